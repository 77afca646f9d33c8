"""Means of the loss terms between two logs, and the first term that is no longer a number.

>>> means = TermMeans()
>>> means.add(["logits", "hidden"], torch.tensor([0.5, 2.0]), torch.tensor(2.5))
>>> means.pop()
{'logits': 0.5, 'hidden': 2.0}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class TermMeans:
    """Running sums of the terms, kept on the device of the losses."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, names: Sequence[str], terms: Tensor, loss: Tensor) -> tuple[str, float] | None:
        """Take the `terms` [len(names)] of one batch, unless a term or their weighted sum `loss` is not finite.

        Returns:
            None, or (what is not finite, in words; its value).
        """
        if not bool(torch.isfinite(terms).all() & torch.isfinite(loss)):
            values = dict(zip([*names, "sum"], [*terms.tolist(), float(loss.detach())], strict=True))
            name = next(n for n, v in values.items() if not math.isfinite(v))
            return f"loss term {name!r}", values[name]
        for name, value in zip(names, terms, strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        return None

    def pop(self) -> dict[str, float]:
        """The mean of each term since the last call."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
