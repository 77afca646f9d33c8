r"""Error-compensated rounding: codes chosen for the layer's output, not for the weights one by one.

With inputs x of second moment :math:`C = E[x x^T]` a changed weight matrix moves the output of its layer by

.. math:: E \| (W - \hat W) x \|^2 = \mathrm{tr}\,(W - \hat W)\, C\, (W - \hat W)^T ,

which is what is made small here, on the grids of `qbert.quantizers.grid` and for all rows at once. Where the matrix has
a bias, that takes over the mean of the error, so that no layer's outputs are shifted, and C is the covariance.

1. *compensation* (OBS; GPTQ): columns are rounded one after the other, and the error of each is spread over those
   still to come. With :math:`H = C + \lambda I = (U + I) D (U + I)^T`, U strictly upper triangular, column j is
   rounded from :math:`w_j + \sum_{i<j} (w_i - \hat w_i) U_{ij}`;
2. *descent*: every column is rounded again to its best code given all others, from
   :math:`w_j + \sum_{i \ne j} (w_i - \hat w_i) H_{ij} / H_{jj}`, which can only lower the error;
3. *refit*: scales (and real-valued zero points) of least error for the present codes, in closed form.

Weights that are zero stay so on grids that have a zero (not on ``midrise`` and ``offset``): a pruned matrix keeps its
pattern, and the others make good for the zeros too. Ranges that suit nearest rounding clip too much for compensated
weights, so several are tried, and every row group keeps the best by the error above; where nothing beats nearest
rounding, the group keeps that. It stands alone because no other rounding asks what the layer is given.

References: Hassibi and Stork 1993 (OBS); Frantar et al. 2023, GPTQ, section 3; Chee et al. 2023, QuIP, section 3.1
(the triangular form); Behdin et al. 2023, QuantEase (the descent).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qbert.bits import Scheme
from qbert.quantizers.grid import code_range, dequantize, quantize
from qbert.quantizers.ranges import GroupRanges, covering_grid, extent, reduce_rows, shrunk

_BLOCK = 32
_TINY = 1e-30
_OBVIOUS = 0.75  # of nearest rounding's error in sums of float32; any larger share is looked at in float64
_LEAST_SHARE = 0.1  # of a scale that one refit leaves
_PARALLEL = 1e-6  # share of the determinant below which codes and a constant cannot be told apart
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the min-max range, tried beside the given one


class Rounded(NamedTuple):
    """A rounded matrix: its weights are scale * (codes - zero)."""

    codes: Tensor  # [O, I] int8
    scale: Tensor  # [G, K] float32
    zero: Tensor  # [G, K] float32
    compensated: Tensor  # [G] bool; False where nearest rounding was better


def _working_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """dW C dW^T of every row, [O], for a difference dW [O, I] and the moment C [I, I]."""
    return torch.linalg.vecdot(difference @ moment.to(difference.dtype), difference)


def damped(moment: Tensor, damping: float) -> Tensor:
    """H = C + lambda I in float64, lambda = `damping` times the mean of C's diagonal; the identity where C is 0.

    Raises:
        ValueError: if C holds NaN or infinity, or `damping` is not positive.
    """
    if not damping > 0:
        raise ValueError(
            f"damping={damping!r} is not possible; use a positive share of the mean diagonal, such as 0.01"
        )
    wide = moment.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("moment: it holds NaN or infinity; collect it on inputs that are finite")
    level = float(wide.diagonal().mean())
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return wide + damping * level * eye if level > 0 else eye


def bias_change(difference: Tensor, mean: Tensor) -> Tensor:
    """What the bias must gain, [O] float64, for outputs of the same mean, where a matrix has lost `difference` [O, I].

    Args:
        mean: E[x], [I], or [g, I] where each of g equal runs of rows has inputs of its own.

    Source: Nagel et al. 2019, data-free quantization, section 4.2 (bias correction), on the inputs that are there.
    """
    wide = difference.double()
    mean = mean.to(wide.device)
    if mean.dim() == 1:
        return wide @ mean
    return torch.linalg.vecdot(wide.view(len(mean), -1, wide.shape[1]), mean.unsqueeze(1)).flatten()


def compensate(
    weight: Tensor,
    metric: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    *,
    order: Tensor | None = None,
    sweeps: int = 0,
) -> Tensor:
    """Codes on given grids, the error of each column spread over those that are rounded after it.

    Args:
        weight: [O, I] float.
        metric: [I, I] float64, positive definite: `damped` of the inputs' second moment.
        scale, zero: [O, K] float, the grid of every row in each of K equal runs of input columns.
        order: [I] int64, the columns in the order in which they are rounded; as they stand where None.
        sweeps: how often every column is rounded again to its best code given the others.

    Returns:
        int8 codes [O, I].

    Raises:
        torch.linalg.LinAlgError: if `metric` is not positive definite.

    Source: Frantar et al. 2023, GPTQ, algorithm 1, in the triangular form of Chee et al. 2023 (QuIP, section 3.1).
    """
    problem = _Columns.of(weight, metric, order, scale.shape[1])
    codes, difference, _ = problem.compensated(scale.T, zero.T, qmin, qmax)
    pull = problem.narrow @ difference if sweeps else difference
    for _ in range(sweeps):
        problem.descend(difference, pull, codes, scale.T, zero.T, qmin, qmax)
    return problem.restored(codes)


class _Columns:
    """A matrix and its metric with the columns in the order of rounding, transposed so that a column is contiguous."""

    def __init__(self, target: Tensor, metric: Tensor, order: Tensor, input_group: list[int]) -> None:
        self.target = target  # [I, N] float32 or float64: N rows of W, or of several copies of it
        self.metric = metric  # [I, I] float64
        self.order = order
        self.input_group = input_group  # run of input columns of each column
        self.zeros: Tensor | None = None  # [I, N], of weights that are zero and stay so
        self.narrow = metric.to(target.dtype)

    @classmethod
    def of(cls, weight: Tensor, metric: Tensor, order: Tensor | None, input_groups: int) -> _Columns:
        columns = weight.shape[1]
        if order is None:
            order = torch.arange(columns, device=weight.device)
        run = torch.div(order * input_groups, columns, rounding_mode="floor").tolist()
        target = weight.detach().to(_working_dtype(weight)).T[order].contiguous()
        problem = cls(target, metric[order][:, order], order, run)
        zeros = target == 0
        problem.zeros = zeros if bool(zeros.any()) else None
        return problem

    def restored(self, codes: Tensor) -> Tensor:
        """int8 codes [O, I] of codes [I, O] in the order of rounding."""
        result = torch.empty_like(codes, dtype=torch.int8)
        result[self.order] = codes.to(torch.int8)
        return result.T.contiguous()

    def triangle(self) -> tuple[Tensor, Tensor]:
        """U [I, I], strictly upper triangular, and the diagonal D [I] of H = (U + I) D (U + I)^T."""
        # Cholesky gives lower triangles; of the matrix turned by 180 degrees, that is an upper one.
        upper = torch.linalg.cholesky(self.metric.flip(0, 1)).flip(0, 1)
        diagonal = upper.diagonal()
        return (upper / diagonal).triu_(1).to(self.target.dtype), diagonal.square().to(self.target.dtype)

    def compensated(self, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of compensation with scale and zero [K, N].

        Returns:
            Codes [I, N], differences W - W^ [I, N], and the error of every row in the metric, [N]: the sum of D_j times
            the square of what column j is off the value that it was rounded from.
        """
        difference, codes = torch.zeros_like(self.target), torch.empty_like(self.target)
        errors = torch.zeros_like(self.target[0])
        feedback, diagonal = self.triangle()
        scale, zero = scale.contiguous(), zero.contiguous()
        for start in range(0, len(self.target), _BLOCK):
            block = slice(start, start + _BLOCK)
            wanted = torch.addmm(self.target[block], feedback[:start, block].T, difference[:start])
            self._round_block(block, wanted, difference, codes, feedback[block, block], scale, zero, qmin, qmax)
            near = difference[block]
            off = (wanted - self.target[block]).addmm_(feedback[block, block].T, near).add_(near)
            errors.add_(off.square_().mul_(diagonal[block].unsqueeze(1)).sum(0))
        return codes, difference, errors

    def descend(
        self, difference: Tensor, pull: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
    ) -> None:
        """Round every column again to its best code given all others, in turn and in place.

        Args:
            difference, codes: D and codes [I, N], which change.
            pull: H D [I, N], which is kept up with D: one product with H in all.
            scale, zero: [K, N].
        """
        scale, zero = scale.contiguous(), zero.contiguous()
        diagonal = self.narrow.diagonal().unsqueeze(1)
        for start in range(0, len(self.target), _BLOCK):
            block = slice(start, start + _BLOCK)
            before = difference[block].clone()
            inside = (self.narrow[block, block] / self.narrow.diagonal()[block]).fill_diagonal_(0.0)
            wanted = (pull[block] / diagonal[block]).sub_(before).add_(self.target[block])
            wanted.addmm_(inside.T, before, alpha=-1)
            self._round_block(block, wanted, difference, codes, inside, scale, zero, qmin, qmax)
            pull.addmm_(self.narrow[:, block], difference[block] - before)

    def _round_block(
        self,
        block: slice,
        wanted: Tensor,
        difference: Tensor,
        codes: Tensor,
        inside: Tensor,
        scale: Tensor,
        zero: Tensor,
        qmin: int,
        qmax: int,
    ) -> None:
        """Round each column of a block from `wanted` plus what the block's own differences add through `inside`."""
        near = difference[block]
        for at in range(len(near)):
            j = block.start + at
            s, z = scale[self.input_group[j]], zero[self.input_group[j]]
            code = torch.addmv(wanted[at], near.T, inside[:, at]).div_(s).add_(z).round_().clamp_(qmin, qmax)
            if self.zeros is not None:
                code = torch.where(self.zeros[j] & (z == z.round()) & (z >= qmin) & (z <= qmax), z, code)
            codes[j] = code
            torch.addcmul(self.target[j], code.sub_(z), s, value=-1, out=near[at])


