"""Rows in registers: cut into chunks that leave few lanes without a column, and how many a program does.

It stands alone because `quantize_rows`, and `layernorm_quant`, which imports that, both cut rows so.

What limits such kernels with many tokens is instructions, not memory: 100 an element take three times as long as the
memory. So a row is cut into chunks of a power of two (768 columns are three of 256), a thread holds neighbouring
columns of every chunk, 16 bytes of the 16-bit types, sums are first made inside a thread, over chunks, and then once
over lanes. With many tokens one warp does a row of up to 1,024 columns alone, without barriers, and a program several.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from qbert.kernels.gpu.tiles import Tile

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


def rule(tokens: int, columns: int) -> Tile:
    """Rows a program (`bm`) and its warps without measuring.

    Few tokens: a row by four warps, where the time of one counts. Many: rows by single warps, of which a thread holds
    at most 32 columns; two of them a program fill the chip from 4,096 tokens on, and more save loads of a weight.
    """
    warps = min(16, triton.next_power_of_2(triton.cdiv(columns, 1024)))
    if tokens <= _MANY_TOKENS:
        return Tile(1, columns, 0, warps=max(4, warps))
    return Tile(2 if tokens <= 8192 else 4, columns, 0, warps=warps)


def chunk_of(columns: int, warps: int) -> int:
    """Columns of a chunk: 8 a thread, as many as 16 bytes hold, or 4 or 2 where that leaves fewer without a column."""
    sizes = [min(triton.next_power_of_2(columns), 32 * warps * each) for each in (8, 4, 2)]
    return min(sizes, key=lambda size: triton.cdiv(columns, size) * size)
