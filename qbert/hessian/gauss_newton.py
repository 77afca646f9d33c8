"""Top eigenpair of the generalized Gauss-Newton matrix of every block, from one backward pass per sample.

For outputs z of the model and a loss l(z), ``GGN = sum_n w_n J_n^T M_n J_n`` with ``J_n = dz_n/dW`` and
``M_n = d^2 l / dz_n^2`` (Schraudolph 2002; Martens 2020, section 8). With ``M_n = L_n L_n^T`` of rank C - 1 for C
classes, the GGN of N samples is ``A^T A`` for the N (C - 1) rows ``sqrt(w_n) L_n^T J_n``, and its eigenvalues are
those of the small Gram matrix ``A A^T``. One forward and C - 1 backward passes give A for all blocks at once: for two
classes the price of a training step, where Hessian eigenvalues need dozens. It is another quantity than the Hessian
(it has no negative eigenvalues, and is smaller away from a minimum), but its top direction is a good start vector.

Rows beyond `rank` are merged into the `rank` leading directions; what is dropped bounds the error.

    >>> pairs = gauss_newton_top(model, micro_batches, {"layer 0": list(layer.parameters())})
    >>> pairs["layer 0"].value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.hessian.eigen import Eigenpair, relative
from qbert.hessian.operator import LossFunction, evaluating, masks_padding, model_loss, to_device
from qbert.hessian.parts import Part, cut, distinct_parameters, whole
from qbert.hessian.samples import Batch, BatchSamples, loss_weight

_MOST_OUTPUTS = 4096
_OTHERS = 0.1  # length of the lower directions' share in a start vector of length 1


class NoModelOutputError(ValueError):
    """The loss is no function of logits that can be seen, so there is no Gauss-Newton matrix."""


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
        batches: micro-batches with labels; each sample is looked at by itself.
        blocks: name -> parameters.
        loss_fn: as for `HessianOperator`; must call `model` once.
        rank: number of directions kept per block; memory is 2 * rank vectors of the blocks' size.
        rows_per_sample: outputs with more independent loss directions (token classification) are sketched to this
            many random ones, which keeps the GGN right on average; `converged` is then False.
        tol: `converged` tells whether what was dropped is at most tol * value.
        seed: for the sketch.
        count: called with 1 for every sample done (progress).

    Returns:
        name -> `Eigenpair` with ``products`` 0 and ``error`` the dropped share of the value.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on.
    """
    factors, exact = _factors(model, batches, blocks, loss_fn, rank, rows_per_sample, seed, count)
    return {name: factor.top(tol, exact) for name, factor in factors.items()}


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
    of them it goes on until they are told apart.

    Args:
        model, batches, blocks, loss_fn, rank: as for `gauss_newton_top`; each sample gives one (random) row.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on.
    """
    factors, _ = _factors(model, batches, blocks, loss_fn, rank, 1, 0, lambda samples: None)
    return {name: factor.mixture() for name, factor in factors.items()}


def _factors(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, Sequence[Part]],
    loss_fn: LossFunction | None,
    rank: int,
    rows_per_sample: int,
    seed: int,
    count: Callable[[int], object],
) -> tuple[dict[str, _Factor], bool]:
    """The factor of every block, and whether no row of it was sketched."""
    factors = {name: _Factor(rank) for name in blocks}
    exact = True
    for rows, complete in _sample_rows(model, batches, blocks, loss_fn or model_loss, rows_per_sample, seed):
        exact &= complete
        for name, parts in blocks.items():
            flat = [_row_of(parts, row) for row in rows]
            factors[name].add(flat[0][None] if len(flat) == 1 else torch.stack(flat))
        count(1)
    return factors, exact


def _row_of(parts: Sequence[Part], row: Mapping[int, Tensor]) -> Tensor:
    """The flat entries [n] of a block in a row of flat gradients, parameter identity -> [size of the parameter]."""
    return torch.cat([cut(part, row[id(whole(part))].view_as(whole(part))).reshape(-1) for part in parts])


class _Factor:
    """Rows A [r, n] of ``A^T A``, cut back to the `rank` leading directions when there are twice as many."""

    def __init__(self, rank: int):
        self.rank, self.dropped = rank, 0.0
        self.blocks: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.blocks.append(rows)
        if sum(len(b) for b in self.blocks) > 2 * self.rank:
            values, directions = self._decompose()
            self.dropped += float(values[self.rank])
            self.blocks = [directions[: self.rank]]

    def top(self, tol: float, exact: bool) -> Eigenpair:
        values, directions = self._decompose()
        value = float(values[0])
        length = torch.linalg.vector_norm(directions[0])
        vector = directions[0] / length if length > 0 else directions[0]
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

    def mixture(self) -> Tensor:
        """The sum of all directions [n], weighted as `gauss_newton_starts` says, in one pass over the rows."""
        rows, values, rotation = self._gram()
        if not values[0] > 0:
            return rows[0]
        kept = values > 1e-8 * values[0]  # what is smaller is rounding
        values, rotation = values[kept], rotation[:, kept]
        least = _OTHERS / max(1, len(values) - 1) ** 0.5
        weights = (values / values[0]).pow(4).clamp(min=least)
        return (rotation @ (weights / values.sqrt())).to(rows) @ rows

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [r], largest first, and rows [r, n] = sqrt(eigenvalue) * eigenvector."""
        rows, values, rotation = self._gram()
        return values, rotation[:, : self.rank + 1].T.to(rows) @ rows

    def _gram(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [r, n]; eigenvalues [r], largest first, and eigenvectors [r, r] of their Gram matrix, in float64."""
        rows = torch.cat(self.blocks)
        values, rotation = torch.linalg.eigh((rows @ rows.T).double())
        return rows, values.flip(0).clamp(min=0), rotation.flip(1)


def _sample_rows(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, Sequence[Part]],
    loss_fn: LossFunction,
    rows_per_sample: int,
    seed: int,
) -> Iterator[tuple[list[dict[int, Tensor]], bool]]:
    """For each sample: its rows, parameter identity -> flat part, and whether they are all of its rows."""
    parameters = distinct_parameters(part for block in blocks.values() for part in block)
    total = sum(loss_weight(batch) for batch in batches)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        samples = BatchSamples([batch], trim=masks_padding(model, loss_fn))
        for index in range(len(samples)):
            (single,) = samples.collate([index])
            weight = loss_weight(single) / total
            if weight == 0:
                continue
            with evaluating(model, parameters):
                outputs, factor = _loss_factor(model, to_device(single, model), loss_fn)
                complete = factor.shape[1] <= rows_per_sample
                if not complete:
                    signs = torch.randint(0, 2, (factor.shape[1], rows_per_sample), generator=generator) * 2 - 1
                    factor = factor @ signs.to(factor) / rows_per_sample**0.5
                rows = []
                for column in (weight**0.5 * factor).T:
                    parts = column.split([z.numel() for z in outputs])
                    seeds = [part.view_as(z) for part, z in zip(parts, outputs, strict=True)]
                    rows.append(_flat_gradients(outputs, seeds, parameters))
            yield rows, complete


def _loss_factor(model: nn.Module, batch: Batch, loss_fn: LossFunction) -> tuple[list[Tensor], Tensor]:
    """Outputs z of one sample and L [d, rank] with ``d^2 loss / dz^2 = L L^T``."""
    captured: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        loss = loss_fn(model, batch)
    finally:
        handle.remove()
    outputs = _logits(captured[0]) if len(captured) == 1 else []
    size = sum(z.numel() for z in outputs)
    gradients = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True) if outputs else (None,)
    if any(g is None for g in gradients) or size > _MOST_OUTPUTS:
        raise NoModelOutputError(
            f"model: {type(model).__name__} shows no logits (at most {_MOST_OUTPUTS} a sample) that its loss depends "
            "on, so it has no Gauss-Newton matrix; use method='lanczos'"
        )
    flat = torch.cat([g.reshape(-1) for g in gradients if g is not None])
    rows = []
    for k in range(size):
        if not flat.requires_grad:  # a loss linear in its outputs
            break
        second = torch.autograd.grad(flat[k], outputs, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(z) if s is None else s for s, z in zip(second, outputs, strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    if not rows:
        return outputs, flat.new_zeros(size, 1)
    values, vectors = torch.linalg.eigh(torch.stack(rows).double())
    kept = values > 1e-6 * values[-1].clamp(min=0)
    if not kept.any():
        return outputs, flat.new_zeros(size, 1)
    return outputs, (vectors[:, kept] * values[kept].sqrt()).to(flat)


def _logits(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    for names in (("logits",), ("start_logits", "end_logits")):
        found = [output.get(n) if isinstance(output, Mapping) else getattr(output, n, None) for n in names]
        if all(isinstance(z, Tensor) and z.requires_grad for z in found):
            return [z for z in found if isinstance(z, Tensor)]
    return []


def _flat_gradients(
    outputs: Sequence[Tensor], seeds: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> dict[int, Tensor]:
    gradients = torch.autograd.grad(outputs, parameters, grad_outputs=seeds, retain_graph=True, allow_unused=True)
    return {
        id(p): (torch.zeros_like(p) if g is None else g).detach().reshape(-1)
        for p, g in zip(parameters, gradients, strict=True)
    }
