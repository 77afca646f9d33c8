"""Which attention runs on a GPU: this package's kernel in one of its tiles, or torch's and a pass of quantization.

It stands alone because `attention` is one of the ways, and knows no other.

Ours writes 8-bit codes and their sums itself; torch's is faster where long sequences pay for a second pass over the
output. The environment variable QBERT_ATTENTION decides: "triton" or "flash" force one; without it the way that
`measure_attention` found fastest for a shape is taken, and ours, in its default tile, for shapes that were not
measured. Measured ways are kept with the tiles (`tiles`, QBERT_TILES). "flash" needs a torch with
`torch.nn.attention.varlen` (2.10 and later).

    out = attend(Heads(query, key, value, cu_seqlens, longest, scale=0.125))
    measure_attention(sequences=32, longest=384, heads=12, head_dim=64)
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from qbert.kernels.gpu.attention import attention, default_tile
from qbert.kernels.gpu.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import Tile, device_name, known_tile, measure, token_bucket
from qbert.kernels.operands import FLOAT, Heads, InputGrid

FLASH = Tile(0, 0, 0, warps=0, stages=0)  # stands for torch's in the table of measured tiles
WAYS = [
    Tile(64, 64, 0, stages=2),
    Tile(64, 32, 0, stages=2),
    Tile(64, 128, 0, stages=2),
    Tile(128, 64, 0, warps=8, stages=2),
    Tile(128, 128, 0, warps=8, stages=2),
    FLASH,
]


def attend(heads: Heads, out: InputGrid = FLOAT, out_row_sum: Tensor | None = None) -> Tensor:
    """As `attention`, in the way that is forced, measured or the default.

    Raises ValueError for another QBERT_ATTENTION, and for "flash" where torch has none for packed sequences.
    """
    forced = os.environ.get("QBERT_ATTENTION", "")
    if forced not in ("", "triton", "flash"):
        raise ValueError(f"QBERT_ATTENTION must be 'triton', 'flash' or not set, got {forced!r}.")
    if forced == "flash" and not has_flash():
        raise ValueError(f"QBERT_ATTENTION=flash needs torch 2.10 or later, this is {torch.__version__}; unset it.")
    tile = FLASH if forced == "flash" else None
    if not forced:
        tile = known_tile(*_shape(heads), device_name(heads.query))
    if tile == FLASH:
        return _flash(heads, out, out_row_sum)
    return attention(heads, out, out_row_sum, tile=tile)


def has_flash() -> bool:
    """Whether this torch has FlashAttention for packed sequences as a public function."""
    return find_spec("torch.nn.attention.varlen") is not None


def _shape(heads: Heads) -> tuple[str, int, int, int, int]:
    """What choices are kept by: tokens, heads, head dimension, and the power of two that holds the longest sequence."""
    tokens, count, head_dim = heads.query.shape
    return "attention", tokens, count, head_dim, token_bucket(heads.longest)


def _flash(heads: Heads, out: InputGrid, out_row_sum: Tensor | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value, cu_seqlens, longest, scale, _ = heads
    y = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    assert isinstance(y, Tensor)
    if not out.bits:
        return y
    codes, _, sums = quantize_rows(y.flatten(1), out)
    if out_row_sum is not None:
        out_row_sum += sums
    return codes.view_as(y)


def measure_attention(*, sequences: int, longest: int, heads: int, head_dim: int) -> Tile:
    """The fastest way for this many sequences of this length, with int8 output and sums; later calls will use it.

    Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure_attention times kernels on a CUDA device, and there is none.")
    tokens = sequences * longest
    fused = torch.randn(tokens, 3, heads, head_dim, device="cuda", dtype=torch.float16)
    query, key, value = fused.unbind(1)
    starts = torch.arange(0, tokens + 1, longest, device="cuda", dtype=torch.int32)
    sums = torch.zeros(tokens, device="cuda", dtype=torch.int32)
    given = (Heads(query, key, value, starts, longest, head_dim**-0.5), InputGrid(0.02), sums)

    def milliseconds(tile: Tile) -> float:
        try:
            if tile == FLASH:
                return float(do_bench_cudagraph(lambda: _flash(*given)))
            return float(do_bench_cudagraph(lambda: attention(*given, tile=tile)))
        except (OutOfResources, PTXASError, CompilationError):
            return float("inf")

    ways = [default_tile(longest, head_dim), *(w for w in WAYS if w != FLASH or has_flash())]
    return measure(*_shape(given[0]), device_name(query), milliseconds, list(dict.fromkeys(ways)))
