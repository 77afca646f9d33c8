"""Labelled samples behind a DataLoader, a data set or a list of batches, and batches made of them.

The loss of a subset is the mean over its samples, ``L = sum_b w_b L_b / sum_b w_b`` with ``L_b`` the mean loss of
micro-batch b and ``w_b`` the number of things that mean runs over (`loss_weight`), so that L, its gradient and its
Hessian do not depend on how the subset is cut.

    >>> samples = as_samples(loader)
    >>> (batch,) = samples.collate([0, 3, 5])
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from qbert.arguments import whole_number

Batch = Mapping[str, Any]
IGNORED_LABEL = -100
_TOKEN_PADDING = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "bbox": 0,
    "special_tokens_mask": 1,
    "labels": IGNORED_LABEL,
}


def loss_weight(batch: Batch) -> int:
    """Number of terms that a model's mean loss over `batch` averages.

    Integer labels [B] or [B, T] (classification, token classification, masked language model): the number that is
    not -100. Anything else (regression and multi-label targets, question-answering spans): the number of samples B.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return int((labels != IGNORED_LABEL).sum())
    return batch_size(batch)


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: the first dimension of its ids, or of its first tensor that has not one for all.

    Raises:
        ValueError: if the batch holds no tensor with a batch dimension.
    """
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim > 0:
        return len(ids)
    sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0]
    if sizes:
        return next((size for size in sizes if size != 1), 1)
    raise ValueError(
        f"batches: a batch with the keys {sorted(batch)} holds no tensor; pass dicts of tensors such as "
        "{'input_ids': [B, T], 'attention_mask': [B, T], 'labels': [B]}"
    )


class Samples(Protocol):
    """Samples that can be counted and collated by index."""

    default_batch_size: int

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Length in tokens of one sample, 0 where unknown; only used to put samples of like length together."""

    def collate(self, indices: Sequence[int]) -> list[Batch]:
        """The samples `indices` as one batch, or several where they do not fit into one."""