def round_compensated(
    weight: Tensor,
    moment: Tensor,
    row_group: Tensor,
    ranges: GroupRanges,
    *,
    bits: int,
    scheme: Scheme = "asymmetric",
    damping: float = 0.01,
    by_activity: bool = True,
    refits: int = 4,
) -> Rounded:
    """Codes and grids of a matrix for the least error of its outputs on inputs with a given second moment.

    Args:
        weight: [O, I] float.
        moment: [I, I] float, C = E[x x^T] of the inputs (or C times a constant).
        row_group: [O] int64, non-decreasing, the row group of each row.
        ranges: the grids [G, K] of nearest rounding: the rounding to beat, and the first of the ranges tried.
        bits: 2, 3, 4 or 8.
        scheme: as in `TensorSpec`.
        damping: share of C's mean diagonal that is added to its diagonal.
        by_activity: round the columns with the largest C_jj first, whose errors the others can then make good.
        refits: how often the grids are refitted, each time followed by a round of descent; 0 keeps the given ranges, as
            ``midrise`` always does: its levels nearest to 0 move with the scale, so that a few inputs much larger than
            the rest would have it shrunk for their small weights, at the cost of all others; so it is with a
            single range for all rows.

    Returns:
        `Rounded`; every group has at most the error tr(dW C dW^T) of nearest rounding on `ranges`.

    Raises:
        ValueError: if `moment` is not finite or of another size, or `damping` is not positive.
    """
    columns, input_groups = weight.shape[1], ranges.scale.shape[1]
    if moment.shape != (columns, columns):
        raise ValueError(f"moment: expected [{columns}, {columns}], got {list(moment.shape)}")
    order = torch.argsort(moment.diagonal(), descending=True, stable=True) if by_activity else None
    if scheme == "midrise" or len(ranges.scale) == 1:
        refits = 0
    problem = _Columns.of(weight, damped(moment, damping), order, input_groups)
    limits = code_range(bits, scheme)
    tried = [ranges]
    if refits:
        low, high = extent(weight, row_group, input_groups)
        tried += [GroupRanges(*covering_grid(*shrunk(low, high, share, scheme), bits, scheme)) for share in _SHARES]
    codes, difference, grids = _best_start(problem, row_group, tried, limits)
    if refits:
        pull, whole = problem.narrow @ difference, problem.narrow @ problem.target
    for _ in range(refits):
        grids = _refitted(problem, codes, difference, pull, whole, row_group, grids, movable_zero=scheme == "offset")
        scale, zero = (x[row_group].T for x in grids)
        problem.descend(difference, pull, codes, scale, zero, *limits)
    return _better_of(weight, moment, row_group, ranges, GroupRanges(*grids), problem.restored(codes), limits)


