"""What an option of a matrix changes in it, and what that changes in the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbert.allocation.whole_file.options import Change, Rules
from qbert.bits import TensorSpec
from qbert.calibration import Batch, Moment, input_moments
from qbert.encoders.targets import Target
from qbert.encoders.weights import as_matrix, stored
from qbert.layers.quantizer import WeightQuantizer
from qbert.outputs import Call
from qbert.quantizers.groups import group_layout
from qbert.quantizers.rounding import bias_change

_GRADIENT_SHARE = 0.9  # as quantize_model weighs the inputs of compensated rounding
_SAMPLES = 8  # whose gradients of a whole matrix are held at once


@torch.no_grad()
def matrix_changes(
    model: nn.Module, batches: Sequence[Batch], rules: Sequence[Rules], progress: bool
) -> dict[nn.Module, list[Change | None]]:
    """First module of every matrix -> what each of its rules changes, as `quantize_model` does it; None for nothing."""
    found: dict[nn.Module, list[Change | None]] = {}
    known = set(model.modules())
    called: dict[nn.Module, Rules] = {m: r for r in rules for m in r.modules if m in known}
    pending = {r.first.module: r for r in rules}
    if called and any(
        s is not None and s.rounding == "compensated" for r in rules for s in map(r.spec, r.matrix_rules)
    ):
        for modules, moment in input_moments(model, batches, list(called), weigh=_GRADIENT_SHARE, progress=progress):
            rule = called[modules[0]]
            pending.pop(rule.first.module)
            found[rule.first.module] = _changes(rule, moment if moment.inputs else None)
    return found | {module: _changes(rule, None) for module, rule in pending.items()}


def _changes(rules: Rules, moment: Moment | None) -> list[Change | None]:
    module, weight = rules.first.module, rules.first.matrix.detach()
    has_bias = len(rules.modules) == 1 and getattr(module, "bias", None) is not None
    changes: list[Change | None] = []
    for spec in map(rules.spec, rules.matrix_rules):
        if spec is None:
            changes.append(None)
        elif moment is None or not has_bias or spec.rounding != "compensated":
            rounded = rounded_matrix(rules.first, spec, None if moment is None else moment.value)
            changes.append(Change(stored(module, rounded - weight).to(torch.bfloat16)))
        else:
            rounded = rounded_matrix(rules.first, spec, moment.covariance)
            change = stored(module, rounded - weight).to(torch.bfloat16)
            # Of the change as it is kept, so that the mean of what it does to the outputs is nothing.
            changes.append(Change(change, bias_change(-as_matrix(module, change).double(), moment.mean).float()))
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


def slopes(module: nn.Module, calls: Sequence[Call], changes: Sequence[Change]) -> list[Tensor]:
    """Change of z^T y of every sample of each call, [B, changes], when the weight of a matrix changes, and its bias.

    A sample's is the inner product of a change with its own gradient sum_t g_t x_t^T, made once for all changes, and
    that of the bias's with sum_t g_t.
    """
    found = _weight_slopes(module, calls, [change.weight for change in changes])
    if all(change.bias is None for change in changes):
        return found
    none = calls[0].gradient.new_zeros(calls[0].gradient.shape[1 if isinstance(module, nn.Conv1d) else -1])
    biases = torch.stack([none if c.bias is None else c.bias.to(none.device) for c in changes], 1).float()  # [O, n]
    for of_call, call in zip(found, calls, strict=True):
        gradient = call.gradient.float()
        if isinstance(module, nn.Conv1d):  # [B, O, L]
            gradient = gradient.transpose(1, 2)
        of_call += (gradient.flatten(1, -2).sum(1) if gradient.dim() > 2 else gradient) @ biases
    return found


def _weight_slopes(module: nn.Module, calls: Sequence[Call], changes: Sequence[Tensor]) -> list[Tensor]:
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
