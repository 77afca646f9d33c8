"""Simpler choices of equal size, for a plan to be held against: uniform bits, the paper's ranking, and chance.

Each picks an option for every item of a `FilePlan` within the same bytes; where a rule leaves something open, as the
paper's leaves which two widths, it gets what the plan's own damages say is best, so that it loses by its rule alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from qbert.allocation.whole_file import FilePlan, Item, Option


def uniform(files: FilePlan, size_mb: float) -> list[int] | None:
    """One width for all matrices and one for all tables, the least damaging pair that fits; None if none does."""
    return _least(
        files,
        size_mb,
        (
            [_width_option(item, tables if _is_table(item) else bits) for item in files.items]
            for bits, tables in itertools.product(files.widths, repeat=2)
        ),
    )


def ranked(files: FilePlan, ranking: Sequence[str], size_mb: float) -> list[int] | None:
    """The paper's rule: the upper half of the ranked layers in the larger of two widths (Q-BERT, section 3.1).

    Args:
        files: options of every item.
        ranking: names of the layers, the most sensitive first (`HessianSpectrum.ranking`).
        size_mb: largest file, 10^6 bytes.
    """
    upper = tuple(ranking[: (len(ranking) + 1) // 2])

    def width(item: Item, small: int, large: int, tables: int) -> int:
        if _is_table(item):
            return tables
        in_upper = any(name == top or name.startswith(top + ".") for name in item.names for top in upper)
        return large if in_upper else small

    return _least(
        files,
        size_mb,
        (
            [_width_option(item, width(item, small, large, tables)) for item in files.items]
            for small, large in itertools.combinations(sorted(files.widths), 2)
            for tables in files.widths
        ),
    )


def by_chance(files: FilePlan, size_mb: float, seed: int) -> list[int] | None:
    """Chance that fills the budget: random larger options, until no item has one that still fits."""
    generator = np.random.default_rng(seed)
    picked = [min(_plain(item), key=_size_of(item)) for item in files.items]
    if files.size(picked) > size_mb * 1e6:
        return None
    while True:
        room = size_mb * 1e6 - files.size(picked)
        steps = [
            (i, o)
            for i, item in enumerate(files.items)
            for o, option in enumerate(item.options)
            if option.parts is None and 0 < option.size - item.options[picked[i]].size <= room
        ]
        if not steps:
            return picked
        items = sorted({i for i, _ in steps})
        chosen = items[generator.integers(len(items))]
        options = [o for i, o in steps if i == chosen]
        picked[chosen] = options[generator.integers(len(options))]


def _least(files: FilePlan, size_mb: float, choices: object) -> list[int] | None:
    fitting = [
        picked
        for picked in choices  # type: ignore[attr-defined]
        if None not in picked and files.size(picked) <= size_mb * 1e6
    ]
    return min(fitting, key=files.damage) if fitting else None


def _width_option(item: Item, bits: int) -> int | None:
    """Index of the plain option of so many bits, the nearest above where there is not that one; None if none is."""
    plain = [(o.rule["bits"], o.damage, i) for i, o in enumerate(item.options) if not _is_composed(o)]
    at_least = [entry for entry in plain if entry[0] >= bits]
    return min(at_least)[2] if at_least else None


def _plain(item: Item) -> list[int]:
    """Indices of the options that leave the structure as it is."""
    return [i for i, option in enumerate(item.options) if option.parts is None]


def _is_composed(option: Option) -> bool:
    return option.parts is not None or bool(option.rule.get("rank") or option.rule.get("row_bits"))


def _is_table(item: Item) -> bool:
    return any("embeddings" in name for name in item.names)


def _size_of(item: Item) -> Callable[[int], int]:
    return lambda index: item.options[index].size
