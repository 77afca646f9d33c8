"""The single kernels of a fused int8 encoder layer as torch operators `torch.ops.qbert.*`.

    quantize_rows        activations to int8 codes, a scale and a sum per token
    matmul_a8            int8 activations x packed weights, with bias, GELU, residual or requantization
    matmul_a8_mixed      the same for query, key and value of different bits
    matmul_a16           fp16 or bf16 activations x packed weights, for few tokens
    layernorm_quantize   residual + LayerNorm + int8
    attention            over a packed batch of sequences of different lengths

On CUDA (sm_80 on) they run the Triton kernels of `gpu/`, elsewhere the exact and slow functions of `reference`. Each
has a fake implementation, so torch.compile and torch.export pass through, and checks its arguments first.

    xq, x_scale, row_sum = quantize_rows(x)
    y = matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, bits=4, out_dtype=torch.float16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import formats, reference
from qbert.kernels.checks import (
    check_attention,
    check_layernorm,
    check_matmul_a8,
    check_matmul_a8_mixed,
    check_matmul_a16,
    check_rows,
)
from qbert.kernels.dispatch import implementation


@torch.library.custom_op("qbert::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, I] -> (int8 codes [T, I], scale float32 [T], row sums int32 [T]), symmetric per token."""
    check_rows("x", x)
    if implementation(x.device) == "triton":
        from qbert.kernels.gpu.quantize_rows import quantize_rows as kernel

        return kernel(x.contiguous())
    return reference.quantize_rows(x.float())


@quantize_rows.register_fake
def _(x):  # type: ignore[no-untyped-def]
    check_rows("x", x)
    rows = x.shape[0]
    return _like(x, torch.int8), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op("qbert::matmul_a8", mutates_args=())
def matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    bits: int,
    gelu: bool = False,
    out_dtype: torch.dtype = torch.float16,
    out_scale: float = 0.0,
) -> Tensor:
    """y [T, O] = act((xq W_q^T - zero row_sum) x_scale scale + bias) + residual, in `out_dtype`.

    xq int8 [T, I], x_scale float32 [T] or [1], row_sum int32 [T] (needed with zero), packed uint8 [O, row bytes],
    scale and bias float32 [O], zero [O] float32 or, times 2^(8 - bits), int32 (`gpu.linear.fixed_point_zero`).
    out_dtype int8 needs `out_scale`: clamp(round(y / out_scale), -128, 127).
    """
    check_matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, residual, bits, out_dtype, out_scale)
    if implementation(xq.device) == "triton":
        from qbert.kernels.gpu.matmul_a8 import matmul_a8 as kernel

        return kernel(
            xq.contiguous(),
            x_scale,
            packed.contiguous(),
            scale,
            bits=bits,
            zero=zero,
            row_sum=row_sum,
            bias=bias,
            gelu=gelu,
            residual=None if residual is None else residual.contiguous(),
            out_dtype=out_dtype,
            out_scale=out_scale or None,
        )
    codes = formats.unpack(packed, bits, xq.shape[1]).to(torch.float64)
    # float64 sums of these integers are exact, and faster than int64 ones.
    acc = xq.to(torch.float64) @ codes.T
    if zero is not None and row_sum is not None:
        unit = 1 << (8 - bits) if zero.dtype == torch.int32 else 1
        acc -= row_sum.to(torch.float64)[:, None] * (zero.to(torch.float64) / unit)
    y = acc * scale.to(torch.float64) * x_scale.to(torch.float64)[:, None]
    y = y if bias is None else y + bias
    y = reference.gelu(y) if gelu else y
    y = y if residual is None else y + residual
    return reference.requantize(y, out_scale) if out_dtype == torch.int8 else y.to(out_dtype)


