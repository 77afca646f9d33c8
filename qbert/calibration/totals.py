"""Second moments of inputs: weighted sums over batches, and what they come to.

It stands alone because the sums ask nothing about models: rows in, moments out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GRAM_BLOCK = 256


@dataclass(frozen=True)
class Moment:
    """The second moment of a matrix's inputs.

    Attributes:
        value: [I, I] float64, C = E[w x x^T] over the inputs that are no padding, the weights w of mean 1; [g, I, I]
            where each of g runs of rows has inputs of its own (convolutions of several channel groups).
        inputs: how many those were.
        mean: [I] or [g, I] float64, E[w x].
        covariance: as `value`, of w x about its mean: the moment in which the error of a matrix counts whose bias is
            free to move. Summed about a point near the mean, since inputs may vary by far less than they are long.
        depth: number of the encoder layer; the moments of one layer are collected before any of its matrices changes.
    """

    value: Tensor
    inputs: int
    mean: Tensor
    covariance: Tensor
    depth: int = 0


class Totals:
    """Weighted sums over inputs, in float64."""

    def __init__(self) -> None:
        self.count, self.weight = 0, 0.0
        self.pivot: Tensor | None = None
        self.products: Tensor | None = None  # on and above the diagonal
        self.sums: Tensor | float = 0.0

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Add inputs [N, I] or [N, g, I] of these weights [N]."""
        root: Any = 1.0 if weights is None else weights.sqrt().view(-1, *[1] * (x.dim() - 1))
        x = x.float()
        if self.pivot is None:
            self.pivot = x.mean(0) if len(x) else torch.zeros_like(x.sum(0))
        rows = (x - self.pivot) * root
        if self.products is None:
            width = rows.shape[-1]
            self.products = torch.zeros(*rows.shape[1:], width, dtype=torch.float64, device=rows.device)
        # On and above the diagonal alone, in blocks of columns, since the rest is the same.
        for start in range(0, rows.shape[-1], _GRAM_BLOCK):
            block = rows[..., start : start + _GRAM_BLOCK]
            products = block.T @ rows[:, start:] if rows.dim() == 2 else _by_group(block, rows[..., start:])
            self.products[..., start : start + _GRAM_BLOCK, start:] += products
        self.sums = self.sums + (rows * root).double().sum(0)
        self.weight += len(x) if weights is None else float(weights.double().sum())
        self.count += len(x)

    def moment(self, depth: int) -> Moment:
        """The means, of matrices of one encoder layer; nothing can be added after it."""
        count = max(self.count, 1)
        assert self.pivot is not None and self.products is not None
        products = self.products.triu_().div_(count)
        products += products.triu(1).transpose(-1, -2)
        pivot, weight, sums = self.pivot.double(), self.weight / count, torch.as_tensor(self.sums) / count
        value = _plus_outer(products.clone(), pivot, sums)
        _plus_outer(value, sums, pivot)
        _plus_outer(value, pivot, pivot, weight)
        covariance = _plus_outer(products, sums, sums, -1 / weight) if weight else products
        return Moment(value, self.count, sums + weight * pivot, covariance, depth)


def _by_group(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ngi,ngj->gij", a, b)


def _plus_outer(matrix: Tensor, a: Tensor, b: Tensor, times: float = 1.0) -> Tensor:
    """Add `times` a b^T to [I, I], or to each of [g, I, I], in place."""
    a, b = a.view(-1, a.shape[-1], 1), b.view(-1, 1, b.shape[-1])
    matrix.view(-1, *matrix.shape[-2:]).baddbmm_(a, b, alpha=times)
    return matrix
