"""The single kernels of a fused int8 encoder layer as torch operators `torch.ops.qbert.*`.

They stand alone because `dispatch` has whole layers, for any model; these are the pieces of a fused one.

    quantize_rows        activations (or their GELU) to int8 codes, a scale and a sum per token
    matmul_a8            int8 activations x packed weights, with bias, GELU, residual or requantization
    matmul_a8_mixed      the same for query, key and value of different bits
    matmul_e4m3          e4m3 activations x e4m3 weights, by cuBLASLt
    matmul_a16           fp16 or bf16 activations x packed weights, for few tokens
    layernorm_quantize   residual + LayerNorm + int8
    attention            over a packed batch of sequences of different lengths
    embed_layernorm      rows of up to three packed tables + LayerNorm + int8

How codes are made is an `InputGrid`, and what a product reads of its weights a `ProductWeight` (`operands`). The scale
of quantized activations is float32 [T], one a token, [1], one for all, or, with an asymmetric grid, [2, T], steps and
offsets. e4m3 codes (a grid with `codes_dtype` float8_e4m3fn) have no zero and no offsets, and their sums count 1/512;
the products take them with weights of 2 to 4 bits, on GPUs from sm_89 on.

On CUDA (sm_80 on) they run the Triton kernels of `gpu/`, elsewhere the exact and slow functions of `reference`. Each
has a fake implementation, so torch.compile and torch.export pass through, and checks its arguments first.

    xq, x_scale, row_sum = quantize_rows(x)
    y = matmul_a8(xq, x_scale, row_sum, ProductWeight([packed], [4], scale, zero, bias), out_dtype=torch.float16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import cpu, dispatch, reference
from qbert.kernels.checks import (
    check_attention,
    check_embed_layernorm,
    check_layernorm_quantize,
    check_matmul_a8,
    check_matmul_a8_mixed,
    check_matmul_a16,
    check_matmul_e4m3,
    check_quantize_rows,
)
from qbert.kernels.operands import FLOAT, PER_TOKEN, E4m3Weight, Heads, InputGrid, PackedWeight, ProductWeight
from qbert.kernels.registration import operator

__all__ = [
    "attention",
    "embed_layernorm",
    "layernorm_quantize",
    "matmul_a8",
    "matmul_a8_mixed",
    "matmul_a16",
    "matmul_e4m3",
    "quantize_rows",
]


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of `x`, whatever its strides."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_codes(x: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and row sums of tokens x [T, I]."""
    tokens = x.shape[0]
    scale = x.new_empty((2, tokens) if grid.asymmetric else (tokens,), dtype=torch.float32)
    return empty_like(x, grid.codes_dtype), scale, x.new_empty(tokens, dtype=torch.int32)


def dense(tensor: Tensor | None) -> Tensor | None:
    """What a kernel can read: it knows no strides of vectors."""
    return None if tensor is None else tensor.contiguous()


@operator(check_quantize_rows, like=lambda x, grid, gelu: empty_codes(x, grid))
def quantize_rows(x: Tensor, grid: InputGrid = PER_TOKEN, gelu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, I] -> (codes [T, I], scale float32 [T] or [2, T], row sums int32 [T]), per token or static.

    With `gelu` they are those of GELU(x), in float32.
    """
    if dispatch.implementation(x.device) == "triton":
        from qbert.kernels.gpu.rows.quantize_rows import quantize_rows as kernel

        return kernel(x.contiguous(), grid, gelu)
    return reference.quantize(reference.gelu(x.double()).float() if gelu else x, grid)


def _like_product(xq: Tensor, weight: ProductWeight, dtype: torch.dtype) -> Tensor:
    return xq.new_empty((xq.shape[0], weight.rows), dtype=dtype)


@operator(
    check_matmul_a8,
    like=lambda xq, x_scale, row_sum, weight, residual, out_row_sum, out, gelu, out_dtype: _like_product(
        xq, weight, out.codes_dtype if out.bits else out_dtype
    ),
)
def matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    weight: ProductWeight,
    residual: Tensor | None = None,
    out_row_sum: Tensor | None = None,
    out: InputGrid = FLOAT,
    gelu: bool = False,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """y [T, O] = act((xq W_q^T - zero row_sum) x_scale scale + bias) + residual, in `out_dtype`.

    xq int8 or float8_e4m3fn [T, I], x_scale float32 [T], [1] or [2, T], row_sum int32 [T] (needed with a zero), of one
    weight [O, I]; residual [T, O]. x_scale [2, T], steps and offsets, adds offset weight_sum before the bias.
    e4m3 activations take bits up to 4 and a float32 zero.
    With a static grid `out` the result is its codes, those of the next product's input; the sum of every row is then
    added to `out_row_sum` (int32 [T], zeroed by the caller), where given: `torch.ops.qbert.matmul_a8_summed`.
    """
    if dispatch.implementation(xq.device) == "triton":
        from qbert.kernels.gpu.products.matmul_a8 import matmul_a8 as kernel

        return kernel(
            xq.contiguous(), x_scale.contiguous(), weight.dense(), row_sum=dense(row_sum), residual=dense(residual),
            gelu=gelu, out_dtype=out_dtype, out=out, out_row_sum=out_row_sum,
        )  # fmt: skip
    y = reference.product(xq, x_scale, row_sum, weight)
    y = reference.gelu(y) if gelu else y
    y = y if residual is None else y + residual
    if not out.bits:
        return y.to(out_dtype)
    return reference.requantize(y, out.scale, out.zero, out_row_sum, out.codes_dtype)


@operator(
    check_matmul_a8_mixed,
    like=lambda xq, x_scale, row_sum, weight, out_dtype: _like_product(xq, weight, out_dtype),
)
def matmul_a8_mixed(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    weight: ProductWeight,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Query, key and value [T, 3 O] in one launch from three weights [O, I] of different bits; as `matmul_a8`."""
    if dispatch.implementation(xq.device) == "triton":
        from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed as kernel

        return kernel(
            xq.contiguous(), x_scale.contiguous(), weight.dense(), row_sum=dense(row_sum), out_dtype=out_dtype
        )
    return reference.product(xq, x_scale, row_sum, weight).to(out_dtype)


