"""The predicted damage of every choice at every bit width: what an exact allocation minimises the sum of.

    >>> damage_table(spectrum, choices, (2, 4), model, None, {})  # [choices][widths]

The damage is what `qbert.sensitivity` predicts or measured, or what the caller gives, or, for a spectrum, sensitivity
times squared weight error (Dong et al. 2020, HAWQ-V2, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qbert.choices import Choice, Measured, free_targets
from qbert.perturbation import weight_errors

Damage = Mapping[str, Mapping[int, float]]
Errors = Mapping[str, Mapping[int, float]]


def damage_table(
    spectrum: Measured | Mapping[str, float],
    choices: Sequence[Choice],
    widths: Sequence[int],
    model: nn.Module,
    damage: Damage | None,
    settings: Mapping[str, Any],
    *,
    errors: Errors | None = None,
) -> list[list[float]]:
    """Predicted damage of every choice at every width, [choices][widths]; `errors` are those of the weights, if known.

    Raises:
        ValueError: if `damage` lacks a block or a width, or holds a number that is not finite; if there is none and a
            sensitivity is negative.
    """
    own = getattr(spectrum, "damage", None)
    if damage is None and callable(own):
        damage = own()
    if damage is not None:
        for block in (b for c in choices for b in c.blocks):
            for width in widths:
                value = damage.get(block.name, {}).get(width, math.nan)
                if not math.isfinite(value):
                    raise ValueError(f"damage: it has no finite number for {block.name!r} at {width} bits; add one")
        return [[math.fsum(damage[b.name][w] for b in c.blocks) for w in widths] for c in choices]
    for block in (b for c in choices for b in c.blocks):
        if block.sensitivity < 0:
            raise ValueError(
                f"spectrum: the sensitivity of {block.name} is {block.sensitivity}, as if errors did good; give "
                "magnitudes, or damage=..."
            )
    if errors is None:
        errors = weight_errors(model, widths, names=[m for c in choices for m in c.members], **settings)
    targets = free_targets(model)
    table = []
    for choice in choices:
        weights: dict[int, tuple[float, str]] = {}  # a weight in several blocks is as sensitive as the most sensitive
        for block in choice.blocks:
            for member in (m for m in block.members if m in choice.members):
                weight = targets[member].module.weight
                assert isinstance(weight, Tensor)
                known, _ = weights.get(id(weight), (block.sensitivity, member))
                weights[id(weight)] = max(known, block.sensitivity), member
        table.append([math.fsum(omega * errors[member][w] for omega, member in weights.values()) for w in widths])
    return table
