"""`WeightQuantizer`: the grids of one weight tensor, and its fake-quantized values with a straight-through gradient.

It stands beside the float weight in every trainable quantized layer, so that optimizers, tied weights and checkpoints
see an ordinary model.

Reference: Shen et al. 2020, sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import TensorSpec
from qbert.quantizers.grid import code_range, dequantize, fake_quantize, least_scale, quantize, scale_gradient
from qbert.quantizers.ranges import SMALLEST_SCALE, GroupRanges, find_ranges, refit_scale
from qbert.quantizers.rounding import Rounded, round_compensated


def note_grid(state: Any, prefix: str, grid: list[Any]) -> None:
    """Write into the metadata of a state dict on what grid the tensors under `prefix` lie.

    Bits, scheme and kind of activation range are no tensors, so that a state dict of another grid would fit.
    """
    if hasattr(state, "_metadata"):
        state._metadata.setdefault(prefix[:-1], {})["grid"] = grid


def check_grid(prefix: str, metadata: Mapping[str, Any], grid: list[Any], errors: list[str]) -> None:
    """Add a sentence to `errors` if a state dict was made on another grid; one without metadata cannot be checked."""
    found = metadata.get("grid")
    if found is not None and list(found) != grid:
        errors.append(
            f"{prefix[:-1]}: the state dict holds values for {_told(found)}, the layer computes with {_told(grid)}; "
            "quantize the model with the same configuration, or load a model that was saved with from_pretrained"
        )


def _told(grid: Sequence[Any]) -> str:
    names = ("bits", "scheme", "activation bits", "activation range")
    return ", ".join(f"{name} {value}" for name, value in zip(names, grid, strict=False))


class WeightQuantizer(nn.Module):
    """Grids of all groups of one weight tensor [O, I].

    Args:
        row_group: [O] int64, the row group of each row.
        input_groups: number K of runs of input columns with a range each.
        spec: bits, scheme and range method.

    Attributes:
        scale, zero: [G, K] float32 parameters, also in a half-precision model; the scale is trained after
            `learn(True)`, with LSQ's gradient factor.
        row_group: [O] int64 buffer.
        uses: how often the weight is applied in one pass; the gradients of its scale then are a mean over those uses.
    """

    row_group: Tensor
    uses: int = 1

    def __init__(self, row_group: Tensor, input_groups: int, spec: TensorSpec) -> None:
        super().__init__()
        self.spec, self.bits, self.input_groups = spec, spec.bits, input_groups
        self.qmin, self.qmax = code_range(spec.bits, spec.scheme)
        groups = int(row_group[-1]) + 1
        self.register_buffer("row_group", row_group)
        # Whatever torch's default dtype and device are.
        zeros = torch.zeros(groups, input_groups, dtype=torch.float32, device=row_group.device)
        self.scale = nn.Parameter(torch.ones_like(zeros), requires_grad=False)
        self.zero = nn.Parameter(zeros, requires_grad=False)

    @torch.no_grad()
    def find(self, weight: Tensor) -> None:
        """Set scale and zero from the weights [O, I] by the specification's range method."""
        self.take(self.ranges_of(weight), weight.dtype)

    def ranges_of(self, weight: Tensor) -> GroupRanges:
        """The grids of weights [O, I] by the specification's range method."""
        return find_ranges(
            weight,
            self.row_group,
            bits=self.bits,
            input_groups=self.input_groups,
            scheme=self.spec.scheme,
            method=self.spec.range_method,
            percentile=self.spec.percentile,
        )

    @torch.no_grad()
    def take(self, ranges: GroupRanges, dtype: torch.dtype) -> None:
        """Set scale and zero [G, K]; scales are at least what weights of `dtype` can be divided by."""
        self.scale.copy_(ranges.scale.clamp_min(least_scale(dtype, SMALLEST_SCALE)))
        self.zero.copy_(ranges.zero)

    @torch.no_grad()
    def compensate(self, weight: Tensor, moment: Tensor) -> Tensor:
        """Set the grids by compensated rounding of the weights [O, I] for inputs with a second moment [I, I].

        Args:
            moment: [I, I], or [g, I, I] where each of g equal runs of rows has inputs of its own.

        Returns:
            The rounded weights in the dtype of `weight`, which lie on the grids: rounded to nearest they stay the same.

        Raises:
            ValueError: as `round_compensated`.
        """
        ranges = self.ranges_of(weight)
        if moment.dim() == 2:
            parts = [self._compensated(weight, moment, self.row_group, ranges, self.spec.refits)]
        else:
            runs = self.row_group.view(len(moment), -1)
            whole = bool((runs[1:, 0] > runs[:-1, -1]).all())  # else a range in two runs, for whose codes it must stay
            parts = []
            for own, rows, index in zip(moment, weight.view(len(moment), -1, weight.shape[1]), runs, strict=True):
                first, last = int(index[0]), int(index[-1]) + 1
                given = GroupRanges(ranges.scale[first:last], ranges.zero[first:last])
                parts.append(self._compensated(rows, own, index - first, given, self.spec.refits if whole else 0))
            if not whole:
                parts = [p._replace(scale=ranges.scale[:0], zero=ranges.zero[:0]) for p in parts]
                parts.append(parts[0]._replace(codes=parts[0].codes[:0], scale=ranges.scale, zero=ranges.zero))
        codes, scale, zero = (torch.cat([p[i] for p in parts]) for i in range(3))
        self.take(GroupRanges(scale, zero), weight.dtype)
        blocks, scale, zero = self._blocks(codes, None, weight.dtype)
        return dequantize(blocks, scale, zero).flatten(-2).to(weight.dtype)

    def _compensated(
        self, weight: Tensor, moment: Tensor, row_group: Tensor, ranges: GroupRanges, refits: int
    ) -> Rounded:
        return round_compensated(
            weight,
            moment,
            row_group,
            ranges,
            bits=self.bits,
            scheme=self.spec.scheme,
            damping=self.spec.damping,
            by_activity=self.spec.column_order == "activity",
            refits=refits,
        )

    def forward(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Fake-quantized weight, same shape and dtype.

        Args:
            weight: [O, I], or gathered rows [..., I] of it.
            rows: indices [...] of the gathered rows; ``None`` means all rows in order.
        """
        blocks, scale, zero = self._blocks(weight, rows)
        if scale.requires_grad:
            scale = scale_gradient(scale, self.gradient_factor(weight))
        return fake_quantize(blocks, scale, zero, self.qmin, self.qmax).flatten(-2)

    @torch.no_grad()
    def refit(self, weight: Tensor) -> None:
        """Set the scale to the least-squares one for the present codes of the weights [O, I]; zero stays."""
        blocks = weight.detach().float().unflatten(-1, (self.input_groups, -1))
        scale = refit_scale(blocks, self.row_group, self.scale, self.zero, self.bits, self.spec.scheme)
        self.scale.copy_(scale.clamp_min(least_scale(weight.dtype, SMALLEST_SCALE)))

    def learn(self, enabled: bool = True) -> None:
        """Let the optimizer train the scale (LSQ), or stop it."""
        self.scale.requires_grad_(enabled)

    @torch.no_grad()
    def change_bits(self, bits: int, weight: Tensor) -> None:
        """Go over to another number of bits: a new code range, and a new grid found from the weights [O, I].

        Codes that were compensated for the inputs of calibration data stay where the bits do; for others, which nobody
        has seen data for, the weights are rounded to nearest.
        """
        if bits == self.bits and self.spec.rounding == "compensated":
            return
        self.spec = replace(self.spec, bits=bits, rounding="nearest")
        self.bits = bits
        self.qmin, self.qmax = code_range(bits, self.spec.scheme)
        self.find(weight)

    def gradient_factor(self, weight: Tensor) -> float:
        """LSQ's 1 / sqrt(N q_max) for groups of N weights on average (Esser et al. 2020, section 2.2), by the uses."""
        per_group = self.row_group.numel() * weight.shape[-1] / self.scale.numel()
        return float((per_group * max(self.qmax, 1)) ** -0.5) / self.uses

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """int8 codes [O, I], two's complement of ``bits`` bits."""
        blocks, scale, zero = self._blocks(weight, None)
        return quantize(blocks, scale, zero, self.qmin, self.qmax).flatten(-2)

    def _blocks(
        self, weight: Tensor, rows: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weight [..., K, I/K], scale and zero [..., K, 1] in float32, or float64 for weights of that dtype)."""
        if rows is None and len(weight) != len(self.row_group):
            raise ValueError(self.resized(len(weight)))
        group = self.row_group if rows is None else self.row_group[rows]
        # Half-precision grids would put weights elsewhere, and packed layers store float32 ones.
        work = torch.promote_types(dtype or weight.dtype, torch.float32)
        scale, zero = (grid[group].unsqueeze(-1).to(work) for grid in (self.scale, self.zero))
        if self.scale.dtype == torch.float16:  # as a file of halves gives it, the scale of a row of zeros is 0
            scale = scale.clamp_min(SMALLEST_SCALE)
        return weight.unflatten(-1, (self.input_groups, -1)), scale, zero

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightQuantizer:
        """Move, but keep grids in float32 where the model is made half: a zero point may be beyond its numbers."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrowed else moved

        super()._apply(kept, recurse)
        return self

    def resized(self, rows: int) -> str:
        """A sentence for a weight that has `rows` rows and not those that the grids were made for."""
        return (
            f"weight: it has {rows} rows, its grids were made for {len(self.row_group)}; resize the float model "
            "(resize_token_embeddings) and call quantize_model on that"
        )

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        groups, input_groups = self.scale.shape
        return f"bits={self.bits}, groups={groups}x{input_groups}, {self.spec.scheme}, {self.spec.range_method}"
