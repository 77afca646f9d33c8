"""The single kernels of a fused int8 encoder layer as torch operators `torch.ops.qbert.*`.

    quantize_rows        activations to int8 codes, a scale and a sum per token
    matmul_a8            int8 activations x packed weights, with bias, GELU, residual or requantization
    matmul_a8_mixed      the same for query, key and value of different bits
    matmul_a16           fp16 or bf16 activations x packed weights, for few tokens
    layernorm_quantize   residual + LayerNorm + int8
    attention            over a packed batch of sequences of different lengths
    embed_layernorm      rows of up to three packed tables + LayerNorm + int8

Static activations are described by a positive scale and an integer zero, x ~ scale (code - zero); a scale of 0 stands
for one symmetric scale a token, or, with `asymmetric`, for a step and an offset a token, float32 [2, T]:
x ~ scale[0] code + scale[1] (`reference.quantize_rows`).

`codes_dtype` float8_e4m3fn makes e4m3 codes instead, which have no zero and no offsets, and whose sums count 1/512; the
products take them with weights of 2 to 4 bits, on GPUs from sm_89 on.

On CUDA (sm_80 on) they run the Triton kernels of `gpu/`, elsewhere the exact and slow functions of `reference`. Each
has a fake implementation, so torch.compile and torch.export pass through, and checks its arguments first.

    xq, x_scale, row_sum = quantize_rows(x)
    y = matmul_a8(xq, x_scale, row_sum, packed, scale, zero, bias, bits=4, out_dtype=torch.float16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import cpu, dispatch, formats, reference
from qbert.kernels.checks import (
    check_attention,
    check_codes,
    check_embed_layernorm,
    check_layernorm,
    check_matmul_a8,
    check_matmul_a8_mixed,
    check_matmul_a16,
    check_requantized,
    check_rows,
    check_static,
)
from qbert.kernels.registration import summing

__all__ = [
    "attention",
    "embed_layernorm",
    "layernorm_quantize",
    "matmul_a8",
    "matmul_a8_mixed",
    "matmul_a16",
    "quantize_rows",
]


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of `x`, whatever its strides."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_scale(x: Tensor, rows: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and row sums of `rows` quantized tokens, on the device of `x`."""
    scale = x.new_empty((2, rows) if asymmetric else (rows,), dtype=torch.float32)
    return scale, x.new_empty(rows, dtype=torch.int32)


def dense(tensor: Tensor | None) -> Tensor | None:
    """What a kernel can read: it knows no strides of vectors."""
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("qbert::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor,
    static_scale: float = 0.0,
    static_zero: int = 0,
    asymmetric: bool = False,
    codes_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, I] -> (int8 codes [T, I], scale float32 [T] or [2, T], row sums int32 [T]), per token or static.

    With `codes_dtype` float8_e4m3fn the codes are e4m3, symmetric, and row sums count 1/512.
    """
    check_rows("x", x)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, x.shape[1], static_zero, asymmetric)
    if dispatch.implementation(x.device) == "triton":
        from qbert.kernels.gpu.quantize_rows import quantize_rows as kernel

        return kernel(x.contiguous(), static_scale, static_zero, asymmetric, codes_dtype)
    return reference.quantize(x, static_scale, static_zero, asymmetric, codes_dtype)


@quantize_rows.register_fake
def _(x, static_scale=0.0, static_zero=0, asymmetric=False, codes_dtype=torch.int8):  # type: ignore[no-untyped-def]
    check_rows("x", x)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, x.shape[1], static_zero, asymmetric)
    return empty_like(x, codes_dtype), *empty_scale(x, x.shape[0], asymmetric)


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
        from qbert.kernels.gpu.products.matmul_a8 import matmul_a8 as kernel

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
    y = reference.product(xq, x_scale, row_sum, codes, scale, real_zero, bias, weight_sum)
    y = reference.gelu(y) if gelu else y
    y = y if residual is None else y + residual
    return reference.requantize(y, out_scale, out_zero, out_row_sum, out_dtype) if out_scale else y.to(out_dtype)


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
        from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed as kernel

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
    return reference.product(xq, x_scale, row_sum, codes, scale, zero, bias, weight_sum).to(out_dtype)


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
        from qbert.kernels.gpu.products.matmul_a16 import matmul_a16 as kernel

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


@torch.library.custom_op("qbert::layernorm_quantize", mutates_args=())
def layernorm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    static_scale: float = 0.0,
    static_zero: int = 0,
    asymmetric: bool = False,
    codes_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = LayerNorm(x + residual) [T, I] in the dtype of x, and its `quantize_rows`: codes, scale, row sums."""
    check_layernorm(x, residual, weight, bias)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, x.shape[1], static_zero, asymmetric)
    if dispatch.implementation(x.device) == "triton":
        from qbert.kernels.gpu.layernorm_quant import layernorm_quantize as kernel

        return kernel(
            x.contiguous(),
            dense(residual),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            static_scale,
            static_zero,
            asymmetric,
            codes_dtype,
        )
    y = reference.layernorm_quantize(x, residual, weight, bias, eps)[0].to(x.dtype)
    return (y, *reference.quantize(y, static_scale, static_zero, asymmetric, codes_dtype))


