r"""Zeros in training: those of a pruned student stay, and movement pruning finds new ones on the way.

`KeepZeros` holds the pattern that the student's config tells. `Movement` (Sanh et al. 2020, section 4) scores each
weight by how training moves it,

.. math:: S = - \sum_t \frac{\partial L}{\partial w}\, w,

so that weights on their way to zero go first; the share of zeros rises by the cubic schedule of Zhu and Gupta 2017.
Weights that are out keep their value aside and may come back; the gradient of the loss is taken at the pruned weights.

    >>> Recipe(..., zeros=Zeros("2:4"))       # what `Distiller` makes a `Movement` of
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.bits import covers
from qbert.distill.recipe import Zeros
from qbert.encoders.targets import base_model, encoder_layers, join_path
from qbert.encoders.weights import as_matrix, matrix_size
from qbert.encoders.zeros import note_zeros, noted_zeros
from qbert.files import check_tensors, write_tensors
from qbert.quantizers.sparsity import Pattern

STATE = "movement.safetensors"
_PARTS = ("dense", "score", "out")


def _matrix(module: nn.Module) -> Tensor:
    return as_matrix(module, module.weight)  # type: ignore[arg-type]


class KeepZeros(TrainerCallback):
    """The zeros that the config of a student notes are zeros again after every step."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self._masks: list[tuple[nn.Module, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Which weights are out: of each pattern the smallest, so that zeros of a low-bit grid may move."""
        prefix, _ = base_model(self.student)
        self._masks = []
        for name, pattern in noted_zeros(self.student).items():
            module = self.student.get_submodule(join_path(prefix, name))
            self._masks.append((module, Pattern.parse(pattern).mask(_matrix(module).detach().abs())))
        self._hold()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the zeros back."""
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        for module, mask in self._masks:
            _matrix(module).masked_fill_(mask, 0)


class _Moved:
    """One matrix under movement pruning."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.dense = _matrix(module).detach().clone()  # with the values of weights that are out
        self.score = torch.zeros_like(self.dense)
        self.out = torch.zeros_like(self.dense, dtype=torch.bool)

    @torch.no_grad()
    def before_step(self) -> None:
        """Score by the gradient at the pruned weights; the optimizer then steps from the values kept aside."""
        gradient = self.module.weight.grad
        if isinstance(gradient, Tensor):
            gradient = as_matrix(self.module, gradient)
            self.score -= gradient * self.dense
            gradient.masked_fill_(self.out, 0)
        _matrix(self.module).copy_(self.dense)

    @torch.no_grad()
    def after_step(self, pattern: Pattern | None) -> None:
        """Keep the new values aside, and show those that are in under `pattern` (the present choice where None)."""
        self.dense.copy_(_matrix(self.module))
        if pattern is not None:
            self.out = pattern.mask(self.score)
        _matrix(self.module).masked_fill_(self.out, 0)


class Movement(TrainerCallback):
    """Movement pruning of a student's matrices during its training.

    Args:
        student: float, or fake-quantized on grids that have a zero.
        zeros: pattern, schedule, and which matrices.

    Raises:
        ValueError: a pattern that does not fit, or names that match no matrix of the layers.
    """

    def __init__(self, student: nn.Module, zeros: Zeros) -> None:
        self.student, self.zeros, self.pattern = student, zeros, Pattern.parse(zeros.pattern)
        self._moved: list[_Moved] = []
        self._kept: dict[str, Tensor] = {}  # of the checkpoint that the next training goes on from
        found = self._matrices()
        if not found:
            raise ValueError(f"zeros: {zeros.names!r} matches no matrix of the student's layers")
        for name, module in found.items():
            self.pattern.check(name, _matrix(module).shape[1])

    def share_at(self, step: int, steps: int) -> float:
        """The share of zeros after a step (from 0) of all steps."""
        begin, end = self.zeros.begin * steps, self.zeros.end * steps
        if step < begin:
            return 0.0
        done = min((step - begin) / max(end - begin, 1.0), 1.0)
        return self.pattern.share * (1.0 - (1.0 - done) ** 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the present weights, or go on from those of the checkpoint that was taken up."""
        self._moved = [_Moved(name, module) for name, module in self._matrices().items()]
        kept, self._kept = self._kept, {}
        for moved in self._moved if kept else ():
            for part in _PARTS:
                getattr(moved, part).copy_(kept[f"{moved.name}.{part}"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score."""
        for moved in self._moved:
            moved.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune anew while the share rises; afterwards the choice stays."""
        step, steps = state.global_step + 1, state.max_steps
        share = self.share_at(step, steps)
        rising = share > 0 and self.share_at(step - 1, steps) < self.pattern.share
        present = (self.pattern if self.pattern.of else Pattern(share=share)) if rising else None
        for moved in self._moved:
            moved.after_step(present)

    def save(self, checkpoint: Path) -> None:
        """Write scores and the values kept aside into the folder of a checkpoint, which is not sealed yet."""
        tensors = {f"{m.name}.{part}": getattr(m, part).contiguous() for m in self._moved for part in _PARTS}
        write_tensors(checkpoint / STATE, tensors)

    def take_up(self, checkpoint: Path) -> None:
        """Begin the next training with what `save` wrote.

        Raises:
            ValueError: the file is not there, damaged, or of other matrices.
        """
        file = checkpoint / STATE
        if not file.is_file():
            raise ValueError(f"{file} with the scores of the weights is not there; resume from another checkpoint")
        check_tensors(file)
        self._kept = load_file(file)
        missing = next((name for name in self._matrices() if f"{name}.{_PARTS[0]}" not in self._kept), None)
        if missing is not None:
            raise ValueError(f"{file} has no scores of {missing}; resume with the recipe that the training began with")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the zeros, so that they stay in what comes next."""
        if self.share_at(state.global_step, state.max_steps) == self.pattern.share:
            note_zeros(self.student, noted_zeros(self.student) | {m.name: self.zeros.pattern for m in self._moved})

    def _matrices(self) -> dict[str, nn.Module]:
        """The matrices of the layers that `zeros` names, trainable twins included, by name relative to the base."""
        wanted = [self.zeros.names] if isinstance(self.zeros.names, str) else list(self.zeros.names)
        found = {}
        for stem, layer in encoder_layers(self.student):
            for path, module in layer.named_modules():
                name = join_path(stem, path)
                if matrix_size(module) and any(pattern == "*" or covers(pattern, [name]) for pattern in wanted):
                    found[name] = module
        return found
