r"""Ranges of weight groups: where the grid of each group begins and ends.

``minmax`` covers every weight, ``percentile`` all but a share of the outliers, ``mse`` minimises

.. math:: \sum_{w \in group} (w - \hat w)^2

over shrunken ranges, followed by exact least-squares steps of the scale (the codes fixed). Groups are runs of rows
crossed with equal runs of input columns and need not be of equal size; every method works on all groups at once.

References: Shen et al. 2020, section 3.3 (min-max groups); Banner et al. 2019 and Nagel et al. 2021, section 3.1
(mean squared error ranges).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qbert.bits import RangeMethod, Scheme
from qbert.quantizers.grid import code_range

_SHRINK_STEPS = 40
_REFINE_STEPS = 4
_FINEST = 2.0**-16
SMALLEST_SCALE = 1e-12


class GroupRanges(NamedTuple):
    """Grids of all groups of a tensor."""

    scale: Tensor  # [G, K] float32, > 0
    zero: Tensor  # [G, K] float32; integer for asymmetric, 0 for symmetric, -1/2 for midrise, any for offset


def find_ranges(
    weight: Tensor,
    row_group: Tensor,
    *,
    bits: int,
    input_groups: int = 1,
    scheme: Scheme = "asymmetric",
    method: RangeMethod = "mse",
    percentile: float = 99.9,
) -> GroupRanges:
    """Scale and zero point of every group of a weight matrix.

    Args:
        weight: [O, I] float.
        row_group: [O] int64, the row group of each row, values 0 .. G-1, non-decreasing.
        bits: 2, 3, 4 or 8.
        input_groups: number K of equal runs of input columns.
        scheme, method, percentile: as in `TensorSpec`.

    Returns:
        `GroupRanges` with scale and zero [G, K] in float32, on the device of `weight`.

    Raises:
        RuntimeError: if `input_groups` does not divide the columns.
    """
    blocks = weight.detach().float().unflatten(1, (input_groups, -1))  # [O, K, I/K]
    low, high = _extent(blocks, row_group, method, percentile)
    if method != "mse":
        return GroupRanges(*covering_grid(low, high, bits, scheme))
    return _least_squares(blocks, row_group, low, high, bits, scheme)


def _extent(blocks: Tensor, row_group: Tensor, method: RangeMethod, percentile: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight [G, K] of each group, without outliers if asked for."""
    if method == "percentile":
        return _percentile_extent(blocks, row_group, percentile)
    return reduce_rows(blocks.amin(-1), row_group, "amin"), reduce_rows(blocks.amax(-1), row_group, "amax")


