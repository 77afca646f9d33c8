"""What a bit allocation may spend: bytes, average bits, bit operations, or measured time.

Every budget is linear in the choices: a constant (what is not decided) plus one cost a choice and bit width.

>>> budgets = make_budgets(blocks, choices, widths, model, reference, settings, size_mb=12)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from qbert.allocation.blocks import Block, Choice, free_targets
from qbert.allocation.damage import Specs, target_specs
from qbert.allocation.knapsack import choose
from qbert.bits import BitsConfig, TensorSpec
from qbert.encoders.targets import Target
from qbert.sizes import model_size, tensor_bytes

Latency = Mapping[str, Mapping[int, float]]
TargetCost = Callable[[Target, TensorSpec | None], float]


@dataclass(frozen=True)
class Budget:
    """An upper bound on a sum over the choices.

    Attributes:
        argument: the argument it came from, for messages.
        limit: the bound, in the unit of the costs.
        unit: costs in one unit of the argument (10^6 bytes in one MB).
        constant: cost of everything that is not decided.
        table: cost of every choice at every width, [choices][widths].
    """

    argument: str
    limit: float
    unit: float
    constant: float
    table: list[list[float]]

    @property
    def smallest(self) -> str:
        """The least that can be spent, in the unit of the argument, as `rounded_up` text."""
        return rounded_up((self.constant + sum(min(row) for row in self.table)) / self.unit)

    @property
    def room(self) -> float:
        """What the choices may spend together."""
        return self.limit - self.constant


def make_budgets(
    blocks: Sequence[Block],
    choices: Sequence[Choice],
    widths: Sequence[int],
    model: nn.Module,
    reference: BitsConfig,
    settings: Mapping[str, Any],
    *,
    size_mb: float | None = None,
    average_bits: float | None = None,
    bit_operations: float | None = None,
    max_latency: float | None = None,
    latency: Latency | None = None,
    specs: Specs | None = None,
) -> list[Budget]:
    """The budgets that are given.

    Args:
        blocks: all measured blocks, fixed ones included.
        choices, widths: what can be decided.
        reference: the configuration in which every choice has the width ``widths[0]``.
        settings: `BitsConfig` defaults.
        size_mb: bytes of the whole model over 10^6.
        average_bits: mean bits of the weights in the blocks.
        bit_operations: sum over the matrices of O I (weight bits) (activation bits), for one token.
        max_latency, latency: a table block or matrix name -> bits -> time, and the bound of its sum.
        specs: bits -> `target_specs`, if known.

    Raises:
        ValueError: a latency table that lacks an entry.
    """
    known = specs or {b: target_specs(model, b, **settings) for b in widths}
    targets = free_targets(model)
    given = reference.resolve(model)

    def table(cost: TargetCost, once: bool = True) -> list[list[float]]:
        return [
            [sum(cost(t, known[b].get(t.path)) for t in _targets(choice.members, targets, once)) for b in widths]
            for choice in choices
        ]

    def budget(argument: str, limit: float, unit: float, whole: float, costs: list[list[float]]) -> Budget:
        spend = limit * unit
        if unit != 1:  # the largest whole number that comes to `limit` in the unit: what model_size(...).mb says fits
            spend = max(
                n for n in (math.floor(spend) - 1, math.floor(spend), math.floor(spend) + 1) if n / unit <= limit
            )
        return Budget(argument, spend, unit, whole - math.fsum(row[0] for row in costs), costs)

    members = [m for b in blocks for m in b.members]
    budgets = []
    if size_mb is not None:
        budgets.append(budget("size_mb", size_mb, 1e6, model_size(model, reference).total, table(_bytes)))
    if average_bits is not None:
        everything = _targets(members, targets, True)
        weights = sum(t.weight.numel() for t in everything)
        whole = sum(_weight_bits(t, given.get(t.path)) for t in everything)
        budgets.append(budget("average_bits", average_bits, weights, whole, table(_weight_bits)))
    if bit_operations is not None:
        whole = sum(_operations(t, given.get(t.path)) for t in _targets(members, targets, False))
        budgets.append(budget("bit_operations", bit_operations, 1, whole, table(_operations, once=False)))
    if max_latency is not None:
        assert latency is not None
        chosen = {m: given.get(targets[m].path) for m in members}
        bits = {m: 8 * targets[m].weight.element_size() if s is None else s.bits for m, s in chosen.items()}
        free = {m for c in choices for m in c.members}
        costs = [[sum(_time(latency, b, c.members, width) for b in c.blocks) for width in widths] for c in choices]
        rest = [m for m in members if m not in free]
        fixed = sum(_time(latency, b, [m], bits[m]) for b in blocks for m in b.members if m in rest)
        whole = fixed + math.fsum(row[0] for row in costs)
        budgets.append(budget("max_latency", max_latency, 1, whole, costs))
    return budgets


def check_bounds(**bounds: float | None) -> dict[str, float | None]:
    """The bounds as Python's numbers.

    Raises:
        ValueError: naming one that is not a positive number.
    """
    for name, value in bounds.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a bound; use a positive number")
    return {name: None if value is None else float(value) for name, value in bounds.items()}


def rounded_up(value: float) -> str:
    """`value` in decimals, never less than it is: at least four after the point, and six significant ones."""
    digits = max(4, 5 - math.floor(math.log10(value))) if value > 0 else 4
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def explain_infeasible(budgets: Sequence[Budget], widths: Sequence[int]) -> str:
    """One sentence on why no choice keeps the budgets, and what the smallest possible bound is."""
    choices = f"with bits={tuple(widths)!r}"
    for b in budgets:
        if choose([[0.0] * len(row) for row in b.table], [b.table], [b.room]) is None:
            given = b.limit / b.unit
            rest = ""
            if b.argument == "size_mb":
                rest = f"{b.constant / b.unit:.4f} MB is not chosen here (embeddings, biases, heads), and "
            return f"{b.argument}={given:g} is too small {choices}: {rest}the smallest possible is {b.smallest}"
    first, others = budgets[0], budgets[1:]
    least = choose(first.table, [b.table for b in others], [b.room for b in others])
    assert least is not None or len(others) > 1
    names = " and ".join(b.argument for b in others)
    if least is None:
        return f"{names} cannot be kept together {choices}; raise one of them"
    needed = (first.constant + sum(row[p] for row, p in zip(first.table, least, strict=True))) / first.unit
    return (
        f"{first.argument}={first.limit / first.unit:g} is too small {choices} together with {names}: the smallest "
        f"possible is {rounded_up(needed)}"
    )


def _targets(members: Iterable[str], targets: Mapping[str, Target], once: bool) -> list[Target]:
    """The targets of the names; those that share one weight only once where `once`."""
    found = [targets[m] for m in members]
    return list({id(t.weight): t for t in found}.values()) if once else found


def _bytes(target: Target, spec: TensorSpec | None) -> float:
    weight = target.weight
    return weight.numel() * weight.element_size() if spec is None else sum(tensor_bytes(target, spec))


def _weight_bits(target: Target, spec: TensorSpec | None) -> float:
    weight = target.weight
    return weight.numel() * (8 * weight.element_size() if spec is None else spec.bits)


def _operations(target: Target, spec: TensorSpec | None) -> float:
    weight = target.weight
    full = 8 * weight.element_size()
    activation = full if spec is None or spec.activation_bits is None else spec.activation_bits
    return weight.numel() * (full if spec is None else spec.bits) * activation


def _time(latency: Latency, block: Block, members: Iterable[str], bits: int) -> float:
    """Time of the matrices of `members` that lie in `block`: the block's own entry, or the sum of theirs."""
    inside = [m for m in block.members if m in set(members)]
    if not inside:
        return 0.0
    if block.name in latency and len(inside) == len(block.members):
        return _entry(latency, block.name, bits)
    for member in inside:
        if member not in latency:
            raise ValueError(f"latency: it has no entry for {block.name!r} nor for its matrix {member!r}; add one")
    return math.fsum(_entry(latency, m, bits) for m in inside)


def _entry(latency: Latency, name: str, bits: int) -> float:
    times = latency[name]
    if bits not in times:
        raise ValueError(f"latency: the entry of {name!r} has no time for {bits} bits; measure it, or leave {bits} out")
    if not (math.isfinite(times[bits]) and times[bits] >= 0):
        raise ValueError(f"latency: the time of {name!r} at {bits} bits is {times[bits]}; use a number of at least 0")
    return float(times[bits])
