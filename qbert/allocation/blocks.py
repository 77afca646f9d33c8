"""What can be decided in a bit allocation: blocks of matrices, those tied to each other, those fixed beforehand.

>>> choices = make_choices(measured_blocks(spectrum), fixed={"encoder.layer.0": 8})
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from torch import nn

from qbert.arguments import is_whole
from qbert.bits import FLOAT_BITS, QUANTIZED_BITS, BitsConfig, covers, longest, table_bits_beside
from qbert.encoders.targets import HEAD_ROLE, Target, base_model, find_targets, join_path

Fixed = Mapping[str, int | Mapping[str, Any]]
_NOT_OF_BLOCKS = ("*", "embeddings")


class Measured(Protocol):
    """What was measured: blocks, the quantizable matrices in each, and how sensitive each block is."""

    @property
    def names(self) -> Sequence[str]:
        """[L] block names."""

    @property
    def members(self) -> Mapping[str, Sequence[str]]:
        """Block name -> names of its matrices (`Target.name`)."""

    @property
    def sensitivity(self) -> Any:
        """[L] sensitivities, larger = more bits."""


@dataclass(frozen=True)
class Block:
    """One measured block: its name, the names of its matrices, and its sensitivity."""

    name: str
    members: tuple[str, ...]
    sensitivity: float


@dataclass(frozen=True)
class Choice:
    """Blocks that get one bit width together.

    Attributes:
        blocks: the blocks, tied ones together.
        members: their matrices that are not fixed.
    """

    blocks: tuple[Block, ...]
    members: tuple[str, ...]

    @property
    def sensitivity(self) -> float:
        """The largest of its blocks'."""
        return max(b.sensitivity for b in self.blocks)


def check_widths(bits: Iterable[int]) -> tuple[int, ...]:
    """`bits` in ascending order.

    Raises:
        ValueError: if it is one number, is empty, holds a number twice or one that is not a bit width.
    """
    if not isinstance(bits, Iterable):
        raise ValueError(f"bits={bits!r} is one number; give the widths to choose from, such as bits=(2, 3)")
    widths = tuple(bits)
    known = QUANTIZED_BITS + FLOAT_BITS
    wrong = [b for b in widths if not is_whole(b) or b not in known]
    if wrong or not widths or len(set(widths)) < len(widths):
        raise ValueError(f"bits={widths!r} is not possible; give different widths out of {', '.join(map(str, known))}")
    return tuple(sorted(int(b) for b in widths))


def measured_blocks(measured: Measured | Mapping[str, float], model: nn.Module | None = None) -> list[Block]:
    """The blocks of a spectrum, of a sensitivity report, or of a plain mapping from block name to sensitivity.

    Raises:
        ValueError: no block, no matrix in any of them, a sensitivity that is not a finite number, or a block that
            `model` does not have.
        TypeError: if `measured` is none of the three, or `model` no module.
    """
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model: expected the float model (nn.Module), got {type(model).__name__}")
    if isinstance(measured, Mapping):
        names = list(measured)
        for name, value in measured.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"spectrum: the sensitivity of {name} is {value!r}; use a number")
        values = [float(v) for v in measured.values()]
        members: Mapping[str, Sequence[str]] = {name: members_of(name, model) for name in names}
    elif not all(hasattr(measured, attribute) for attribute in ("names", "members", "sensitivity")):
        raise TypeError(
            f"spectrum: expected a HessianSpectrum (HessianSpectrum.load reads a file), the result of "
            f"qbert.sensitivity or a mapping from block name to sensitivity, got {type(measured).__name__}"
        )
    else:
        names, values, members = list(measured.names), [float(v) for v in measured.sensitivity], measured.members
    if not names:
        raise ValueError("spectrum: it holds no block; measure an encoder with at least one layer")
    if not any(members[name] for name in names):
        raise ValueError(
            "spectrum: none of its blocks holds a matrix that could be quantized, as if a quantized model had been "
            "measured; measure the float model"
        )
    for name, value in zip(names, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"spectrum: the sensitivity of {name} is {value}; measure it again")
    if model is not None:
        known = {t.name for t in find_targets(model)}
        for name in names:
            for member in members[name]:
                if member not in known:
                    raise ValueError(
                        f"spectrum: its block {name} holds {member}, which is no quantizable matrix of the model; "
                        "pass the float model that was measured"
                    )
    return [Block(n, tuple(members[n]), v) for n, v in zip(names, values, strict=True)]


def members_of(name: str, model: nn.Module | None) -> list[str]:
    """The matrices at or below `name`; `name` itself where no model is given.

    Raises:
        ValueError: if the model has no quantizable matrix there.
    """
    if model is None:
        return [name]
    inside = [t.name for t in find_targets(model) if covers(name, (t.name, t.path)) and not t.is_embedding]
    if not inside:
        raise ValueError(f"spectrum: the model has no quantizable matrix at or below {name!r}; check the name")
    return inside


