"""Residual addition, LayerNorm and quantization in one pass: what stands between two matrix products of a layer.

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,   h = x + residual

y is written in the input's type (the next residual), with its codes, scale and row sum (`quantize_rows`) or, with
a static scale and zero, those codes. One program a token, the row in registers, float32 throughout.

    y, yq, y_scale, row_sum = layernorm_quantize(x, residual, weight, bias, eps)
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.quantize_rows import (
    asymmetric_codes,
    asymmetric_grid,
    count,
    empty_scale,
    quantize_values,
    range_kind,
    to_codes,
)

MAX_COLUMNS = 16384


@triton.jit
def normalize_row(h, weight_ptr, bias_ptr, width, eps, column, inside):
    """LayerNorm of one row h (float32 [BLOCK], zero outside), zero outside."""
    mean = tl.sum(h, axis=0) / width
    centered = tl.where(inside, h - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return centered * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * weight + bias


@triton.jit
def store_quantized(
    y, row, column, inside, width, q_ptr, scale_ptr, row_sum_ptr, static_scale, static_zero, RANGE: tl.constexpr
):
    """Codes, row sum and scale (with RANGE "asymmetric" offset too) of one row y, float32 [BLOCK], in a grid (T,)."""
    F8: tl.constexpr = q_ptr.dtype.element_ty == tl.float8e4nv
    if RANGE == "static":
        q = to_codes(tl.div_rn(y, static_scale), static_zero, F8)
        scale = static_scale
    elif RANGE == "asymmetric":
        low = tl.min(tl.where(inside, y, float("inf")), axis=0)
        scale, offset = asymmetric_grid(low, tl.max(tl.where(inside, y, float("-inf")), axis=0))
        q = asymmetric_codes(y, low, scale)
        tl.store(scale_ptr + tl.num_programs(0) + row, offset)
    else:
        q, scale = quantize_values(y, tl.max(tl.abs(y), axis=0), F8)
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + row.to(tl.int64) * width + column, q, mask=inside)
    tl.store(row_sum_ptr + row, tl.sum(tl.where(inside, count(q), 0), axis=0))


@triton.jit
def layernorm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    q_ptr,
    scale_ptr,
    row_sum_ptr,
    width,
    eps,
    static_scale,
    static_zero,
    stride_x,
    stride_r,
    HAS_RESIDUAL: tl.constexpr,
    RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T,)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x_ptr + row.to(tl.int64) * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row.to(tl.int64) * stride_r + column, mask=inside, other=0.0).to(tl.float32)
    y = normalize_row(h, weight_ptr, bias_ptr, width, eps, column, inside)
    # The codes are those of the stored, rounded y: what the residual path sees is what the product sees.
    stored = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64) * width + column, stored, mask=inside)
    store_quantized(
        stored.to(tl.float32), row, column, inside, width, q_ptr, scale_ptr, row_sum_ptr, static_scale, static_zero,
        RANGE,
    )  # fmt: skip


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
    """Launches `layernorm_quantize_kernel`: x, residual [T, I] -> (y [T, I], codes [T, I], float32 [T], int32 [T]).

    A positive `static_scale` takes the place of one scale a token; the third result is then filled with it. With
    `asymmetric` it is [2, T], steps and offsets. At most 16,384 columns.
    """
    tokens, columns = x.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"layernorm_quantize keeps a row in registers: at most {MAX_COLUMNS} columns, got {columns}.")
    y = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    codes = torch.empty((tokens, columns), dtype=codes_dtype, device=x.device)
    scale = empty_scale(tokens, asymmetric, x.device)
    row_sum = torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        block = triton.next_power_of_2(columns)
        layernorm_quantize_kernel[(tokens,)](
            x,
            residual,
            weight,
            bias,
            y,
            codes,
            scale,
            row_sum,
            columns,
            eps,
            static_scale,
            float(static_zero),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            HAS_RESIDUAL=residual is not None,
            RANGE=range_kind(static_scale, asymmetric),
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
    return y, codes, scale, row_sum
