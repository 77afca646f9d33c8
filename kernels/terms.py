"""What the epilogue of an int8 product needs of a packed layer: scale, zero and bias per output row.

    y[t, o] = (acc[t, o] - zero[o] row_sum[t]) scale[o] x_scale[t] + bias[o]

Static activations have a zero of their own, x ~ x_scale (xq - x_zero). Its part of the sum does not depend on x and
goes into the bias:

    sum_i (xq - x_zero)(q - zero) = acc - zero row_sum - x_zero (sum_i q - I zero)

Asymmetric activations have an offset a token, x ~ x_scale xq + x_offset: the term x_offset[t] weight_sum[o] is added,
with weight_sum = scale (sum_i q - I zero), the sums of the real weights.

For many tokens weights of 2 to 4 bits are unpacked, zeros subtracted: to int8 codes (`unpacked_weight`) or, exact too,
to eight-bit floats, which the vendor's product takes (`e4m3_weight`).

    terms = Terms.prepare(weight, bias)
    y = operators.matmul_a8(xq, x_scale, row_sum, terms.of([weight.codes], [weight.bits]))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qbert.kernels import formats, reference
from qbert.kernels.operands import PER_TOKEN, E4m3Weight, InputGrid, PackedWeight, ProductWeight


def fixed_point_zero(zero: Tensor, bits: int, columns: int) -> Tensor | None:
    """zero [O] for `matmul_a8`: None where all are 0, int32 zero * 2^(8 - bits) where that is exact, else float32.

    int32 also wants |zero| * 2^(8 - bits) * 128 * columns, plus the product itself, below 2^31.
    """
    if not bool((zero != 0).any()):
        return None
    scaled = zero.double() * (1 << (8 - bits))
    room = float(scaled.abs().max()) * 128 + 128 * 128
    if bool((scaled == scaled.round()).all()) and room * columns < 2**31:
        return scaled.to(torch.int32)
    return zero.float().contiguous()


class Terms(NamedTuple):
    """The terms of one layer, or of several with one input whose rows lie under each other.

    scale float32 [O]; zero [O] as `fixed_point_zero` gives it; row_zero float32 [O], the zero itself; bias float32 [O]
    or None, the part of a static activation zero included; weight_sum float32 [O], for asymmetric activations only.
    """

    scale: Tensor
    zero: Tensor | None
    row_zero: Tensor
    bias: Tensor | None
    weight_sum: Tensor | None

    @classmethod
    def prepare(cls, weight: PackedWeight, bias: Tensor | None = None, grid: InputGrid = PER_TOKEN) -> Terms:
        """From a weight with one input group, bias [O] or None, and the grid of the input.

        Nothing returned shares memory with an argument.
        """
        spread = (reference.expand_groups(t, weight.row_group, weight.rows)[:, 0] for t in (weight.scale, weight.zero))
        row_scale, row_zero = (t.float().contiguous().clone() for t in spread)
        whole = None if bias is None else bias.detach().float().clone()
        weight_sum = None
        if grid.asymmetric or (grid.scale > 0 and grid.zero):
            sums = weight.unpacked().sum(dim=1, dtype=torch.int64).double()
            weight_sum = (row_scale.double() * (sums - weight.columns * row_zero.double())).float()
        if weight_sum is not None and not grid.asymmetric:
            shift = grid.scale * grid.zero * weight_sum
            whole, weight_sum = -shift if whole is None else whole - shift, None
        return cls(row_scale, fixed_point_zero(row_zero, weight.bits, weight.columns), row_zero, whole, weight_sum)

    @classmethod
    def join(cls, parts: list[Terms]) -> Terms:
        """The terms for `matmul_a8_mixed`."""
        row_zero = torch.cat([p.row_zero for p in parts])
        zeros = [torch.zeros_like(p.scale, dtype=torch.int32) if p.zero is None else p.zero for p in parts]
        exact = all(zero.dtype == torch.int32 for zero in zeros)
        some = any(p.bias is not None for p in parts)
        biases = [torch.zeros_like(p.scale) if p.bias is None else p.bias for p in parts]
        sums = [p.weight_sum for p in parts if p.weight_sum is not None]
        return cls(
            torch.cat([p.scale for p in parts]),
            None if all(p.zero is None for p in parts) else torch.cat(zeros) if exact else row_zero,
            row_zero,
            torch.cat(biases) if some else None,
            torch.cat(sums) if sums else None,
        )

    def of(self, codes: list[Tensor], bits: list[int]) -> ProductWeight:
        """What a product takes: these terms with the packed codes that they belong to."""
        return ProductWeight(codes, bits, self.scale, self.zero, self.bias, self.weight_sum)


def unpacked_weight(weights: list[PackedWeight], terms: Terms) -> ProductWeight | None:
    """Weights with one int8 input, one under the other, as one of 8 bits without zeros; None where int8 cannot hold it.

    Zeros are subtracted. Where some are halves, codes count half steps. The product is the same integer, in the same
    or in half units, so that results are those of the packed weights.
    """
    codes = _without_zeros(weights, terms)
    half = not torch.equal(codes, codes.round())
    codes = 2 * codes if half else codes
    if not torch.equal(codes, codes.round()) or bool((codes.abs() > 127).any()):
        return None
    scale = terms.scale / 2 if half else terms.scale
    return ProductWeight([formats.pack(codes.to(torch.int8), 8)], [8], scale, None, terms.bias, terms.weight_sum)


def _without_zeros(weights: list[PackedWeight], terms: Terms) -> Tensor:
    """float32 [all rows, I]."""
    return torch.cat([w.unpacked() for w in weights]).float() - terms.row_zero[:, None]


def e4m3_weight(weights: list[PackedWeight], terms: Terms, grid: InputGrid, dtype: torch.dtype) -> E4m3Weight | None:
    """Weights with one e4m3 input, one under the other, for `operators.matmul_e4m3`; None where e4m3 changes some code.

    Codes of 2 to 4 bits minus a whole or half zero are exact: e4m3 has four digits and reaches 448. A static step of
    `grid` goes into the scale, so that the product needs none for its tokens. The bias comes in `dtype`, the result's.
    """
    codes = _without_zeros(weights, terms)
    floats = codes.to(torch.float8_e4m3fn)
    if not torch.equal(floats.float(), codes):
        return None
    scale = terms.scale * grid.scale if grid.scale else terms.scale
    return E4m3Weight(floats, scale, None if terms.bias is None else terms.bias.to(dtype))
