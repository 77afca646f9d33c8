"""A few rows of a data set of any kind, to look at before the training begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

from torch.utils.data import DataLoader, Subset

_SAMPLE = 256
_BATCH_SIZE = 64


def first_rows(dataset: Any, count: int, columns: Collection[str]) -> list[dict[str, Any]]:
    """The first `count` rows, or as many as there are, cut down to `columns`; of an iterable data set too.

    Raises:
        ValueError: the data set is empty.
    """
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    rows = [dataset[i] for i in range(min(count, len(dataset)))] if indexed else itertools.islice(dataset, count)
    found = [{key: value for key, value in row.items() if key in columns} for row in rows]
    if not found:
        raise ValueError("train_dataset is empty; give at least one row to distill on")
    return found


def sample_batches(dataset: Any, collate: Callable[[list[Any]], Any]) -> list[Any]:
    """Batches of up to 256 rows from all over the data set; none of one that has no length."""
    if not hasattr(dataset, "__len__"):
        return []
    indices = range(0, len(dataset), max(len(dataset) // _SAMPLE, 1))
    subset: Any = Subset(dataset, list(indices)[:_SAMPLE])
    return list(DataLoader(subset, _BATCH_SIZE, collate_fn=collate))
