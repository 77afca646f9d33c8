"""How one tensor is quantized: bits, groups, scheme, range and activations, and what of it is possible.

    >>> TensorSpec(bits=3, groups=12, scheme="symmetric").is_float
    False

Reference: Shen et al. 2020, Q-BERT, section 3.3 (group-wise quantization).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

from qbert.arguments import is_whole
from qbert.targets import Target

Scheme: TypeAlias = Literal["asymmetric", "symmetric", "midrise"]
RangeMethod: TypeAlias = Literal["minmax", "percentile", "mse"]
ActivationRange: TypeAlias = Literal["dynamic", "asymmetric", "static"]

QUANTIZED_BITS = (2, 3, 4, 8)
FLOAT_BITS = (16, 32)
DEFAULT_GROUPS = 128
_WHOLE_NUMBERS = ("bits", "groups", "input_group_size", "activation_bits")


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
            placed symmetrically around 0 without 0 itself.
        range_method: ``minmax``, ``percentile`` (of the weights of a group) or ``mse`` (least squared error).
        percentile: share in percent of the weights that ``percentile`` keeps inside the range.
        activation_bits: bits of the input of a matrix product: 8, or ``None`` for float activations.
        activation_range: ``dynamic`` (per token, symmetric), ``asymmetric`` (per token, from its smallest to its
            largest value: finer steps where a token's outliers have one sign, as in BERT) or ``static`` (per tensor,
            affine, calibrated); ``None`` is static if calibration data is given and dynamic if not.
    """

    bits: int = 4
    groups: int | None = None
    input_group_size: int | None = None
    scheme: Scheme = "asymmetric"
    range_method: RangeMethod = "mse"
    percentile: float = 99.9
    activation_bits: int | None = 8
    activation_range: ActivationRange | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            if is_whole(getattr(self, name)):  # numpy's become Python's, for JSON
                object.__setattr__(self, name, int(getattr(self, name)))
        _check_spec(self)

    @property
    def is_float(self) -> bool:
        """Whether the tensor is left as it is."""
        return self.bits in FLOAT_BITS


SPEC_FIELDS = tuple(f.name for f in fields(TensorSpec))


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
    """Plain JSON values of one specification; ``TensorSpec(**values)`` reads them back."""
    return asdict(spec)


def check_bits(name: str, bits: Any) -> int:
    """`bits` as an int.

    Raises:
        ValueError: if it is no bit width, with the nearest one.
    """
    if not is_whole(bits) or bits not in QUANTIZED_BITS + FLOAT_BITS:
        nearest = min(QUANTIZED_BITS, key=lambda b: abs(b - bits)) if isinstance(bits, (int, float)) else 4
        raise ValueError(f"{name}={bits!r} is not possible; use 2, 3, 4 or 8 (nearest: {nearest}), or 16/32 for float")
    return int(bits)


def _check_spec(spec: TensorSpec) -> None:
    check_bits("bits", spec.bits)
    for name in ("groups", "input_group_size"):
        value = getattr(spec, name)
        if value is not None and not (is_whole(value) and value >= 1):
            raise ValueError(f"{name}={value!r} is not possible; use a whole number of at least 1")
    choices = {
        "scheme": ("asymmetric", "symmetric", "midrise"),
        "range_method": ("minmax", "percentile", "mse"),
        "activation_bits": (8, None),
        "activation_range": ("dynamic", "asymmetric", "static", None),
    }
    for name, allowed in choices.items():
        value = getattr(spec, name)
        if value not in allowed or isinstance(value, float):
            raise ValueError(f"{name}={value!r} is not possible; use one of {allowed}")
    if not (isinstance(spec.percentile, Real) and 50.0 < spec.percentile <= 100.0):
        raise ValueError(f"percentile={spec.percentile!r} is not possible; use a percentage in (50, 100]")


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


def _suits_heads(groups: int, heads: int | None) -> bool:
    # Fewer groups than heads must hold whole heads; more are shared out over the heads, unequally if need be.
    return heads is None or groups >= heads or heads % groups == 0
