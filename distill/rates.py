"""Which parts of a student train in a stage, and at which rate: progressive transfer trains one layer at a time.

A stage names patterns of modules and a factor of its learning rate for each; the longest match counts, and what none
matches trains at the full rate. An optimizer knows rates by group, so that its groups are split by what the stages say.
In a file of its own, since step sizes (`step_sizes`) have rates for another reason.

    >>> Stage("layer 1", terms, rates={"encoder.layer.1": 1.0, "encoder.layer.0": 0.1, "*": 0.0})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qbert.bits import covers, longest
from qbert.distill.recipe import Recipe, Stage, Timetable
from qbert.encoders.targets import base_model


def has_rates(recipe: Recipe) -> bool:
    """Whether a stage trains some parts at another rate than others."""
    return any(stage.rates for stage in recipe.stages)


def rate_of(stage: Stage, names: tuple[str, ...]) -> float:
    """Factor of the learning rate, in `stage`, of a parameter of these names."""
    found = longest(p for p in stage.rates if p == "*" or covers(p, names))
    return stage.rates[found[0]] if found else 1.0


def factors_of(student: nn.Module, recipe: Recipe) -> dict[int, tuple[float, ...]]:
    """id of a parameter of `student` -> its factor in every stage.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    prefix, _ = base_model(student)
    named = {p: (n.removeprefix(prefix + ".") if prefix else n, n) for n, p in student.named_parameters()}
    for stage in recipe.stages:
        unused = next((k for k in stage.rates if k != "*" and not any(covers(k, n) for n in named.values())), None)
        if unused is not None:
            raise ValueError(f"stage {stage.name!r}: rates of {unused!r}, but the student has no such part")
    return {id(p): tuple(rate_of(stage, names) for stage in recipe.stages) for p, names in named.items()}


def split_groups(optimizer: torch.optim.Optimizer, factors: Mapping[int, tuple[float, ...]]) -> None:
    """Split the groups of an optimizer that has taken no step, so that all parameters of one have the same factors."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        parts: dict[tuple[float, ...], list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), ()), []).append(parameter)
        for members in parts.values():
            optimizer.add_param_group({**group, "params": members})


def schedules(
    optimizer: torch.optim.Optimizer, table: Timetable, factors: Mapping[int, tuple[float, ...]]
) -> list[Callable[[int], float]]:
    """For each group, its learning rate by step as a factor of its own."""

    def of(group: Mapping[str, Any]) -> Callable[[int], float]:
        own = factors.get(id(group["params"][0])) if group["params"] else None
        if not own:
            return table.rate_at
        return lambda step: table.rate_at(step) * own[table.stage_at(step)]

    return [of(group) for group in optimizer.param_groups]


def scale_schedule(
    scheduler: Any, optimizer: torch.optim.Optimizer, stage: Stage, factors: Mapping[int, tuple[float, ...]]
) -> None:
    """Multiply a schedule that has not begun by the rate of the only stage, and by its factors of parts.

    Raises:
        ValueError: the stage has such rates, and the schedule is no function of the step.
    """
    if stage.rate == 1 and not stage.rates:
        return
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type: stage {stage.name!r} has rates of its own, which {type(scheduler).__name__} cannot "
            "heed; use 'linear' or 'cosine'"
        )

    def scaled(plain: Callable[[int], float], factor: float) -> Callable[[int], float]:
        return lambda step: factor * plain(step)

    firsts = [group["params"][:1] for group in optimizer.param_groups]
    own = [stage.rate * (factors.get(id(first[0]), (1.0,))[0] if first else 1.0) for first in firsts]
    scheduler.lr_lambdas = [scaled(plain, factor) for plain, factor in zip(scheduler.lr_lambdas, own, strict=True)]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
