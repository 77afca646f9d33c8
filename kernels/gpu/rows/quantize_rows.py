"""int8 or e4m3 codes of activations, one grid a token or a static one, with the row sums that zeros of weights need.

    dynamic:     x_scale[t] = max_i |x[t, i]| / 127,  xq[t, i] = round-half-even(x[t, i] / x_scale[t])
    asymmetric:  x_scale[0, t] = (high - low) / 255,  x_scale[1, t] = low + 128 x_scale[0, t],  the value of code 0,
                 xq[t, i] = round-half-even((x[t, i] - low) / x_scale[0, t]) - 128,  low, high the ends of row t
    static:      xq[t, i] = clamp(round-half-even(x[t, i] / static_scale) + static_zero, -128, 127)
    always:      row_sum[t] = sum_i xq[t, i]

e4m3 codes (float8_e4m3fn) are eight-bit floats up to 448, rounded half to even; they have no asymmetric grid:

    dynamic:     x_scale[t] = max_i |x[t, i]| / 448,  xq[t, i] = e4m3(x[t, i] / x_scale[t])
    static:      xq[t, i] = e4m3(clamp(x[t, i] / static_scale, -448, 448))
    always:      row_sum[t] = 512 sum_i xq[t, i], an integer, because e4m3 counts in 512ths (at most 9,362 columns)

Rows stay in registers; arithmetic in float32 with correctly rounded division: codes equal `reference.quantize_rows`.

    xq, x_scale, row_sum = quantize_rows(x)       # [T, I] -> int8 [T, I], float32 [T], int32 [T]
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.dependent import after_previous, dependent_launch
from qbert.kernels.gpu.gelu import gelu as gelu_of
from qbert.kernels.gpu.rows.chunks import chunk_of, columns_of, load_chunks, rule
from qbert.kernels.gpu.rows.division import lift_of, quotient
from qbert.kernels.operands import PER_TOKEN, InputGrid


@triton.jit
def rounded(y, zero):
    """round-half-even(y) + zero, int32, of float32 values below 2^22 and an integer zero, float32 too."""
    # Adding 1.5 * 2^23 rounds to the nearest even integer, in the adder itself, which then stands in the lowest bits.
    return (y + 12582912.0).to(tl.int32, bitcast=True) + (tl.cast(zero, tl.int32) - 0x4B400000)


@triton.jit
def to_int8(y, zero):
    """clamp(round-half-even(y) + zero, -128, 127), int32, of float32 values and an integer zero, float32 too."""
    return rounded(tl.minimum(tl.maximum(y, -128.0 - zero), 127.0 - zero), zero)


@triton.jit
def to_codes(y, zero, F8: tl.constexpr):
    """`to_int8`, or, of numbers without a zero, the nearest e4m3 within -448..448, half to even."""
    if F8:
        return tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)
    else:
        return to_int8(y, zero)


@triton.jit
def count(codes):
    """Codes as int32, e4m3 ones in 512ths: all of them are whole numbers of these, so that sums are exact."""
    if codes.dtype == tl.float8e4nv:
        return rounded(codes.to(tl.float32) * 512.0, 0.0)
    else:
        return codes.to(tl.int32)


@triton.jit
def divided(x, step, dtype: tl.constexpr):
    """x / step, correctly rounded, float32 values that come of type dtype and are at most 512 steps."""
    if dtype == tl.float16:  # whose smallest values are no smaller than the lift wants them
        lift = 1.0
    else:
        lift = lift_of(step)
        x *= lift
    step *= lift
    return quotient(x, step, tl.div_rn(1.0, step), dtype == tl.float32)


@triton.jit
def quantize_values(x, largest, F8: tl.constexpr, dtype: tl.constexpr):
    """Codes of float32 values whose largest magnitude (of the row) is `largest`, and the scale."""
    scale = tl.div_rn(largest, 448.0 if F8 else 127.0)
    # 0 / 1 for a row of zeros. The minimum makes a number of NaN too; a quotient's own rounding error does not matter.
    y = tl.minimum(divided(x, tl.where(scale > 0, scale, 1.0), dtype), 448.0 if F8 else 127.0)
    if F8:
        return y.to(tl.float8e4nv), scale
    else:
        return rounded(y, 0.0), scale


@triton.jit
def static_codes(x, scale, zero, F8: tl.constexpr, dtype: tl.constexpr):
    """Codes of float32 values of type dtype on a static grid: clamp(round-half-even(x / scale) + zero)."""
    # Before the division, so that no quotient overflows: what lies at an end, to within its rounding, gets its code.
    low = (-448.0 if F8 else -128.0 - zero) * scale
    high = (448.0 if F8 else 127.0 - zero) * scale
    y = divided(tl.minimum(tl.maximum(x, low), high), scale, dtype)
    if F8:
        return y.to(tl.float8e4nv)
    else:
        return rounded(y, zero)


@triton.jit
def asymmetric_grid(low, high):
    """Step and value of code 0 of a row between `low` and `high`, float32."""
    step = tl.div_rn(high - low, 255.0)
    # 128 steps are exact in float32, so a fused multiply-add gives the same.
    return step, low + 128.0 * step


@triton.jit
def asymmetric_codes(x, low, step):
    """int8 codes, as int32, of float32 values from `low` on; -128 for a row of one value."""
    y = divided(x - low, tl.where(step > 0, step, 1.0), tl.float32)
    return rounded(tl.minimum(y, 255.0), -128.0)  # the minimum makes a number of NaN too


@triton.jit
def store_codes(
    row,
    x,
    q_ptr,
    scale_ptr,
    row_sum_ptr,
    tokens,
    static_scale,
    inv_static_scale,
    static_zero,
    RANGE: tl.constexpr,
    GELU: tl.constexpr,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Codes, row sum and scale (and offset) of one of `tokens` rows, a tuple of float32 [CHUNK], zero beyond its end.

    Its values were of type `dtype`, or, with GELU, are one of them. RANGE: "dynamic", "asymmetric" or "static".
    """
    F8: tl.constexpr = q_ptr.dtype.element_ty == tl.float8e4nv
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    start = tl.cast(row, tl.int64) * WIDTH
    scale = static_scale
    if RANGE == "dynamic":
        high = tl.abs(x[0])
        for c in tl.static_range(1, COUNT):
            high = tl.maximum(high, tl.abs(x[c]))
        largest = tl.max(high, axis=0)
    elif RANGE == "asymmetric":
        low = tl.full((CHUNK,), float("inf"), dtype=tl.float32)
        high = tl.full((CHUNK,), float("-inf"), dtype=tl.float32)
        for c in tl.static_range(COUNT):
            if (c + 1) * CHUNK <= WIDTH:
                low, high = tl.minimum(low, x[c]), tl.maximum(high, x[c])
            else:
                inside = columns_of(c, CHUNK) < WIDTH
                low = tl.minimum(low, tl.where(inside, x[c], float("inf")))
                high = tl.maximum(high, tl.where(inside, x[c], float("-inf")))
        least = tl.min(low, axis=0)
        scale, offset = asymmetric_grid(least, tl.max(high, axis=0))
        tl.store(scale_ptr + tokens + row, offset)
    total = tl.zeros((CHUNK,), dtype=tl.int32)
    # A lane stores the codes of the columns that it holds, 16 bytes of `dtype`. Without being told so, Triton would let
    # it have the 16 codes of 16 bytes, and move every row between lanes for that.
    HELD: tl.constexpr = 128 // dtype.primitive_bitwidth
    within = tl.arange(0, CHUNK) // HELD * HELD + tl.arange(0, CHUNK) % HELD
    for c in tl.static_range(COUNT):
        if RANGE == "static":
            if GELU:
                q = to_codes(x[c] * inv_static_scale, static_zero, F8)
            else:
                q = static_codes(x[c], static_scale, static_zero, F8, dtype)
        elif RANGE == "asymmetric":
            q = asymmetric_codes(x[c], least, scale)
        else:
            q, scale = quantize_values(x[c], largest, F8, tl.float32 if GELU else dtype)
        if (c + 1) * CHUNK <= WIDTH:
            tl.store(q_ptr + start + (c * CHUNK + within), q)
            total += count(q)
        else:
            tl.store(q_ptr + start + (c * CHUNK + within), q, mask=c * CHUNK + within < WIDTH)
            total += tl.where(columns_of(c, CHUNK) < WIDTH, count(q), 0)
    tl.store(scale_ptr + row, scale)
    tl.store(row_sum_ptr + row, tl.sum(total, axis=0))


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    row_sum_ptr,
    tokens,
    static_scale,
    inv_static_scale,
    static_zero,
    stride_x,
    RANGE: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / ROWS): a program does ROWS neighbouring rows, one after the other.

    GELU is rounded itself, so that after it a multiplication does for the division by a static step.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    after_previous(PDL)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        x = load_chunks(x_ptr + tl.cast(row, tl.int64) * stride_x, WIDTH, CHUNK)
        if GELU:
            COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
            active = ()
            for c in tl.static_range(COUNT):
                active += (gelu_of(x[c]),)
            x = active
        store_codes(
            row, x, q_ptr, scale_ptr, row_sum_ptr, tokens, static_scale, inv_static_scale, static_zero, RANGE, GELU,
            dtype, WIDTH, CHUNK,
        )  # fmt: skip


