r"""Zeros in a matrix, chosen and made good by what the layer is given (OBS, SparseGPT), in patterns a chip can use.

It stands alone because it takes tensors only: which matrices of a model lose what is for `students.pruned` to say.

With inputs x of second moment :math:`C`, :math:`H = C + \lambda I = (U + I) D (U + I)^T` with U strictly upper
triangular, setting column j of a row to zero costs :math:`D_j \tilde w_j^2`, where :math:`\tilde w_j` is the weight
after it has taken over what the zeros before it left undone. Columns are gone through in order, each run of columns
loses its cheapest weights, and at last all that stay are settled by coordinate descent, which is exact in the limit.

    >>> sparsify(weight, moment, Pattern.parse("2:4"))
    >>> sparsify(weight, None, Pattern.parse(0.5))              # by magnitude

References: Hassibi and Stork 1993 (OBS); Frantar and Alistarh 2023, SparseGPT, section 3; Mishra et al. 2021 (2:4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.quantizers.rounding import damped

_BLOCK = 128
_SETTLED = 1e-6  # share of the weights' size below which a sweep changes nothing that counts


@dataclass(frozen=True)
class Pattern:
    """Which weights may be zero.

    Attributes:
        zeros, of: every run of `of` neighbouring columns of a row has `zeros` zeros; `of` 0 means no pattern.
        share: the share of zeros where there is no pattern, in every `_BLOCK` columns of all rows together.
    """

    zeros: int = 0
    of: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, pattern: Any) -> Pattern:
        """From "N:M" (N of M are zero, as in 2:4), or a share of zeros between 0 and 1.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(pattern, Pattern):
            return pattern
        if isinstance(pattern, float) and 0 < pattern < 1:
            return cls(share=pattern)
        head, colon, tail = str(pattern).partition(":")
        if colon and head.isdigit() and tail.isdigit() and 0 < int(head) < int(tail):
            return cls(int(tail) - int(head), int(tail), 1 - int(head) / int(tail))
        raise ValueError(
            f'pattern={pattern!r} is not known; use "2:4" (2 of 4 are kept), or a share of zeros such as 0.5'
        )

    def check(self, name: str, columns: int) -> None:
        """Raises ValueError if a matrix `name` with so many columns cannot have the pattern."""
        if self.of and columns % self.of:
            raise ValueError(
                f"pattern: {name} has {columns} columns, no multiple of {self.of}; leave it out by `names`"
            )

    def mask(self, scores: Tensor) -> Tensor:
        """True for the weights with the least of `scores` [O, I], as many as the pattern has zeros."""
        if self.of:
            runs = scores.unflatten(1, (-1, self.of))
            least = runs.argsort(dim=2, stable=True)[..., : self.zeros]
            return torch.zeros_like(runs, dtype=torch.bool).scatter_(2, least, True).flatten(1)
        count = round(self.share * scores.numel())
        least = scores.flatten().argsort(stable=True)[:count]
        return (
            torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
            .index_fill_(0, least, True)
            .view_as(scores)
        )


def half_is_zero(matrix: Tensor) -> bool:
    """Whether two in every four neighbouring columns of each row of [O, I] are exactly zero (2:4)."""
    if matrix.is_meta or matrix.shape[1] % 4 or not matrix.numel():
        return False
    rows = (matrix[:1], matrix)  # nearly every dense matrix is told by its first row
    return all(bool(((part == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()) for part in rows)


def sparsify(
    weight: Tensor,
    moment: Tensor | None,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    compensate: bool = True,
    sweeps: int = 10,
) -> Tensor:
    """The weights with zeros in a pattern, for the least change of the layer's outputs.

    Args:
        weight: [O, I] float.
        moment: [I, I], C = E[x x^T] of the inputs; None chooses by magnitude and changes nothing else.
        pattern: where zeros may be.
        damping: share of C's mean diagonal that is added to its diagonal.
        compensate: whether the weights that stay make good for those that go.
        sweeps: at most so many rounds of coordinate descent at the end.

    Returns:
        [O, I] in the dtype of `weight`.

    Raises:
        ValueError: if `moment` is not finite, or of another size.
    """
    if moment is None:
        return weight.masked_fill(pattern.mask(weight.abs()), 0)
    columns = weight.shape[1]
    if moment.shape != (columns, columns):
        raise ValueError(f"moment: expected [{columns}, {columns}], got {list(moment.shape)}")
    metric = damped(moment.to(weight.device), damping)
    target = weight.detach().double()
    feedback, price = triangle(metric)
    if not compensate:
        inverse = torch.linalg.inv(metric).diagonal()
        return weight.masked_fill(pattern.mask(target.square() / inverse), 0)
    run = pattern.of or _BLOCK
    off = torch.zeros_like(target)  # original minus present weights
    zeros = torch.zeros_like(target, dtype=torch.bool)
    for start in range(0, columns, run):
        block = slice(start, min(start + run, columns))
        wanted = target[:, block] + off[:, :start] @ feedback[:start, block]
        chosen = pattern.mask(wanted.square() * price[block])
        inside = feedback[block, block]
        for at in range(chosen.shape[1]):
            value = wanted[:, at] + off[:, start : start + at] @ inside[:at, at]
            off[:, start + at] = target[:, start + at] - value.masked_fill(chosen[:, at], 0)
        zeros[:, block] = chosen
    return settle(target, zeros, metric, target - off, sweeps).to(weight.dtype)


def triangle(metric: Tensor) -> tuple[Tensor, Tensor]:
    """U [I, I], strictly upper triangular, and the diagonal D [I] of a metric H = (U + I) D (U + I)^T."""
    upper = torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)
    diagonal = upper.diagonal()
    return (upper / diagonal).triu(1), diagonal.square()


def settle(target: Tensor, zeros: Tensor, metric: Tensor, start: Tensor, sweeps: int) -> Tensor:
    """Weights of least error tr(dW H dW^T) that are zero where `zeros`, by coordinate descent.

    Args:
        target: [O, I] float64, the weights to stand in for.
        zeros: [O, I] bool.
        metric: H [I, I] float64, positive definite.
        start: [O, I] float64, zero where `zeros`; the error only falls from there.
        sweeps: at most so many rounds over all columns.
    """
    if not sweeps:
        return start
    off = (target - start).T.contiguous()  # [I, O]
    kept = (~zeros).T
    pull = (metric / metric.diagonal()).contiguous()  # [i, j]: H_ij / H_jj
    size = float(target.abs().mean()) or 1.0
    for _ in range(sweeps):
        moved = 0.0
        for begin in range(0, len(off), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            near = off[block]
            inside = pull[block, block]
            gradient = pull[:, block].T @ off  # what block columns see of all differences
            for at in range(len(near)):
                step = gradient[at] * kept[begin + at]
                near[at] -= step
                gradient -= inside[at].unsqueeze(1) * step
                moved = max(moved, float(step.abs().max()))
        if moved < _SETTLED * size:
            break
    return target - off.T
