"""What lookup tables are used for on unlabelled data: how often each row is read, and how much that matters.

It stands alone because it reads texts and tables only: `quantize_model` asks it how rows weigh, and quantizes them.

    >>> table_uses(model, batches, [model.embeddings.word_embeddings])

Few sentences hold few of the rows. All rows that they do not hold together are expected to be read as often as rows
that a single sentence holds (Good 1953), and each of them in proportion to 1 / (its number + 100): tokenizers number
their pieces from frequent to rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qbert.calibration import Batch
from qbert.layers.tables import TableUse
from qbert.outputs import Call, output_gradients

_FIRST_RANKS = 100.0
_LEAST_UNSEEN, _MOST_UNSEEN = 1e-3, 0.5


class UseCounter:
    """Collects what tables are used for, call by call.

    Attributes:
        counts: table -> [V] how often each row was read.
        holding: table -> [V] how many samples hold it.
    """

    def __init__(self, tables: Sequence[nn.Module]) -> None:
        rows = {t: t.weight.shape for t in tables}  # type: ignore[union-attr]
        self.counts = {t: torch.zeros(v, dtype=torch.float64) for t, (v, _) in rows.items()}  # type: ignore[misc]
        self.holding = {t: torch.zeros(v, dtype=torch.float64) for t, (v, _) in rows.items()}  # type: ignore[misc]
        self._squares = {t: torch.zeros(d, d, dtype=torch.float64) for t, (_, d) in rows.items()}  # type: ignore[misc]

    def add(self, calls: Iterable[Call]) -> None:
        """Count one batch; rows whose gradient is zero, as that of padding, are not read."""
        for call in calls:
            if call.module not in self.counts:
                continue
            gradients = call.gradient.detach().flatten(0, -2).double().cpu()
            read = gradients.square().sum(1) > 0
            ids = call.input.cpu()
            size = len(self.counts[call.module])
            self.counts[call.module] += torch.bincount(ids.reshape(-1)[read], minlength=size)
            for row, own in zip(ids.flatten(0, -2), read.view(ids.shape).flatten(0, -2), strict=True):
                self.holding[call.module][row[own].unique()] += 1
            gradients = gradients[read]
            self._squares[call.module] += gradients.T @ gradients

    def use(self, table: nn.Module) -> TableUse:
        """What one of the tables is used for."""
        counts = self.counts[table]
        total = float(counts.sum())
        metric = self._squares[table] / max(total, 1.0)
        return TableUse(expected_shares(counts, self.holding[table]), metric)


def table_uses(model: nn.Module, batches: Sequence[Batch], tables: Sequence[nn.Module]) -> dict[nn.Module, TableUse]:
    """Table -> what it is used for, from one forward and one backward pass over `batches`."""
    counter = UseCounter(tables)
    for _, calls in output_gradients(model, batches, tables):
        counter.add(calls)
    return {table: counter.use(table) for table in tables}


def expected_shares(counts: Tensor, holding: Tensor) -> Tensor:
    """The share [V] of all tokens to come that each row is expected to be.

    Args:
        counts: how often each row was read, [V].
        holding: in how many samples it was, [V].
    """
    total = float(counts.sum())
    prior = 1.0 / (torch.arange(len(counts), dtype=torch.float64) + _FIRST_RANKS)
    if total == 0:
        return prior / prior.sum()
    unseen = counts == 0
    if not bool(unseen.any()):
        return counts / total
    share = min(max(float(counts[holding == 1].sum()) / total, _LEAST_UNSEEN), _MOST_UNSEEN)
    prior = torch.where(unseen, prior, 0.0)
    return counts / total * (1 - share) + share * prior / prior.sum()
