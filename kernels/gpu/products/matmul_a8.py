"""y = x W^T with 8-bit activations and packed weights on int8 or e4m3 tensor cores.

int8 activations take 2-, 3-, 4- or 8-bit weights; their sum is an exact int32. e4m3 activations (sm_89 and later) take
2-, 3- or 4-bit weights, exact in e4m3 (`unpack`), and a float32 sum of which sm_90 keeps 13 bits behind the first
(arXiv 2412.19437, section 3.3.2), but which Triton overlaps with unpacking there, unlike int32's. Same epilogues:

    y[t, o] = act((acc - zero[o] row_sum[t]) scale[o] x_scale[t] + x_offset[t] weight_sum[o] + bias[o]) + residual[t, o]

x_offset is there for activations that are quantized asymmetrically, x ~ x_scale xq + x_offset.

Weights are the LEFT operand of the tensor-core product, acc [O, T] = W x^T: their unpacked bytes go from registers
straight into it (register-A wgmma on sm_90) and never back to shared memory. Per-row scale and zero live in the
epilogue, as in QServe's per-channel kernel (arXiv 2405.04532, section 5.2.1), so Q-BERT's row groups cost nothing.

Epilogues: bias; GELU; static requantization to int8, with row sums for the next product; residual; or the bare int32.
With few tokens the columns are split over SPLIT programs a tile; each writes its part, and the one that arrives last
adds the parts, always in the same order, and runs the epilogue.

    y = matmul_a8(xq, x_scale, ProductWeight([packed], [4], scale, zero, bias), row_sum=row_sum)
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.dependent import after_previous, dependent_launch, fetch_rows
from qbert.kernels.gpu.products.epilogue import epilogue, start_value
from qbert.kernels.gpu.products.unpack import finish, load_weight_tile, load_weight_tile_f8, tile_columns
from qbert.kernels.gpu.tiles import (
    Tile,
    asm_kind,
    choose_tile,
    device_name,
    kernel_name,
    output_kind,
    registers_option,
    scale_kind,
    split_workspace,
    tail_of,
    zero_kind,
)
from qbert.kernels.operands import FLOAT, InputGrid, ProductWeight


@triton.jit
def _load_weights(
    ptrs, start, BITS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, F8: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    if F8:
        return load_weight_tile_f8(ptrs, start, BITS, L, P, PADDED, ASM % 3 != 0)
    else:
        return load_weight_tile(ptrs, start, BITS, L, P, PADDED, ASM)


@triton.jit
def _accumulate_blocks(
    x_rows, w_rows, first, last, acc, BITS: tl.constexpr, BK: tl.constexpr, F8: tl.constexpr, ASM: tl.constexpr
):
    F: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    P: tl.constexpr = BK // F
    TILES: tl.constexpr = 256 // BK
    columns = tile_columns(256, P, F)
    for i in range(first, last):
        start = (i % TILES) * P
        x = tl.load(x_rows + ((i // TILES) * 256 + start + columns)[None, :])
        w = _load_weights(w_rows + (i // TILES) * (32 * BITS), start, BITS, 256, P, False, F8, ASM)
        acc = tl.dot(w, x.T, acc, out_dtype=acc.dtype)
        if F8:
            finish(i, ASM)
    return acc


@triton.jit
def accumulate(
    x_ptr,
    w_ptr,
    rows_x,
    rows_w,
    K,
    stride_x,
    stride_w,
    first,
    last,
    acc,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    WITH_TAIL,
    ASM: tl.constexpr,
):
    """acc [BN, BM] += W x^T over the 256-column blocks' tiles first..last - 1, and the shorter last block.

    int32 and 2^(8 - BITS) times the product for int8 x, float32 and the product / 512 for e4m3 x.
    """
    F8: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    F: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    x_rows = x_ptr + rows_x[:, None].to(tl.int64) * stride_x
    w_rows = w_ptr + rows_w[:, None].to(tl.int64) * stride_w
    if F8:
        # A loop that may not run at all would set sums to zero beside it, before the wait for its products, and ptxas
        # would then run these one by one (C7515).
        if last > first:
            acc = _accumulate_blocks(x_rows, w_rows, first, last, acc, BITS, BK, F8, ASM)
    else:
        acc = _accumulate_blocks(x_rows, w_rows, first, last, acc, BITS, BK, F8, ASM)
    if TAIL > 0:  # noqa: SIM102  the outer condition is decided when the kernel is compiled
        if WITH_TAIL:
            PT: tl.constexpr = TAIL_PAD // F
            PADDED: tl.constexpr = TAIL_PAD != TAIL
            c = tile_columns(TAIL, PT, F)
            whole = K // 256 * 256
            inside = (whole + c < K) & ((tl.arange(0, TAIL_PAD) % PT) < TAIL // F)
            x = tl.load(x_rows + (whole + c)[None, :], mask=inside[None, :], other=0.0 if F8 else 0)
            w = _load_weights(w_rows + (whole // 8) * BITS, 0, BITS, TAIL, PT, PADDED, F8, ASM)
            acc = tl.dot(w, x.T, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def matmul_a8_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_scale_ptr,
    scale_ptr,
    zero_ptr,
    row_sum_ptr,
    weight_sum_ptr,
    bias_ptr,
    residual_ptr,
    out_sum_ptr,
    parts_ptr,
    arrived_ptr,
    inv_out_scale,
    out_zero,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_y,
    stride_r,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    ASM: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    OUT_SUM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of O * tiles of T, SPLIT); neighbours share the tokens' tile, which then stays in the L2 cache."""
    n_tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0)
    rn = (tile % n_tiles) * BN + tl.arange(0, BN)
    first_m = (tile // n_tiles) * BM
    rm = first_m + tl.arange(0, BM)
    # Rows beyond the matrix repeat the last one: no mask in the loop, and the surplus is not stored.
    rows_w = tl.minimum(rn, N - 1)
    rows_x = tl.minimum(rm, M - 1)
    steps = K // 256 * (256 // BK)
    F8: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    SUM: tl.constexpr = tl.float32 if F8 else tl.int32
    if SPLIT == 1:
        if first_m == 0:
            fetch_rows(w_ptr, rows_w, stride_w, 0, stride_w, PDL)
        after_previous(PDL)
        acc = start_value(zero_ptr, row_sum_ptr, rm, rn, M, N, BM, BN, ZERO, SUM)
        acc = accumulate(
            x_ptr, w_ptr, rows_x, rows_w, K, stride_x, stride_w, 0, steps, acc, BITS, BK, TAIL, TAIL_PAD, True, ASM
        )
        last_to_arrive = True
    else:
        part = tl.program_id(1)
        per_part = tl.cdiv(steps, SPLIT)
        first = part * per_part
        last = tl.minimum(first + per_part, steps)
        if first_m == 0:  # whole blocks of 256 columns, 32 * BITS bytes each
            end = tl.where(part == SPLIT - 1, stride_w, tl.cdiv(last, 256 // BK) * (32 * BITS))
            fetch_rows(w_ptr, rows_w, stride_w, first // (256 // BK) * (32 * BITS), end, PDL)
        after_previous(PDL)
        acc = tl.zeros((BN, BM), dtype=SUM)
        acc = accumulate(
            x_ptr,
            w_ptr,
            rows_x,
            rows_w,
            K,
            stride_x,
            stride_w,
            first,
            last,
            acc,
            BITS,
            BK,
            TAIL,
            TAIL_PAD,
            part == SPLIT - 1,
            ASM,
        )
        inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        parts = parts_ptr + tile.to(tl.int64) * (SPLIT * BN * BM) + inner
        tl.store(parts + part * (BN * BM), acc)
        tl.debug_barrier()
        last_to_arrive = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if last_to_arrive:
            acc = start_value(zero_ptr, row_sum_ptr, rm, rn, M, N, BM, BN, ZERO, SUM)
            for other in range(0, SPLIT):
                acc += tl.load(parts + other * (BN * BM), cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if last_to_arrive:
        epilogue(
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
            BITS,
            X_SCALE,
            ZERO,
            HAS_BIAS,
            GELU,
            HAS_RESIDUAL,
            OUT,
            OUT_SUM,
            F8,
        )


def matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    weight: ProductWeight,
    *,
    row_sum: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    out: InputGrid = FLOAT,
    out_row_sum: Tensor | None = None,
    tile: Tile | None = None,
    asm: bool = True,
) -> Tensor:
    """Launches `matmul_a8_kernel`: xq int8 or float8_e4m3fn [T, I], one weight [O, I] -> y [T, O].

    x_scale float32 [T], [1], or [2, T] with offsets, which need weight_sum; residual [T, O]. The zero (None = 0) is
    either int32, holding zero * 2^(8 - bits) where that is an integer (exact, and faster), or float32; it needs row_sum
    int32 [T]. With e4m3 xq it is float32, and bits at most 4.
    A static grid `out` makes y its codes and, where `out_row_sum` (int32 [T], zeroed) is given, adds every row's sum to
    it, e4m3 ones counting 1/512 (`quantize_rows`). out_dtype int32 returns the bare integer product, zero term
    included.
    The caller has checked shapes and devices (`qbert.kernels.checks`).
    """
    packed, bits, zero = weight.codes[0], weight.bits[0], weight.zero
    out_dtype = out.codes_dtype if out.bits else out_dtype
    tokens, columns = xq.shape
    rows = packed.shape[0]
    y = torch.empty((tokens, rows), dtype=out_dtype, device=xq.device)
    if tokens == 0 or rows == 0:
        return y
    if tile is None:
        tile = choose_tile(kernel_name("matmul_a8", xq), tokens, rows, columns, bits, device_name(xq))
    tail, tail_pad = tail_of(columns, bits)
    tiles = triton.cdiv(rows, tile.bn) * triton.cdiv(tokens, tile.bm)
    sums = torch.int32 if xq.dtype == torch.int8 else torch.float32
    parts, arrived = split_workspace(xq.device, tiles, tile, sums) if tile.split > 1 else (y, y)
    matmul_a8_kernel[(tiles, tile.split)](
        xq,
        packed.view(torch.int8),
        y,
        x_scale,
        weight.scale,
        zero,
        row_sum,
        weight.weight_sum,
        weight.bias,
        residual,
        out_row_sum,
        parts,
        arrived,
        1.0 / out.scale if out.bits else 0.0,
        float(out.zero),
        tokens,
        rows,
        columns,
        xq.stride(0),
        packed.stride(0),
        y.stride(0),
        0 if residual is None else residual.stride(0),
        BITS=bits,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        SPLIT=tile.split,
        TAIL=tail,
        TAIL_PAD=tail_pad,
        ASM=asm_kind(asm, xq),
        X_SCALE=scale_kind(x_scale),
        ZERO=zero_kind(zero, xq),
        HAS_BIAS=weight.bias is not None,
        GELU=gelu,
        HAS_RESIDUAL=residual is not None,
        OUT=output_kind(out_dtype),
        OUT_SUM=out_row_sum is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent_launch(xq, tokens),
        **registers_option(tile, xq),
    )
    return y
