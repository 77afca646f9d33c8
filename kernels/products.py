"""The matrix products among `operators`, as torch operators `torch.ops.qbert.matmul_*`.

They stand alone because what ends a product (bias, GELU, residual, requantization) is theirs and no other operator's.

y = matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, bits=4, out_dtype=torch.float16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import dispatch, formats, reference
from qbert.kernels.checks import (
    check_codes,
    check_matmul_a8,
    check_matmul_a8_mixed,
    check_matmul_a16,
    check_requantized,
)
from qbert.kernels.registration import summing
from qbert.kernels.twins import dense, product, requantize


def matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_row_sum: Tensor | None = None,
    weight_sum: Tensor | None = None,
    *,
    bits: int,
    gelu: bool = False,
    out_dtype: torch.dtype = torch.float16,
    out_scale: float = 0.0,
    out_zero: int = 0,
) -> Tensor:
    """y [T, O] = act((xq W_q^T - zero row_sum) x_scale scale + bias) + residual, in `out_dtype`.

    xq int8 [T, I], x_scale float32 [T] or [1], row_sum int32 [T] (needed with zero), packed uint8 [O, row bytes],
    scale and bias float32 [O], zero [O] float32 or, times 2^(8 - bits), int32 (`terms.fixed_point_zero`).
    xq float8_e4m3fn takes bits up to 4 and a float32 zero, its row_sum counting 1/512.
    x_scale [2, T], steps and offsets, adds offset weight_sum before the bias; weight_sum float32 [O] is the sum of each
    row of the real weights.
    out_dtype int8 needs `out_scale`: clamp(round(y / out_scale) + out_zero, -128, 127), and so does float8_e4m3fn, the
    number nearest to y / out_scale; the sum of every row is then
    added to `out_row_sum` (int32 [T], zeroed by the caller), where given: `torch.ops.qbert.matmul_a8_summed`.
    """
    return _call_matmul_a8(
        xq, x_scale, row_sum, packed, scale, zero, bias, residual, weight_sum, out_row_sum=out_row_sum, bits=bits,
        gelu=gelu, out_dtype=out_dtype, out_scale=out_scale, out_zero=out_zero,
    )  # fmt: skip


def _matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    *,
    out_row_sum: Tensor | None = None,
    bits: int,
    gelu: bool = False,
    out_dtype: torch.dtype = torch.float16,
    out_scale: float = 0.0,
    out_zero: int = 0,
) -> Tensor:
    check_matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, residual, bits, out_dtype, out_scale, weight_sum)
    check_requantized(out_scale, out_zero, out_row_sum, xq)
    if out_scale:
        check_codes(out_dtype, packed.shape[0], out_zero)
    if dispatch.implementation(xq.device) == "triton":
        from qbert.kernels.gpu.matmul_a8 import matmul_a8 as kernel

        return kernel(
            xq.contiguous(),
            x_scale.contiguous(),
            packed.contiguous(),
            scale.contiguous(),
            bits=bits,
            zero=dense(zero),
            row_sum=dense(row_sum),
            weight_sum=dense(weight_sum),
            bias=dense(bias),
            gelu=gelu,
            residual=dense(residual),
            out_dtype=out_dtype,
            out_scale=out_scale,
            out_zero=out_zero,
            out_row_sum=out_row_sum,
        )
    codes = formats.unpack(packed, bits, xq.shape[1])
    real_zero = zero if zero is None or zero.dtype != torch.int32 else zero.double() / (1 << (8 - bits))
    y = product(xq, x_scale, row_sum, codes, scale, real_zero, bias, weight_sum)
    y = reference.gelu(y) if gelu else y
    y = y if residual is None else y + residual
    return requantize(y, out_scale, out_zero, out_row_sum, out_dtype) if out_scale else y.to(out_dtype)


def _matmul_a8_fake(  # type: ignore[no-untyped-def]
    xq, x_scale, row_sum, packed, scale, zero=None, bias=None, residual=None, weight_sum=None, *, out_row_sum=None,
    bits, gelu=False, out_dtype=torch.float16, out_scale=0.0, out_zero=0,
):  # fmt: skip
    check_matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, residual, bits, out_dtype, out_scale, weight_sum)
    check_requantized(out_scale, out_zero, out_row_sum, xq)
    if out_scale:
        check_codes(out_dtype, packed.shape[0], out_zero)
    return xq.new_empty((xq.shape[0], packed.shape[0]), dtype=out_dtype)


_call_matmul_a8 = summing("matmul_a8", _matmul_a8, _matmul_a8_fake)


@torch.library.custom_op("qbert::matmul_a8_mixed", mutates_args=())
def matmul_a8_mixed(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: list[Tensor],
    bits: list[int],
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    weight_sum: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Query, key and value [T, 3 O] in one launch from three weights [O, row bytes] of different bits.

    scale, zero, bias and weight_sum [3 O]; zero float32 or, times each weight's 2^(8 - bits), int32.
    """
    check_matmul_a8_mixed(xq, x_scale, row_sum, packed, bits, scale, zero, bias, out_dtype, weight_sum)
    if dispatch.implementation(xq.device) == "triton":
        from qbert.kernels.gpu.matmul_a8_mixed import matmul_a8_mixed as kernel

        weights = (packed[0].contiguous(), packed[1].contiguous(), packed[2].contiguous())
        widths = (bits[0], bits[1], bits[2])
        return kernel(
            xq.contiguous(),
            x_scale.contiguous(),
            weights,
            widths,
            scale.contiguous(),
            zero=dense(zero),
            row_sum=dense(row_sum),
            weight_sum=dense(weight_sum),
            bias=dense(bias),
            out_dtype=out_dtype,
        )
    codes = torch.cat([formats.unpack(p, b, xq.shape[1]) for p, b in zip(packed, bits, strict=True)])
    if zero is not None and zero.dtype == torch.int32:
        unit = torch.tensor([1 << (8 - b) for b in bits], device=zero.device)
        zero = zero.double() / unit.repeat_interleave(packed[0].shape[0])
    return product(xq, x_scale, row_sum, codes, scale, zero, bias, weight_sum).to(out_dtype)


