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
_CACHED_VALUES = 1 << 20  # float32 values that are searched together on CPUs: 4 MB
_VALUES_A_LEVEL = 128  # from as many weights a group and level on, running sums are cheaper than passes over them
_ROUNDING = 1e-3  # more than float32 sums and codes of up to 8 bits can be off, as a share of the squared error
_SMALLEST_ERROR = 1e-30  # below, float32 squares lose their digits
_LARGEST_SCALE = 1e12  # beyond, float32 sums of squares may overflow
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
    """The best grid [G, K] of the shrunken ranges, refined.

    Groups do not depend on each other: on CPUs they are searched a few at a time, so that codes stay in the cache.
    """
    shares = [1.0 - step / _SHRINK_STEPS for step in range(_SHRINK_STEPS)]
    grids = [covering_grid(*shrunk(low, high, share, scheme), bits, scheme) for share in shares]
    scales, zeros = torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])
    sizes = torch.bincount(row_group).tolist()
    most = _CACHED_VALUES // blocks[0].numel() if blocks.device.type == "cpu" else len(blocks)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    row = first = 0
    while first < len(sizes):
        rows, last = sizes[first], first + 1
        while last < len(sizes) and rows + sizes[last] <= most:
            rows, last = rows + sizes[last], last + 1
        part = _Part(blocks[row : row + rows], row_group[row : row + rows] - first, bits, scheme)
        found = _Search(part, scales[:, first:last], zeros[:, first:last])
        best_scale[first:last], best_zero[first:last] = found.scale, found.zero
        row, first = row + rows, last
    return GroupRanges(best_scale, best_zero)


