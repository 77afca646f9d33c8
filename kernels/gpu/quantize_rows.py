"""int8 codes of activations, one symmetric scale a token or a static scale and zero, with the row sums zeros need.

    x_scale[t] = max_i |x[t, i]| / 127,  xq[t, i] = round-half-even(x[t, i] / x_scale[t]),  row_sum[t] = sum_i xq[t, i]
    static:   xq[t, i] = clamp(round-half-even(x[t, i] / static_scale) + static_zero, -128, 127)

One program a token; arithmetic in float32 with correctly rounded division: codes equal `reference.quantize_rows`.

    xq, x_scale, row_sum = quantize_rows(x)       # [T, I] -> int8 [T, I], float32 [T], int32 [T]
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def to_int8(y, zero):
    """clamp(round-half-even(y) + zero, -128, 127), int8, of float32 values and an integer zero, float32 too."""
    y = tl.minimum(tl.maximum(y, -128.0 - zero), 127.0 - zero)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, in the adder itself.
    return (((y + 12582912.0) - 12582912.0) + zero).to(tl.int8)


@triton.jit
def quantize_values(x, largest):
    """int8 codes of float32 values whose largest magnitude (of the row) is `largest`, and the scale."""
    scale = tl.div_rn(largest, 127.0)
    # 0 / 1 for a row of zeros; the quotient may exceed 127 by its rounding error, which the rounding removes.
    return to_int8(tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0), scale


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    row_sum_ptr,
    width,
    static_scale,
    static_zero,
    stride_x,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T,). Rows longer than BLOCK are read twice, in pieces."""
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride_x
    q_ptr += row.to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    peak = 0.0
    if not STATIC:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(x_ptr + start + column, mask=start + column < width, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        peak = tl.max(largest, axis=0)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    scale = static_scale
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if STATIC:
            q = tl.where(inside, to_int8(tl.div_rn(x, static_scale), static_zero), 0)
        else:
            q, scale = quantize_values(x, peak)
        tl.store(q_ptr + start + column, q, mask=inside)
        total += q.to(tl.int32)
    tl.store(scale_ptr + row, scale)
    tl.store(row_sum_ptr + row, tl.sum(total, axis=0))


def quantize_rows(x: Tensor, static_scale: float = 0.0, static_zero: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `quantize_rows_kernel`: x [T, I] with unit column stride -> (int8 [T, I], float32 [T], int32 [T]).

    A positive `static_scale` takes the place of one scale a token; the second result is then filled with it.
    """
    tokens, columns = x.shape
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    # Not filled where the kernel writes them: a fill is a launch of its own.
    new = torch.empty if codes.numel() else torch.zeros
    scale = new(tokens, dtype=torch.float32, device=x.device)
    row_sum = new(tokens, dtype=torch.int32, device=x.device)
    if codes.numel():
        block = min(4096, triton.next_power_of_2(columns))
        quantize_rows_kernel[(tokens,)](
            x,
            codes,
            scale,
            row_sum,
            columns,
            static_scale,
            float(static_zero),
            x.stride(0),
            STATIC=static_scale > 0,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
    return codes, scale, row_sum
