"""Rivals of a plan keep its size and their own rule, and none is predicted to be better than the exact choice."""

from typing import Any

import pytest
import torch
from encoders import build, inputs_for

from qbert.allocation.whole_file import FilePlan
from qbert.pipeline import rivals


@pytest.fixture(scope="module")
def files() -> FilePlan:
    torch.manual_seed(0)
    model = build("bert").eval()
    return FilePlan(model, [inputs_for("bert", batch=6) for _ in range(4)], groups=4)


def rule_of(files: FilePlan, picked: list[int], word: str) -> set[int]:
    pairs = zip(files.items, picked, strict=True)
    return {item.options[p].rule["bits"] for item, p in pairs if any(word in name for name in item.names)}


def middle(files: FilePlan) -> float:
    largest = sum(max(option.size for option in item.options) for item in files.items) + files.constant
    return (files.smallest_mb + largest / 1e6) / 2


def test_uniform_has_one_width_for_matrices(files: FilePlan) -> None:
    picked = rivals.uniform(files, middle(files))
    assert picked is not None and len(rule_of(files, picked, "layer")) == 1


def test_ranked_gives_the_upper_half_more(files: FilePlan) -> None:
    picked = rivals.ranked(files, ["encoder.layer.1", "encoder.layer.0"], middle(files))
    assert picked is not None
    (above,), (below,) = (rule_of(files, picked, f"encoder.layer.{i}.") for i in (1, 0))
    assert above > below


@pytest.mark.parametrize("seed", range(3))
def test_chance_fills_the_budget_and_differs_by_seed(files: FilePlan, seed: int) -> None:
    size = middle(files)
    picked = rivals.by_chance(files, size, seed)
    assert picked is not None and picked == rivals.by_chance(files, size, seed) != rivals.by_chance(
        files, size, seed + 9
    )
    room = size * 1e6 - files.size(picked)
    assert room >= 0
    for item, p in zip(files.items, picked, strict=True):
        assert all(o.size - item.options[p].size > room for o in item.options if o.size > item.options[p].size)


def test_none_is_predicted_to_be_better_than_the_exact_choice(files: FilePlan) -> None:
    size = middle(files)
    best = files.damage(files.choose(size))
    others: list[Any] = [
        rivals.uniform(files, size),
        rivals.ranked(files, ["encoder.layer.0", "encoder.layer.1"], size),
    ]
    for picked in [*others, *(rivals.by_chance(files, size, seed) for seed in range(4))]:
        assert picked is not None
        assert files.size(picked) <= size * 1e6 and files.damage(picked) >= best - 1e-12


def test_a_size_that_nothing_fits_gives_none(files: FilePlan) -> None:
    size = files.smallest_mb * 0.9
    assert rivals.uniform(files, size) is None and rivals.by_chance(files, size, 0) is None
    assert rivals.ranked(files, ["encoder.layer.0", "encoder.layer.1"], size) is None