class _Part(NamedTuple):
    """Rows [R, K, I/K] of whole groups, `row_group` [R] from 0 up."""

    blocks: Tensor
    row_group: Tensor
    bits: int
    scheme: Scheme

    def only(self, groups: Tensor) -> _Part:
        """The groups of a mask [G], numbered anew."""
        if bool(groups.all()):
            return self
        rows = groups[self.row_group]
        numbers = groups.cumsum(0) - 1
        return self._replace(blocks=self.blocks[rows], row_group=numbers[self.row_group[rows]])

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Squared error [G, K] under a grid [G, K]."""
        return _group_error(_codes(*self[:2], scale, zero, *self[2:]), self.blocks, self.row_group, scale)

    def error_and_fit(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """`error`, and the scale [G, K] of least squared error for the codes of the grid."""
        codes = _codes(*self[:2], scale, zero, *self[2:])
        fitted = _fitted(codes, self.blocks, self.row_group, scale)
        return _group_error(codes, self.blocks, self.row_group, scale), fitted


class _Search:
    """The search over grids for the groups of one part, which tries a grid only where no bound rules it out.

    Args:
        part: the weights.
        scales, zeros: [S, G, K], grids from the widest to the narrowest range.

    Attributes:
        scale, zero, error: [G, K], the best grid and its squared error.
    """

    def __init__(self, part: _Part, scales: Tensor, zeros: Tensor) -> None:
        self.part = part
        self.scale, self.zero = scales[0].clone(), zeros[0].clone()
        per_group = len(part.blocks) * part.blocks.shape[-1] / len(self.scale)
        by_sums = part.scheme != "offset" and float(scales.max()) < _LARGEST_SCALE
        many = by_sums and per_group >= _VALUES_A_LEVEL << part.bits
        self.sums = _Sums(part) if many else None
        if self.sums is None:
            self._shrink(scales, zeros)
        else:
            self._shrink_by_sums(self.sums, scales, zeros)
        self._refine()

    def _keep(self, groups: Tensor, error: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Keep a grid [g, K] of some groups (indices [g]) where its error is less, and say where."""
        better = error < self.error[groups]
        for kept, new in ((self.error, error), (self.scale, scale), (self.zero, zero)):
            kept[groups] = torch.where(better, new, kept[groups])
        return better

    def _shrink(self, scales: Tensor, zeros: Tensor) -> None:
        """The best of the shrunken ranges, group by group given up where narrower ones cannot be better.

        Weights inside a range lose at most half a step each. What a range loses beyond that, it loses by cutting, and
        every narrower range around the same zero point cuts at least as much.
        """
        counts = torch.bincount(self.part.row_group).double().unsqueeze(-1) * self.part.blocks.shape[-1]
        nested = (zeros == zeros[0]).all(0)
        groups, part = torch.arange(len(self.scale), device=scales.device), self.part
        self.error = part.error(self.scale, self.zero)
        for scale, zero in zip(scales, zeros, strict=True):
            error = part.error(scale[groups], zero[groups])
            self._keep(groups, error, scale[groups], zero[groups])
            inside = counts[groups] * scale[groups].double().square() / 4
            cut = (1 - _ROUNDING) * error.double() - (1 + _ROUNDING) * inside
            going_on = ~((cut > self.error[groups].clamp_min(_SMALLEST_ERROR)) & nested[groups]).all(-1)
            groups, part = groups[going_on], part.only(going_on)
            if not len(groups):
                return

    def _shrink_by_sums(self, sums: _Sums, scales: Tensor, zeros: Tensor) -> None:
        """The best of the shrunken ranges, the first of equal ones; those that may be the best are tried."""
        low, high = sums.bounds(scales, zeros)
        possible = low <= high.amin(0)
        error = torch.where(possible, high, torch.inf)
        unsure = (possible.sum(0) > 1).any(-1)
        for step in torch.nonzero((possible & unsure[:, None]).flatten(1).any(-1)).flatten().tolist():
            some = possible[step].any(-1) & unsure
            tried = self.part.only(some).error(scales[step, some], zeros[step, some]).double()
            error[step, some] = torch.where(possible[step, some], tried, torch.inf)
        best = error.argmin(0, keepdim=True)
        self.scale, self.zero = scales.gather(0, best)[0], zeros.gather(0, best)[0]

    def _refine(self) -> None:
        """Least-squares steps of scale (and of an offset), and steps of one of the zero, while anything changes."""
        groups, part = torch.arange(len(self.scale), device=self.scale.device), self.part
        if part.scheme == "offset":
            for _ in range(_REFINE_STEPS):
                scale, zero = _refit_line(part.blocks, part.row_group, self.scale, self.zero, part.bits)
                self._keep(groups, part.error(scale, zero), scale, zero)
            return
        self.error, fitted = part.error_and_fit(self.scale, self.zero)
        for _ in range(_REFINE_STEPS):
            zero = self.zero[groups]
            error, again = part.error_and_fit(fitted, zero)
            better = self._keep(groups, error, fitted, zero)
            fitted = torch.where(better, again, fitted)
            if part.scheme == "asymmetric":
                self._move_zero(groups, part)
            moved = self.zero[groups] != zero
            changed = (better | moved).any(-1)
            groups, part, fitted, moved = groups[changed], part.only(changed), fitted[changed], moved[changed].any(-1)
            if not len(groups):
                return
            if bool(moved.any()):
                some = groups[moved]
                fitted[moved] = part.only(moved).error_and_fit(self.scale[some], self.zero[some])[1]

    def _move_zero(self, groups: Tensor, part: _Part) -> None:
        """Try the zero points one below, and where that is not better, one above."""
        qmin, qmax = code_range(part.bits, part.scheme)
        before = self.zero.clone()
        moves = torch.stack([(before - 1).clamp(qmin, qmax), (before + 1).clamp(qmin, qmax)])
        possible = moves != before
        if self.sums is not None:
            possible &= self.sums.bounds(self.scale.expand_as(moves), moves)[0] < self.error
        for zero, trying in zip(moves, possible, strict=True):
            some = (trying & (self.zero == before))[groups].any(-1)
            if bool(some.any()):
                chosen = groups[some]
                scale, moved = self.scale[chosen], zero[chosen]
                self._keep(chosen, part.only(some).error(scale, moved), scale, moved)