def _best_start(
    problem: _Columns, row_group: Tensor, tried: list[GroupRanges], limits: tuple[int, int]
) -> tuple[Tensor, Tensor, GroupRanges]:
    """Codes [I, O], differences [I, O] and grids of the best ranges of every row group, compensated on each."""
    rows = len(row_group)
    copies = _Columns(problem.target.repeat(1, len(tried)), problem.metric, problem.order, problem.input_group)
    copies.zeros = None if problem.zeros is None else problem.zeros.repeat(1, len(tried))
    scale, zero = (torch.cat([getattr(r, n)[row_group] for r in tried]).T for n in ("scale", "zero"))
    codes, difference, errors = copies.compensated(scale, zero, *limits)
    best = reduce_rows(errors.view(len(tried), rows).T, row_group, "sum").argmin(1)  # [G]
    group = torch.arange(len(best), device=best.device)
    grids = GroupRanges(*(torch.stack([getattr(r, n) for r in tried])[best, group] for n in ("scale", "zero")))
    taken = best[row_group] * rows + torch.arange(rows, device=best.device)
    return codes[:, taken].contiguous(), difference[:, taken].contiguous(), grids


def _refitted(
    problem: _Columns,
    codes: Tensor,
    difference: Tensor,
    pull: Tensor,
    whole: Tensor,
    row_group: Tensor,
    grids: GroupRanges,
    movable_zero: bool,
) -> GroupRanges:
    """Grids of least error tr(D^T H D) for fixed codes, one run of input columns after the other.

    D and `pull` = H D change in place; `whole` is H W, so that with one run H c = (H W - H D) / s costs no product.

    A run with centred codes c = q - z and weights s c is moved by (ds) c, or by (ds) c + (do) 1 where the zero point
    is real: the least squares of one or two unknowns in the metric H.
    """
    scale, zero = grids.scale.clone(), grids.zero.clone()
    runs = torch.tensor(problem.input_group, device=difference.device)
    for k in range(scale.shape[1]):
        inside = slice(None) if scale.shape[1] == 1 else (runs == k).nonzero().flatten()
        own = problem.narrow[inside][:, inside]
        centred = codes[inside] - zero[row_group, k]
        by_codes = (whole - pull).div_(scale[row_group, k]) if scale.shape[1] == 1 else own @ centred  # [I/K, O]
        cc, cd = (_group_sum((a * centred).sum(0), row_group) for a in (by_codes, pull[inside]))
        ds, do = torch.where(cc > 0, cd / cc.clamp_min(_TINY), 0.0), torch.zeros_like(cc)
        if movable_zero:
            co, oo, od = by_codes.sum(0), own.sum().expand(len(row_group)), pull[inside].sum(0)
            co, oo, od = (_group_sum(x, row_group) for x in (co, oo, od))
            determinant = cc * oo - co * co
            solvable = determinant > _PARALLEL * cc * oo
            safe = torch.where(solvable, determinant, 1.0)
            ds = torch.where(solvable, (cd * oo - od * co) / safe, ds)
            do = torch.where(solvable, (od * cc - cd * co) / safe, do)
        new = scale[:, k] + ds
        usable = new > scale[:, k] * _LEAST_SHARE  # one of the other sign would turn the grid round
        ds, do = torch.where(usable, ds, 0.0), torch.where(usable, do, 0.0)
        change = ds[row_group] * centred + do[row_group]
        difference[inside] -= change
        if scale.shape[1] == 1:
            pull -= ds[row_group] * by_codes + own.sum(1, keepdim=True) * do[row_group]
        else:
            pull.addmm_(problem.narrow[:, inside], change, alpha=-1)
        scale[:, k] += ds
        zero[:, k] -= do / scale[:, k]
    return GroupRanges(scale, zero)


