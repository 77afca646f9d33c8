"""The single kernels of a fused int8 encoder layer as torch operators `torch.ops.qbert.*`.

    quantize_rows        activations to int8 codes, a scale and a sum per token
    matmul_a8            int8 activations x packed weights, with bias, GELU, residual or requantization
    matmul_a8_mixed      the same for query, key and value of different bits
    matmul_a16           fp16 or bf16 activations x packed weights, for few tokens
    layernorm_quantize   residual + LayerNorm + int8
    attention            over a packed batch of sequences of different lengths
    embed_layernorm      rows of up to three packed tables + LayerNorm + int8

The three products are defined in `products`, the others here. Static activations are described by a positive scale and
an integer zero, x ~ scale (code - zero); a scale of 0 stands for one symmetric scale a token, or, with `asymmetric`,
for a step and an offset a token, float32 [2, T]: x ~ scale[0] code + scale[1] (`reference.quantize_rows`).

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

from qbert.kernels import cpu, dispatch, reference
from qbert.kernels.checks import (
    check_attention,
    check_codes,
    check_embed_layernorm,
    check_layernorm,
    check_requantized,
    check_rows,
    check_static,
)
from qbert.kernels.products import matmul_a8, matmul_a8_mixed, matmul_a16
from qbert.kernels.registration import summing
from qbert.kernels.twins import dense, empty_like, empty_scale, quantize, requantize

__all__ = [
    "attention",
    "embed_layernorm",
    "layernorm_quantize",
    "matmul_a8",
    "matmul_a8_mixed",
    "matmul_a16",
    "quantize_rows",
]


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
    return quantize(x, static_scale, static_zero, asymmetric, codes_dtype)


@quantize_rows.register_fake
def _(x, static_scale=0.0, static_zero=0, asymmetric=False, codes_dtype=torch.int8):  # type: ignore[no-untyped-def]
    check_rows("x", x)
    check_static(static_scale, static_zero, asymmetric)
    check_codes(codes_dtype, x.shape[1], static_zero, asymmetric)
    return empty_like(x, codes_dtype), *empty_scale(x, x.shape[0], asymmetric)


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
    return (y, *quantize(y, static_scale, static_zero, asymmetric, codes_dtype))


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
    return (y, *quantize(y, static_scale, static_zero, asymmetric, codes_dtype))


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
    return requantize(out, out_scale, out_zero, out_row_sum, codes_dtype) if out_scale else out.to(query.dtype)


def _attention_fake(  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, longest, scale, out_scale=0.0, out_zero=0, *, out_row_sum=None,
    codes_dtype=torch.int8,
):  # fmt: skip
    check_attention(query, key, value, cu_seqlens)
    check_requantized(out_scale, out_zero, out_row_sum, query)
    check_codes(codes_dtype, query.shape[1] * query.shape[2], out_zero)
    return empty_like(query, codes_dtype if out_scale else query.dtype)


_call_attention = summing("attention", _attention, _attention_fake)