@matmul_a8_mixed.register_fake
def _(  # type: ignore[no-untyped-def]
    xq, x_scale, row_sum, packed, bits, scale, zero=None, bias=None, weight_sum=None, *, out_dtype=torch.float16
):
    check_matmul_a8_mixed(xq, x_scale, row_sum, packed, bits, scale, zero, bias, out_dtype, weight_sum)
    return xq.new_empty((xq.shape[0], 3 * packed[0].shape[0]), dtype=out_dtype)


@torch.library.custom_op("qbert::matmul_a16", mutates_args=())
def matmul_a16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None, *, bits: int
) -> Tensor:
    """y [T, O] = x W^T + bias in the dtype of x; scale, zero, bias float32 [O]. Meant for up to 64 tokens."""
    check_matmul_a16(x, packed, scale, zero, bias, bits)
    if dispatch.implementation(x.device) == "triton" and x.dtype != torch.float32:
        from qbert.kernels.gpu.matmul_a16 import matmul_a16 as kernel

        return kernel(
            x.contiguous(), packed.contiguous(), scale.contiguous(), bits=bits, zero=dense(zero), bias=dense(bias)
        )
    codes = formats.unpack(packed, bits, x.shape[1])
    no_zero = torch.zeros_like(scale) if zero is None else zero
    return reference.matmul_a16(x, codes, scale[:, None], no_zero[:, None], bias).to(x.dtype)


@matmul_a16.register_fake
def _(x, packed, scale, zero=None, bias=None, *, bits):  # type: ignore[no-untyped-def]
    check_matmul_a16(x, packed, scale, zero, bias, bits)
    return x.new_empty((x.shape[0], packed.shape[0]))