def _group_sum(values: Tensor, row_group: Tensor) -> Tensor:
    return reduce_rows(values.unsqueeze(1), row_group, "sum").squeeze(1)


def _better_of(
    weight: Tensor,
    moment: Tensor,
    row_group: Tensor,
    ranges: GroupRanges,
    found: GroupRanges,
    codes: Tensor,
    limits: tuple[int, int],
) -> Rounded:
    """The given codes, or those of nearest rounding in every row group whose outputs they serve better."""

    blocks = weight.detach().to(_working_dtype(weight)).unflatten(1, (ranges.scale.shape[1], -1))
    scale, zero = ranges.scale[row_group].unsqueeze(-1), ranges.zero[row_group].unsqueeze(-1)
    nearest = quantize(blocks, scale, zero, *limits).flatten(1)

    def group_errors(codes: Tensor, grids: GroupRanges, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[G], of those rows [O] alone that are True."""
        kept, group = blocks[rows], row_group[rows]
        codes = codes[rows].unflatten(1, kept.shape[1:])
        rounded = dequantize(codes, grids.scale[group].unsqueeze(-1), grids.zero[group].unsqueeze(-1))
        errors = torch.zeros(len(rows), dtype=dtype, device=rows.device)
        errors[rows] = output_error((kept.to(dtype) - rounded.to(dtype)).flatten(1), moment)
        return _group_sum(errors, row_group)

    def is_better(rows: Tensor, dtype: torch.dtype, share: float = 1.0) -> Tensor:
        return group_errors(codes, found, rows, dtype) < share * group_errors(nearest, ranges, rows, dtype)

    # Products in float64 cost as much as the rounding itself.
    better = is_better(torch.ones_like(row_group, dtype=torch.bool), blocks.dtype, _OBVIOUS)
    unsure = ~better[row_group]
    if bool(unsure.any()):
        better |= is_better(unsure, torch.float64)
    return Rounded(
        torch.where(better[row_group].unsqueeze(1), codes, nearest),
        torch.where(better.unsqueeze(1), found.scale, ranges.scale),
        torch.where(better.unsqueeze(1), found.zero, ranges.zero),
        better,
    )
