r"""Kronecker factors of the Gauss-Newton matrix of every weight matrix, from one pass over labelled data.

For a matrix W with inputs x and output gradients g of the loss,

.. math:: \tfrac12 \langle dW, H\, dW \rangle \approx \tfrac12 \mathrm{tr}(G\, dW\, C\, dW^T), \qquad
          G = \tfrac1N \sum_{n, t, j} g\, g^T, \quad C = E[x x^T],

where sample n has tokens t, the columns j of its loss Hessian's factor are propagated back, and gradients and inputs of
different tokens are taken for independent. A file of its own, for factors say nothing about bits.

Reference: Martens and Grosse 2015 (K-FAC), section 3; Eschenhagen et al. 2023, section 3.2 (expanded over tokens).

    >>> kronecker_factors(model, batches, [module])[module].damage(change)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.inputs import unmasked
from qbert.hessian.batches import Batch
from qbert.hessian.gauss_newton.loss_factor import loss_factor
from qbert.hessian.losses import LossFunction, MeasuredLoss


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one weight matrix [O, I].

    Attributes:
        gradients: G [O, O] float64, summed over the tokens of a sample, mean over samples.
        inputs: C [I, I] float64, mean over tokens.
    """

    gradients: Tensor
    inputs: Tensor

    def damage(self, change: Tensor) -> float:
        """tr(G dW C dW^T) / 2 in units of the loss, for a change dW [O, I]."""
        wide = change.double()
        return float((self.gradients @ wide @ self.inputs).mul_(wide).sum()) / 2


def kronecker_factors(
    model: nn.Module,
    batches: Sequence[Batch],
    modules: Sequence[nn.Linear],
    loss_fn: LossFunction | None = None,
    *,
    most_columns: int | None = None,
) -> dict[nn.Linear, KroneckerFactors]:
    """The factors of the weights of `modules`, from one forward pass a batch and one backward pass a class.

    Args:
        model: with a task head, or any module together with `loss_fn`; it is left as it was.
        batches: micro-batches with labels.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss; default ``model(**batch).loss``.
        most_columns: of the factor of a batch; where it has more, so many random sums of them, of signs from a fixed
            seed, stand for all: G is then an unbiased estimate.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on, or the loss depends on the
            weights in other ways as well.
    """
    measured = MeasuredLoss(model, batches, loss_fn)
    zeros = {m: (m.weight.new_zeros(m.out_features, m.out_features), m.in_features) for m in modules}
    left = {m: g.double() for m, (g, _) in zeros.items()}
    right = {m: m.weight.new_zeros(width, width).double() for m, (_, width) in zeros.items()}
    count = dict.fromkeys(modules, 0)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        on_device = measured.on_device(batch)
        with _recorded(modules) as calls, measured.evaluating([p for m in modules for p in m.parameters()]):
            factor = loss_factor(measured, on_device, check=batch is batches[0])
            mask = on_device.get("attention_mask")
            for m, x, _ in calls:
                rows = unmasked(x, mask).flatten(0, -2)  # products in the model's own dtype, sums in float64
                right[m] += rows.T @ rows
                count[m] += len(rows)
            share = measured.share(batch)
            columns = _few_columns(factor.matrix, most_columns, generator)
            for j in range(columns.shape[2]):
                seeds = factor.seeds(columns[:, :, j])
                found = torch.autograd.grad(
                    factor.outputs, [y for _, _, y in calls], seeds, retain_graph=True, allow_unused=True
                )
                for (m, _, _), gradient in zip(calls, found, strict=True):
                    if gradient is not None:
                        rows = gradient.flatten(0, -2)
                        left[m] += share * (rows.T @ rows).double()
    return {m: KroneckerFactors(left[m], right[m] / max(count[m], 1)) for m in modules}


def _few_columns(matrix: Tensor, most: int | None, generator: torch.Generator) -> Tensor:
    """L [B, d, r], or a random M [B, d, most] with E[M M^T] = L L^T where r is larger."""
    rows, _, rank = matrix.shape
    if most is None or rank <= most:
        return matrix
    signs = torch.randint(0, 2, (rows, rank, most), generator=generator).mul_(2).sub_(1).to(matrix)
    return matrix @ signs * most**-0.5


@contextlib.contextmanager
def _recorded(modules: Sequence[nn.Linear]) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Inside, every call of `modules` is added to the list as (module, input, output)."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append((module, inputs[0].detach(), output))

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
