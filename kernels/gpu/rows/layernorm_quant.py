"""Residual addition, LayerNorm and quantization in one pass: what stands between two matrix products of a layer.

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,   h = x + residual

y is written in the input's type (the next residual), with its codes, scale and row sum (`quantize_rows`) or, with
a static scale and zero, those codes. A row stays in registers, float32 throughout.

With many tokens a program does several rows with one load of weight and bias (`rows`).

    y, yq, y_scale, row_sum = layernorm_quantize(x, residual, weight, bias, eps)
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench_cudagraph

from qbert.kernels.gpu.dependent import after_previous, dependent_launch
from qbert.kernels.gpu.rows.chunks import chunk_of, columns_of, load_chunks, rule
from qbert.kernels.gpu.rows.quantize_rows import empty_codes, range_kind, store_codes
from qbert.kernels.gpu.tiles import Tile, device_name, known_tile, measure
from qbert.kernels.operands import PER_TOKEN, InputGrid

MAX_COLUMNS = 16384


@triton.jit
def normalize_row(h, weight, bias, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """LayerNorm of one row; h, weight and bias are tuples of float32 [CHUNK], h zero beyond its end."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    total = h[0]
    for c in tl.static_range(1, COUNT):
        total += h[c]
    mean = tl.sum(total, axis=0) / WIDTH
    squares = tl.zeros((CHUNK,), dtype=tl.float32)
    centered = ()
    for c in tl.static_range(COUNT):
        from_mean = h[c] - mean
        if (c + 1) * CHUNK > WIDTH:
            from_mean = tl.where(columns_of(c, CHUNK) < WIDTH, from_mean, 0.0)
        squares += from_mean * from_mean
        centered += (from_mean,)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / WIDTH + eps))
    y = ()
    for c in tl.static_range(COUNT):
        y += (centered[c] * factor * weight[c] + bias[c],)
    return y


@triton.jit
def store_row(
    row,
    y,
    y_ptr,
    q_ptr,
    scale_ptr,
    row_sum_ptr,
    tokens,
    static_scale,
    static_zero,
    RANGE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One of `tokens` rows y, a tuple of float32 [CHUNK], and its codes, row sum and scale (and offset).

    The codes are those of the stored, rounded y: what the residual path sees is what the product sees.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    start = tl.cast(row, tl.int64) * WIDTH
    stored = ()
    for c in tl.static_range(COUNT):
        column = columns_of(c, CHUNK)
        chunk = y[c].to(dtype)
        if (c + 1) * CHUNK <= WIDTH:
            tl.store(y_ptr + start + column, chunk)
        else:
            tl.store(y_ptr + start + column, chunk, mask=column < WIDTH)
        stored += (chunk.to(tl.float32),)
    store_codes(
        row, stored, q_ptr, scale_ptr, row_sum_ptr, tokens, static_scale, 0.0, static_zero, RANGE, False, dtype, WIDTH,
        CHUNK,
    )  # fmt: skip


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
    tokens,
    eps,
    static_scale,
    static_zero,
    stride_x,
    stride_r,
    HAS_RESIDUAL: tl.constexpr,
    RANGE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / ROWS): a program does ROWS neighbouring rows, one after the other."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    after_previous(PDL)
    weight = load_chunks(weight_ptr, WIDTH, CHUNK)
    bias = load_chunks(bias_ptr, WIDTH, CHUNK)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        h = load_chunks(x_ptr + tl.cast(row, tl.int64) * stride_x, WIDTH, CHUNK)
        if HAS_RESIDUAL:
            residual = load_chunks(residual_ptr + tl.cast(row, tl.int64) * stride_r, WIDTH, CHUNK)
            sums = ()
            for c in tl.static_range(COUNT):
                sums += (h[c] + residual[c],)
            h = sums
        y = normalize_row(h, weight, bias, eps, WIDTH, CHUNK)
        store_row(row, y, y_ptr, q_ptr, scale_ptr, row_sum_ptr, tokens, static_scale, static_zero, RANGE, WIDTH, CHUNK)


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
    most 16,384 columns. `tile` gives the rows a program does (`bm`) and its warps: what was measured for so many
    tokens (`measure_layernorm`) where None, else what `rule` gives.
    """
    tokens, columns = x.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"layernorm_quantize keeps a row in registers: at most {MAX_COLUMNS} columns, got {columns}.")
    y = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    codes, scale, row_sum = empty_codes(tokens, columns, grid, x.device)
    if tokens:
        tile = tile or known_tile(*_shape(tokens, columns), device_name(x)) or rule(tokens, columns)
        layernorm_quantize_kernel[(triton.cdiv(tokens, tile.bm),)](
            x,
            residual,
            weight,
            bias,
            y,
            codes,
            scale,
            row_sum,
            tokens,
            eps,
            grid.scale,
            float(grid.zero),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            HAS_RESIDUAL=residual is not None,
            RANGE=range_kind(grid),
            ROWS=tile.bm,
            WIDTH=columns,
            CHUNK=chunk_of(columns, tile.warps),
            num_warps=tile.warps,
            **dependent_launch(x, tokens),
        )
    return y, codes, scale, row_sum


def _shape(tokens: int, columns: int) -> tuple[str, int, int, int, int]:
    """What measured tiles are kept by; those of "layernorm_quantize" were of a kernel of one row a program."""
    return "layernorm_rows", tokens, columns, columns, 8


def measure_layernorm(*, tokens: int, columns: int) -> Tile:
    """The fastest rows and warps a program for this many tokens, fp16 in, static int8 codes out; later calls use them.

    Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure_layernorm times kernels on a CUDA device, and there is none.")
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    weight, bias = torch.randn(2, columns, device="cuda", dtype=torch.float16)
    grid = InputGrid(0.02)

    def milliseconds(tile: Tile) -> float:
        return float(do_bench_cudagraph(lambda: layernorm_quantize(x, None, weight, bias, 1e-12, grid, tile=tile)))

    return measure(*_shape(tokens, columns), device_name(x), milliseconds, layernorm_candidates(tokens, columns))


def layernorm_candidates(tokens: int, columns: int) -> list[Tile]:
    """Tiles worth trying, the rule's among them."""
    sizes = [(1, 4), (1, 8), (1, 2), (1, 1)] if tokens <= 1024 else [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2)]
    least = triton.next_power_of_2(triton.cdiv(columns, 2048))
    ways = [Tile(rows, columns, 0, warps=warps) for rows, warps in sizes if warps >= least]
    return list(dict.fromkeys([rule(tokens, columns), *ways]))
