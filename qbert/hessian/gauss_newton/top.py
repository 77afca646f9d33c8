"""Top eigenpair of the generalized Gauss-Newton matrix of every block, from one backward pass.

For outputs z of the model and a loss l(z), ``GGN = sum_n w_n J_n^T M_n J_n`` with ``J_n = dz_n/dW`` and
``M_n = d^2 l / dz_n^2`` (Schraudolph 2002; Martens 2020, section 8). With ``M_n = L_n L_n^T`` of rank C - 1 for C
classes, the GGN of N samples is ``A^T A`` for the N (C - 1) rows ``sqrt(w_n) L_n^T J_n``, and its eigenvalues are
those of the small Gram matrix ``A A^T``. One forward and C - 1 backward passes give A for all blocks at once
(`qbert.hessian.gauss_newton.sample_gradients`): for two classes the price of a training step, where Hessian
eigenvalues need dozens. It is another quantity than the Hessian (it has no negative eigenvalues, and is smaller away
from a minimum), but its top direction is a good start vector.

Rows beyond `rank` are merged into the `rank` leading directions; what is dropped bounds the error.

    >>> pairs = gauss_newton_top(model, micro_batches, {"layer 0": list(layer.parameters())})
    >>> pairs["layer 0"].value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qbert.arguments import whole_number
from qbert.hessian.batches import Batch
from qbert.hessian.blocks import Part
from qbert.hessian.eigen import Eigenpair, relative
from qbert.hessian.gauss_newton.factor_rows import FactorRows
from qbert.hessian.gauss_newton.sample_gradients import sample_rows
from qbert.hessian.losses import LossFunction, MeasuredLoss
from qbert.hessian.vectors import norm

_CHECKED_SAMPLES = 16
_OTHERS = 0.1  # length of the lower directions' share in a start vector of length 1


def gauss_newton_top(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, Sequence[Part]],
    *,
    loss_fn: LossFunction | None = None,
    rank: int = 32,
    rows_per_sample: int = 8,
    tol: float = 1e-3,
    seed: int = 0,
    count: Callable[[int], object] = lambda samples: None,
) -> dict[str, Eigenpair]:
    """Eigenpair of largest value of each block's Gauss-Newton matrix.

    Args:
        model: its forward must return logits (``logits``, ``start_logits``/``end_logits``, or a tensor).
        batches: micro-batches with labels.
        blocks: name -> parameters.
        loss_fn: as for `HessianOperator`; must call `model` once.
        rank: number of directions kept per block; memory is 2 * rank vectors of the blocks' size, less for few
            samples.
        rows_per_sample: outputs with more independent loss directions (token classification) are sketched to this
            many random ones, which keeps the GGN right on average; `converged` is then False.
        tol: `converged` tells whether what was dropped is at most tol * value.
        seed: for the sketch.
        count: called with the number of samples done since the last time (progress).

    Returns:
        name -> `Eigenpair` with ``products`` 0 and ``error`` the dropped share of the value.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on, or the loss depends on the
            parameters in other ways as well.
        ValueError: if the loss is not a mean over samples or labels, whose matrices could be added up.
    """
    measured = MeasuredLoss(model, batches, loss_fn)
    return top_pairs(measured, blocks, rank=rank, rows_per_sample=rows_per_sample, tol=tol, seed=seed, count=count)


def gauss_newton_starts(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, Sequence[Part]],
    *,
    loss_fn: LossFunction | None = None,
    rank: int = 32,
) -> dict[str, Tensor]:
    """A start vector [n] for the Hessian's eigenvalue iteration of each block: all directions of a sketched GGN.

    The top direction u_0 leads, and each of the r others has a share, ``max((mu_j / mu_0)^4, 0.1 / sqrt(r)) u_j``.
    Where a few samples fit badly, the Hessian's top eigenvector is made of lower directions, and an iteration from
    u_0 alone can settle on a smaller eigenvalue before it has seen it. (A layer of a MiniLM on SST-2 has the top
    eigenvalues 2.15 and 2.06; from u_0, three products gave 2.06 and an estimated error of 1e-4.) With a share of all
    of them it goes on until they are told apart. What a loss takes from elsewhere than the logits is not in it.

    Args:
        model, batches, blocks, loss_fn, rank: as for `gauss_newton_top`; each sample gives one (random) row.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on.
    """
    return start_vectors(MeasuredLoss(model, batches, loss_fn), blocks, rank=rank)


def top_pairs(
    measured: MeasuredLoss,
    blocks: Mapping[str, Sequence[Part]],
    *,
    rank: int = 32,
    rows_per_sample: int = 8,
    tol: float = 1e-3,
    seed: int = 0,
    count: Callable[[int], object] = lambda samples: None,
) -> dict[str, Eigenpair]:
    """`gauss_newton_top` of a loss that is put together already."""
    _refuse_what_does_not_add_up(measured)
    factors, exact = _factors(measured, blocks, rank, rows_per_sample, seed, count, check=True)
    return {name: factor.top(tol, exact) for name, factor in factors.items()}


def start_vectors(measured: MeasuredLoss, blocks: Mapping[str, Sequence[Part]], *, rank: int = 32) -> dict[str, Tensor]:
    """`gauss_newton_starts` of a loss that is put together already.

    Eigenvectors have no signs: each gets that with which it moves the samples as those of the blocks before do, so
    that the vectors of all blocks together are a guess as well.
    """
    factors, _ = _factors(measured, blocks, rank, 1, 0, lambda samples: None, check=False)
    found: dict[str, Tensor] = {}
    before: Tensor | None = None
    for name, factor in factors.items():
        found[name], moves = factor.mixture()
        if before is None or len(before) != len(moves):
            before = torch.zeros_like(moves)
        if before @ moves < 0:
            found[name], moves = found[name].neg_(), -moves
        before = before + moves / torch.linalg.vector_norm(moves).clamp(min=torch.finfo(moves.dtype).tiny)
    return found


def _refuse_what_does_not_add_up(measured: MeasuredLoss) -> None:
    rows = measured.rows()
    some = range(0, len(rows), max(1, len(rows) // _CHECKED_SAMPLES))[:_CHECKED_SAMPLES]
    if not measured.over([batch for i in some for batch in rows.collate([i])]).adds_up():
        raise ValueError(
            "model: its loss is not a mean over samples or labels (several terms, class weights, labels outside of "
            "the text), so that it has no Gauss-Newton matrix of single samples; use method='lanczos'"
        )


def _factors(
    measured: MeasuredLoss,
    blocks: Mapping[str, Sequence[Part]],
    rank: int,
    rows_per_sample: int,
    seed: int,
    count: Callable[[int], object],
    check: bool,
) -> tuple[dict[str, _Factor], bool]:
    """The factor of every block, and whether no row of it was sketched."""
    rank = whole_number("rank", rank, least=1)
    rows_per_sample = whole_number("rows_per_sample", rows_per_sample, least=1)
    factors = {name: _Factor(rank) for name in blocks}
    exact = True
    for group in sample_rows(measured, blocks, rows_per_sample=rows_per_sample, seed=seed, check=check):
        exact &= group.complete
        for name, factor in factors.items():
            factor.add(group.rows[name])
        count(group.samples)
    return factors, exact


class _Factor:
    """Rows A [r, n] of ``A^T A``, cut back to the `rank` leading directions before they are more than twice as many."""

    def __init__(self, rank: int):
        self.rank, self.dropped = rank, 0.0
        self.pieces: list[FactorRows] = []

    def add(self, rows: FactorRows) -> None:
        for piece in rows.slices(self.rank):
            if sum(map(len, self.pieces)) + len(piece) > 2 * self.rank:
                self._merge()
            self.pieces.append(piece)

    def top(self, tol: float, exact: bool) -> Eigenpair:
        rows, values, rotation = self._gram()
        value = float(values[0])
        direction = rows.combined(rotation[:, 0])
        length = norm(direction)
        vector = direction / length if length > 0 else direction
        error = relative(self.dropped, value)
        converged = exact and error <= tol
        return Eigenpair(
            value=value,
            vector=vector,
            residual=error,
            error=error,
            upper_bound=value + self.dropped if exact else math.inf,
            other_end=0.0,
            other_end_residual=0.0,
            gap=value - float(values[1]) if len(values) > 1 else value,
            products=0,
            converged=converged,
        )

    def mixture(self) -> tuple[Tensor, Tensor]:
        """The sum x of all directions [n], weighted as `gauss_newton_starts` says, and A x [r]."""
        rows, values, rotation = self._gram()
        if not values[0] > 0:
            return rows.combined(rotation[:, 0]), torch.zeros_like(values)
        kept = values > 1e-6 * values[0]  # what is smaller is rounding
        values, rotation = values[kept], rotation[:, kept]
        least = _OTHERS / max(1, len(values) - 1) ** 0.5
        weights = (values / values[0]).pow(4).clamp(min=least)
        return rows.combined(rotation @ (weights / values.sqrt())), rotation @ (weights * values.sqrt())

    def _merge(self) -> None:
        """Replace the rows by the leading directions, sqrt(eigenvalue) * eigenvector."""
        joined = FactorRows.joined(self.pieces)
        rows = joined.dense()
        values, rotation = _eigh(rows @ rows.T)
        self.dropped += float(values[self.rank])
        directions = rotation[:, : self.rank].T.to(rows) @ rows
        self.pieces = [FactorRows(directions.split(joined.sizes, dim=1))]

    def _gram(self) -> tuple[FactorRows, Tensor, Tensor]:
        """Rows [r, n]; eigenvalues [r], largest first, and eigenvectors [r, r] of their Gram matrix, in float64."""
        rows = FactorRows.joined(self.pieces)
        self.pieces = [rows]
        return rows, *_eigh(rows.gram())


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, rotation = torch.linalg.eigh(gram.double())
    return values.flip(0).clamp(min=0), rotation.flip(1)
