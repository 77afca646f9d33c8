"""Quantizers that train: which step sizes move during a distillation, how, and until when.

They stand alone because they know quantizers and optimizers, but no teacher and no loss.

Steps of matrices below 8 bits are learned (LSQ, Esser et al. 2020), refitted to the weights by least squares, or left
as they were found; those of tables below 8 bits are refitted where those of matrices are, and otherwise left. Static
activation ranges are learned, follow the batches (Jacob et al. 2018), or stay. The recipe says which. What has 8 bits,
and dynamic activation ranges, have nothing to train.

    >>> begin_training(student, recipe)                     # before the optimizer is made
    >>> hold_steps(student, recipe)                         # as each stage begins
    >>> [group["params"] for group in step_groups(student, recipe)]
    >>> end_training(student)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.calibration.rows import padding_left_out
from qbert.distill.recipe import Recipe
from qbert.encoders.sharing import uses
from qbert.layers.kind import TrainableLayer
from qbert.layers.recurrent import StepMasks
from qbert.quantizers.activations import ActivationQuantizer

_SMALLEST_SCALE = 1e-8
_MOMENTUM = 0.99  # of moving activation ranges (Jacob et al. 2018, section 3.1)


def quantized_matrices(student: nn.Module) -> list[Any]:
    """The quantized matrices, each weight quantizer once."""
    return list({id(m.weight_quantizer): m for m in _matrices(student)}.values())


def _matrices(student: nn.Module) -> list[Any]:
    return [m for m in student.modules() if isinstance(m, TrainableLayer) and m.is_trainable_matrix]


def trained_matrices(student: nn.Module) -> list[Any]:
    """Those whose step sizes training may move: the ones of fewer than 8 bits."""
    return [m for m in quantized_matrices(student) if m.weight_quantizer.bits < 8]


def refitted_layers(student: nn.Module) -> list[Any]:
    """The quantized matrices and tables of fewer than 8 bits, each weight quantizer once."""
    layers = [m for m in student.modules() if isinstance(m, TrainableLayer)]
    return list({id(m.weight_quantizer): m for m in layers if m.weight_quantizer.bits < 8}.values())


def static_activations(student: nn.Module) -> list[ActivationQuantizer]:
    """The activation quantizers that have a range of their own."""
    return [layer.activation_quantizer for layer in _static_layers(student)]


def _static_layers(student: nn.Module) -> list[Any]:
    layers = [m for m in student.modules() if isinstance(m, TrainableLayer) and m.activation_quantizer is not None]
    return [m for m in layers if m.activation_quantizer is not None and m.activation_quantizer.mode == "static"]


def stage_bits(recipe: Recipe, index: int) -> int | None:
    """The bits that the matrices have in stage `index`; None where no stage has set any yet."""
    found = [stage.bits for stage in recipe.stages[: index + 1] if stage.bits is not None]
    return found[-1] if found else None


def learning_matrices(student: nn.Module, recipe: Recipe) -> list[Any]:
    """Those whose step sizes are learned in some stage of the recipe."""
    if recipe.steps != "learned":
        return []
    goes_down = any(stage.bits is not None and stage.bits < 8 for stage in recipe.stages)
    return quantized_matrices(student) if goes_down else trained_matrices(student)


def begin_training(student: nn.Module, recipe: Recipe) -> None:
    """Make the step sizes trainable that the recipe trains, in whichever stage: the optimizer and the data-parallel
    wrapper take what is trainable at the start. `hold_steps` then stops those whose turn has not come.

    Raises:
        ValueError: the recipe trains activation ranges, and the student has none of its own.
    """
    static = static_activations(student)
    if recipe.activations != "fixed" and not static:
        raise ValueError(
            f"recipe {recipe.name!r} trains activation ranges, but the student finds them at run time; quantize it "
            "with activation_range='static' and calibration_data, or use activations='fixed'"
        )
    counts = uses(student)
    for module in _matrices(student):
        module.weight_quantizer.uses = counts.get(module, 1)
    for module in trained_matrices(student):
        module.weight_quantizer.learn(False)
    for module in learning_matrices(student, recipe):
        module.weight_quantizer.learn()
    for quantizer in static:
        quantizer.follow(_MOMENTUM if recipe.activations == "average" else None)
        learned = recipe.activations == "learned"
        if learned != isinstance(quantizer.scale, nn.Parameter):
            quantizer.learn(learned)
        quantizer.scale.requires_grad_(learned)


def hold_steps(student: nn.Module, recipe: Recipe) -> None:
    """Let the step sizes learn that are of fewer than 8 bits now, and hold the others."""
    for module in learning_matrices(student, recipe):
        module.weight_quantizer.learn(module.weight_quantizer.bits < 8)


def end_training(student: nn.Module) -> None:
    """Nothing moves any more, and learned activation scales are plain buffers again."""
    for module in quantized_matrices(student):
        module.weight_quantizer.learn(False)
    for quantizer in static_activations(student):
        quantizer.follow(None)
        quantizer.learn(False)


def change_bits(student: nn.Module, bits: Mapping[int, int]) -> list[nn.Parameter]:
    """Go over to other bits; 8-bit embeddings and activations stay as they are.

    Args:
        bits: {id of a weight quantizer: its bits}. One that has them already keeps its grid.

    Returns:
        The scales that belong to a new grid.
    """
    renewed = []
    for module in _matrices(student):
        quantizer = module.weight_quantizer
        if quantizer.bits != bits[id(quantizer)]:
            quantizer.change_bits(bits[id(quantizer)], module.matrix.detach())
            renewed.append(quantizer.scale)
        module.spec = quantizer.spec
    return renewed


def step_groups(student: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One optimizer group for each trained step size: its rate is relative to its size, as steps differ by 100x."""
    found = [m.weight_quantizer.scale for m in learning_matrices(student, recipe)]
    found += [q.scale for q in static_activations(student) if isinstance(q.scale, nn.Parameter)]
    return [{"params": [scale], "weight_decay": 0.0, "lr": _rate(scale, recipe)} for scale in found]