@operator(
    check_matmul_e4m3, like=lambda xq, x_scale, weight, out_dtype: xq.new_empty((len(xq), weight.rows), dtype=out_dtype)
)
def matmul_e4m3(
    xq: Tensor, x_scale: Tensor | None, weight: E4m3Weight, out_dtype: torch.dtype = torch.float16
) -> Tensor:
    """y [T, O] = xq codes^T x_scale scale + bias in float16 or bfloat16; x_scale float32 [T], None for 1.

    What many tokens are faster with than with `matmul_a8`, which reads packed weights: `dispatch.takes_unpacked`.
    """
    if dispatch.implementation(xq.device) == "triton":
        from qbert.kernels.gpu.products.matmul_e4m3 import matmul_e4m3 as kernel

        return kernel(xq.contiguous(), x_scale, weight, out_dtype)
    return reference.matmul_e4m3(xq, x_scale, weight).to(out_dtype)


@operator(check_matmul_a16, like=lambda x, weight: _like_product(x, weight, x.dtype))
def matmul_a16(x: Tensor, weight: ProductWeight) -> Tensor:
    """y [T, O] = x W^T + bias in the dtype of x; the zero is float32. Meant for up to 64 tokens."""
    if dispatch.implementation(x.device) == "triton" and x.dtype != torch.float32:
        from qbert.kernels.gpu.products.matmul_a16 import matmul_a16 as kernel

        return kernel(x.contiguous(), weight.dense())
    codes = reference.product_codes(weight, x.shape[1])
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    return reference.matmul_a16(x, codes, weight.scale[:, None], zero[:, None], weight.bias).to(x.dtype)


@operator(
    check_layernorm_quantize,
    like=lambda x, residual, weight, bias, eps, grid: (empty_like(x, x.dtype), *empty_codes(x, grid)),
)
def layernorm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, grid: InputGrid = PER_TOKEN
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = LayerNorm(x + residual) [T, I] in the dtype of x, and its `quantize_rows`: codes, scale, row sums."""
    if dispatch.implementation(x.device) == "triton":
        from qbert.kernels.gpu.rows.layernorm_quant import layernorm_quantize as kernel

        return kernel(x.contiguous(), dense(residual), weight.contiguous(), bias.contiguous(), eps, grid)
    y = reference.layernorm_quantize(x, residual, weight, bias, eps)[0].to(x.dtype)
    return (y, *reference.quantize(y, grid))


def _like_embed_layernorm(  # type: ignore[no-untyped-def]
    ids, tables, weight, bias, eps, grid, out_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = weight.new_empty((ids[0].shape[0], weight.shape[0]), dtype=out_dtype)
    return (y, *empty_codes(y, grid))


@operator(check_embed_layernorm, like=_like_embed_layernorm)
def embed_layernorm(
    ids: list[Tensor],
    tables: list[PackedWeight],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grid: InputGrid = PER_TOKEN,
    out_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of the sum of one to three packed tables' rows: y [T, I] and its `quantize_rows`.

    ids[i] int32 or int64 [T] are rows of tables[i] [V, I], whose scale and zero are float32. An id outside its table
    raises IndexError on a CPU; on a GPU its row is NaN.
    """
    if dispatch.implementation(weight.device) == "triton":
        from qbert.kernels.gpu.rows.embedding import embed_layernorm as kernel

        pairs = [(i.contiguous(), table.dense()) for i, table in zip(ids, tables, strict=True)]
        return kernel(pairs, weight.contiguous(), bias.contiguous(), eps, out_dtype, grid)
    rows = [cpu.embedding(i, table) for i, table in zip(ids, tables, strict=True)]
    total = torch.stack([r.double() for r in rows]).sum(dim=0)
    y = reference.layernorm_quantize(total, None, weight, bias, eps)[0].to(out_dtype)
    return (y, *reference.quantize(y, grid))


@operator(
    check_attention,
    like=lambda heads, out, out_row_sum: empty_like(heads.query, out.codes_dtype if out.bits else heads.query.dtype),
)
def attention(heads: Heads, out: InputGrid = FLOAT, out_row_sum: Tensor | None = None) -> Tensor:
    """Self-attention [T, H, D] inside sequences of different lengths, packed one after the other.

    In the dtype of query, or, with a static grid `out`, its codes; the sum of every token's codes is then added to
    `out_row_sum` (int32 [T], zeroed by the caller), where given: `torch.ops.qbert.attention_summed`. Tokens of no
    sequence: undefined.
    """
    dtype = heads.query.dtype
    if dispatch.implementation(heads.query.device) == "triton" and dtype != torch.float32:
        from qbert.kernels.gpu.attention_ways import attend

        return attend(heads._replace(cu_seqlens=heads.cu_seqlens.contiguous()), out, out_row_sum)
    y = reference.attention(*heads[:4], heads.scale)
    if not out.bits:
        return y.to(dtype)
    return reference.requantize(y, out.scale, out.zero, out_row_sum, out.codes_dtype)
