"""Rows of a tall matrix A [r, n] whose columns are a block's parameters, kept as cheaply as they came about.

A sample's gradient with respect to a weight matrix [O, I] is a sum over its tokens of outer products of what the
backward pass brings to the outputs and what the forward pass had at the inputs (Goodfellow 2015, arXiv:1510.01799).
Kept in this form, inner products between samples and weighted sums over them need no sample's gradient by itself.

    >>> rows = FactorRows([OuterProducts(left, right, row, 2), bias_rows])
    >>> rows.gram(), rows.combined(torch.tensor([0.3, 0.7]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterProducts:
    """`count` matrices [O, I]; number k is the sum of ``left[t] right[t]^T`` over all t with ``row[t] == k``.

    Attributes:
        left: [T, O].
        right: [T, I].
        row: [T], integers below `count`.
        count: number of matrices.
    """

    left: Tensor
    right: Tensor
    row: Tensor
    count: int

    def dense(self) -> Tensor:
        """The matrices, flat: [count, O * I]."""
        shape = (self.count, self.left.shape[1], self.right.shape[1])
        found = self.left.new_empty(shape)
        for k in range(self.count):
            tokens = self.row == k
            torch.mm(self.left[tokens].T, self.right[tokens], out=found[k])
        return found.view(self.count, -1)

    def gram(self) -> Tensor:
        """Inner products of the matrices [count, count], by pairs of tokens or of matrices, whichever is less work."""
        tokens, outputs, inputs = len(self.row), self.left.shape[1], self.right.shape[1]
        if tokens**2 * (outputs + inputs) > (tokens + self.count**2) * outputs * inputs:
            rows = self.dense()
            return rows @ rows.T
        pairs = (self.left @ self.left.T).mul_(self.right @ self.right.T)
        return self.summed(self.summed(pairs).T)

    def summed(self, values: Tensor) -> Tensor:
        """Sums of `values` [T, m] over the tokens of each matrix, [count, m]."""
        return values.new_zeros(self.count, values.shape[1]).index_add_(0, self.row, values)

    def combined(self, weights: Tensor) -> Tensor:
        """The matrices' sum with `weights` [count], flat: [O * I]."""
        return ((weights[self.row, None] * self.left).T @ self.right).reshape(-1)

    def cut(self, start: int, stop: int) -> OuterProducts:
        """Rows `start` to `stop` of every matrix."""
        return OuterProducts(self.left[:, start:stop], self.right, self.row, self.count)

    def matrices(self, first: int, last: int) -> OuterProducts:
        """The matrices `first` to `last` (not included)."""
        tokens = (self.row >= first) & (self.row < last)
        return OuterProducts(self.left[tokens], self.right[tokens], self.row[tokens] - first, last - first)


Entries = Tensor | OuterProducts


class FactorRows:
    """The rows of one block.

    Args:
        parts: for every part of the block, in order, its columns: [r, size of the part], or outer products.
    """

    def __init__(self, parts: Sequence[Entries]):
        self.parts = list(parts)

    def __len__(self) -> int:
        first = self.parts[0]
        return first.count if isinstance(first, OuterProducts) else len(first)

    @property
    def sizes(self) -> list[int]:
        """Number of columns of every part."""
        return [p.left.shape[1] * p.right.shape[1] if isinstance(p, OuterProducts) else p.shape[1] for p in self.parts]

    def dense(self) -> Tensor:
        """A [r, n]."""
        return torch.cat([dense(part) for part in self.parts], dim=1)

    def gram(self) -> Tensor:
        """A A^T [r, r] in float64."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for part in self.parts:
            gram = part.gram() if isinstance(part, OuterProducts) else part @ part.T
            total = total.to(gram.device) + gram.double()
        return total

    def combined(self, weights: Tensor) -> Tensor:
        """A^T weights, [n], in the rows' dtype."""
        found = []
        for part in self.parts:
            like = part.left if isinstance(part, OuterProducts) else part
            wanted = weights.to(like)
            found.append(part.combined(wanted) if isinstance(part, OuterProducts) else wanted @ part)
        return torch.cat(found)

    def slices(self, most: int) -> list[FactorRows]:
        """The rows in slices of at most `most`."""
        if len(self) <= most:
            return [self]
        return [self.taken(first, min(first + most, len(self))) for first in range(0, len(self), most)]

    def taken(self, first: int, last: int) -> FactorRows:
        """The rows `first` to `last` (not included)."""
        return FactorRows(
            [p.matrices(first, last) if isinstance(p, OuterProducts) else p[first:last] for p in self.parts]
        )

    @staticmethod
    def joined(pieces: Sequence[FactorRows]) -> FactorRows:
        """The rows of all `pieces` (of one block), one below the other."""
        return FactorRows([_below(entries) for entries in zip(*(piece.parts for piece in pieces), strict=True)])


def dense(entries: Entries) -> Tensor:
    """The rows of one part [r, size], written out."""
    return entries.dense() if isinstance(entries, OuterProducts) else entries


def _below(entries: Sequence[Entries]) -> Entries:
    outer = [e for e in entries if isinstance(e, OuterProducts)]
    if len(outer) < len(entries):
        return torch.cat([dense(e) for e in entries])
    starts = [sum(e.count for e in outer[:i]) for i in range(len(outer) + 1)]
    return OuterProducts(
        torch.cat([e.left for e in outer]),
        torch.cat([e.right for e in outer]),
        torch.cat([e.row + start for e, start in zip(outer, starts, strict=False)]),
        starts[-1],
    )