def renew_groups(optimizer: Any, scheduler: Any, scales: list[nn.Parameter], recipe: Recipe) -> None:
    """Rates for the scales of new grids, and no memory of the steps that the old ones took."""
    renewed = {id(scale) for scale in scales}
    for number, group in enumerate(optimizer.param_groups):
        scale = group["params"][0]
        if id(scale) not in renewed:
            continue
        base = group.get("initial_lr", group["lr"])
        rate = _rate(scale, recipe)
        group["lr"] = rate * group["lr"] / base if base > 0 else rate
        group["initial_lr"] = rate
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs[number] = rate
        optimizer.state.pop(scale, None)


def _rate(scale: nn.Parameter, recipe: Recipe) -> float:
    return recipe.step_rate * float(scale.detach().mean())


class StepSizeCallback(TrainerCallback):
    """Keeps learned step sizes positive, refits those that follow the weights, and freezes all near the end."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        self.student, self.recipe = student, recipe
        self._put_on: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let moving ranges leave out the padding, as calibration does, until `close`."""
        if self.recipe.activations != "average":
            return
        masks = StepMasks(self.student)

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            masks.mask = kwargs.get("attention_mask")

        hook = self.student.register_forward_pre_hook(note, with_kwargs=True)
        self._put_on += [masks.close, hook.remove]
        for layer in _static_layers(self.student):
            layer.activation_quantizer.follow(_MOMENTUM, lambda x, layer=layer: padding_left_out(layer, masks, x)(x))

    def close(self) -> None:
        """Take off the student what `on_train_begin` put on it."""
        while self._put_on:
            self._put_on.pop()()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the step sizes once the recipe's share of the training is over."""
        if self._is_frozen(state):
            for module in quantized_matrices(self.student):
                module.weight_quantizer.learn(False)
            for quantizer in static_activations(self.student):
                quantizer.follow(None)
                quantizer.scale.requires_grad_(False)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Bound or refit the step sizes after the optimizer's step."""
        if self.recipe.activations == "learned":
            for quantizer in static_activations(self.student):
                quantizer.scale.clamp_(min=_SMALLEST_SCALE)
        for module in learning_matrices(self.student, self.recipe):
            module.weight_quantizer.scale.clamp_(min=_SMALLEST_SCALE)
        due = self.recipe.steps == "refit" and state.global_step % self.recipe.refit_every == 0
        if due and not self._is_frozen(state):
            for module in refitted_layers(self.student):
                module.weight_quantizer.refit(module.matrix)

    def _is_frozen(self, state: TrainerState) -> bool:
        return state.global_step >= self.recipe.freeze_at * state.max_steps
