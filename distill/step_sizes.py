"""Quantizers that train: which step sizes move during a distillation, how, and until when.

Steps of matrices below 8 bits are learned (LSQ, Esser et al. 2020), refitted to the weights by least squares, or left
as they were found; static activation ranges are learned, follow the batches (Jacob et al. 2018), or stay. The recipe
says which. 8-bit tables and dynamic activation ranges have nothing to train.

    >>> begin_training(student, recipe)
    >>> [group["params"] for group in step_groups(student, recipe)]
    >>> end_training(student)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.distill.recipe import Recipe
from qbert.layers.kind import TrainableLayer
from qbert.quantizers.activations import ActivationQuantizer

_SMALLEST_SCALE = 1e-8
_MOMENTUM = 0.99  # of moving activation ranges (Jacob et al. 2018, section 3.1)


def quantized_matrices(student: nn.Module) -> list[Any]:
    """The quantized matrices, each weight quantizer once."""
    layers = (m for m in student.modules() if isinstance(m, TrainableLayer) and not isinstance(m, nn.Embedding))
    found = {id(m.weight_quantizer): m for m in layers}
    return list(found.values())


def trained_matrices(student: nn.Module) -> list[Any]:
    """Those whose step sizes training may move: the ones of fewer than 8 bits."""
    return [m for m in quantized_matrices(student) if m.weight_quantizer.bits < 8]


def static_activations(student: nn.Module) -> list[ActivationQuantizer]:
    """The activation quantizers that have a range of their own."""
    found = [m.activation_quantizer for m in student.modules() if isinstance(m, TrainableLayer)]
    return [quantizer for quantizer in found if quantizer is not None and quantizer.mode == "static"]


def begin_training(student: nn.Module, recipe: Recipe) -> None:
    """Make the step sizes trainable that the recipe trains.

    Raises:
        ValueError: the recipe trains activation ranges, and the student has none of its own.
    """
    static = static_activations(student)
    if recipe.activations != "fixed" and not static:
        raise ValueError(
            f"recipe {recipe.name!r} trains activation ranges, but the student finds them at run time; quantize it "
            "with activation_range='static' and calibration_data, or use activations='fixed'"
        )
    for module in trained_matrices(student):
        module.weight_quantizer.learn(recipe.steps == "learned")
    for quantizer in static:
        quantizer.follow(_MOMENTUM if recipe.activations == "average" else None)
        quantizer.learn(recipe.activations == "learned")


def end_training(student: nn.Module) -> None:
    """Nothing moves any more, and learned activation scales are plain buffers again."""
    for module in quantized_matrices(student):
        module.weight_quantizer.learn(False)
    for quantizer in static_activations(student):
        quantizer.follow(None)
        quantizer.learn(False)


def step_groups(student: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One optimizer group for each trained step size: its rate is relative to its size, as steps differ by 100x."""
    found = [m.weight_quantizer.scale for m in trained_matrices(student)]
    found += [q.scale for q in static_activations(student) if isinstance(q.scale, nn.Parameter)]
    trained = [scale for scale in found if scale.requires_grad]
    return [
        {"params": [scale], "weight_decay": 0.0, "lr": recipe.step_rate * float(scale.detach().mean())}
        for scale in trained
    ]


class StepSizeCallback(TrainerCallback):
    """Keeps learned step sizes positive, refits those that follow the weights, and freezes all near the end."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        self.student, self.recipe = student, recipe

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the step sizes once the recipe's share of the training is over."""
        if state.global_step >= self.recipe.freeze_at * state.max_steps:
            for module in trained_matrices(self.student):
                module.weight_quantizer.learn(False)
            for quantizer in static_activations(self.student):
                quantizer.follow(None)
                quantizer.scale.requires_grad_(False)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refit or bound the step sizes after the optimizer's step."""
        if state.global_step >= self.recipe.freeze_at * state.max_steps:
            return
        if self.recipe.activations == "learned":
            for quantizer in static_activations(self.student):
                quantizer.scale.clamp_(min=_SMALLEST_SCALE)
        for module in trained_matrices(self.student):
            if self.recipe.steps == "learned":
                module.weight_quantizer.scale.clamp_(min=_SMALLEST_SCALE)
            elif self.recipe.steps == "refit" and state.global_step % self.recipe.refit_every == 0:
                module.weight_quantizer.refit(module.weight)