def extent(weight: Tensor, row_group: Tensor, input_groups: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight, both [G, K], of every group of a matrix [O, I]."""
    return _extent(weight.detach().float().unflatten(1, (input_groups, -1)), row_group, "minmax", 100.0)


def _percentile_extent(blocks: Tensor, row_group: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    sizes = torch.bincount(row_group)
    starts = torch.cumsum(sizes, 0) - sizes
    low = blocks.new_empty(len(sizes), blocks.shape[1])
    high = torch.empty_like(low)
    for group, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        values = blocks[start : start + size].transpose(0, 1).flatten(1)  # [K, size * I/K]
        count = values.shape[1]
        # Order statistics rather than interpolated quantiles, so that 100 % is exactly min-max.
        drop = int((count - 1) * (100.0 - percentile) / 200.0)
        low[group] = values.kthvalue(drop + 1, dim=1).values
        high[group] = values.kthvalue(count - drop, dim=1).values
    return low, high


def covering_grid(low: Tensor, high: Tensor, bits: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid that covers [low, high] (widened to hold 0, but for ``offset``)."""
    qmin, qmax = code_range(bits, scheme)
    if scheme == "offset":
        # A zero point far from the codes would leave them no digits in float32.
        least = torch.maximum(low.abs(), high.abs()) * _FINEST
        scale = torch.maximum((high - low) / (qmax - qmin), least).clamp_min(SMALLEST_SCALE)
        return scale, qmin - low / scale
    if scheme == "asymmetric":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = ((high - low) / (qmax - qmin)).clamp_min(SMALLEST_SCALE)
        return scale, torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
    largest = torch.maximum(low.abs(), high.abs())
    zero = torch.full_like(largest, -0.5 if scheme == "midrise" else 0.0)
    return (largest / (qmax - zero)).clamp_min(SMALLEST_SCALE), zero


def shrunk(low: Tensor, high: Tensor, share: float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """A share of the range: towards 0, which every grid but ``offset`` keeps near its middle; there, to its middle."""
    if scheme != "offset":
        return low * share, high * share
    middle, half = (low + high) / 2, (high - low) / 2 * share
    return middle - half, middle + half


def _least_squares(
    blocks: Tensor,
    row_group: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    scheme: Scheme,
) -> GroupRanges:
    best_scale, best_zero = covering_grid(low, high, bits, scheme)
    best_error = _group_error(blocks, row_group, best_scale, best_zero, bits, scheme)
    start_low, start_high = low, high

    def keep(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_scale, best_zero, best_error
        error = _group_error(blocks, row_group, scale, zero, bits, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)

    for step in range(1, _SHRINK_STEPS):
        share = 1.0 - step / _SHRINK_STEPS
        keep(*covering_grid(*shrunk(start_low, start_high, share, scheme), bits, scheme))
    for _ in range(_REFINE_STEPS):
        if scheme == "offset":
            keep(*_refit_line(blocks, row_group, best_scale, best_zero, bits))
            continue
        keep(refit_scale(blocks, row_group, best_scale, best_zero, bits, scheme), best_zero)
        if scheme == "asymmetric":
            qmin, qmax = code_range(bits, scheme)
            keep(best_scale, (best_zero - 1).clamp(qmin, qmax))
            keep(best_scale, (best_zero + 1).clamp(qmin, qmax))
    return GroupRanges(best_scale, best_zero)


def _codes(blocks: Tensor, row_group: Tensor, scale: Tensor, zero: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """Centred codes q - z [O, K, I/K] in float."""
    qmin, qmax = code_range(bits, scheme)
    row_scale, row_zero = scale[row_group].unsqueeze(-1), zero[row_group].unsqueeze(-1)
    centred = torch.div(blocks, row_scale).add_(row_zero).round_().clamp_(qmin, qmax)
    return centred.sub_(row_zero)


def _group_error(
    blocks: Tensor,
    row_group: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    scheme: Scheme,
) -> Tensor:
    """Squared error [G, K] of each group under a grid."""
    difference = _codes(blocks, row_group, scale, zero, bits, scheme)
    difference.mul_(scale[row_group].unsqueeze(-1)).sub_(blocks).square_()
    return reduce_rows(difference.sum(-1), row_group, "sum")


def refit_scale(
    blocks: Tensor,
    row_group: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    scheme: Scheme,
) -> Tensor:
    """The scale [G, K] of least squared error for the codes that a grid gives: <w, q - z> / <q - z, q - z>.

    Args:
        blocks: [O, K, I/K] float32 weights.
        row_group: [O] int64.
        scale, zero: [G, K], the present grid.
    """
    centred = _codes(blocks, row_group, scale, zero, bits, scheme)
    inner = reduce_rows((centred * blocks).sum(-1), row_group, "sum")
    norm = reduce_rows(centred.square().sum(-1), row_group, "sum")
    return torch.where(norm > 0, inner / norm.clamp_min(1e-30), scale).clamp_min(SMALLEST_SCALE)


def _refit_line(blocks: Tensor, row_group: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and real-valued zero [G, K] of least squared error for the codes of a grid: the regression line."""
    centred = _codes(blocks, row_group, scale, zero, bits, "offset")
    count = reduce_rows(torch.full_like(centred[..., 0], centred.shape[-1]), row_group, "sum")
    mean, level = (reduce_rows(x.sum(-1), row_group, "sum") / count for x in (centred, blocks))
    deviation = centred - mean[row_group].unsqueeze(-1)
    inner = reduce_rows((deviation * blocks).sum(-1), row_group, "sum")
    norm = reduce_rows(deviation.square().sum(-1), row_group, "sum")
    slope = torch.where((norm > 0) & (inner > 0), inner / norm.clamp_min(1e-30), scale).clamp_min(SMALLEST_SCALE)
    slope = torch.maximum(slope, level.abs() * _FINEST)
    return slope, zero - (level - slope * mean) / slope


def reduce_rows(values: Tensor, row_group: Tensor, how: str) -> Tensor:
    """Reduce [O, K] over the rows of each group to [G, K]."""
    groups = int(row_group[-1]) + 1
    if groups == values.shape[0]:
        return values
    index = row_group.unsqueeze(1).expand_as(values)
    result = values.new_zeros(groups, values.shape[1])
    return result.scatter_reduce(0, index, values, reduce=how, include_self=False)
