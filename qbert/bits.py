"""Which tensor gets how many bits: the configuration that every part of the library passes around.

A `BitsConfig` maps name patterns to bits (or to a full tensor specification), plus defaults. `resolve` turns it into
one `TensorSpec` per tensor of a given model, and refuses, before anything is changed, whatever cannot work.

    >>> config = BitsConfig({"encoder.layer.0": 8, "embeddings": 8, "*": 4}, groups=128)
    >>> config.resolve(model)["bert.encoder.layer.1.output.dense"].bits
    4

Patterns match dotted module names by prefix or glob, with or without the backbone's own prefix. ``"embeddings"`` is
every embedding table; ``"*"`` is every other matrix of the encoder. The longest match wins, wildcards not
counted, and a name before a pattern. Pooler and task heads stay
in float unless a pattern without a leading wildcard names them.

Reference: Shen et al. 2020, Q-BERT, section 3.1 (mixed precision) and 3.3 (group-wise quantization).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from qbert.arguments import is_whole
from qbert.encoders.targets import HEAD_ROLE, Target, find_targets
from qbert.files import read_json, write_json

Scheme: TypeAlias = Literal["asymmetric", "symmetric", "midrise", "offset"]
RangeMethod: TypeAlias = Literal["minmax", "percentile", "mse"]
ActivationRange: TypeAlias = Literal["dynamic", "asymmetric", "static", "dynamic or static"]
Rounding: TypeAlias = Literal["nearest", "compensated"]
ColumnOrder: TypeAlias = Literal["activity", "given"]
QUANTIZED_BITS = (2, 3, 4, 8)
FLOAT_BITS = (16, 32)
DEFAULT_GROUPS = 128
_WHOLE_NUMBERS = ("bits", "groups", "input_group_size", "activation_bits", "refits", "rank")


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2, 3, 4 or 8; 16 and 32 leave the tensor in float.
        groups: number of groups of output rows with a range each; ``None`` chooses 128 (near-equal groups where 128
            does not divide the rows) for a matrix and one group a row for an embedding table. A number of at least
            the rows means one group a row.
        input_group_size: also cut the inputs into groups of this many columns; ``None`` does not.
        scheme: ``asymmetric`` has an integer zero point, so that 0 is on the grid; ``symmetric`` has levels
            -m..m with m = 2^(bits-1) - 1, which is ternary at 2 bits; ``midrise`` has 2^bits levels
            placed symmetrically around 0 without 0 itself; ``offset`` has a real-valued zero point, so that the levels
            may lie anywhere, at 4 bytes a group instead of 1.
        range_method: ``minmax``, ``percentile`` (of the weights of a group) or ``mse`` (least squared error).
        percentile: share in percent of the weights that ``percentile`` keeps inside the range.
        activation_bits: bits of the input of a matrix product: 4, 6, 8, or ``None`` for float activations. Fewer than
            8 are computed in float, by the packed model too.
        activation_range: ``dynamic`` (per token, symmetric), ``asymmetric`` (per token, from its smallest to its
            largest value: finer steps where a token's outliers have one sign, as in BERT) or ``static`` (per tensor,
            affine, calibrated); ``None`` is static if calibration data is given and asymmetric if not, and asymmetric
            for a matrix with compensated rounding. ``dynamic or static``, which was ``None``'s meaning in
            configurations of format 1, is dynamic where ``None`` is asymmetric for want of data.
        rounding: ``nearest``, or ``compensated``: codes for the least error of the layer's outputs on calibration
            data, the error of each column spread over the others (`qbert.quantizers.rounding`). Tables, whose rows
            are looked up one by one, are always rounded to nearest.
        damping: share of the mean squared input that is added to the inputs' second moment for compensated rounding.
        column_order: the columns that are rounded first: those with the largest inputs (``activity``), or as they
            stand (``given``).
        refits: how often compensated rounding fits its ranges anew to the codes found; 0 keeps those of
            `range_method`, as ``midrise`` and a single group always do.
        rank: of a word table [V, D] alone: store V rows of this length, in `bits` bits, and a matrix that makes rows
            of length D of them, in 8 bits, fitted to the rows that calibration data looks up.
        row_bits: of a word table alone: pairs (bits, number of rows), most bits first. The rows that matter most on
            calibration data get the first ones, and so on; all others get `bits`.
    """

    bits: int = 4
    groups: int | None = None
    input_group_size: int | None = None
    scheme: Scheme = "asymmetric"
    range_method: RangeMethod = "mse"
    percentile: float = 99.9
    activation_bits: int | None = 8
    activation_range: ActivationRange | None = None
    rounding: Rounding = "nearest"
    damping: float = 0.01
    column_order: ColumnOrder = "activity"
    refits: int = 4
    rank: int | None = None
    row_bits: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            if is_whole(getattr(self, name)):  # numpy's become Python's, for JSON
                object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "row_bits", _row_bits(self.row_bits))
        _check_spec(self)

    @property
    def is_float(self) -> bool:
        """Whether the tensor is left as it is."""
        return self.bits in FLOAT_BITS

    @property
    def is_composed(self) -> bool:
        """Whether the tensor is a table that is stored as several tensors."""
        return self.rank is not None or bool(self.row_bits)

    @property
    def needs_data(self) -> bool:
        """Whether `quantize_model` has to see inputs to make it."""
        return self.rounding == "compensated" or self.is_composed or self.activation_range == "static"


