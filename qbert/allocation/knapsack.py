r"""Exact choice of one option for every item under budgets (the multiple-choice knapsack problem).

.. math:: \min_{o} \sum_i d_{i,o_i} \quad\text{subject to}\quad \sum_i c^k_{i,o_i} \le B_k \ \text{for every budget } k

`choose` solves it by Lagrangian bounds and dynamic programming over the few items that the bounds leave open; costs
are added and compared as whole numbers of any size, so that no tolerance decides what keeps a budget. `front` gives
all optimal trade-offs of one cost at once, by dynamic programming over all items. Both drop what another partial
choice dominates.

    >>> choose(damage=[[5.0, 1.0], [2.0, 0.5]], costs=[[[2, 3], [2, 3]]], budgets=[5])
    [1, 0]

References: HAWQ-V3 (Yao et al. 2021, section 3.4) for the formulation; Kellerer, Pferschy, Pisinger, "Knapsack
Problems", 2004, chapter 11; Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995, for the
order of the items and the bounds of partial choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

Table = Sequence[Sequence[float]]  # [items][options], rows of unequal length allowed
Whole = NDArray[Any]  # int64, or Python's integers where they do not fit

_MOST_STATES = 1 << 20  # partial choices looked at side by side
_RIVALS = 256  # partial choices that are compared with all others, under several budgets
_LEAST_FACTOR, _LARGEST_FACTOR = 1e-280, 1e280
# HiGHS stops at an absolute gap of 1e-6: with the largest damage at 1e6, that is 1e-12 of it.
_OBJECTIVE_SCALE = 1e6
_MOST_CUTS = 50
_UNIT = 2.0**-53


def choose(damage: Table, costs: Sequence[Table], budgets: Sequence[float]) -> list[int] | None:
    """Index of the chosen option of every item, or ``None`` where no choice keeps all budgets.

    The sum of the damages is the least possible one up to the rounding of float64 sums, and memory grows with the
    number of items. Under one budget, 10,000 items take less than a second. Under several, random tables of many items
    can leave more than a million partial choices open; then HiGHS decides, within its tolerances, and what it finds is
    checked exactly against the budgets.

    Args:
        damage: what is minimised, [items][options], finite.
        costs: for every budget a table like `damage`, finite.
        budgets: upper bound of each correctly rounded sum of costs (`total`); infinity is none.

    Raises:
        ValueError: a number that is not finite (a budget: NaN).
        RuntimeError: if HiGHS gives up.
    """
    numbers = [x for table in (damage, *costs) for row in table for x in row]
    if not all(map(math.isfinite, numbers)) or any(map(math.isnan, budgets)):
        raise ValueError("damage, costs and budgets: one of them holds NaN or infinity; give finite numbers")
    if not damage:
        return [] if all(budget >= 0 for budget in budgets) else None
    if not all(damage):
        return None
    problem = _settle(damage, costs, budgets)
    if problem is None:
        return None
    try:
        return _Search(problem).run()
    except _TooManyError:
        return _by_milp(problem)


def total(table: Table, picked: Sequence[int]) -> float:
    """Correctly rounded sum of the picked entries, one a row."""
    return math.fsum(row[p] for row, p in zip(table, picked, strict=True))


def front(damage: Table, cost: Table) -> list[tuple[float, float, list[int]]]:
    """All Pareto-optimal (cost, damage, chosen options), cost ascending and damage strictly descending.

    Exact; the work grows with the number of distinct totals of `cost`, which is small for byte sizes of matrices of
    few shapes and exponential at worst. With totals of a few thousand steps, 1,000 items take about a second.
    """
    spent, harm = np.zeros(1), np.zeros(1)
    steps = []
    for harm_row, cost_row in zip(damage, cost, strict=True):
        grown_spent = np.add.outer(np.asarray(cost_row, float), spent).ravel()
        grown_harm = np.add.outer(np.asarray(harm_row, float), harm).ravel()
        kept = _undominated(grown_spent, grown_harm)
        option, parent = np.divmod(kept, len(spent))
        steps.append((option.astype(np.min_scalar_type(len(cost_row))), parent.astype(np.int32)))
        spent, harm = grown_spent[kept], grown_harm[kept]
    picked = np.empty((len(steps), len(spent)), dtype=np.int32)
    state: NDArray[Any] = np.arange(len(spent))
    for i in reversed(range(len(steps))):
        option, parent = steps[i]
        picked[i], state = option[state], parent[state]
    return list(zip(spent.tolist(), harm.tolist(), picked.T.tolist(), strict=True))


def _undominated(cost: Whole, harm: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other one beats in cost and harm, cost ascending and harm strictly descending."""
    order = np.argsort(cost, kind="stable")  # merges runs that are in order already
    sorted_harm = harm[order]
    falls = np.ones(len(order), dtype=bool)
    falls[1:] = sorted_harm[1:] < np.minimum.accumulate(sorted_harm)[:-1]
    kept = order[falls]
    last_of_its_cost = np.ones(len(kept), dtype=bool)
    last_of_its_cost[:-1] = cost[kept[1:]] != cost[kept[:-1]]
    return kept[last_of_its_cost]


