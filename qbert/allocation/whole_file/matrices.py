"""What an option of a matrix changes in it, and what that changes in the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbert.allocation.whole_file.options import Rules
from qbert.bits import TensorSpec
from qbert.calibration import Batch, input_moments
from qbert.encoders.targets import Target
from qbert.encoders.weights import stored
from qbert.layers.quantizer import WeightQuantizer
from qbert.outputs import Call
from qbert.quantizers.groups import group_layout

_GRADIENT_SHARE = 0.9  # as quantize_model weighs the inputs of compensated rounding
_SAMPLES = 8  # whose gradients of a whole matrix are held at once


@torch.no_grad()
def matrix_changes(
    model: nn.Module, batches: Sequence[Batch], rules: Sequence[Rules], progress: bool
) -> dict[nn.Module, list[Tensor | None]]:
    """First module of every matrix -> dW [O, I] of each of its rules, bfloat16; None where it stays as it is."""
    found: dict[nn.Module, list[Tensor | None]] = {}
    known = set(model.modules())
    linear: dict[nn.Module, Rules] = {m: r for r in rules for m in r.modules if type(m) is nn.Linear and m in known}
    pending = {r.first.module: r for r in rules}
    if linear and any(
        s is not None and s.rounding == "compensated" for r in rules for s in map(r.spec, r.matrix_rules)
    ):
        for modules, moment in input_moments(model, batches, list(linear), weigh=_GRADIENT_SHARE, progress=progress):
            rule = linear[modules[0]]
            pending.pop(rule.first.module)
            found[rule.first.module] = _changes(rule, moment.value if moment.inputs else None)
    return found | {module: _changes(rule, None) for module, rule in pending.items()}


def _changes(rules: Rules, moment: Tensor | None) -> list[Tensor | None]:
    weight = rules.first.matrix.detach()
    changes: list[Tensor | None] = []
    for spec in map(rules.spec, rules.matrix_rules):
        if spec is None:
            changes.append(None)
            continue
        rounded = rounded_matrix(rules.first, spec, moment)
        changes.append(stored(rules.first.module, rounded - weight).to(torch.bfloat16))
    return changes


@torch.no_grad()
def rounded_matrix(target: Target, spec: TensorSpec, moment: Tensor | None = None) -> Tensor:
    """A weight [O, I] on the grids of a specification; compensated, if it says so, for a second moment [I, I]."""
    weight = target.matrix.detach()
    quantizer = WeightQuantizer(*group_layout(target, spec), spec).to(weight.device)
    if moment is not None and spec.rounding == "compensated":
        return quantizer.compensate(weight, moment.to(weight.device))
    quantizer.find(weight)
    return quantizer(weight)  # type: ignore[no-any-return]


def slopes(module: nn.Module, calls: Sequence[Call], changes: Sequence[Tensor]) -> list[Tensor]:
    """Change of z^T y of every sample of each call, [B, changes], when the weight of a matrix changes.

    A sample's is the inner product of a change with its own gradient sum_t g_t x_t^T, made once for all changes.
    """
    if isinstance(module, nn.Conv1d):
        moved = [[module._conv_forward(call.input.float(), c.float(), None) for c in changes] for call in calls]
        return [
            torch.stack([(y * call.gradient.float()).flatten(1).sum(1) for y in of_call], 1)
            for call, of_call in zip(calls, moved, strict=True)
        ]
    outputs_first = isinstance(module, nn.Linear)
    flat = torch.stack([c.flatten() for c in changes], 1).float()  # [O I, changes]
    found = []
    for call in calls:
        x, gradient = (
            v.float().flatten(1, -2) if v.dim() > 2 else v.float().unsqueeze(1) for v in (call.input, call.gradient)
        )
        left, right = (gradient, x) if outputs_first else (x, gradient)
        found.append(
            torch.cat(
                [
                    torch.bmm(a.transpose(1, 2), b).flatten(1) @ flat
                    for a, b in zip(left.split(_SAMPLES), right.split(_SAMPLES), strict=True)
                ]
            )
        )
    return found