SPEC_FIELDS = tuple(f.name for f in fields(TensorSpec))
_LATER_FIELDS = ("rounding", "damping", "column_order", "refits", "rank", "row_bits")


def make_spec(where: str, base: TensorSpec, settings: Mapping[str, Any]) -> TensorSpec:
    """`base` with some fields changed.

    Raises:
        ValueError: for an unknown or impossible setting; it begins with `where`.
    """
    unknown = sorted(set(settings) - set(SPEC_FIELDS))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; use one of {', '.join(SPEC_FIELDS)}")
    try:
        return replace(base, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def spec_to_dict(spec: TensorSpec) -> dict[str, Any]:
    """Plain JSON values of one specification; ``TensorSpec(**values)`` reads them back.

    What versions before knew nothing of is left out where it is the default, so that they read the rest.
    """
    plain = {f.name: f.default for f in fields(TensorSpec)}
    values = {n: v for n, v in asdict(spec).items() if n not in _LATER_FIELDS or v != plain[n]}
    return values | {"row_bits": [list(pair) for pair in spec.row_bits]} if spec.row_bits else values


def check_bits(name: str, bits: Any) -> int:
    """`bits` as an int.

    Raises:
        ValueError: if it is no bit width, with the nearest one.
    """
    if not is_whole(bits) or bits not in QUANTIZED_BITS + FLOAT_BITS:
        nearest = min(QUANTIZED_BITS, key=lambda b: abs(b - bits)) if isinstance(bits, (int, float)) else 4
        raise ValueError(f"{name}={bits!r} is not possible; use 2, 3, 4 or 8 (nearest: {nearest}), or 16/32 for float")
    return int(bits)


def _row_bits(value: Any) -> tuple[tuple[int, int], ...]:
    """`value` as pairs of ints, most bits first.

    Raises:
        ValueError: if it is no mapping from bits to numbers of rows and no sequence of such pairs.
    """
    try:
        pairs = [(bits, rows) for bits, rows in (value.items() if isinstance(value, Mapping) else value)]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    # JSON knows keys of one kind only.
    pairs = [(int(b) if isinstance(b, str) and b.isdigit() else b, rows) for b, rows in pairs]
    known = all(is_whole(b) and b in QUANTIZED_BITS and is_whole(n) and n >= 1 for b, n in pairs)
    if not known or len({b for b, _ in pairs}) < len(pairs):
        raise ValueError(
            f"row_bits={value!r} is not possible; give bits (2, 3, 4 or 8) and how many rows get them, such as "
            "{8: 500, 4: 3000}"
        )
    return tuple(sorted(((int(b), int(n)) for b, n in pairs), reverse=True))


def _check_spec(spec: TensorSpec) -> None:
    check_bits("bits", spec.bits)
    for name in ("groups", "input_group_size", "rank"):
        value = getattr(spec, name)
        if value is not None and not (is_whole(value) and value >= 1):
            raise ValueError(f"{name}={value!r} is not possible; use a whole number of at least 1")
    choices = {
        "scheme": ("asymmetric", "symmetric", "midrise", "offset"),
        "range_method": ("minmax", "percentile", "mse"),
        "activation_bits": (4, 6, 8, None),
        "activation_range": ("dynamic", "asymmetric", "static", "dynamic or static", None),
        "rounding": ("nearest", "compensated"),
        "column_order": ("activity", "given"),
    }
    for name, allowed in choices.items():
        value = getattr(spec, name)
        if value not in allowed or isinstance(value, float):
            raise ValueError(f"{name}={value!r} is not possible; use one of {allowed}")
    if not (isinstance(spec.percentile, Real) and 50.0 < spec.percentile <= 100.0):
        raise ValueError(f"percentile={spec.percentile!r} is not possible; use a percentage in (50, 100]")
    if not (isinstance(spec.damping, Real) and 0.0 < spec.damping <= 1.0):
        raise ValueError(f"damping={spec.damping!r} is not possible; use a share in (0, 1], such as 0.01")
    if not (is_whole(spec.refits) and spec.refits >= 0):
        raise ValueError(f"refits={spec.refits!r} is not possible; use a whole number of at least 0")
    if spec.rank is not None and spec.row_bits:
        raise ValueError(f"rank={spec.rank} and row_bits={spec.row_bits} exclude each other; give one of them")


def check_groups(target: Target, spec: TensorSpec) -> None:
    """Refuse groups of rows or inputs that do not fit a tensor.

    Raises:
        ValueError: naming the tensor and the nearest number that fits.
    """
    rows, columns = target.shape
    if spec.groups is not None and spec.groups < rows:
        valid = [g for g in range(1, rows + 1) if rows % g == 0 and _suits_heads(g, target.heads)]
        if spec.groups not in valid:
            nearest = min(valid, key=lambda g: abs(g - spec.groups))  # type: ignore[operator]
            heads = f" in {target.heads} heads" if target.heads else ""
            raise ValueError(
                f"{target.name}: groups={spec.groups} does not divide its {rows} rows{heads}; nearest valid: {nearest}"
            )
    if spec.input_group_size is not None and columns % spec.input_group_size:
        valid = [g for g in range(1, columns + 1) if columns % g == 0]
        nearest = min(valid, key=lambda g: abs(g - spec.input_group_size))  # type: ignore[operator]
        raise ValueError(
            f"{target.name}: input_group_size={spec.input_group_size} does not divide its {columns} inputs; "
            f"nearest valid: {nearest}"
        )


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank at which two factors of a table [rows, columns] have fewer values than the table itself."""
    return (rows * columns - 1) // (rows + columns)


def check_composition(target: Target, spec: TensorSpec, tied: bool) -> None:
    """Refuse a rank or bits by rows that a tensor cannot have.

    Raises:
        ValueError: for a matrix, a table that shares its weight (`tied`), groups, more rows than there are, rows with
            no more bits than the rest, or a rank at which nothing is saved, naming the tensor and what is possible.
    """
    name = "rank" if spec.rank is not None else "row_bits"
    where = f"{target.name}: {name}={getattr(spec, name)!r}"
    rows, columns = target.shape
    if not target.is_embedding:
        raise ValueError(f"{where} is for lookup tables, and this is a matrix; leave it out")
    if tied:
        raise ValueError(f"{where} is not possible, because another layer computes with the same weight; give it bits")
    if spec.groups is not None or spec.input_group_size is not None:
        raise ValueError(f"{where} has a range a row; leave groups and input_group_size out")
    if spec.rank is not None and spec.rank > largest_rank(rows, columns):
        raise ValueError(
            f"{where} saves nothing over its {rows} rows of {columns}; the largest rank that does is "
            f"{largest_rank(rows, columns)}"
        )
    more = sum(count for _, count in spec.row_bits)
    if more >= rows:
        raise ValueError(f"{where} are {more} rows, but the table has {rows}; name fewer, or give all of them bits")
    if spec.row_bits and spec.row_bits[-1][0] <= spec.bits:
        raise ValueError(
            f"{where}: {spec.row_bits[-1][0]} bits are no more than the other rows' {spec.bits}; raise them"
        )


def _suits_heads(groups: int, heads: int | None) -> bool:
    # Fewer groups than heads must hold whole heads; more are shared out over the heads, unequally if need be.
    return heads is None or groups >= heads or heads % groups == 0


def covers(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names of a tensor."""
    glob = any(c in pattern for c in "*?[")
    below = pattern + "."
    return any(n == pattern or n.startswith(below) or (glob and fnmatch.fnmatchcase(n, pattern)) for n in names)


def longest(patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that have the most characters besides wildcards, in their order.

    A class ``[...]`` is a wildcard. Among patterns of as many characters, those without one go before.
    """
    given = list(patterns)
    most = max(map(_length, given), default=None)
    return [p for p in given if _length(p) == most]


# As fnmatch reads it: "]" right after "[" or "[!" belongs to the class, and "[" without an end is a character.
_WILDCARD = re.compile(r"[*?]|\[(?:!.|[^!])[^]]*\]")


def _length(pattern: str) -> tuple[int, bool]:
    """(characters besides wildcards, whether there is none of those)."""
    rest, wildcards = _WILDCARD.subn("", pattern)
    return len(rest), not wildcards


JSON_FORMAT = "qbert.bits/2"
# Of format 1, whose defaults were others: what its configurations leave unsaid, they still mean.
_FIRST_FORMAT = "qbert.bits/1"
_FIRST_TABLES = 8
_FIRST_RANGE: ActivationRange = "dynamic or static"
_MOST_BESIDE_SMALL_TABLES = 4
_SMALL_TABLES = 4


def table_bits_beside(widths: Iterable[int]) -> int:
    """Bits of the embedding tables where nothing is said of them: 4 beside matrices of at most 4 bits, else 8."""
    return _SMALL_TABLES if max(widths) <= _MOST_BESIDE_SMALL_TABLES else 8


class BitsConfig:
    """Bits and quantizer settings for every tensor of an encoder.

    Args:
        bits: one number for every encoder matrix, or a mapping from name patterns to a number or to a mapping of
            fields of `TensorSpec`: ``{"encoder.layer.0": 8, "*.output.dense": {"bits": 3, "groups": 12}, "*": 4}``.
            Without ``"*"``, matrices that no pattern names stay in float.
        embedding_bits: bits of the embedding tables that no pattern names (32 for float). ``None`` is 4 where no
            pattern gives more than 4 bits, and 8 otherwise.
        **defaults: `TensorSpec` fields that hold where a pattern does not say otherwise (``groups``, ``scheme``,
            ``range_method``, ``activation_bits``, ...). ``groups`` and ``input_group_size`` given here concern
            matrices only.

    Raises:
        ValueError: for impossible bits, groups, schemes or unknown settings, naming the pattern and the choices.
        TypeError: if `bits` is neither an int nor a mapping.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int | Mapping[str, Any]] = 4,
        *,
        embedding_bits: int | None = None,
        **defaults: Any,
    ) -> None:
        if not (is_whole(bits) or isinstance(bits, Mapping)):
            raise TypeError(f"bits: expected an int or a mapping from name patterns, got {type(bits).__name__}")
        unknown = sorted(set(defaults) - set(SPEC_FIELDS))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; use one of {', '.join(SPEC_FIELDS[1:])}")
        self._default_spec = make_spec("defaults", TensorSpec(), defaults)
        self.defaults: dict[str, Any] = {name: getattr(self._default_spec, name) for name in defaults}
        rules = dict(bits) if isinstance(bits, Mapping) else {"*": bits}
        if not rules:
            raise ValueError('bits: the mapping is empty; give at least one pattern, such as {"*": 4}')
        self.rules: dict[str, dict[str, Any]] = {}
        widths: list[int] = []
        for pattern, value in rules.items():
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(f"bits: patterns are non-empty strings, got {pattern!r}")
            settings = dict(value) if isinstance(value, Mapping) else {"bits": value}
            spec = make_spec(f"pattern {pattern!r}", self._default_spec, settings)
            self.rules[pattern] = {name: getattr(spec, name) for name in settings}
            widths.append(spec.bits)
        tables = table_bits_beside(widths) if embedding_bits is None else embedding_bits
        self.embedding_bits = check_bits("embedding_bits", tables)

    @classmethod
    def parse(cls, value: int | Mapping[str, Any] | BitsConfig | str | os.PathLike[str]) -> BitsConfig:
        """A `BitsConfig` from anything that is accepted as a ``bits_config``.

        Args:
            value: an int, a mapping from patterns, the mapping that `to_dict` makes, a `BitsConfig`, or the path of a
                JSON file written by `save`.

        Raises:
            ValueError, TypeError: as the constructor; FileNotFoundError if there is no such file.
        """
        if isinstance(value, BitsConfig):
            return value
        if isinstance(value, (str, os.PathLike)):
            return cls.load(value)
        if isinstance(value, Mapping) and "format" in value:
            return cls.from_dict(value)
        return cls(value)

    def resolve(self, model: nn.Module) -> dict[str, TensorSpec]:
        """The specification of every tensor of `model` that is to be quantized, by module path.

        Raises:
            ValueError: if a pattern matches nothing, two patterns of equal length disagree about a tensor, a group
                count or size does not divide, tensors that share one weight would be quantized in different ways, or
                nothing is left to quantize.
        """
        targets = find_targets(model)
        if all(t.role == HEAD_ROLE for t in targets):
            raise ValueError(
                f"model: {type(model).__name__} has no matrix or table that could be quantized; "
                "pass an encoder that is not quantized yet"
            )
        used: set[str] = set()
        resolved: dict[str, TensorSpec] = {}
        for target in targets:
            pattern = self._best_pattern(target, used)
            if pattern is None and not target.is_embedding:
                continue
            base = (
                replace(
                    self._default_spec, groups=None, input_group_size=None, rounding="nearest", rank=None, row_bits=()
                )
                if target.is_embedding
                else self._default_spec
            )
            settings = self.rules[pattern] if pattern is not None else {"bits": self.embedding_bits}
            spec = replace(base, **settings)
            if target.is_embedding and spec.rounding != "nearest":
                raise ValueError(
                    f"pattern {pattern!r}: rounding='compensated' makes nothing better in the table {target.name}, "
                    "whose rows are looked up one by one; leave it out"
                )
            if not spec.is_float:
                check_groups(target, spec)
                if spec.is_composed:
                    check_composition(target, spec, sum(t.weight is target.weight for t in targets) > 1)
                resolved[target.path] = spec
        self._refuse_unused(targets, used)
        if not resolved:
            raise ValueError("bits: every tensor is left in float; give at least one pattern 2, 3, 4 or 8 bits")
        _settle_ties(targets, resolved)
        return resolved

    def check_patterns(self, model: nn.Module) -> None:
        """Raises ValueError for a pattern that matches no tensor of `model`."""
        targets = find_targets(model)
        self._refuse_unused(targets, {p for p in self.rules for t in targets if _matches(p, t)})

    def _best_pattern(self, target: Target, used: set[str]) -> str | None:
        matches = [p for p in self.rules if _matches(p, target)]
        used.update(matches)
        if not matches:
            return None
        best = longest(matches)
        if any(self.rules[p] != self.rules[best[0]] for p in best):
            raise ValueError(
                f"patterns {best[0]!r} and {best[1]!r} both match {target.name} with equal length but differ; "
                "make one of them longer"
            )
        return best[0]

    def _refuse_unused(self, targets: Iterable[Target], used: set[str]) -> None:
        for pattern in self.rules:
            if pattern in used or pattern in ("*", "embeddings"):
                continue
            names = {part for t in targets for name in t.names for part in _prefixes(name)}
            close = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.0)
            raise ValueError(
                f"pattern {pattern!r} matches no tensor of the model; the nearest names are {', '.join(close)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, read back by `from_dict`."""
        return {
            "format": JSON_FORMAT,
            "bits": {p: s["bits"] if list(s) == ["bits"] else _plain(s) for p, s in self.rules.items()},
            "embedding_bits": self.embedding_bits,
            **_plain(self.defaults),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BitsConfig:
        """The inverse of `to_dict`, of versions before too. Raises ValueError if `values` is of no such format."""
        values = dict(values)
        written = values.pop("format", None)
        if written not in (JSON_FORMAT, _FIRST_FORMAT) or "bits" not in values:
            raise ValueError(f"not a bits configuration: expected format {JSON_FORMAT!r} with a 'bits' mapping")
        bits = values.pop("bits")
        if written == _FIRST_FORMAT:
            values = as_first_format(values)
            if isinstance(bits, Mapping):
                bits = {pattern: _said(v) if isinstance(v, Mapping) else v for pattern, v in bits.items()}
        return cls(bits, **values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as JSON (aside first, then renamed)."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitsConfig:
        """Read a configuration written by `save`, or any JSON mapping from patterns to bits.

        Raises:
            FileNotFoundError: if there is no such file; ValueError if it is not a bits configuration.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"bits_config: there is no file {os.fspath(path)!r}; pass a number, a mapping from name patterns, or "
                "the path of a JSON file of one"
            )
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"bits_config: {path} holds a {type(values).__name__}; expected a JSON object")
        try:
            return cls.from_dict(values) if "format" in values else cls(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"bits_config: {path} cannot be used: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitsConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        extra = "".join(f", {k}={v!r}" for k, v in self.defaults.items())
        return f"BitsConfig({self.to_dict()['bits']}, embedding_bits={self.embedding_bits}{extra})"


def as_first_format(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `BitsConfig` that say what format 1 meant where it said nothing."""
    return {"embedding_bits": _FIRST_TABLES, "activation_range": _FIRST_RANGE, **_said(values)}


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without a range that is left open."""
    return {name: value for name, value in values.items() if value is not None or name != "activation_range"}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as values that come back from JSON as they are."""
    return {n: [list(pair) for pair in v] if n == "row_bits" else v for n, v in settings.items()}


def _matches(pattern: str, target: Target) -> bool:
    if pattern == "*":
        return not target.is_embedding and target.role != HEAD_ROLE
    if pattern == "embeddings":
        return target.is_embedding
    if target.role == HEAD_ROLE and pattern.startswith(("*", "?", "[")):
        return False
    return covers(pattern, target.names)


def _settle_ties(targets: Iterable[Target], resolved: dict[str, TensorSpec]) -> None:
    """Refuse different grids for one weight; a matrix tied to a table is rounded as the table is, in its groups if it
    names none.

    A head that no pattern names follows its table in `quantize_model`.
    """
    first: dict[int, Target] = {}
    for target in sorted(targets, key=lambda t: t.path not in resolved):
        spec = resolved.get(target.path)
        owner = first.setdefault(id(target.weight), target)
        if owner is target or owner.path not in resolved:
            continue
        given = resolved[owner.path]
        if spec is None and target.role == HEAD_ROLE and owner.is_embedding:
            continue
        if spec is not None and owner.is_embedding:
            groups = _layout(owner, given)[1] if spec.groups is None else spec.groups
            spec = resolved[target.path] = replace(spec, groups=groups, rounding="nearest")
        if spec is None or _layout(target, spec) != _layout(owner, given):
            here, there = ("float" if x is None else f"{x.bits} bits" for x in (given, spec))
            raise ValueError(
                f"{owner.path} and {target.path} share one weight but are given {here} and {there}"
                + (", in other groups or another scheme" if here == there else "")
                + "; give both the same, or name only one"
            )


def _layout(target: Target, spec: TensorSpec) -> tuple[Any, ...]:
    """What decides the codes of a weight."""
    rows = target.shape[0]
    groups = min(rows, spec.groups or (rows if target.is_embedding else DEFAULT_GROUPS))
    heads = target.heads if 1 < groups < rows else None
    cut = spec.percentile if spec.range_method == "percentile" else None
    how = (spec.damping, spec.column_order, spec.refits) if spec.rounding == "compensated" else None
    return spec.bits, groups, heads, spec.input_group_size, spec.scheme, spec.range_method, cut, how


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