@dataclass(frozen=True)
class _Problem:
    """A choice with its costs in whole numbers above the least of each item.

    Attributes:
        damage: [N, M], at most 1 in magnitude, infinite where an item has no such option or none that fits.
        costs: [K, N, M] whole numbers from 0 to the budget.
        budgets: [K] whole numbers.
    """

    damage: NDArray[np.float64]
    costs: Whole
    budgets: Whole


def _settle(damage: Table, costs: Sequence[Table], budgets: Sequence[float]) -> _Problem | None:
    """The problem without what cannot matter; ``None`` where a budget is below the least that can be spent."""
    items, options = len(damage), max(len(row) for row in damage)
    there = np.arange(options) < np.array([len(row) for row in damage], dtype=int).reshape(items, 1)
    harm = np.full((items, options), np.inf)
    harm[there] = [x for row in damage for x in row]
    largest = np.abs(harm[there]).max(initial=0.0)
    harm = np.ldexp(harm, -math.frexp(largest)[1])
    tables, rooms = [], []
    for table, budget in zip(costs, budgets, strict=True):
        if budget == math.inf:
            continue
        flat, room = _whole([x for row in table for x in row], budget)
        spent = np.zeros((items, options), dtype=object)
        spent[there] = flat
        least = np.where(there, spent, max(flat, default=0)).min(axis=1)
        room -= sum(least.tolist())
        if room < 0:
            return None
        spent = np.where(there, spent - least[:, None], 0)
        harm = np.where(spent > room, np.inf, harm)
        spent = np.where(np.isfinite(harm), spent, 0)
        if sum(spent.max(axis=1).tolist()) > room:
            tables.append(spent)
            rooms.append(room)
    kind = np.int64 if max(rooms, default=0) < 2**61 // max(1, len(rooms)) else object
    if not np.isfinite(harm).any(axis=1).all():
        return None
    return _Problem(harm, np.array(tables, dtype=kind).reshape(len(rooms), items, options), np.array(rooms, dtype=kind))


