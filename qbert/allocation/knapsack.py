r"""Exact choice of one option for every item under budgets (the multiple-choice knapsack problem).

.. math:: \min_{o} \sum_i d_{i,o_i} \quad\text{subject to}\quad \sum_i c^k_{i,o_i} \le B_k \ \text{for every budget } k

`choose` solves it by mixed-integer programming (HiGHS through ``scipy.optimize.milp``); `front` gives all optimal
trade-offs of one cost at once by dynamic programming over the items, without the states that another one dominates.

    >>> choose(damage=[[5.0, 1.0], [2.0, 0.5]], costs=[[[2, 3], [2, 3]]], budgets=[5])
    [1, 0]

References: HAWQ-V3 (Yao et al. 2021, section 3.4) for the formulation; Kellerer, Pferschy, Pisinger, "Knapsack
Problems", 2004, chapter 11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Table = Sequence[Sequence[float]]  # [items][options], rows of unequal length allowed
# HiGHS stops at an absolute gap of 1e-6: with the largest damage at 1e6, that is 1e-12 of it.
_OBJECTIVE_SCALE = 1e6
_MOST_CUTS = 50


def choose(damage: Table, costs: Sequence[Table], budgets: Sequence[float]) -> list[int] | None:
    """Index of the chosen option of every item, or ``None`` where no choice keeps all budgets.

    Args:
        damage: what is minimised, [items][options], finite.
        costs: for every budget a table like `damage`; whole numbers are compared exactly.
        budgets: upper bound of each sum of costs.

    Raises:
        RuntimeError: if the solver gives up.
    """
    offsets = np.cumsum([0, *(len(row) for row in damage)])
    variables = int(offsets[-1])
    objective = np.concatenate([np.asarray(row, float) - min(row) for row in damage]) if damage else np.zeros(0)
    if variables == 0:
        return [] if all(b >= 0 for b in budgets) else None
    if objective.max() > 0:
        objective *= _OBJECTIVE_SCALE / objective.max()
    one_each = np.zeros((len(damage), variables))
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        one_each[i, start:stop] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for table, budget in zip(costs, budgets, strict=True):
        row, bound = _scaled(np.concatenate([np.asarray(r, float) for r in table]), budget)
        constraints.append(LinearConstraint(row[None, :], -np.inf, bound))
    for _ in range(_MOST_CUTS):
        result = milp(
            objective,
            constraints=constraints,
            integrality=np.ones(variables),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:
            return None
        if result.status != 0 or result.x is None:
            raise RuntimeError(f"the bit allocation could not be solved: {result.message}")
        picked = [int(np.argmax(result.x[start:stop])) for start, stop in itertools.pairwise(offsets)]
        if all(total(table, picked) <= budget for table, budget in zip(costs, budgets, strict=True)):
            return picked
        # Within the solver's tolerance but over the budget: forbid this one choice and look on.
        cut = np.zeros(variables)
        cut[[start + p for start, p in zip(offsets, picked, strict=False)]] = 1
        constraints.append(LinearConstraint(cut[None, :], -np.inf, len(damage) - 1))
    raise RuntimeError("the bit allocation could not be solved within the solver's tolerance; round the costs")


def total(table: Table, picked: Sequence[int]) -> float:
    """Correctly rounded sum of the picked entries, one a row."""
    return math.fsum(row[p] for row, p in zip(table, picked, strict=True))


def front(damage: Table, cost: Table) -> list[tuple[float, float, list[int]]]:
    """All Pareto-optimal (cost, damage, chosen options), cost ascending and damage strictly descending.

    Exact; the work grows with the number of distinct totals of `cost`, which is small for byte sizes of matrices of
    few shapes and exponential at worst.
    """
    states: list[tuple[float, float, list[int]]] = [(0.0, 0.0, [])]
    for harm_row, cost_row in zip(damage, cost, strict=True):
        grown = [
            (spent + c, harm + h, [*picked, o])
            for spent, harm, picked in states
            for o, (h, c) in enumerate(zip(harm_row, cost_row, strict=True))
        ]
        grown.sort(key=lambda state: (state[0], state[1]))
        states, least = [], math.inf
        for state in grown:
            if state[1] < least:
                states.append(state)
                least = state[1]
    return states


def _scaled(costs: np.ndarray, budget: float) -> tuple[np.ndarray, float]:
    """The same constraint in small numbers: whole ones over their common divisor, others over the largest."""
    if np.all(costs == np.round(costs)) and np.all(np.abs(costs) < 2**53):
        divisor = math.gcd(*(int(c) for c in costs)) or 1
        return costs / divisor, float(math.floor(Fraction(budget) / divisor)) if math.isfinite(budget) else budget
    largest = float(np.abs(costs).max())
    return costs / largest, budget / largest
