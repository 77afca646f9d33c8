"""Random subsets of labelled samples, cut into micro-batches with little padding.

>>> samples = as_samples(loader)
>>> subset = micro_batches(samples, draw(len(samples), fraction=0.1, seed=0, run=3), size=32)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.arguments import whole_number
from qbert.hessian.samples import Batch, Samples, as_samples, loss_weight, preserved_random_state

# What launching the kernels of one more micro-batch costs, in tokens of computing, by device; on GPUs more than is won.
BATCH_COST = {"cpu": 64}


def draw(count: int, *, fraction: float, seed: int, run: int) -> list[int]:
    """Indices of a random `fraction` of `count` samples, at least one, drawn without replacement.

    Every run draws for itself from the whole set (Q-BERT: ten draws of 10 % each), so runs may overlap.
    """
    generator = torch.Generator().manual_seed(_mixed_seed(seed, run, "draw"))
    size = max(1, round(count * fraction))
    return torch.randperm(count, generator=generator, device="cpu")[:size].tolist()


def micro_batches(
    samples: Samples, indices: Sequence[int], size: int, *, seed: int = 0, batch_cost: int | None = None
) -> list[Batch]:
    """The samples `indices` in micro-batches of at most `size`, like lengths together to keep padding short.

    Collators may use random numbers (masking): they see generators seeded with `seed`, and the caller's are left
    as they were.

    Args:
        batch_cost: cut further where that saves more padding than so many tokens for each further micro-batch; None:
            never.
    """
    with preserved_random_state(seed):
        by_length = sorted(indices, key=lambda i: (samples.length(i), i))
        groups: list[Sequence[int]] = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        if batch_cost is not None:
            groups = [part for group in groups for part in _cut_by_length(samples, group, batch_cost)]
        result = [batch for group in groups for batch in samples.collate(group)]
    return [batch for batch in result if loss_weight(batch) > 0]


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


def random_subset(
    model: nn.Module,
    batches: Any,
    *,
    samples: int | None,
    seed: int,
    collate_fn: Callable[[list[Any]], Batch] | None = None,
    micro_batch_size: int | None = None,
) -> list[Batch]:
    """`samples` random samples of `batches` (None or more than there are: all) in micro-batches.

    Raises:
        ValueError, TypeError: data that cannot be used, or a count that is not positive.
    """
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    view = as_samples(batches, collate_fn=collate_fn, pad_token_id=pad or 0)
    fraction = 1.0 if samples is None else min(1.0, whole_number("samples", samples, least=1) / len(view))
    chosen = draw(len(view), fraction=fraction, seed=whole_number("seed", seed), run=0)
    return micro_batches(view, chosen, micro_batch(micro_batch_size, view), seed=seed)


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