@layernorm_quantize.register_fake
def _(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, eps, static_scale=0.0, static_zero=0, asymmetric=False, codes_dtype=torch.int8
):
    check_layernorm(x, residual, weight, bias)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, x.shape[1], static_zero, asymmetric)
    return empty_like(x, x.dtype), empty_like(x, codes_dtype), *empty_scale(x, x.shape[0], asymmetric)


@torch.library.custom_op("qbert::embed_layernorm", mutates_args=())
def embed_layernorm(
    ids: list[Tensor],
    packed: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    row_group: list[Tensor],
    bits: list[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype = torch.float16,
    static_scale: float = 0.0,
    static_zero: int = 0,
    asymmetric: bool = False,
    codes_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of the sum of one to three packed tables' rows: y [T, I] and its `quantize_rows`.

    Table i: ids[i] int32 or int64 [T], packed[i] uint8 [V, row bytes], scale[i] and zero[i] float32 [G, K],
    row_group[i] int32 [V], empty where G = V or 1. An id outside its table raises IndexError on a CPU; on a GPU its row
    is NaN.
    """
    check_embed_layernorm(ids, packed, scale, zero, row_group, bits, weight, bias, out_dtype)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, weight.shape[0], static_zero, asymmetric)
    groups = [g if g.numel() else None for g in row_group]
    if dispatch.implementation(weight.device) == "triton":
        from qbert.kernels.gpu.embedding import Table
        from qbert.kernels.gpu.embedding import embed_layernorm as kernel

        tables = [Table.of(*t, weight.shape[0]) for t in zip(packed, scale, zero, groups, bits, strict=True)]
        pairs = [(i.contiguous(), table) for i, table in zip(ids, tables, strict=True)]
        norm = (weight.contiguous(), bias.contiguous(), eps)
        return kernel(pairs, *norm, out_dtype, static_scale, static_zero, asymmetric, codes_dtype)
    features = weight.shape[0]
    rows = [
        cpu.embedding(i, p, s, z, g, bits=b, features=features)
        for i, p, s, z, g, b in zip(ids, packed, scale, zero, groups, bits, strict=True)
    ]
    total = torch.stack([r.double() for r in rows]).sum(dim=0)
    y = reference.layernorm_quantize(total, None, weight, bias, eps)[0].to(out_dtype)
    return (y, *reference.quantize(y, static_scale, static_zero, asymmetric, codes_dtype))


@embed_layernorm.register_fake
def _(  # type: ignore[no-untyped-def]
    ids, packed, scale, zero, row_group, bits, weight, bias, eps, *, out_dtype=torch.float16, static_scale=0.0,
    static_zero=0, asymmetric=False, codes_dtype=torch.int8,
):  # fmt: skip
    check_embed_layernorm(ids, packed, scale, zero, row_group, bits, weight, bias, out_dtype)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, weight.shape[0], static_zero, asymmetric)
    y = weight.new_empty((ids[0].shape[0], weight.shape[0]), dtype=out_dtype)
    return y, empty_like(y, codes_dtype), *empty_scale(y, y.shape[0], asymmetric)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    out_scale: float = 0.0,
    out_zero: int = 0,
    out_row_sum: Tensor | None = None,
    codes_dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Self-attention [T, H, D] inside the sequences cu_seqlens[s] to cu_seqlens[s + 1] (int32 [S + 1]).

    `longest` bounds their lengths. In the dtype of query, or, with `out_scale` > 0, int8 or e4m3; the sum of every
    token's codes is then added to `out_row_sum` (int32 [T], zeroed by the caller), where given:
    `torch.ops.qbert.attention_summed`. Tokens of no sequence: undefined.
    """
    return _call_attention(
        query, key, value, cu_seqlens, longest, scale, out_scale, out_zero, out_row_sum=out_row_sum,
        codes_dtype=codes_dtype,
    )  # fmt: skip


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    out_scale: float = 0.0,
    out_zero: int = 0,
    *,
    out_row_sum: Tensor | None = None,
    codes_dtype: torch.dtype = torch.int8,
) -> Tensor:
    check_attention(query, key, value, cu_seqlens)
    check_requantized(out_scale, out_zero, out_row_sum, query)
    check_codes(codes_dtype, query.shape[1] * query.shape[2], out_zero)
    if dispatch.implementation(query.device) == "triton" and query.dtype != torch.float32:
        from qbert.kernels.gpu.attention_ways import attend

        return attend(
            query, key, value, cu_seqlens.contiguous(), longest, scale, out_scale, out_zero, out_row_sum, codes_dtype
        )
    out = reference.attention(query, key, value, cu_seqlens, scale)
    return (
        reference.requantize(out, out_scale, out_zero, out_row_sum, codes_dtype) if out_scale else out.to(query.dtype)
    )


def _attention_fake(  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, longest, scale, out_scale=0.0, out_zero=0, *, out_row_sum=None,
    codes_dtype=torch.int8,
):  # fmt: skip
    check_attention(query, key, value, cu_seqlens)
    check_requantized(out_scale, out_zero, out_row_sum, query)
    check_codes(codes_dtype, query.shape[1] * query.shape[2], out_zero)
    return empty_like(query, codes_dtype if out_scale else query.dtype)


_call_attention = summing("attention", _attention, _attention_fake)
