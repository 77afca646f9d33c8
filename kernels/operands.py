"""What passes through every kernel's arguments: packed weights, as stored and as multiplied, grids, heads.

torch operators take plain tensors and numbers; `registration` takes these apart there, in one place.

    weight = PackedWeight(formats.pack(codes, 4), scale, zero, row_group, bits=4, columns=768)
    y = dispatch.linear(x, weight, bias, InputGrid(asymmetric=True))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.kernels import formats

E4M3_MAX = 448
# Sequences of one length, from this one on, may take another attention on a GPU, and are worth telling apart.
UNIFORM_LENGTH = 256


class InputGrid(NamedTuple):
    """How the input of a product is quantized: x ~ scale (code - zero), in int8 or, without a zero, e4m3 codes.

    Where scale is 0, with one symmetric scale a token, or, if `asymmetric`, from its smallest to its largest value:
    for a step and an offset a token, float32 [2, T], x ~ scale[0] code + scale[1] (`reference.quantize_rows`).
    `bits` 0 stands for an input that is left as it is.
    """

    scale: float = 0.0
    zero: int = 0
    asymmetric: bool = False
    codes_dtype: torch.dtype = torch.int8
    bits: int = 8

    @property
    def in_e4m3(self) -> InputGrid:
        """e4m3 codes of the same range: static up to the larger of its ends, or per token."""
        largest = self.scale * max(128 + self.zero, 127 - self.zero)
        return InputGrid(largest / E4M3_MAX, codes_dtype=torch.float8_e4m3fn)

    @property
    def options(self) -> dict[str, Any]:
        """The same as the keywords of `cpu.CpuLinear.prepare`."""
        return {
            "activation_bits": self.bits or None,
            "activation_scale": self.scale or None,
            "activation_zero": self.zero,
            "asymmetric": self.asymmetric,
        }


PER_TOKEN = InputGrid()  # int8, symmetric
FLOAT = InputGrid(bits=0)


class Spans(NamedTuple):
    """Where the sequences of T packed tokens lie.

    Sequence s is the tokens starts[s] to starts[s + 1] (int32 [S + 1]), at most `longest` of them; `uniform` promises
    that all are that long, and that no token is in none.
    """

    starts: Tensor
    longest: int
    uniform: bool = False


class Heads(NamedTuple):
    """What attention reads: query, key and value [T, H, D], unit stride over D, slices of one tensor or not.

    The sequences are `Spans(cu_seqlens, longest, uniform)`; scores are multiplied by `scale`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    longest: int
    scale: float
    uniform: bool = False


class PackedWeight(NamedTuple):
    """A weight [O, I], or table [V, I], as it is stored: W[o, i] = scale[g, k] (q[o, i] - zero[g, k]).

    codes uint8 [O, row bytes] (`formats.pack`); scale, zero [G, K] of any floating dtype, k the input group of column
    i; row_group [O], of any integer dtype, the group g of every row, or None where G = O or G = 1; columns I.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    row_group: Tensor | None
    bits: int
    columns: int

    @property
    def rows(self) -> int:
        """O, or V."""
        return self.codes.shape[0]

    def dense(self) -> PackedWeight:
        """The same in what kernels read: contiguous, grids in float32, groups in int32."""
        groups = None if self.row_group is None else self.row_group.int().contiguous()
        grids = (self.scale.float().contiguous(), self.zero.float().contiguous())
        return PackedWeight(self.codes.contiguous(), *grids, groups, self.bits, self.columns)

    def unpacked(self) -> Tensor:
        """int8 codes [O, I]."""
        return formats.unpack(self.codes, self.bits, self.columns)


class E4m3Weight(NamedTuple):
    """A weight [O, I] as a product of eight-bit floats takes it: W[o, i] = scale[o] codes[o, i], y + bias.

    codes float8_e4m3fn [O, I], zeros subtracted; scale float32 [O]; bias [O] in the dtype of the result.
    `terms.e4m3_weight` makes it from stored weights that it holds exactly.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """O."""
        return self.codes.shape[0]


class ProductWeight(NamedTuple):
    """A weight as an int8, e4m3 or fp16 product takes it: codes, and what its epilogue needs of every output row.

    codes uint8 [O, row bytes] of one weight, or of several with one input whose rows lie under each other, each with
    its bits; scale and bias float32 [all rows]; zero [all rows] float32 or, times 2^(8 - bits), int32
    (`terms.fixed_point_zero`); weight_sum float32 [all rows], the sum of each row of the real weights, for inputs with
    offsets. `terms.Terms` makes them from stored weights.
    """

    codes: list[Tensor]
    bits: list[int]
    scale: Tensor
    zero: Tensor | None = None
    bias: Tensor | None = None
    weight_sum: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of all the weights together."""
        return sum(codes.shape[0] for codes in self.codes)

    def dense(self) -> ProductWeight:
        """The same without strides."""
        vectors = (None if t is None else t.contiguous() for t in self[2:])
        return ProductWeight([codes.contiguous() for codes in self.codes], self.bits, *vectors)  # type: ignore[arg-type]
