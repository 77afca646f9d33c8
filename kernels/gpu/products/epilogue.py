"""What happens to a product before it is stored: scale, zero, bias, GELU, residual, int8 or e4m3 again.

    y = act((acc / 2^(8 - b) - zero[o] row_sum[t]) scale[o] x_scale[t] + bias[o]) + residual[t, o]
    with offsets, x ~ x_scale[0] xq + x_scale[1]: the bias is bias[o] + x_scale[1, t] weight_sum[o]

acc is [O, T], the transpose of what is stored, because weights are the left operand (`matmul_a8`).
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from qbert.kernels.gpu.gelu import gelu
from qbert.kernels.gpu.rows.quantize_rows import count, to_codes


@triton.jit
def start_value(
    zero_ptr, row_sum_ptr, rm, rn, M, N, BM: tl.constexpr, BN: tl.constexpr, ZERO: tl.constexpr, SUM: tl.constexpr
):
    """First value of acc [BN, BM] of type SUM: 0, or the whole zero-point term in the units of acc.

    "int32": -zero 2^(8 - BITS) row_sum, exact; "e4m3": -zero row_sum / 512^2, for acc and row sums both count 1/512.

    Done here and not in the epilogue because there a second vector over tokens costs 32 more registers a thread, and
    with them the second program on a processor.
    """
    if ZERO == "int32":
        zero = tl.load(zero_ptr + rn, mask=rn < N, other=0)
        row_sum = tl.load(row_sum_ptr + rm, mask=rm < M, other=0)
        return -(zero[:, None] * row_sum[None, :])
    elif ZERO == "e4m3":
        zero = tl.load(zero_ptr + rn, mask=rn < N, other=0.0)
        row_sum = tl.load(row_sum_ptr + rm, mask=rm < M, other=0).to(tl.float32) * (-1.0 / (512 * 512))
        return zero[:, None] * row_sum[None, :]
    else:
        return tl.zeros((BN, BM), dtype=SUM)


@triton.jit
def _halves(acc):
    """[R, 2 W] to [R, W] twice: its first columns and its last."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def epilogue(
    acc,
    y_ptr,
    x_scale_ptr,
    scale_ptr,
    zero_ptr,
    row_sum_ptr,
    weight_sum_ptr,
    bias_ptr,
    residual_ptr,
    out_sum_ptr,
    inv_out_scale,
    out_zero,
    first_m,
    rn,
    M,
    N,
    stride_y,
    stride_r,
    BITS: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    OUT_SUM: tl.constexpr,
    F8: tl.constexpr = False,
    IN_UNITS: tl.constexpr = True,
):
    """From acc = 2^(8 - BITS) * integer product [BN, BM], int32 or float32, to the stored output.

    With F8, x is e4m3: acc is the product / 512, or, not IN_UNITS, the product itself, its zero-point term included.

    X_SCALE: "one" for all tokens, one a "token", or "asymmetric": M steps with M offsets behind them.
    """
    # Two vectors over tokens (steps, offsets, row sums in or out), or one and a residual, do not fit into the registers
    # beside a large tile: it is finished in two halves. Behind several loops (acc is float32) even one does not fit.
    BM: tl.constexpr = acc.shape[1]
    MORE: tl.constexpr = HAS_RESIDUAL or OUT_SUM or ZERO == "float"
    FULL: tl.constexpr = X_SCALE == "asymmetric" or (X_SCALE == "token" and acc.dtype == tl.float32)
    HALVES8: tl.constexpr = X_SCALE == "token" or GELU
    HALVES: tl.constexpr = (FULL and BM >= 64) or (X_SCALE == "token" and MORE and BM >= 128)
    QUARTERS: tl.constexpr = F8 and IN_UNITS and GELU and BM >= 128 and OUT != "float"
    PARTS: tl.constexpr = 4 if QUARTERS else 2 if (HALVES8 and BM >= 128 if F8 and IN_UNITS else HALVES) else 1
    WIDTH: tl.constexpr = BM // PARTS
    UNIT: tl.constexpr = (512.0 if IN_UNITS else 1.0) if F8 else 1.0 / (1 << (8 - BITS))
    if PARTS > 1:
        left, right = _halves(acc)
    if PARTS == 4:
        first, second = _halves(left)
        third, fourth = _halves(right)
    for part in tl.static_range(PARTS):
        if PARTS == 2:
            acc = left if part == 0 else right
        elif PARTS == 4:
            acc = first if part == 0 else second if part == 1 else third if part == 2 else fourth
        rm = first_m + part * WIDTH + tl.arange(0, WIDTH)
        inside = (rn[:, None] < N) & (rm[None, :] < M)
        y_ptrs = y_ptr + rm[None, :].to(tl.int64) * stride_y + rn[:, None]
        if OUT == "int32":
            tl.store(y_ptrs, acc >> (8 - BITS), mask=inside)
        else:
            y = acc.to(tl.float32) * UNIT
            if ZERO == "float":
                zero = tl.load(zero_ptr + rn, mask=rn < N, other=0.0)
                row_sum = tl.load(row_sum_ptr + rm, mask=rm < M, other=0).to(tl.float32)
                y -= zero[:, None] * row_sum[None, :]
            if X_SCALE == "asymmetric":  # before the other factor, so that steps are done with when offsets are loaded
                y *= tl.load(x_scale_ptr + rm, mask=rm < M, other=0.0)[None, :]
            y *= tl.load(scale_ptr + rn, mask=rn < N, other=0.0)[:, None]
            if X_SCALE == "one":
                y *= tl.load(x_scale_ptr)
            elif X_SCALE == "token":
                y *= tl.load(x_scale_ptr + rm, mask=rm < M, other=0.0)[None, :]
            else:
                offset = tl.load(x_scale_ptr + M + rm, mask=rm < M, other=0.0)
                y += tl.load(weight_sum_ptr + rn, mask=rn < N, other=0.0)[:, None] * offset[None, :]
            if HAS_BIAS:
                y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0)[:, None]
            if GELU:
                y = gelu(y)
            if HAS_RESIDUAL:
                r_ptrs = residual_ptr + rm[None, :].to(tl.int64) * stride_r + rn[:, None]
                y += tl.load(r_ptrs, mask=inside, other=0.0).to(tl.float32)
            if OUT == "int8" or OUT == "e4m3":
                q = to_codes(y * inv_out_scale, out_zero, OUT == "e4m3")
                tl.store(y_ptrs, q, mask=inside)
                if OUT_SUM:
                    total = tl.sum(tl.where(inside, count(q), 0), axis=0)
                    tl.atomic_add(out_sum_ptr + rm, total, mask=rm < M, sem="relaxed")
            else:
                tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
