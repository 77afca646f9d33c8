"""From bits of blocks to a bits configuration, with as few patterns as say it.

>>> write_config(blocks, {"encoder.layer.0": 3, "encoder.layer.1": 2}, (2, 3), None, model, 8, {}).rules
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qbert.bits import BitsConfig
from qbert.choices import Block, Fixed, best_rules, fixed_value
from qbert.patterns import covers
from qbert.targets import base_model


def write_config(
    blocks: Sequence[Block],
    chosen: Mapping[str, int],
    widths: Sequence[int],
    fixed: Fixed | None,
    model: nn.Module | None,
    embedding_bits: int,
    settings: Mapping[str, Any],
) -> BitsConfig:
    """The configuration that gives every block its chosen bits and every fixed matrix its fixed ones."""
    prefix = base_model(model)[0] if model is not None else ""
    rules: dict[str, int | Mapping[str, Any]] = {}
    for block in blocks:
        if block.name in chosen:
            names = [block.name] if _stands_for(block, blocks) else block.members
            rules.update(dict.fromkeys(names, chosen[block.name]))
    rules.update(fixed or {})
    rules.setdefault("*", max(widths))
    for block in blocks:
        for member in block.members:
            wanted = fixed_value(member, fixed, prefix)
            if wanted is None:
                wanted = chosen[block.name]
            if any(value != wanted for value in best_rules(member, rules, prefix)):
                rules[member] = wanted
    return BitsConfig(rules, embedding_bits=embedding_bits, **settings)


def _stands_for(block: Block, blocks: Sequence[Block]) -> bool:
    """Whether the block's name, as a pattern, matches its own matrices and nobody else's."""
    others = [m for b in blocks if b is not block for m in b.members]
    return all(covers(block.name, (m,)) for m in block.members) and not any(covers(block.name, (m,)) for m in others)