def _whole(costs: Sequence[float], budget: float) -> tuple[list[int], int]:
    """The same constraint in whole numbers: their sum is at most the bound where `total` is at most the budget.

    Floats are multiples of a power of two. Their correctly rounded sum is at most the budget where the exact one is at
    most half-way to the next larger float.
    """
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    denominator = max((d for _, d in ratios), default=1)
    whole = [n * (denominator // d) for n, d in ratios]
    divisor = math.gcd(*whole) or 1
    following = math.nextafter(budget, math.inf)
    half_way = Fraction(budget)
    if following < math.inf:
        half_way = (half_way + Fraction(following)) / 2
    bound = half_way * denominator / divisor
    excluded = bound.denominator == 1 and float(half_way) > budget
    return [n // divisor for n in whole], math.floor(bound) - excluded


class _TooManyError(Exception):
    """More partial choices than `_MOST_STATES`."""


class _Search:
    """The best choice of a problem, by dynamic programming over the items that Lagrangian bounds leave open.

    With multipliers m >= 0 of the budgets (here shares of them), every choice within the budgets has the damage

        L + sum_i r_i + slack,   r_io = d_io + m c_io - min_o' (d_io' + m c_io') >= 0,   slack = m (1 - sum_i c_i) >= 0

    for one constant L: options and partial choices with more than the best known choice has above L are dropped. Items
    come in the order of the least damage r per change of m c that they offer; a partial choice that is over the
    budgets, or under them, has at least to pay that of the next item to come back.
    """

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.items = np.arange(len(problem.damage))
        shares = (problem.costs / problem.budgets[:, None, None]).astype(np.float64)
        self.cost = shares.sum(axis=0)
        multipliers, self.best = self._multipliers(shares)
        weighed = np.tensordot(multipliers, shares, 1)
        value = problem.damage + weighed
        least = value.min(axis=1)
        self.reduced = value - least[:, None]
        self.reduced[self.reduced <= 4 * _UNIT * np.abs(least)[:, None]] = 0.0
        self.start = self._filled(self._cheapest(value), weighed)
        self.moves = weighed - weighed[self.items, self.start][:, None]
        self.slack = math.fsum(multipliers) - math.fsum(weighed[self.items, self.start])
        size = math.fsum(np.abs(least)) + math.fsum(weighed[self.items, self.start]) + math.fsum(multipliers)
        self.margin = 8 * _UNIT * size
        self.gap = math.inf
        if self.best is not None:
            spared = problem.damage[self.items, self.best] - problem.damage[self.items, self.start]
            self.gap = math.fsum(spared) + self.slack
            if self.slack < self.gap and self._fits(self.start):
                self.best, self.gap = self.start, self.slack

    def _multipliers(self, shares: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
        """Multipliers of the budgets whose bound is high, and a choice within the budgets, if one was met."""
        damage = self.problem.damage

        def choice(multipliers: NDArray[np.float64]) -> NDArray[np.int64]:
            return self._cheapest(damage + np.tensordot(multipliers, shares, 1))

        direction = np.ones(len(shares)) if len(shares) < 2 else _dual(damage, shares)
        free = choice(0 * direction)
        if self._fits(free):
            return 0 * direction, free
        if not direction.any():
            return direction, None
        low, high = 0.0, 1.0
        while high > _LEAST_FACTOR and self._fits(choice(high * direction)):
            high /= 4
        while not self._fits(choice(high * direction)):
            low, high = high, 4 * high
            if high > _LARGEST_FACTOR:  # under several budgets, whose cheapest options differ
                return direction, None
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if self._fits(choice(middle * direction)) else (middle, high)
        return (high if len(shares) == 1 else 1.0) * direction, choice(high * direction)

    def _cheapest(self, value: NDArray[np.float64]) -> NDArray[np.int64]:
        """Index of the least value of every item, of equal ones that of the least cost."""
        equal = value == value.min(axis=1, keepdims=True)
        return np.where(equal, self.cost, np.inf).argmin(axis=1)

    def _filled(self, picked: NDArray[np.int64], weighed: NDArray[np.float64]) -> NDArray[np.int64]:
        """The choice with dearer options of no more damage m c + d, as many as the budgets hold, item by item."""
        if not self._fits(picked):
            return picked
        picked = picked.copy()
        room = self.problem.budgets - self.problem.costs[:, self.items, picked].sum(axis=1)
        dearer = (self.reduced == 0) & (weighed > weighed[self.items, picked][:, None])
        for item in np.flatnonzero(dearer.any(axis=1)):
            options = np.flatnonzero(dearer[item])
            for option in options[np.argsort(-weighed[item, options])]:
                more = self.problem.costs[:, item, option] - self.problem.costs[:, item, picked[item]]
                if (more <= room).all():
                    picked[item], room = option, room - more
                    break
        return picked

    def _fits(self, picked: NDArray[np.int64]) -> bool:
        spent = self.problem.costs[:, self.items, picked].sum(axis=1)
        return bool((spent <= self.problem.budgets).all())

    def run(self) -> list[int] | None:
        """The best choice, ``None`` if there is none.

        Raises:
            _TooManyError: if more partial choices are open than may be looked at.
        """
        if self.gap <= self.margin:
            assert self.best is not None
            return self.best.tolist()
        open_options = np.isfinite(self.reduced) & (self.reduced < self.gap - self.margin)
        open_options[self.items, self.start] = True
        first = self.problem.costs[:, self.items, self.start]
        if len(self.problem.costs) == 1:  # another option of the same cost is never better
            other = self.problem.costs[0] != first[0][:, None]
            open_options &= other | (np.arange(open_options.shape[1]) == self.start[:, None])
        left = np.flatnonzero(open_options.sum(axis=1) > 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(open_options & (self.moves != 0), self.reduced / np.abs(self.moves), np.inf)
        left = left[np.argsort(price[left].min(axis=1, initial=np.inf), kind="stable")]
        falling = np.where(self.moves < 0, price, np.inf)[left].min(axis=1, initial=np.inf)
        rising = np.where(self.moves > 0, price, np.inf)[left].min(axis=1, initial=np.inf)
        change = self.problem.costs[:, left] - first[:, left, None]
        fall = np.where(open_options[left], change, 0).min(axis=2, initial=0)
        # Of the items that are still to come, after each one: the least prices, and the most that can be saved.
        falling, rising = (np.append(np.minimum.accumulate(p[::-1])[::-1][1:], np.inf) for p in (falling, rising))
        saving = np.append(np.cumsum(fall[:, ::-1], axis=1)[:, ::-1], np.zeros_like(fall[:, :1]), axis=1)[:, 1:]
        spent = first.sum(axis=1)[:, None]
        paid, slack = np.zeros(1), np.full(1, self.slack)
        steps: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for step, item in enumerate(left):
            options = np.flatnonzero(open_options[item])
            spent = (spent[:, None, :] + change[:, step, options, None]).reshape(len(spent), -1)
            paid = np.add.outer(self.reduced[item, options], paid).ravel()
            slack = np.subtract.outer(-self.moves[item, options], -slack).ravel()
            fits = (spent <= self.problem.budgets[:, None]).all(axis=0)
            value = np.where(fits, paid + np.maximum(slack, 0), np.inf)
            here = int(value.argmin())
            if value[here] < self.gap:
                self.gap = float(value[here])
                self.best = self.start.copy()
                option, state = divmod(here, len(paid) // len(options))
                self.best[item] = options[option]
                for earlier in range(step - 1, -1, -1):
                    self.best[left[earlier]], state = steps[earlier][0][state], steps[earlier][1][state]
            bound = paid + np.where(
                slack > 0, min(1.0, rising[step]) * slack, _product(falling[step], -slack - self.margin)
            )
            within = (spent + saving[:, step, None] <= self.problem.budgets[:, None]).all(axis=0)
            kept = np.flatnonzero((bound < self.gap - self.margin) & within)
            kept = kept[_open(spent[:, kept], (paid + slack)[kept])]
            if len(kept) > _MOST_STATES:
                raise _TooManyError
            taken, parent = np.divmod(kept, len(paid) // len(options))
            steps.append((options[taken], parent))
            spent, paid, slack = spent[:, kept], paid[kept], slack[kept]
            if not len(kept):
                break
        return None if self.best is None else self.best.tolist()


def _product(price: float, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
    """price times amount where that is positive, without infinity times 0."""
    return np.where(amounts > 0, price, 0.0) * np.where(amounts > 0, amounts, 1.0)


def _open(spent: Whole, harm: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of partial choices [K, S] that no other one dominates; of several costs, by comparing with the best."""
    if len(spent) == 1:
        return _undominated(spent[0], harm)
    order = np.argsort(harm, kind="stable")
    spent = spent[:, order]
    dominated = np.zeros(len(order), dtype=bool)
    for rival in range(min(_RIVALS, len(order))):
        if not dominated[rival]:
            dominated[rival + 1 :] |= (spent[:, rival + 1 :] >= spent[:, rival, None]).all(axis=0)
    return order[~dominated]


def _dual(damage: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multipliers [K] of the budgets in the linear relaxation; any that are not negative give a bound."""
    there = np.isfinite(damage)
    one_each = csr_array((np.ones(there.sum()), (np.nonzero(there)[0], np.arange(there.sum()))))
    found = linprog(
        damage[there],
        A_ub=np.stack([share[there] for share in shares]),
        b_ub=np.ones(len(shares)),
        A_eq=one_each,
        b_eq=np.ones(len(damage)),
        bounds=(0, 1),
        method="highs",
    )
    if found.status != 0:
        return np.zeros(len(shares))
    return np.maximum(-found.ineqlin.marginals, 0.0)


def _by_milp(problem: _Problem) -> list[int] | None:
    """A choice by HiGHS, without its presolve, which loses solutions where costs span many decades.

    Raises:
        RuntimeError: if HiGHS gives up, or its choices are over a budget by no more than its tolerance.
    """
    there = np.isfinite(problem.damage)
    item, option = np.nonzero(there)
    one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for cost, budget in zip(problem.costs, problem.budgets, strict=True):
        constraints.append(LinearConstraint(csr_array((cost[there] / budget).astype(np.float64)[None]), -np.inf, 1))
    for _ in range(_MOST_CUTS):
        result = milp(
            problem.damage[there] * _OBJECTIVE_SCALE,
            constraints=constraints,
            integrality=np.ones(len(item)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.status == 2:
            return None
        if result.status != 0 or result.x is None:
            raise RuntimeError(f"the bit allocation could not be solved: {result.message}")
        weights = np.full(there.shape, -1.0)
        weights[there] = result.x
        picked = weights.argmax(axis=1)
        chosen = option == picked[item]
        spent = problem.costs[:, np.arange(len(picked)), picked].sum(axis=1)
        if (spent <= problem.budgets).all():
            return picked.tolist()
        # Within the solver's tolerance but over the budget: forbid this one choice and look on.
        constraints.append(LinearConstraint(csr_array(chosen[None].astype(float)), -np.inf, len(picked) - 1))
    raise RuntimeError("the bit allocation could not be solved within the solver's tolerance; round the costs")
