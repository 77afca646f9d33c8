"""Residual addition, LayerNorm and quantization in one pass: what stands between two matrix products of a layer.

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,   h = x + residual

y is written in the input's type (the next residual), with its codes, scale and row sum (`quantize_rows`) or, with
a static scale and zero, those codes. A row stays in registers, float32 throughout.

What limits it with many tokens is instructions, not memory: a thread that does 100 for an element writes a third of
what the memory takes. So a row is cut into chunks of a power of two that leave few lanes without a column (768 are
three of 256), a thread holds neighbouring columns, 16 bytes of the 16-bit types, in every chunk, sums are first made
inside a thread, over chunks, and then once over lanes; with many tokens one warp does a row alone, without barriers,
and a program several rows with one load of weight and bias.

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
from qbert.kernels.gpu.quantize_rows import (
    asymmetric_codes,
    asymmetric_grid,
    count,
    empty_codes,
    quantize_values,
    range_kind,
    static_codes,
)
from qbert.kernels.gpu.tiles import Tile, device_name, known_tile, measure
from qbert.kernels.operands import PER_TOKEN, InputGrid

MAX_COLUMNS = 16384
_MANY_TOKENS = 1024  # from here on what a program costs counts, not how long it takes


@triton.jit
def columns_of(chunk, CHUNK: tl.constexpr):
    """Columns of one of a row's chunks, int32 [CHUNK]."""
    return chunk * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def load_chunks(ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A row of WIDTH values as a tuple of float32 [CHUNK], zero beyond its end."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    chunks = ()
    for c in tl.static_range(COUNT):
        column = columns_of(c, CHUNK)
        if (c + 1) * CHUNK <= WIDTH:
            chunk = tl.load(ptr + column)
        else:
            chunk = tl.load(ptr + column, mask=column < WIDTH, other=0.0)
        chunks += (chunk.to(tl.float32),)
    return chunks


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
    F8: tl.constexpr = q_ptr.dtype.element_ty == tl.float8e4nv
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    start = tl.cast(row, tl.int64) * WIDTH
    stored = ()
    low = tl.full((CHUNK,), float("inf"), dtype=tl.float32)
    high = tl.full((CHUNK,), float("-inf"), dtype=tl.float32)
    for c in tl.static_range(COUNT):
        column = columns_of(c, CHUNK)
        chunk = y[c].to(dtype)
        known = chunk.to(tl.float32)
        if (c + 1) * CHUNK <= WIDTH:
            tl.store(y_ptr + start + column, chunk)
        else:
            tl.store(y_ptr + start + column, chunk, mask=column < WIDTH)
        if RANGE == "asymmetric":
            if (c + 1) * CHUNK <= WIDTH:
                low, high = tl.minimum(low, known), tl.maximum(high, known)
            else:
                low = tl.minimum(low, tl.where(column < WIDTH, known, float("inf")))
                high = tl.maximum(high, tl.where(column < WIDTH, known, float("-inf")))
        elif RANGE == "dynamic":
            high = tl.maximum(high, tl.abs(known))
        stored += (known,)
    scale = static_scale
    if RANGE == "asymmetric":
        least = tl.min(low, axis=0)
        scale, offset = asymmetric_grid(least, tl.max(high, axis=0))
        tl.store(scale_ptr + tokens + row, offset)
    elif RANGE == "dynamic":
        largest = tl.max(high, axis=0)
    total = tl.zeros((CHUNK,), dtype=tl.int32)
    # A lane stores the codes of the columns it holds of y. Without being told so, Triton would let it have the 16
    # codes of 16 bytes, and move every row between lanes for that.
    HELD: tl.constexpr = 128 // dtype.primitive_bitwidth
    within = tl.arange(0, CHUNK) // HELD * HELD + tl.arange(0, CHUNK) % HELD
    for c in tl.static_range(COUNT):
        if RANGE == "static":
            q = static_codes(stored[c], static_scale, static_zero, F8, dtype)
        elif RANGE == "asymmetric":
            q = asymmetric_codes(stored[c], least, scale)
        else:
            q, scale = quantize_values(stored[c], largest, F8, dtype)
        if (c + 1) * CHUNK <= WIDTH:
            tl.store(q_ptr + start + (c * CHUNK + within), q)
            total += count(q)
        else:
            tl.store(q_ptr + start + (c * CHUNK + within), q, mask=c * CHUNK + within < WIDTH)
            total += tl.where(columns_of(c, CHUNK) < WIDTH, count(q), 0)
    tl.store(scale_ptr + row, scale)
    tl.store(row_sum_ptr + row, tl.sum(total, axis=0))


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


def rule(tokens: int, columns: int) -> Tile:
    """Rows a program (`bm`) and its warps without measuring.

    Few tokens: a row by four warps, where the time of one counts. Many: rows by single warps, of which a thread holds
    at most 32 columns; two of them a program fill the chip from 4,096 tokens on, and more save loads of the weight.
    """
    warps = triton.next_power_of_2(triton.cdiv(columns, 1024))
    if tokens <= _MANY_TOKENS:
        return Tile(1, columns, 0, warps=max(4, warps))
    return Tile(2 if tokens <= 8192 else 4, columns, 0, warps=warps)


def chunk_of(columns: int, warps: int) -> int:
    """Columns of a chunk: 8 a thread, as many as 16 bytes hold, or 4 or 2 where that leaves fewer without a column."""
    sizes = [min(triton.next_power_of_2(columns), 32 * warps * each) for each in (8, 4, 2)]
    return min(sizes, key=lambda size: triton.cdiv(columns, size) * size)


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
    sizes = [(1, 4), (1, 8), (1, 2), (1, 1)] if tokens <= _MANY_TOKENS else [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2)]
    least = triton.next_power_of_2(triton.cdiv(columns, 2048))
    ways = [Tile(rows, columns, 0, warps=warps) for rows, warps in sizes if warps >= least]
    return list(dict.fromkeys([rule(tokens, columns), *ways]))
