"""Query, key and value in one launch although each has its own bits: `matmul_a8` over three weights of one height.

Q-BERT's allocation may give the three projections of a layer different bits. A program belongs to one of them (a scalar
branch over up to three inlined loops) and writes its slice of the fused output [T, 3 O]:

    y[t, s O + o] = (acc_s[o, t] - zero[s, o] row_sum[t]) scale[s, o] x_scale[t] + x_offset[t] weight_sum[s, o]
                    + bias[s, o],   s = query, key, value

    weight = ProductWeight([query, key, value], [2, 3, 2], scale, zero, bias)
    y = matmul_a8_mixed(xq, x_scale, weight, row_sum=row_sum)
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.dependent import after_previous, dependent_launch, fetch_rows
from qbert.kernels.gpu.products.epilogue import epilogue, start_value
from qbert.kernels.gpu.products.matmul_a8 import accumulate
from qbert.kernels.gpu.tiles import (
    Tile,
    asm_kind,
    choose_tile,
    device_name,
    kernel_name,
    registers_option,
    scale_kind,
    tail_of,
    zero_kind,
)
from qbert.kernels.operands import ProductWeight


@triton.jit
def _product(
    x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK: tl.constexpr, BITS: tl.constexpr,
    TAIL: tl.constexpr, TAIL_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + product [BN, BM] of one weight's rows, in the units of `accumulate`, divided by them, float32."""
    steps = K // 256 * (256 // BK)
    acc = accumulate(
        x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, 0, steps, acc, BITS, BK, TAIL, TAIL_PAD, True, ASM
    )
    if x_ptr.dtype.element_ty == tl.float8e4nv:
        return acc * 512.0
    else:
        return acc.to(tl.float32) * (1.0 / (1 << (8 - BITS)))


@triton.jit
def matmul_a8_mixed_kernel(
    x_ptr, query_ptr, key_ptr, value_ptr, y_ptr, x_scale_ptr, scale_ptr, zero_ptr, row_sum_ptr,
    weight_sum_ptr, bias_ptr, M, N, K, stride_x, stride_query, stride_key, stride_value, stride_y,
    BITS0: tl.constexpr, TAIL0: tl.constexpr, PAD0: tl.constexpr,
    BITS1: tl.constexpr, TAIL1: tl.constexpr, PAD1: tl.constexpr,
    BITS2: tl.constexpr, TAIL2: tl.constexpr, PAD2: tl.constexpr,
    LOOP_KEY: tl.constexpr, LOOP_VALUE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr,
    X_SCALE: tl.constexpr, ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (3 * tiles of O * tiles of T).

    One loop for each different number of bits, BITS0 (the query's), BITS1 and BITS2, which are 0 where there are fewer;
    LOOP_KEY and LOOP_VALUE are those of the key and the value.
    """
    n_tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0)
    segment = (tile // n_tiles) % 3
    rn = (tile % n_tiles) * BN + tl.arange(0, BN)
    first_m = (tile // (3 * n_tiles)) * BM
    rm = first_m + tl.arange(0, BM)
    rows_w = tl.minimum(rn, N - 1)
    rows_x = tl.minimum(rm, M - 1)
    w_ptr = tl.where(segment == 0, query_ptr, tl.where(segment == 1, key_ptr, value_ptr))
    stride_w = tl.where(segment == 0, stride_query, tl.where(segment == 1, stride_key, stride_value))
    if first_m == 0:
        fetch_rows(w_ptr, rows_w, stride_w, 0, stride_w, PDL)
    after_previous(PDL)
    first = segment * N
    first_zero = zero_ptr + first if ZERO != "none" else zero_ptr
    F8: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    acc = start_value(first_zero, row_sum_ptr, rm, rn, M, N, BM, BN, ZERO, tl.float32 if F8 else tl.int32)
    loop = tl.where(segment == 0, 0, tl.where(segment == 1, LOOP_KEY, LOOP_VALUE))
    # Loops that are alike would not share their memory, so there are not more of them than different numbers of bits.
    if BITS1 == 0:  # noqa: SIM114  decided when the kernel is compiled, unlike the next
        y = _product(x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK, BITS0, TAIL0, PAD0, ASM)
    elif loop == 0:
        y = _product(x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK, BITS0, TAIL0, PAD0, ASM)
    elif BITS2 == 0:  # noqa: SIM114
        y = _product(x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK, BITS1, TAIL1, PAD1, ASM)
    elif loop == 1:
        y = _product(x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK, BITS1, TAIL1, PAD1, ASM)
    else:
        y = _product(x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, acc, BK, BITS2, TAIL2, PAD2, ASM)
    epilogue(
        y, y_ptr + first, x_scale_ptr, scale_ptr + first, first_zero, row_sum_ptr,
        weight_sum_ptr + first if X_SCALE == "asymmetric" else weight_sum_ptr,
        bias_ptr + first if HAS_BIAS else bias_ptr, None, None, 0.0, 0.0, first_m, rn, M, N, stride_y, 0,
        8, X_SCALE, ZERO, HAS_BIAS, False, False, "float", False, F8, False,
    )  # fmt: skip


def loops_of(bits: Sequence[int], columns: int) -> tuple[list[int], tuple[int, int]]:
    """Bits, tail and padded tail of the kernel's three loops, and which of them the key and the value take."""
    different = list(dict.fromkeys(bits))
    constants: list[int] = []
    for width in different:
        constants += [width, *tail_of(columns, width)]
    return constants + [0] * (9 - len(constants)), (different.index(bits[1]), different.index(bits[2]))


def matmul_a8_mixed(
    xq: Tensor,
    x_scale: Tensor,
    weight: ProductWeight,
    *,
    row_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    tile: Tile | None = None,
    asm: bool = True,
) -> Tensor:
    """Launches `matmul_a8_mixed_kernel`: xq int8 or e4m3 [T, I], three weights [O, I] -> y [T, 3 O].

    row_sum int32 [T], needed with a zero; x_scale float32 [T], [1], or [2, T] with offsets, which need weight_sum.
    """
    packed, bits, zero = weight.codes, weight.bits, weight.zero
    tokens, columns = xq.shape
    rows = packed[0].shape[0]
    y = torch.empty((tokens, 3 * rows), dtype=out_dtype, device=xq.device)
    if tokens == 0 or rows == 0:
        return y
    if tile is None:
        tile = choose_tile(kernel_name("matmul_a8_mixed", xq), tokens, rows, columns, max(bits), device_name(xq))
    constants, loops = loops_of(bits, columns)
    grid = (3 * triton.cdiv(rows, tile.bn) * triton.cdiv(tokens, tile.bm),)
    matmul_a8_mixed_kernel[grid](
        xq,
        *(p.view(torch.int8) for p in packed),
        y,
        x_scale,
        weight.scale,
        zero,
        row_sum,
        weight.weight_sum,
        weight.bias,
        tokens,
        rows,
        columns,
        xq.stride(0),
        *(p.stride(0) for p in packed),
        y.stride(0),
        *constants,
        *loops,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        ASM=asm_kind(asm, xq),
        X_SCALE=scale_kind(x_scale),
        ZERO=zero_kind(zero, xq),
        HAS_BIAS=weight.bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent_launch(xq, tokens),
        **registers_option(tile, xq),
    )
    return y
