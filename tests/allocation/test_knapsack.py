"""Exact choices under budgets against every choice, against dynamic programming on whole numbers, and against HiGHS."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.allocation import knapsack
from qbert.allocation.knapsack import choose, front, total

KINDS = ("small whole numbers", "large whole numbers", "reals", "six decades", "six decades of both", "equal ones")


def numbers(kind: str, random: np.random.Generator, options: list[int]) -> list[list[float]]:
    def one() -> float:
        if kind == "small whole numbers":
            return float(random.integers(0, 20))
        if kind == "large whole numbers":
            return float(random.integers(1, 10**15))
        if kind == "reals":
            return float(random.uniform(-1, 10))
        if kind == "equal ones":
            return float(random.integers(1, 3)) / 10
        return float(10 ** random.uniform(-3, 3))

    return [[one() for _ in range(count)] for count in options]


@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=250, deadline=None)
def test_against_every_choice(kind: str, budgets: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    options = random.integers(1, 5, size=random.integers(1, 6)).tolist()
    damage = numbers(kind if kind == "six decades of both" else "reals", random, options)
    costs = [numbers(kind, random, options) for _ in range(budgets)]
    every = list(itertools.product(*map(range, options)))
    # Bounds that a choice reaches exactly, to the last bit, and others.
    reached = every[random.integers(len(every))]
    bounds = [total(c, reached) * float(random.choice([1.0, 1.0, random.uniform(0.5, 1.5)])) for c in costs]
    kept = [p for p in every if all(total(c, p) <= b for c, b in zip(costs, bounds, strict=True))]
    picked = choose(damage, costs, bounds)
    if not kept:
        assert picked is None
        return
    assert picked is not None and tuple(picked) in kept
    best = min(total(damage, p) for p in kept)
    assert total(damage, picked) == pytest.approx(best, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("kind", ["damage falls with cost", "damage nearly a function of cost", "no relation"])
def test_against_dynamic_programming(kind: str) -> None:
    random = np.random.default_rng(5)
    for _ in range(8):
        items = int(random.integers(20, 60))
        cost = np.sort(random.integers(1, 60, size=(items, 4)), axis=1)
        damage = np.sort(random.lognormal(0, 2, size=(items, 4)), axis=1)[:, ::-1]
        if kind == "damage nearly a function of cost":
            damage = 100 - cost * random.uniform(0.95, 1.05, size=(items, 4))
        elif kind == "no relation":
            damage = random.uniform(0, 1, size=(items, 4))
        budget = int(random.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum()))
        least = np.zeros(budget + 1)  # of the items so far, for at most so much
        for harms, spends in zip(damage, cost, strict=True):
            fitting = [
                np.concatenate([np.full(min(c, budget + 1), np.inf), least[: max(0, budget + 1 - c)]]) + d
                for d, c in zip(harms, spends.tolist(), strict=True)
            ]
            least = np.min(fitting, axis=0)
        picked = choose(damage.tolist(), [cost.tolist()], [budget])
        assert picked is not None and total(cost.tolist(), picked) <= budget
        assert total(damage.tolist(), picked) == pytest.approx(least[-1], rel=1e-12)


def test_ten_thousand_items_are_within_a_step_of_their_bound() -> None:
    random = np.random.default_rng(0)
    weights = random.choice([384 * 384, 384 * 1536, 768 * 768, 768 * 3072], size=(10_000, 1))
    widths = np.array([2, 3, 4, 8])
    damage = random.lognormal(0, 1.5, size=(10_000, 1)) * weights * 4.0**-widths
    cost = weights * widths / 8
    budget = float(np.floor(cost.min(axis=1).sum() + 0.37 * np.ptp(cost, axis=1).sum()))
    picked = choose(damage.tolist(), [cost.tolist()], [budget])
    assert picked is not None and total(cost.tolist(), picked) <= budget
    # No choice is below the Lagrangian bound, whatever the multiplier.
    bounds = [(damage + m * cost).min(axis=1).sum() - m * budget for m in np.logspace(-6, 2, 3000)]
    assert max(bounds) <= total(damage.tolist(), picked) <= max(bounds) * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_highs_finds_the_same_where_it_has_to_decide(seed: int, monkeypatch: Any) -> None:
    random = np.random.default_rng(seed)
    damage = random.uniform(0, 1, size=(12, 3)).tolist()
    costs = random.integers(1, 40, size=(2, 12, 3)).astype(float)
    bounds = [float(math.floor(c.min(axis=1).sum() + 0.4 * np.ptp(c, axis=1).sum())) for c in costs]
    picked = choose(damage, costs.tolist(), bounds)
    monkeypatch.setattr(knapsack, "_MOST_STATES", 0)
    decided = choose(damage, costs.tolist(), bounds)
    assert (picked is None) == (decided is None)
    if picked is not None and decided is not None:
        assert total(damage, picked) == pytest.approx(total(damage, decided), rel=1e-9)


def test_numbers_of_any_size_are_compared_exactly() -> None:
    assert choose([[2.0, 1.0]], [[[1e30, 1e30 * (1 + 2**-52)]]], [1e30]) == [0]
    assert choose([[2.0, 1.0]], [[[1e-300, 1e300]]], [1e300]) == [1]
    assert choose([[2.0, 1.0]], [[[1e-300, 1e300]]], [1e299]) == [0]
    assert choose([[2.0, 1.0], [2.0, 1.0]], [[[0.1, 0.2], [0.1, 0.2]]], [0.1 + 0.2]) in ([0, 1], [1, 0])
    assert choose([[2.0, 1.0]], [[[1.0, 2.0]]], [math.inf]) == [1]
    assert choose([], [[]], [0]) == [] and choose([], [[]], [-1]) is None and choose([[]], [[[]]], [1]) is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    for damage, cost in (([[wrong]], [[1.0]]), ([[1.0]], [[wrong]])):
        with pytest.raises(ValueError, match="damage, costs and budgets: one of them holds NaN or infinity"):
            choose(damage, [cost], [1.0])


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_front_of_reals_against_every_choice(seed: int, items: int) -> None:
    random = np.random.default_rng(seed)
    options = random.integers(1, 4, size=items).tolist()
    damage, cost = numbers("reals", random, options), numbers("reals", random, options)
    every = [(total(cost, p), total(damage, p)) for p in itertools.product(*map(range, options))]
    optimal = sorted(p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every))
    found = front(damage, cost)
    np.testing.assert_allclose([(c, d) for c, d, _ in found], optimal, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([(total(cost, p), total(damage, p)) for _, _, p in found], optimal, atol=1e-12)


def test_front_of_many_items_has_the_choices_of_its_budgets() -> None:
    random = np.random.default_rng(1)
    widths = np.array([2, 3, 4, 8])
    cost = (random.choice([1, 4], size=(150, 1)) * widths).astype(float).tolist()
    damage = (random.lognormal(0, 1, size=(150, 1)) * 4.0**-widths).tolist()
    found = front(damage, cost)
    for spent, harm, picked in found[:: len(found) // 10]:
        best = choose(damage, [cost], [spent])
        assert best is not None and total(damage, best) == pytest.approx(harm, rel=1e-12)
        assert (total(cost, picked), total(damage, picked)) == (spent, pytest.approx(harm, rel=1e-12))