def range_kind(grid: InputGrid) -> str:
    """What the row kernels call the range of their output."""
    return "asymmetric" if grid.asymmetric else "static" if grid.scale > 0 else "dynamic"


def empty_codes(tokens: int, columns: int, grid: InputGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """To be written: codes [T, I], scales [T] or steps and offsets [2, T], row sums [T]."""
    return (
        torch.empty((tokens, columns), dtype=grid.codes_dtype, device=device),
        torch.empty((2, tokens) if grid.asymmetric else (tokens,), dtype=torch.float32, device=device),
        torch.empty(tokens, dtype=torch.int32, device=device),
    )


def quantize_rows(
    x: Tensor, grid: InputGrid = PER_TOKEN, gelu: bool = False, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `quantize_rows_kernel`: x [T, I] with unit column stride -> (codes [T, I], float32 [T], int32 [T]).

    With `gelu` those of GELU(x). On a static grid the second result is filled with its scale; on an asymmetric one it
    is [2, T], steps and offsets. Where `sums` [T] is given, the third is written there.
    """
    tokens, columns = x.shape
    codes, scale, row_sum = empty_codes(tokens, columns, grid, x.device)
    row_sum = row_sum if sums is None else sums
    if not codes.numel():  # only here, because a fill is a launch of its own
        scale.zero_()
        row_sum.zero_()
    else:
        tile = rule(tokens, columns)
        quantize_rows_kernel[(triton.cdiv(tokens, tile.bm),)](
            x,
            codes,
            scale,
            row_sum,
            tokens,
            grid.scale,
            1.0 / grid.scale if grid.scale else 0.0,
            float(grid.zero),
            x.stride(0),
            RANGE=range_kind(grid),
            GELU=gelu,
            ROWS=tile.bm,
            WIDTH=columns,
            CHUNK=chunk_of(columns, tile.warps),
            num_warps=tile.warps,
            **dependent_launch(x, tokens),
        )
    return codes, scale, row_sum