@matmul_a8.register_fake
def _(  # type: ignore[no-untyped-def]
    xq, x_scale, row_sum, packed, scale, zero=None, bias=None, residual=None, *, bits, gelu=False,
    out_dtype=torch.float16, out_scale=0.0,
):  # fmt: skip
    check_matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, residual, bits, out_dtype, out_scale)
    return xq.new_empty((xq.shape[0], packed.shape[0]), dtype=out_dtype)


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
    *,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Query, key and value [T, 3 O] in one launch from three weights [O, row bytes] of different bits.

    scale, zero and bias [3 O]; zero float32, or int32 where zeros are integers.
    """
    check_matmul_a8_mixed(xq, x_scale, row_sum, packed, bits, scale, zero, bias, out_dtype)
    if implementation(xq.device) == "triton":
        from qbert.kernels.gpu.matmul_a8_mixed import matmul_a8_mixed as kernel

        weights = (packed[0].contiguous(), packed[1].contiguous(), packed[2].contiguous())
        widths = (bits[0], bits[1], bits[2])
        return kernel(
            xq.contiguous(), x_scale, weights, widths, scale, zero=zero, row_sum=row_sum, bias=bias, out_dtype=out_dtype
        )
    codes = torch.cat([formats.unpack(p, b, xq.shape[1]) for p, b in zip(packed, bits, strict=True)])
    no_zero = torch.zeros_like(scale) if zero is None else zero
    return reference.matmul_a8(xq, x_scale, codes, scale[:, None], no_zero[:, None], bias).to(out_dtype)


@matmul_a8_mixed.register_fake
def _(xq, x_scale, row_sum, packed, bits, scale, zero=None, bias=None, *, out_dtype=torch.float16):  # type: ignore[no-untyped-def]
    check_matmul_a8_mixed(xq, x_scale, row_sum, packed, bits, scale, zero, bias, out_dtype)
    return xq.new_empty((xq.shape[0], 3 * packed[0].shape[0]), dtype=out_dtype)


@torch.library.custom_op("qbert::matmul_a16", mutates_args=())
def matmul_a16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None, *, bits: int
) -> Tensor:
    """y [T, O] = x W^T + bias in the dtype of x; scale, zero, bias float32 [O]. Meant for up to 64 tokens."""
    check_matmul_a16(x, packed, scale, zero, bias, bits)
    if implementation(x.device) == "triton" and x.dtype != torch.float32:
        from qbert.kernels.gpu.matmul_a16 import matmul_a16 as kernel

        return kernel(x.contiguous(), packed.contiguous(), scale, bits=bits, zero=zero, bias=bias)
    codes = formats.unpack(packed, bits, x.shape[1])
    no_zero = torch.zeros_like(scale) if zero is None else zero
    return reference.matmul_a16(x, codes, scale[:, None], no_zero[:, None], bias).to(x.dtype)


@matmul_a16.register_fake
def _(x, packed, scale, zero=None, bias=None, *, bits):  # type: ignore[no-untyped-def]
    check_matmul_a16(x, packed, scale, zero, bias, bits)
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("qbert::layernorm_quantize", mutates_args=())
def layernorm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, static_scale: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = LayerNorm(x + residual) [T, I] in the dtype of x, with the int8 codes, scale [T] and row sums [T] of y.

    `static_scale` > 0 quantizes with that scale instead of one per token.
    """
    check_layernorm(x, residual, weight, bias)
    if implementation(x.device) == "triton":
        from qbert.kernels.gpu.layernorm_quant import layernorm_quantize as kernel

        return kernel(
            x.contiguous(),
            None if residual is None else residual.contiguous(),
            weight,
            bias,
            eps,
            static_scale or None,
        )
    y = reference.layernorm_quantize(x, residual, weight, bias, eps)[0].to(x.dtype)
    if not static_scale:
        return (y, *reference.quantize_rows(y.float()))
    codes = reference.requantize(y.float(), static_scale)
    return y, codes, torch.full(y.shape[:1], static_scale), codes.sum(dim=1, dtype=torch.int32)


@layernorm_quantize.register_fake
def _(x, residual, weight, bias, eps, static_scale=0.0):  # type: ignore[no-untyped-def]
    check_layernorm(x, residual, weight, bias)
    rows = x.shape[0]
    scale, row_sum = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), _like(x, torch.int8), scale, row_sum


@torch.library.custom_op("qbert::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    out_scale: float = 0.0,
) -> Tensor:
    """Self-attention [T, H, D] inside the sequences cu_seqlens[s] to cu_seqlens[s + 1] (int32 [S + 1]).

    `longest` bounds their lengths. In the dtype of query, or int8 with `out_scale` > 0.
    """
    check_attention(query, key, value, cu_seqlens)
    if implementation(query.device) == "triton" and query.dtype != torch.float32:
        from qbert.kernels.gpu.attention import attention as kernel

        return kernel(query, key, value, cu_seqlens, longest, scale, out_scale or None)
    out = reference.attention(query, key, value, cu_seqlens, scale)
    return reference.requantize(out, out_scale) if out_scale else out.to(query.dtype)


@attention.register_fake
def _(query, key, value, cu_seqlens, longest, scale, out_scale=0.0):  # type: ignore[no-untyped-def]
    check_attention(query, key, value, cu_seqlens)
    return _like(query, torch.int8 if out_scale else query.dtype)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