class DatasetSamples:
    """Samples of a map-style data set, put together by its collator."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Batch] | None, default_batch_size: int):
        self.dataset, self.default_batch_size = dataset, default_batch_size
        self.collate_fn = collate_fn or default_collate

    def __len__(self) -> int:
        return len(self.dataset)

    def length(self, index: int) -> int:
        """Tokens in one sample, 0 where it has no `input_ids`."""
        sample = self.dataset[index]
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
        return 0 if ids is None else len(ids)

    def collate(self, indices: Sequence[int]) -> list[Batch]:
        """One batch, made by the collator.

        Raises:
            ValueError: if torch's own collator cannot put the samples together.
        """
        samples = [self.dataset[int(i)] for i in indices]
        try:
            batch = self.collate_fn(samples)
        except (RuntimeError, TypeError) as error:
            if self.collate_fn is not default_collate:
                raise
            raise ValueError(
                f"batches: torch's default_collate cannot make a batch of these samples ({error}); give a collate_fn, "
                "such as DataCollatorWithPadding(tokenizer)"
            ) from error
        return [_checked_batch(batch)]


class BatchSamples:
    """Rows of ready-made batches, put together again where keys and shapes allow.

    With `trim`, rows with ``labels`` lose the padding at their end that they came with and get what their new batch
    needs: for losses that do not see masked tokens. (Losses over spans do: their softmax runs over all positions.)
    """

    def __init__(self, batches: Sequence[Batch], pad_token_id: int = 0, trim: bool = False):
        self.batches = [_checked_batch(b) for b in batches]
        self.pad_token_id, self.trim = pad_token_id, trim
        sizes = [batch_size(b) for b in self.batches]
        self.default_batch_size = max(sizes, default=1)
        self.rows = [(b, r) for b, size in enumerate(sizes) for r in range(size)]

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, index: int) -> int:
        """Tokens in one row."""
        return self._tokens(self._row(index))

    def collate(self, indices: Sequence[int]) -> list[Batch]:
        """One batch for each kind of row."""
        groups: dict[Any, list[dict[str, Any]]] = {}
        for index in indices:
            row = self._row(index)
            groups.setdefault(self._signature(row), []).append(row)
        return [self._merge(rows) for rows in groups.values()]

    def _row(self, index: int) -> dict[str, Any]:
        b, r = self.rows[int(index)]
        batch = self.batches[b]
        size = batch_size(batch)
        row = {
            k: v[r : r + 1] if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == size else v
            for k, v in batch.items()
        }
        tokens, mask = self._tokens(row), row.get("attention_mask")
        if not self.trim or "labels" not in row:
            return row
        if not isinstance(mask, Tensor) or mask.shape != (1, tokens) or self._signature(row)[-1] is not None:
            return row
        used = mask[0] != 0
        labels = row.get("labels")
        if isinstance(labels, Tensor) and labels.shape == (1, tokens):
            used = used | (labels[0] != IGNORED_LABEL)
        end = int(used.nonzero().max()) + 1 if used.any() else tokens
        return {k: v[:, :end] if self._by_token(v, tokens) else v for k, v in row.items()}

    @staticmethod
    def _tokens(batch: Batch) -> int:
        ids = batch.get("input_ids")
        return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else 0

    @staticmethod
    def _by_token(value: Any, tokens: int) -> bool:
        """Whether a tensor says something of each token: [B, T], or [B, T, ...] as the boxes of LayoutLM."""
        return isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens > 0

    def _signature(self, row: Batch) -> tuple[Any, ...]:
        """Rows with equal signatures can share a batch: equal keys and shapes, T apart where it can be padded."""
        tokens = self._tokens(row) if "attention_mask" in row else 0
        signature: list[Any] = []
        paddable = True
        for key, value in row.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                signature.append((key, value.item() if isinstance(value, Tensor) else repr(value)))
                continue
            shape: tuple[Any, ...] = tuple(value.shape[1:])
            if self._by_token(value, tokens):
                paddable &= key == "input_ids" or key in _TOKEN_PADDING
                shape = ("T", *shape[1:])
            signature.append((key, shape, value.dtype))
        return (*signature, None if paddable else tokens)

    def _merge(self, rows: list[dict[str, Any]]) -> Batch:
        tokens = max(self._tokens(row) for row in rows)
        merged: dict[str, Any] = {}
        for key, first in rows[0].items():
            if not isinstance(first, Tensor) or first.ndim == 0:
                merged[key] = first
                continue
            values = [row[key] for row in rows]
            if first.ndim > 1 and any(v.shape[1] != first.shape[1] for v in values):
                fill, behind = _TOKEN_PADDING.get(key, self.pad_token_id), (0, 0) * (first.ndim - 2)
                values = [torch.nn.functional.pad(v, (*behind, 0, tokens - v.shape[1]), value=fill) for v in values]
            merged[key] = torch.cat(values)
        return merged


def as_samples(
    batches: Any,
    *,
    collate_fn: Callable[[list[Any]], Batch] | None = None,
    pad_token_id: int = 0,
    trim: bool = False,
) -> Samples:
    """One view on the three ways to hand over data.

    Args:
        batches: a DataLoader (its data set and collator are used, its sampler is not), a map-style data set, or
            a sequence of dicts of tensors.
        collate_fn: makes a batch of a list of samples; only for a data set (default: torch's).
        pad_token_id: fills `input_ids` where rows of several ready-made batches are put together.
        trim: take the padding off the rows of ready-made batches, see `BatchSamples`.

    Raises:
        ValueError: no samples at all, or a batch that is not a dict of tensors.
        TypeError: anything else than the three.
    """
    samples: Samples
    if isinstance(batches, DataLoader):
        if isinstance(batches.dataset, IterableDataset) or batches.batch_size is None:
            with preserved_random_state():
                samples = BatchSamples(list(batches), pad_token_id, trim)
        else:
            collate_fn = collate_fn or batches.collate_fn
            samples = DatasetSamples(batches.dataset, collate_fn, batches.batch_size)
    elif isinstance(batches, Mapping):
        raise TypeError(
            f"batches: one {type(batches).__name__} was given; pass a list of dicts of tensors, even if it holds only "
            "one, or one split of a DatasetDict"
        )
    elif isinstance(batches, list | tuple) and batches and collate_fn is None:
        samples = BatchSamples(batches, pad_token_id, trim)
    elif hasattr(batches, "__len__") and hasattr(batches, "__getitem__"):
        samples = DatasetSamples(batches, collate_fn, 32)
    else:
        raise TypeError(
            f"batches: {type(batches).__name__} is neither a DataLoader, a data set with __len__ and __getitem__, "
            "nor a list of dicts; an iterator can be passed as list(iterator)"
        )
    if len(samples) == 0:
        raise ValueError("batches: no samples; pass at least one labelled sample")
    return samples


@contextlib.contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Leave the global generators of Python, numpy and torch as they were; inside, they start from `seed`."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _as_tensor(array: np.ndarray) -> Any:
    """A tensor of numbers; a list of what torch has no dtype for, such as text."""
    try:
        return torch.from_numpy(array)
    except TypeError:
        return array.tolist()


def _checked_batch(batch: Any) -> Batch:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batches: a batch is a {type(batch).__name__}, but it must be a dict of tensors with the model's "
            "argument names; give a collate_fn that makes one"
        )
    converted = {k: _as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    size = batch_size(converted)
    for key, value in converted.items():
        if isinstance(value, list | tuple) and (key == "labels" or not all(isinstance(entry, str) for entry in value)):
            told = f"of {type(value[0]).__name__}" if value else "of nothing"
            raise ValueError(
                f"batches: {key!r} is a {type(value).__name__} {told}; make a tensor of it, in a collate_fn or before"
            )
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] not in (1, size):
            raise ValueError(
                f"batches: {key!r} has the shape {tuple(value.shape)} in a batch of {size} samples; its first "
                "dimension must be that of the samples (constants belong into loss_fn)"
            )
    ids = converted.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim < 2:
        raise ValueError(
            f"batches: input_ids has the shape {tuple(ids.shape)} instead of [B, T]; for a list of single samples give "
            "a collate_fn that makes a batch of them"
        )
    return converted


# What launching the kernels of one more micro-batch costs, in tokens of computing, by device; on GPUs more than is won.
# (MiniLM on one EPYC core: 18 to 25.)
BATCH_COST = {"cpu": 16}


def draw(count: int, *, fraction: float, seed: int, run: int, attempt: int = 0) -> list[int]:
    """Indices of a random `fraction` of `count` samples, at least one, drawn without replacement.

    Every run draws for itself from the whole set (Q-BERT: ten draws of 10 % each), so runs may overlap. Each `attempt`
    is another draw, for runs that find no label among their samples.
    """
    generator = torch.Generator().manual_seed(_mixed_seed(seed, run, f"draw {attempt}" if attempt else "draw"))
    size = max(1, round(count * fraction))
    return torch.randperm(count, generator=generator, device="cpu")[:size].tolist()


def micro_batches(
    samples: Samples,
    indices: Sequence[int],
    size: int,
    *,
    seed: int = 0,
    batch_cost: int | None = None,
    unlabelled: bool = False,
) -> list[Batch]:
    """The samples `indices` in micro-batches of at most `size`, like lengths together to keep padding short.

    Collators may use random numbers (masking): they see generators seeded with `seed`, and the caller's are left
    as they were.

    Args:
        batch_cost: cut further where that saves more padding than so many tokens for each further micro-batch; None:
            never.
        unlabelled: keep micro-batches without a label.
    """
    with preserved_random_state(seed):
        by_length = sorted(indices, key=lambda i: (samples.length(i), i))
        groups: list[Sequence[int]] = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        if batch_cost is not None:
            groups = [part for group in groups for part in _cut_by_length(samples, group, batch_cost)]
        result = [batch for group in groups for batch in samples.collate(group)]
    return [batch for batch in result if unlabelled or loss_weight(batch) > 0]


def _cut_by_length(samples: Samples, group: Sequence[int], batch_cost: int) -> list[Sequence[int]]:
    """`group`, sorted by length, cut so that padded tokens + batch_cost * parts is least (dynamic programming)."""
    lengths = [samples.length(i) for i in group]
    best, cut = [0], [0]  # of the first j samples: least cost, and where its last part begins
    for end in range(1, len(group) + 1):
        costs = [best[start] + (end - start) * lengths[end - 1] + batch_cost for start in range(end)]
        cut.append(min(range(end), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    parts: list[Sequence[int]] = []
    end = len(group)
    while end:
        parts.append(group[cut[end] : end])
        end = cut[end]
    return parts[::-1]


def micro_batch(size: int | None, samples: Samples) -> int:
    """`size`, or where it is None the batch size that `samples` came with.

    Raises:
        TypeError, ValueError: if it is no whole number of at least 1.
    """
    return samples.default_batch_size if size is None else whole_number("micro_batch_size", size, least=1)


def fingerprint(batches: Iterable[Batch]) -> str:
    """sha256 over keys, shapes, dtypes and values of `batches`."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous()
                digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{key}{value!r}".encode())
    return digest.hexdigest()


def _mixed_seed(seed: int, run: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}/{run}".encode()).digest()[:7], "big")
