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
from triton.testing import do_bench_cudagraph

from qbert.kernels.gpu.quantize_rows import (
    asymmetric_codes,
    asymmetric_grid,
    count,
    empty_codes,
    quantize_values,
    range_kind,
    to_codes,
)
from qbert.kernels.gpu.tiles import Tile, device_name, known_tile, measure
from qbert.kernels.operands import PER_TOKEN, InputGrid

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
    grid: InputGrid = PER_TOKEN,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `layernorm_quantize_kernel`: x, residual [T, I] -> (y [T, I], codes [T, I], float32 [T], int32 [T]).

    On a static grid the third result is filled with its scale; on an asymmetric one it is [2, T], steps and offsets. At
    most 16,384 columns. Of `tile` only the warps count: the measured ones (`measure_layernorm`) where None, else the
    default.
    """
    tokens, columns = x.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"layernorm_quantize keeps a row in registers: at most {MAX_COLUMNS} columns, got {columns}.")
    y = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    codes, scale, row_sum = empty_codes(tokens, columns, grid, x.device)
    if tokens:
        block = triton.next_power_of_2(columns)
        tile = tile or known_tile(*_shape(tokens, columns), device_name(x)) or default_warps(columns)
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
            grid.scale,
            float(grid.zero),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            HAS_RESIDUAL=residual is not None,
            RANGE=range_kind(grid),
            BLOCK=block,
            num_warps=tile.warps,
        )
    return y, codes, scale, row_sum


def default_warps(columns: int) -> Tile:
    """Warps a row that suit few tokens, where the time of one program counts."""
    return Tile(1, columns, 0, warps=4 if columns <= 2048 else 8)


def _shape(tokens: int, columns: int) -> tuple[str, int, int, int, int]:
    """What measured warps are kept by."""
    return "layernorm_quantize", tokens, columns, columns, 8


def measure_layernorm(*, tokens: int, columns: int) -> Tile:
    """The fastest number of warps a row for this many tokens, fp16 in, static int8 codes out; later calls will use it.

    With many tokens the instructions count, and fewer warps need fewer for the sums over a row.
    Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure_layernorm times kernels on a CUDA device, and there is none.")
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    weight, bias = torch.randn(2, columns, device="cuda", dtype=torch.float16)
    grid = InputGrid(0.02)

    def milliseconds(tile: Tile) -> float:
        return float(do_bench_cudagraph(lambda: layernorm_quantize(x, None, weight, bias, 1e-12, grid, tile=tile)))

    ways = [default_warps(columns), *(Tile(1, columns, 0, warps=warps) for warps in (1, 2, 4, 8))]
    return measure(*_shape(tokens, columns), device_name(x), milliseconds, list(dict.fromkeys(ways)))