class _Sums:
    """Bounds on the errors of many grids at once, from the sorted weights of each group and their running sums.

    With n_c weights of sum t_c between the two edges where code c begins and ends, the squared error of a grid is
    sum w^2 - 2 s sum_c (c - z) t_c + s^2 sum_c (c - z)^2 n_c: 2^b look-ups a grid instead of a pass over all weights.
    """

    def __init__(self, part: _Part) -> None:
        self.bits, self.scheme = part.bits, part.scheme
        sizes = torch.bincount(part.row_group)
        self.rows = int(sizes.max())
        columns = part.blocks.shape[1:]
        place = torch.arange(len(part.blocks), device=sizes.device) - (sizes.cumsum(0) - sizes)[part.row_group]
        values = part.blocks.new_full((len(sizes), columns[0], self.rows, columns[1]), torch.inf)
        values[part.row_group, :, place] = part.blocks
        self.values = _sorted(values.flatten(2))  # [G, K, n], infinite beyond the weights of a smaller group
        self.counts = (sizes * columns[1]).unsqueeze(-1)  # [G, 1]
        finite = self.values
        if int(sizes.min()) < self.rows:
            finite = finite.masked_fill(finite == torch.inf, 0.0)
        self.squares = torch.linalg.vector_norm(finite, dim=-1, dtype=torch.float64).square()
        self.sums = finite.new_zeros(*finite.shape[:-1], finite.shape[-1] + 1, dtype=torch.float64)
        torch.cumsum(finite, -1, dtype=torch.float64, out=self.sums[..., 1:])

    def bounds(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Below and above the float32 errors of grids [S, G, K], in float64."""
        qmin, qmax = code_range(self.bits, self.scheme)
        codes = torch.arange(qmin, qmax + 1, device=scale.device) - zero.double().unsqueeze(-1)  # [S, G, K, levels]
        step = scale.double().unsqueeze(-1)
        edges = (step * (codes[..., :-1] + 0.5)).float().permute(1, 2, 0, 3)  # [G, K, S, levels - 1]
        found = torch.searchsorted(self.values, edges.flatten(2).contiguous())
        place = torch.minimum(found, self.counts.unsqueeze(-1)).view(edges.shape)
        ends = self.counts[:, :, None, None].expand(*edges.shape[:3], 1)
        place = torch.cat([torch.zeros_like(ends), place, ends], -1)
        running = self.sums.gather(-1, place.flatten(2)).view(place.shape)
        within, total = place.diff(dim=-1).permute(2, 0, 1, 3), running.diff(dim=-1).permute(2, 0, 1, 3)
        error = (step * codes * (step * codes * within - 2 * total)).sum(-1) + self.squares
        return self._around(error.clamp_min(0), scale.double(), zero.double())

    def _around(self, error: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """How far the float32 error of a grid can be from the true one, as low and high bounds.

        Rounding moves w / s + z and s (q - z) by a few units in the last place, so that every weight's difference from
        its level is off by at most `off` steps, weights at an edge included; the sum of squares adds its own rounding.
        """
        unit = 2.0**-24
        qmin, qmax = code_range(self.bits, self.scheme)
        off = 8 * unit * (torch.maximum((qmin - zero).abs(), (qmax - zero).abs()) + zero.abs() + 1)
        step = self.counts * scale.square()
        slack = step * (2 * off + off.square()) + 2 * (error * step).sqrt() * off
        slack += (self.rows + 256) * unit * (error + slack) + 1e-12 * self.squares + 1e-44 * self.counts
        return error - slack, error + slack


def _sorted(values: Tensor) -> Tensor:
    """`values`, sorted along the last axis; on CPUs by NumPy, which sorts float32 thirty times faster than torch."""
    if values.device.type == "cpu":
        values.numpy().sort(axis=-1)
        return values
    return values.sort(dim=-1).values


def _codes(blocks: Tensor, row_group: Tensor, scale: Tensor, zero: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """Centred codes q - z [O, K, I/K] in float."""
    qmin, qmax = code_range(bits, scheme)
    row_scale, row_zero = scale[row_group].unsqueeze(-1), zero[row_group].unsqueeze(-1)
    centred = torch.div(blocks, row_scale).add_(row_zero).round_().clamp_(qmin, qmax)
    return centred.sub_(row_zero)


def _group_error(codes: Tensor, blocks: Tensor, row_group: Tensor, scale: Tensor) -> Tensor:
    """Squared error [G, K] of each group; takes the place of the centred codes."""
    codes.mul_(scale[row_group].unsqueeze(-1)).sub_(blocks).square_()
    return reduce_rows(codes.sum(-1), row_group, "sum")


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
    return _fitted(_codes(blocks, row_group, scale, zero, bits, scheme), blocks, row_group, scale)


def _fitted(centred: Tensor, blocks: Tensor, row_group: Tensor, scale: Tensor) -> Tensor:
    """<w, c> / <c, c> [G, K] for centred codes c [O, K, I/K]; the present scale where they are all 0."""
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
