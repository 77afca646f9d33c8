"""Simulated: how often intervals of few runs hold, and how often equal blocks are told apart."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from qbert.hessian.intervals import interval, omega, p_equal, told_apart

Draw = Callable[[np.random.Generator, int], np.ndarray]

# Distribution -> how runs are drawn, and its |mean| + std.
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, runs: random.normal(-10, 1, runs), 11.0),
    "normal around 0": (lambda random, runs: random.normal(0, 1, runs), 1.0),
    "exponential": (lambda random, runs: random.exponential(1, runs), 2.0),
    "lognormal": (
        lambda random, runs: random.lognormal(0, 1, runs),
        math.exp(0.5) * (1 + math.sqrt(math.e - 1)),
    ),
    "gamma": (lambda random, runs: random.gamma(3, 1, runs), 3 + math.sqrt(3)),
    "uniform": (lambda random, runs: random.uniform(0, 1, runs), 0.5 + math.sqrt(1 / 12)),
}
SIMULATIONS = 500


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_intervals_hold_as_often_as_they_say(kind: str, runs: int) -> None:
    draw, truth = DISTRIBUTIONS[kind]
    random = np.random.default_rng(7)
    bounds = [interval(draw(random, runs), 0.95, 500, random) for _ in range(SIMULATIONS)]
    held = sum(low <= truth <= high for low, high in bounds)
    # Three standard errors of 500 simulations below 95 %.
    assert held >= SIMULATIONS * (0.95 - 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS))


@pytest.mark.parametrize("runs", [3, 10])
@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, "skewed, of both signs"])
def test_equal_blocks_are_rarely_told_apart(kind: str, runs: int) -> None:
    random = np.random.default_rng(8)

    def draw() -> np.ndarray:
        if kind in DISTRIBUTIONS:
            return DISTRIBUTIONS[kind][0](random, runs)
        return 1 - random.exponential(1, runs)

    apart = sum(p_equal(draw(), draw(), 500, random) <= 0.05 for _ in range(SIMULATIONS))
    assert apart <= SIMULATIONS * (0.05 + 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS))


def test_other_shapes_of_the_same_sensitivity_are_rarely_told_apart() -> None:
    random = np.random.default_rng(9)
    apart = sum(
        p_equal(random.normal(4, 0.01, 10), random.exponential(2, 10), 500, random) <= 0.05 for _ in range(SIMULATIONS)
    )
    assert apart <= SIMULATIONS * (0.05 + 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS))


def test_clear_differences_are_told_apart() -> None:
    random = np.random.default_rng(10)
    for runs in (3, 10):
        apart = [p_equal(random.normal(9, 0.1, runs), random.normal(1, 0.1, runs), 500, random) for _ in range(100)]
        assert np.mean(np.array(apart) <= 0.05) > 0.8
    mixed = [p_equal(random.normal(0, 9, 10), random.normal(0, 0.1, 10), 500, random) for _ in range(100)]
    assert np.mean(np.array(mixed) <= 0.05) > 0.9


def test_many_equal_blocks_are_tested_together() -> None:
    random = np.random.default_rng(11)
    any_apart = sum(bool(told_apart(random.uniform(size=11), 0.95).any()) for _ in range(2000))
    assert any_apart <= 2000 * (0.05 + 3 * math.sqrt(0.95 * 0.05 / 2000))
    assert told_apart(np.array([0.001, 0.9, 0.03, 0.02]), 0.95).tolist() == [True, False, False, False]
    assert told_apart(np.array([0.001, 0.01, 0.02, 0.04]), 0.95).tolist() == [True, True, True, True]


def test_runs_without_any_spread_have_no_width() -> None:
    random = np.random.default_rng(0)
    low, high = interval(np.full(4, -2.5), 0.95, 100, random)
    assert (low, high) == (pytest.approx(2.5), pytest.approx(2.5))
    assert interval(np.zeros(3), 0.95, 100, random) == (0.0, 0.0)
    assert omega(np.array([[1.0, -4.0], [3.0, -4.0]])).tolist() == [3.0, 4.0]
