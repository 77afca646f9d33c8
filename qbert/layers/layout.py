"""How a packed tensor is laid out: bits, groups, heads, and which zero points are stored.

Everything here can be written into a configuration file; with the number of rows and columns of a weight it fixes the
shape of every stored tensor. Codes take ``rows * columns * bits / 8`` bytes (rows padded to whole bytes), those of a
2:4 matrix ``rows * columns * (bits / 2 + .75) / 8``; scales 4 bytes a group, zero points 1 byte a group for the
asymmetric scheme, 4 for the offset one and nothing for the others.

    >>> layout_of(quantized.get_submodule("encoder.layer.0.output.dense")).groups
    128
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qbert.bits import TensorSpec
from qbert.kernels.formats import half_row_nbytes, packed_row_nbytes
from qbert.layers.quantizer import WeightQuantizer
from qbert.quantizers.groups import row_group_of
from qbert.quantizers.sparsity import half_is_zero

StoredZero: TypeAlias = Literal["none", "int8", "float32"]
# The zero point of schemes in which it is always the same, and so not stored.
FIXED_ZERO = {"symmetric": 0.0, "midrise": -0.5}


@dataclass(frozen=True)
class PackedLayout:
    """Layout of one packed tensor.

    Attributes:
        spec: its specification, with the number of groups resolved and the activation quantization as it is.
        heads: number of blocks of rows that groups do not cross (Q-BERT section 3.3); ``None`` if rows have no heads.
        input_groups: number K of runs of input columns with a scale each.
        zero: dtype of the stored zero points; ``none`` if the scheme fixes them.
        sparsity: ``2:4`` where files hold two in every four codes of a row, and which they are; the others are zero.
    """

    spec: TensorSpec
    heads: int | None
    input_groups: int
    zero: StoredZero
    sparsity: Literal["2:4"] | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.spec.bits

    @property
    def groups(self) -> int:
        """Number G of row groups."""
        assert self.spec.groups is not None
        return self.spec.groups

    def __str__(self) -> str:
        sparse = f", {self.sparsity}" if self.sparsity else ""
        return f"bits={self.bits}, groups={self.groups}x{self.input_groups}, {self.spec.scheme}{sparse}"

    def row_nbytes(self, columns: int) -> int:
        """Bytes of the stored codes of a row of `columns` weights."""
        stored = half_row_nbytes if self.sparsity else packed_row_nbytes
        return stored(columns, self.bits)


def layout_of(module: Any) -> PackedLayout:
    """The layout in which a fake-quantized layer is packed.

    Raises:
        ValueError: if its row groups are not those of any number of groups and heads.
    """
    quantizer = module.weight_quantizer
    groups, input_groups = quantizer.scale.shape
    activation = getattr(module, "activation_quantizer", None)
    if activation is not None and not activation.enabled:
        activation = None
    spec = replace(
        quantizer.spec,
        groups=groups,
        activation_bits=None if activation is None else activation.bits,
        activation_range=None if activation is None else activation.mode,
    )
    return PackedLayout(spec, _heads_of(quantizer.row_group, groups), input_groups, stored_zero(quantizer))


def stored_sparsity(matrix: Tensor, bits: int, zero: StoredZero, scheme: str) -> Literal["2:4"] | None:
    """How a matrix [O, I] of float weights is stored: ``2:4`` where it has such zeros, its grid has one, and it pays.

    A zero point that is learned, or always between two codes, gives no weight that is exactly zero.
    """
    if (zero != "int8" and FIXED_ZERO.get(scheme) != 0.0) or not half_is_zero(matrix):
        return None
    columns = matrix.shape[1]
    return "2:4" if half_row_nbytes(columns, bits) < packed_row_nbytes(columns, bits) else None


def has_exact_zero(scheme: str) -> bool:
    """Whether a weight that is zero stays so on every grid of a scheme, as long as zero points are not learned."""
    return scheme == "asymmetric" or FIXED_ZERO.get(scheme) == 0.0


def stored_zero(quantizer: WeightQuantizer) -> StoredZero:
    """The smallest storage that keeps the zero points exactly: none, int8, or float32 for learned ones."""
    zero = quantizer.zero.detach()
    fixed = FIXED_ZERO.get(quantizer.spec.scheme)
    if fixed is not None and bool((zero == fixed).all()):
        return "none"
    if bool(((zero == zero.round()) & (zero >= -128) & (zero <= 127)).all()):
        return "int8"
    return "float32"


def _heads_of(row_group: Tensor, groups: int) -> int | None:
    rows = len(row_group)
    index = torch.arange(rows, device=row_group.device)
    for heads in (None, *(h for h in range(2, groups) if rows % h == 0)):
        if torch.equal(row_group_of(index, rows, groups, heads), row_group):
            return heads
    raise ValueError(
        f"the {groups} row groups of a tensor with {rows} rows are not those that row_groups makes for any number of "
        "heads; build the quantizer with row_groups"
    )
