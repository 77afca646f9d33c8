"""y = x W^T with fp16 or bf16 activations and 2-, 3-, 4- or 8-bit weights: for few tokens, where weight bytes decide.

    y[t, o] = (sum_i x[t, i] q[o, i] - zero[o] sum_i x[t, i]) scale[o] + bias[o]

Both sums are in float32; codes are exact in fp16 and in bf16. From about 64 tokens on this is slower than dequantizing
once and calling the vendor's product (Marlin, arXiv 2408.11743, figure 9, and every weight-only kernel since): see
`qbert.kernels.dispatch`. Columns are split over SPLIT programs a tile as in `matmul_a8`; the last to arrive adds the
parts in their order, so that results do not depend on timing.

    y = matmul_a16(x, ProductWeight([packed], [4], scale, zero, bias))        # [T, I] -> [T, O], dtype of x
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.products.unpack import finish, load_weight_tile, load_weight_tile_fp16, tile_columns
from qbert.kernels.gpu.tiles import Tile, asm_kind, choose_tile, device_name, split_workspace, tail_of
from qbert.kernels.operands import ProductWeight


@triton.jit
def _weights(
    ptrs, start, x, BITS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr
):
    """Weight tile in the type of x: codes (ASM, fp16 only), else codes times 2^(8 - BITS)."""
    if ASM:
        return load_weight_tile_fp16(ptrs, start, BITS, L, P, PADDED)
    else:
        return load_weight_tile(ptrs, start, BITS, L, P, PADDED, False).to(x.dtype)


@triton.jit
def matmul_a16_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    parts_ptr,
    sums_ptr,
    arrived_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_y,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    ASM: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (tiles of O * tiles of T, SPLIT)."""
    F: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    P: tl.constexpr = BK // F
    TILES: tl.constexpr = 256 // BK
    n_tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rn = (tile % n_tiles) * BN + tl.arange(0, BN)
    rm = (tile // n_tiles) * BM + tl.arange(0, BM)
    x_rows = x_ptr + tl.minimum(rm, M - 1)[:, None].to(tl.int64) * stride_x
    w_rows = w_ptr + tl.minimum(rn, N - 1)[:, None].to(tl.int64) * stride_w
    columns = tile_columns(256, P, F)
    steps = K // 256 * TILES
    per_part = tl.cdiv(steps, SPLIT)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    x_sum = tl.zeros((BM,), dtype=tl.float32)
    for i in range(part * per_part, tl.minimum((part + 1) * per_part, steps)):
        start = (i % TILES) * P
        x = tl.load(x_rows + ((i // TILES) * 256 + start + columns)[None, :])
        w = _weights(w_rows + (i // TILES) * (32 * BITS), start, x, BITS, 256, P, False, ASM % 3 != 0)
        acc = tl.dot(w, x.T, acc)
        finish(i, ASM)
        if HAS_ZERO:
            x_sum += tl.sum(x.to(tl.float32), axis=1)
    if TAIL > 0:  # noqa: SIM102  the outer condition is decided when the kernel is compiled
        if part == SPLIT - 1:
            PT: tl.constexpr = TAIL_PAD // F
            c = tile_columns(TAIL, PT, F)
            whole = K // 256 * 256
            inside = (whole + c < K) & ((tl.arange(0, TAIL_PAD) % PT) < TAIL // F)
            x = tl.load(x_rows + (whole + c)[None, :], mask=inside[None, :], other=0.0)
            w = _weights(w_rows + (whole // 8) * BITS, 0, x, BITS, TAIL, PT, TAIL_PAD != TAIL, ASM % 3 != 0)
            acc = tl.dot(w, x.T, acc)
            if HAS_ZERO:
                x_sum += tl.sum(x.to(tl.float32), axis=1)
    last_to_arrive = True
    if SPLIT > 1:
        parts = parts_ptr + tile.to(tl.int64) * (SPLIT * BN * BM)
        parts += tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        sums = sums_ptr + tile.to(tl.int64) * (SPLIT * BM) + tl.arange(0, BM)
        tl.store(parts + part * (BN * BM), acc)
        if HAS_ZERO:
            tl.store(sums + part * BM, x_sum)
        tl.debug_barrier()
        last_to_arrive = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if last_to_arrive:
            acc = tl.zeros((BN, BM), dtype=tl.float32)
            x_sum = tl.zeros((BM,), dtype=tl.float32)
            for other in range(0, SPLIT):
                acc += tl.load(parts + other * (BN * BM), cache_modifier=".cg")
                if HAS_ZERO:
                    x_sum += tl.load(sums + other * BM, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if last_to_arrive:
        y = acc if ASM % 3 != 0 else acc * (1.0 / (1 << (8 - BITS)))
        if HAS_ZERO:
            y -= tl.load(zero_ptr + rn, mask=rn < N, other=0.0)[:, None] * x_sum[None, :]
        y *= tl.load(scale_ptr + rn, mask=rn < N, other=0.0)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0)[:, None]
        y_ptrs = y_ptr + rm[None, :].to(tl.int64) * stride_y + rn[:, None]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))


def matmul_a16(x: Tensor, weight: ProductWeight, *, tile: Tile | None = None, asm: bool = True) -> Tensor:
    """Launches `matmul_a16_kernel`: x [T, I] fp16 or bf16, one weight [O, I] -> y [T, O] in the dtype of x.

    The zero is float32. The caller has checked shapes and devices (`qbert.kernels.checks`).
    """
    packed, bits = weight.codes[0], weight.bits[0]
    tokens, columns = x.shape
    rows = packed.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if tokens == 0 or rows == 0:
        return y
    if tile is None:
        tile = choose_tile("matmul_a16", tokens, rows, columns, bits, device_name(x))
    tail, tail_pad = tail_of(columns, bits)
    tiles = triton.cdiv(rows, tile.bn) * triton.cdiv(tokens, tile.bm)
    parts, arrived = split_workspace(x.device, tiles, tile, torch.float32) if tile.split > 1 else (y, y)
    sums = parts[tiles * tile.split * tile.bm * tile.bn :] if tile.split > 1 else y
    matmul_a16_kernel[(tiles, tile.split)](
        x,
        packed.view(torch.int8),
        y,
        weight.scale,
        weight.zero,
        weight.bias,
        parts,
        sums,
        arrived,
        tokens,
        rows,
        columns,
        x.stride(0),
        packed.stride(0),
        y.stride(0),
        BITS=bits,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        SPLIT=tile.split,
        TAIL=tail,
        TAIL_PAD=tail_pad,
        ASM=asm_kind(asm and x.dtype == torch.float16, x),
        HAS_ZERO=weight.zero is not None,
        HAS_BIAS=weight.bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
