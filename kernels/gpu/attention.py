"""Self-attention over a packed batch of sequences of different lengths: no padding, one pass, eight bits out.

It stands alone because it is one kernel and its launch; `attention_ways` chooses between it and torch's.

    out[t, h] = sum_u softmax_u(query[t, h] . key[u, h] * scale) value[u, h],   u in the sequence of t

One program a (block of queries, head, sequence); keys and values are walked in blocks with a running maximum and
sum (online softmax, arXiv 2205.14135, algorithm 1), products in fp16 with float32 sums. query, key and value may be
slices of one fused [T, 3 H D] tensor. The output is fp16/bf16, or int8 (e4m3) with a static scale and zero and,
summed over heads, the row sums that the next product needs.

    out = attention(Heads(query, key, value, cu_seqlens, longest, scale=head_dim**-0.5))        # [T, H, D]
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels.gpu.dependent import after_previous, dependent_launch
from qbert.kernels.gpu.rows.quantize_rows import count, to_codes
from qbert.kernels.gpu.tiles import Tile
from qbert.kernels.operands import FLOAT, Heads, InputGrid

MAX_HEAD_DIM = 128


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    out_sum_ptr,
    starts_ptr,
    scale,
    inv_out_scale,
    out_zero,
    stride_q,
    stride_k,
    stride_v,
    head_q,
    head_k,
    head_v,
    stride_out,
    D,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OUT_SUM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of queries of the longest sequence, heads, sequences)."""
    after_previous(PDL)
    head = tl.program_id(1)
    start = tl.load(starts_ptr + tl.program_id(2)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(2) + 1).to(tl.int64) - start).to(tl.int32)
    first = tl.program_id(0) * BLOCK_Q
    if first < length:
        rows = first + tl.arange(0, BLOCK_Q)
        d = tl.arange(0, BLOCK_D)
        keys = tl.arange(0, BLOCK_K)
        q_at = q_ptr + start * stride_q + head * head_q + rows[:, None].to(tl.int64) * stride_q + d[None, :]
        q = tl.load(q_at, mask=(rows[:, None] < length) & (d[None, :] < D), other=0.0)
        k_at = k_ptr + start * stride_k + head * head_k + keys[:, None].to(tl.int64) * stride_k + d[None, :]
        v_at = v_ptr + start * stride_v + head * head_v + keys[:, None].to(tl.int64) * stride_v + d[None, :]
        peak = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
        for done in range(0, length, BLOCK_K):
            inside = (done + keys[:, None] < length) & (d[None, :] < D)
            k = tl.load(k_at, mask=inside, other=0.0)
            v = tl.load(v_at, mask=inside, other=0.0)
            k_at += BLOCK_K * stride_k
            v_at += BLOCK_K * stride_v
            # exp2 is the hardware's exponential, and its argument one multiply-add.
            scores = tl.where(done + keys[None, :] < length, tl.dot(q, k.T), float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            log_scale = scale * 1.4426950408889634
            weights = tl.exp2(scores * log_scale - (new_peak * log_scale)[:, None])
            fade = tl.exp2((peak - new_peak) * log_scale)
            total = total * fade + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
            peak = new_peak
        out = acc / total[:, None]
        at = out_ptr + (start + rows[:, None]) * stride_out + head * D + d[None, :]
        stored = (rows[:, None] < length) & (d[None, :] < D)
        if QUANTIZE:
            codes = to_codes(out * inv_out_scale, out_zero, out_ptr.dtype.element_ty == tl.float8e4nv)
            tl.store(at, codes, mask=stored)
            if OUT_SUM:
                total_codes = tl.sum(tl.where(stored, count(codes), 0), axis=1)
                tl.atomic_add(out_sum_ptr + start + rows, total_codes, mask=rows < length, sem="relaxed")
        else:
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=stored)


def default_tile(longest: int, head_dim: int) -> Tile:
    """Queries and keys a step (`bm`, `bn`) and warps for sequences up to `longest`.

    16 rows of queries a warp: eight warps on 64 queries would compute every score and exponential twice. With heads
    wider than 64, 64 keys need too many registers.
    """
    return Tile(64 if longest > 32 else 16, 64 if longest > 32 and head_dim <= 64 else 32, 0, stages=2)


def attention(
    heads: Heads, out: InputGrid = FLOAT, out_row_sum: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """Launches `attention_kernel`: [T, H, D] of every sequence; D up to 128.

    A static grid `out` makes the result its codes; every token's sum over heads is then added to `out_row_sum` (int32
    [T], zeroed) where given.
    """
    query, key, value, cu_seqlens, longest, scale, _ = heads
    tokens, count, head_dim = query.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention takes head dimensions up to {MAX_HEAD_DIM}, got {head_dim}.")
    dtype = out.codes_dtype if out.bits else query.dtype
    y = torch.empty((tokens, count, head_dim), dtype=dtype, device=query.device)
    sequences = cu_seqlens.numel() - 1
    if tokens and sequences > 0:
        tile = default_tile(longest, head_dim) if tile is None else tile
        attention_kernel[(triton.cdiv(longest, tile.bm), count, sequences)](
            query,
            key,
            value,
            y,
            out_row_sum,
            cu_seqlens,
            scale,
            1.0 / out.scale if out.bits else 0.0,
            float(out.zero),
            query.stride(0),
            key.stride(0),
            value.stride(0),
            query.stride(1),
            key.stride(1),
            value.stride(1),
            y.stride(0),
            head_dim,
            BLOCK_Q=tile.bm,
            BLOCK_K=tile.bn,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            QUANTIZE=bool(out.bits),
            OUT_SUM=out_row_sum is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **dependent_launch(query, tokens),
        )
    return y
