"""The predicted damage of every choice at every bit width: what an exact allocation minimises the sum of.

    >>> damage_table(spectrum, choices, (2, 4), model, None, {})  # [choices][widths]

The damage is what `qbert.sensitivity` predicts or measured, or what the caller gives, or, for a spectrum, sensitivity
times squared weight error (Dong et al. 2020, HAWQ-V2, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.allocation.blocks import Choice, Measured, free_targets
from qbert.bits import FLOAT_BITS, BitsConfig, TensorSpec
from qbert.encoders.targets import Target, find_targets
from qbert.encoders.weights import stored
from qbert.layers.quantizer import WeightQuantizer
from qbert.quantizers.groups import group_layout

Damage = Mapping[str, Mapping[int, float]]
Errors = Mapping[str, Mapping[int, float]]
Specs = Mapping[int, Mapping[str, TensorSpec]]  # bits -> path -> specification


def target_specs(model: nn.Module, bits: int, **settings: Any) -> dict[str, TensorSpec]:
    """Path -> specification of every matrix outside of the embeddings and heads when all of them get `bits` bits.

    Args:
        bits: 2, 3, 4 or 8; 16 and 32 (float) give an empty dict.
        **settings: `BitsConfig` defaults (``groups``, ``scheme``, ``range_method``, ...).

    Raises:
        ValueError: as `BitsConfig.resolve`.
    """
    config = BitsConfig({"*": bits}, embedding_bits=32, **settings)
    return {} if bits in FLOAT_BITS else config.resolve(model)


@torch.no_grad()
def quantized_weight(target: Target, spec: TensorSpec) -> Tensor:
    """The dequantized weight of nearest rounding, in the layout and dtype of `target.weight`."""
    weight = target.matrix.detach()
    row_group, input_groups = group_layout(target, spec)
    quantizer = WeightQuantizer(row_group, input_groups, spec).to(weight.device)
    quantizer.find(weight)
    return stored(target.module, quantizer(weight))


def weight_errors(
    model: nn.Module, bits: Sequence[int], *, names: Iterable[str] | None = None, **settings: Any
) -> dict[str, dict[int, float]]:
    """Squared error ||W - Q_b(W)||^2 by target name and bit width, rounded to nearest; 0 at 16 and 32 bits.

    Args:
        model: a float encoder.
        bits: bit widths to look at.
        names: names of targets (`Target.name`); all matrices outside of the embeddings and heads where None.
        **settings: `BitsConfig` defaults.

    Raises:
        ValueError: if a name is not a quantizable matrix of the model, or the settings do not fit it.
    """
    return errors_under({b: target_specs(model, b, **settings) for b in bits}, model, names)


def errors_under(specs: Specs, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, dict[int, float]]:
    """`weight_errors` under the specifications of every bit width, as `target_specs` gives them."""
    targets = {t.name: t for t in find_targets(model)}
    known = [n for n, t in targets.items() if any(t.path in s for s in specs.values())]
    wanted = list(names) if names is not None else known
    errors: dict[str, dict[int, float]] = {}
    for name in wanted:
        if name not in targets:
            raise ValueError(f"model: it has no quantizable matrix {name!r}; measure and quantize the same model")
        target = targets[name]
        errors[name] = {b: _squared_error(target, by_path.get(target.path)) for b, by_path in specs.items()}
    return errors


def _squared_error(target: Target, spec: TensorSpec | None) -> float:
    if spec is None:
        return 0.0
    weight = target.weight
    return float((weight.detach().double() - quantized_weight(target, spec).double()).square().sum())


def damage_table(
    spectrum: Measured | Mapping[str, float],
    choices: Sequence[Choice],
    widths: Sequence[int],
    model: nn.Module,
    damage: Damage | None,
    settings: Mapping[str, Any],
    *,
    errors: Errors | None = None,
    specs: Specs | None = None,
) -> list[list[float]]:
    """Predicted damage of every choice at every width, [choices][widths].

    Args:
        errors: those of the weights, if known.
        specs: bits -> `target_specs`, if known.

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
        specs = specs or {b: target_specs(model, b, **settings) for b in widths}
        errors = errors_under(specs, model, [m for c in choices for m in c.members])
    targets = free_targets(model)
    table = []
    for choice in choices:
        weights: dict[int, tuple[float, str]] = {}  # a weight in several blocks is as sensitive as the most sensitive
        for block in choice.blocks:
            for member in (m for m in block.members if m in choice.members):
                weight = targets[member].weight
                known, _ = weights.get(id(weight), (block.sensitivity, member))
                weights[id(weight)] = max(known, block.sensitivity), member
        table.append([math.fsum(omega * errors[member][w] for omega, member in weights.values()) for w in widths])
    return table
