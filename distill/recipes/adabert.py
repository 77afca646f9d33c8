r"""AdaBERT: labels, the teacher's layers by their probes, and for a search the price of the architecture.

.. math:: (1 - \gamma) L_{CE} + \gamma L_{KD} + \beta L_E

Source: Chen et al. 2020, eq. 7 and sections 3.1 to 3.3; authors' and PaddleSlim's code: gamma .8, beta 4; student layer
i of K learns from the probe of teacher layer ceil(i N / K), each pair weighed by the softmax of the probes' negated
losses. Differences: beside the probes stands the teacher's own output, whose share is `prediction`; AdamW for weights
and choices, the latter at ten times the rate, since a search takes minutes here and not 70 epochs.

    >>> adabert(probed.losses, depth=3)                    # to train what was derived
    >>> adabert_search(probed.losses, depth=4)             # to search
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qbert.distill.recipe import Match, Recipe, Stage


def adabert(
    losses: Sequence[float] = (1.0,) * 6,
    *,
    depth: int = 3,
    gamma: float = 0.8,
    prediction: float = 0.5,
    temperature: float = 1.0,
) -> Recipe:
    """Labels and the teacher's knowledge, layer by layer.

    Args:
        losses: of the teacher's probes, a number a layer (`ProbedTeacher.losses`).
        depth: layers of the student.
        gamma: share of the teacher's knowledge, in (0, 1); the rest is that of the labels.
        prediction: share of it that is the teacher's own output.
        temperature: of all soft targets.

    Raises:
        ValueError: a number that cannot work; a student deeper than its teacher.
    """
    return _recipe("adabert", _knowledge(losses, depth, gamma, prediction, temperature))


def adabert_search(
    losses: Sequence[float] = (1.0,) * 6,
    *,
    depth: int = 4,
    efficiency: float = 4.0,
    choices: float = 10.0,
    gamma: float = 0.8,
    prediction: float = 0.5,
    temperature: float = 1.0,
) -> Recipe:
    """The same with the price of the architecture, for `qbert.distill.search.Search`.

    Args:
        efficiency: beta, weight of the price, which lies between 0 and 1; positive.
        choices: rate of the choices relative to that of the weights.
        losses, depth, gamma, prediction, temperature: as of `adabert`; depth is the most that there may be.

    Raises:
        ValueError: no efficiency weight, or another number that cannot work.
    """
    if not efficiency > 0:
        raise ValueError(
            f"efficiency={efficiency} searches without an efficiency weight, so that nothing speaks for a small "
            "architecture; use a positive weight such as 4"
        )
    if not choices > 0:
        raise ValueError(f"choices={choices} is no rate; use a positive factor such as 10")
    terms = _knowledge(losses, depth, gamma, prediction, temperature)
    return _recipe("adabert_search", (*terms, Match("cost", weight=efficiency)), rates={"architecture": choices})


def probe_pairs(depth: int, layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), both from 0: layer i of K, counted from 1, and ceil(i N / K)."""
    return [(i - 1, math.ceil(i * layers / depth) - 1) for i in range(1, depth + 1)]


def _knowledge(
    losses: Sequence[float], depth: int, gamma: float, prediction: float, temperature: float
) -> tuple[Match, ...]:
    if not 1 <= depth <= len(losses):
        raise ValueError(f"depth={depth} does not fit a teacher of {len(losses)} layers; use 1 to {len(losses)}")
    if not 0 < gamma < 1 or not 0 < prediction < 1 or not temperature > 0:
        raise ValueError(
            f"gamma={gamma}, prediction={prediction} and temperature={temperature} are not possible; use shares "
            "between 0 and 1, and a positive temperature"
        )
    pairs = probe_pairs(depth, len(losses))
    likely = [math.exp(min(losses) - losses[teacher]) for _, teacher in pairs]
    soft = {"temperature": temperature}
    probes = (
        Match(
            "probes",
            "soft_ce",
            weight=gamma * (1 - prediction) * share / sum(likely),
            layers=(pair,),
            options=soft,
            name=f"probe_{pair[1]}",
        )
        for pair, share in zip(pairs, likely, strict=True)
    )
    logits = Match("logits", "soft_ce", weight=gamma * prediction, options=soft)
    return (Match("labels", weight=1 - gamma), logits, *probes)


def _recipe(name: str, terms: tuple[Match, ...], rates: dict[str, float] | None = None) -> Recipe:
    return Recipe(
        name=name,
        source="Chen et al. 2020",
        stages=(Stage("search" if rates else "distillation", terms, rates=rates or {}),),
        steps="fixed",
        arguments={
            "learning_rate": 2e-3,
            "num_train_epochs": 5 if rates else 30,
            "per_device_train_batch_size": 32,
            "weight_decay": 1e-3,
        },
    )