def make_choices(
    blocks: Sequence[Block],
    *,
    fixed: Fixed | None = None,
    tied: Iterable[Iterable[str]] = (),
    model: nn.Module | None = None,
) -> list[Choice]:
    """One choice for every set of tied blocks that is not wholly fixed, in the order of the blocks.

    Args:
        blocks: as measured.
        fixed: pattern -> bits (or a mapping of `TensorSpec` fields) of what is not to be decided.
        tied: sets of block names that shall get equal bits; blocks that share a weight in `model` always do.
        model: to find shared weights.

    Raises:
        ValueError: if `tied` names an unknown block; TypeError if it holds names instead of sets of names, or `fixed`
            is no mapping.
    """
    if not (fixed is None or isinstance(fixed, Mapping)):
        raise TypeError(f"fixed: expected a mapping from name patterns to bits, got {type(fixed).__name__}")
    sets = list(tied)
    if any(isinstance(names, str) for names in sets):
        raise TypeError(f"tied: {sets!r} holds names; give sets of names, such as [({sets[0]!r}, ...)]")
    parent = {b.name: b.name for b in blocks}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for names in [list(g) for g in sets] + _sharing(blocks, model):
        for name in names:
            if name not in parent:
                raise ValueError(f"tied: {name!r} is no measured block; use names such as {blocks[0].name!r}")
            parent[root(name)] = root(names[0])
    prefix = base_model(model)[0] if model is not None else ""
    together: dict[str, list[Block]] = {}
    for block in blocks:
        together.setdefault(root(block.name), []).append(block)
    choices = []
    for group in together.values():
        members = tuple(m for b in group for m in b.members if fixed_value(m, fixed, prefix) is None)
        if members:
            choices.append(Choice(tuple(group), members))
    return choices


def fixed_value(member: str, fixed: Fixed | None, prefix: str = "") -> int | Mapping[str, Any] | None:
    """What the longest fixed pattern that covers a matrix says; ``None`` where none does."""
    values = best_rules(member, {p: v for p, v in (fixed or {}).items() if p not in _NOT_OF_BLOCKS}, prefix)
    if any(v != values[0] for v in values):
        raise ValueError(f"fixed: two patterns of equal length disagree about {member}; make one of them longer")
    return values[0] if values else None


def best_rules(member: str, rules: Fixed, prefix: str = "") -> list[int | Mapping[str, Any]]:
    """The values of the longest patterns that cover a matrix, chosen among as `BitsConfig` does."""
    return [rules[p] for p in longest(covering(member, rules, prefix))]


def covering(member: str, rules: Fixed, prefix: str = "") -> list[str]:
    """The patterns that cover a matrix."""
    names = (member, join_path(prefix, member))
    return [p for p in rules if p != "embeddings" and covers(p, names)]


def free_targets(model: nn.Module) -> dict[str, Target]:
    """Matrices by name, tables and heads apart."""
    return {t.name: t for t in find_targets(model) if not t.is_embedding and t.role != HEAD_ROLE}


def _sharing(blocks: Sequence[Block], model: nn.Module | None) -> list[list[str]]:
    """Names of blocks that hold one and the same weight."""
    if model is None:
        return []
    weights = {t.name: id(t.weight) for t in find_targets(model)}
    owners: dict[int, list[str]] = {}
    for block in blocks:
        for member in block.members:
            owners.setdefault(weights[member], []).append(block.name)
    return [names for names in owners.values() if len(set(names)) > 1]


class ConfigWriter:
    """Writes configurations of many choices of bits for the same blocks, with as few patterns as say them.

    Args:
        blocks: all measured blocks, fixed ones included.
        chosen: names of the blocks whose bits are chosen.
        widths, fixed, model, embedding_bits, settings: as for `qbert.allocate_bits`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        chosen: Iterable[str],
        widths: Sequence[int],
        fixed: Fixed | None,
        model: nn.Module | None,
        embedding_bits: int | None,
        settings: Mapping[str, Any],
    ) -> None:
        prefix = base_model(model)[0] if model is not None else ""
        names, known = set(chosen), [(m, b) for b in blocks for m in b.members]
        self._patterns: list[tuple[str, str]] = []  # pattern, block whose bits it gets
        for block in blocks:
            if block.name in names:
                alone = all(covers(block.name, (m,)) == (b is block) for m, b in known)
                self._patterns += [(pattern, block.name) for pattern in ([block.name] if alone else block.members)]
        self._others = {**(fixed or {})}
        self._others.setdefault("*", max(widths))
        rules: Fixed = dict.fromkeys([*dict(self._patterns), *self._others], 0)
        self._members = [
            (member, block.name, fixed_value(member, fixed, prefix), covering(member, rules, prefix))
            for block in blocks
            for member in block.members
        ]
        self._prefix, self._settings = prefix, settings
        # The same for every choice, so that its size is the sum of what is chosen and a constant.
        self._embedding_bits = table_bits_beside(widths) if embedding_bits is None else embedding_bits

    def write(self, chosen: Mapping[str, int]) -> BitsConfig:
        """The configuration that gives every block its chosen bits and every fixed matrix its fixed ones."""
        rules: dict[str, int | Mapping[str, Any]] = {pattern: chosen[name] for pattern, name in self._patterns}
        rules.update(self._others)
        added: dict[str, int | Mapping[str, Any]] = {}
        for member, name, fixed, patterns in self._members:
            wanted = chosen[name] if fixed is None else fixed
            found = longest([*patterns, *covering(member, added, self._prefix)])
            if any(added.get(pattern, rules.get(pattern)) != wanted for pattern in found):
                added[member] = wanted
        return BitsConfig({**rules, **added}, embedding_bits=self._embedding_bits, **self._settings)
