"""Which attention runs on a GPU: this package's kernel in one of its tiles, or torch's and a pass of quantization.

It stands alone because `attention` is one of the ways, and knows no other.

Ours writes 8-bit codes and their sums itself; torch's are faster where long sequences pay for a second pass over the
output: "flash" for packed sequences, where torch has `torch.nn.attention.varlen` (2.10 and later), and "sdpa", cuDNN's
or another of torch's, for sequences of one length alone (`Heads.uniform`). The environment variable QBERT_ATTENTION
decides: "triton", "flash" or "sdpa" force one ("sdpa" where it can be taken); without it the way that
`measure_attention` found fastest for a shape is taken, and for shapes that were not measured that of a rule. Measured
ways are kept with the tiles (`tiles`, QBERT_TILES).

    out = attend(Heads(query, key, value, cu_seqlens, longest, scale=0.125))
    measure_attention(sequences=32, longest=384, heads=12, head_dim=64)
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from qbert.kernels.gpu.attention import attention, default_tile
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import Tile, device_name, known_tile, measure, token_bucket
from qbert.kernels.operands import FLOAT, UNIFORM_LENGTH, Heads, InputGrid

logger = logging.getLogger(__name__)
# Stand for torch's in the table of measured tiles: for packed sequences, and for those of one length.
FLASH, SDPA = Tile(0, 0, 0, warps=0, stages=0), Tile(0, 0, 0, warps=0, stages=1)
WAYS = [
    Tile(64, 64, 0, stages=2),
    Tile(64, 32, 0, stages=2),
    Tile(64, 128, 0, stages=2),
    Tile(128, 64, 0, warps=8, stages=2),
    Tile(128, 128, 0, warps=8, stages=2),
    FLASH,
]
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_backends_set = threading.Lock()
_without_plan: set[tuple[object, ...]] = set()  # devices, dtypes and shapes that SDPA refused
# From which the pass that quantizes the output of SDPA costs less than it saves: estimated from the attention of
# BERT-base on an H200 at 32x128 (as fast as ours without that pass) and 128x384 (1.7 times as fast).
_UNIFORM_TOKENS = 2048


def attend(heads: Heads, out: InputGrid = FLOAT, out_row_sum: Tensor | None = None) -> Tensor:
    """As `attention`, in the way that is forced, measured or the default.

    Raises ValueError for another QBERT_ATTENTION, and for "flash" where torch has none for packed sequences.
    """
    forced = os.environ.get("QBERT_ATTENTION", "")
    if forced not in ("", "triton", "flash", "sdpa"):
        raise ValueError(f"QBERT_ATTENTION must be 'triton', 'flash', 'sdpa' or not set, got {forced!r}.")
    if forced == "flash" and not has_flash():
        raise ValueError(f"QBERT_ATTENTION=flash needs torch 2.10 or later, this is {torch.__version__}; unset it.")
    if not len(heads.query):
        return attention(heads, out, out_row_sum)
    way = _way(heads) if not forced else {"flash": FLASH, "sdpa": SDPA if heads.uniform else None}.get(forced)
    if way == SDPA:
        return _sdpa(heads, out, out_row_sum) if forced else _sdpa_or_ours(heads, out, out_row_sum)
    if way == FLASH:
        return _flash(heads, out, out_row_sum)
    return attention(heads, out, out_row_sum, tile=way)


def _way(heads: Heads) -> Tile | None:
    """What was measured for a shape, or what the rule says; None for ours in its default tile."""
    name = device_name(heads.query)
    if heads.uniform:
        measured = known_tile(*_shape(heads), name)
        if measured is not None:
            return measured
        if _pays(heads):
            return SDPA
    return known_tile(*_shape(heads._replace(uniform=False)), name)


def _pays(heads: Heads) -> bool:
    """The rule for SDPA, on sm_90 and what is newer."""
    query = heads.query
    enough = len(query) >= _UNIFORM_TOKENS
    hopper = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
    return hopper and enough and heads.longest >= UNIFORM_LENGTH


def has_flash() -> bool:
    """Whether this torch has FlashAttention for packed sequences as a public function."""
    return find_spec("torch.nn.attention.varlen") is not None


def _shape(heads: Heads) -> tuple[str, int, int, int, int]:
    """What choices are kept by: tokens, heads, head dimension, and the power of two that holds the longest sequence."""
    tokens, count, head_dim = heads.query.shape
    name = "attention_uniform" if heads.uniform else "attention"
    return name, tokens, count, head_dim, token_bucket(heads.longest)


def _flash(heads: Heads, out: InputGrid, out_row_sum: Tensor | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value, cu_seqlens, longest, scale, _ = heads
    y = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    assert isinstance(y, Tensor)
    return _quantized(y, out, out_row_sum)


def _sdpa_or_ours(heads: Heads, out: InputGrid, out_row_sum: Tensor | None) -> Tensor:
    """cuDNN may be chosen for a shape that it then has no plan for (pytorch issues 129579, 140930)."""
    shape = (heads.query.device, heads.query.dtype, heads.query.shape, heads.longest)
    if shape not in _without_plan:
        try:
            return _sdpa(heads, out, out_row_sum)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _without_plan.add(shape)
            logger.warning("torch's attention does not take %s: %s", tuple(shape[2]), str(error).splitlines()[0])
    return attention(heads, out, out_row_sum)


def _sdpa(heads: Heads, out: InputGrid, out_row_sum: Tensor | None) -> Tensor:
    """torch's over views [B, H, L, D] of the packed tokens, in the order of tokens or another as its backend likes."""
    query, key, value = (t.unflatten(0, (-1, heads.longest)).transpose(1, 2) for t in heads[:3])
    # What it sets is the process's: one thread at a time, or another would put back what this one had set.
    with _backends_set, sdpa_kernel(_BACKENDS, set_priority=True):
        y = F.scaled_dot_product_attention(query, key, value, scale=heads.scale)
    return _quantized(y.transpose(1, 2).reshape(heads.query.shape), out, out_row_sum)


def _quantized(y: Tensor, out: InputGrid, out_row_sum: Tensor | None) -> Tensor:
    """y [T, H, D], or its codes; their sums, which are zeros before, are written."""
    if not out.bits:
        return y
    return quantize_rows(y.flatten(1), out, sums=out_row_sum)[0].view_as(y)


def measure_attention(*, sequences: int, longest: int, heads: int, head_dim: int, uniform: bool = False) -> Tile:
    """The fastest way for this many sequences of this length, with int8 output and sums; later calls will use it.

    `uniform` measures for batches that are known to have sequences of this length alone, and tries SDPA too.
    Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure_attention times kernels on a CUDA device, and there is none.")
    tokens = sequences * longest
    fused = torch.randn(tokens, 3, heads, head_dim, device="cuda", dtype=torch.float16)
    query, key, value = fused.unbind(1)
    starts = torch.arange(0, tokens + 1, longest, device="cuda", dtype=torch.int32)
    sums = torch.zeros(tokens, device="cuda", dtype=torch.int32)
    given = (Heads(query, key, value, starts, longest, head_dim**-0.5, uniform), InputGrid(0.02), sums)

    def milliseconds(tile: Tile) -> float:
        try:
            if tile in (FLASH, SDPA):
                torchs = _flash if tile == FLASH else _sdpa
                with contextlib.suppress(RuntimeError):
                    return float(do_bench_cudagraph(lambda: torchs(*given)))
                return float("inf")
            return float(do_bench_cudagraph(lambda: attention(*given, tile=tile)))
        except (OutOfResources, PTXASError, CompilationError):
            return float("inf")

    ways = [default_tile(longest, head_dim), *(w for w in WAYS if w != FLASH or has_flash()), *([SDPA] * uniform)]
    return measure(*_shape(given[0]), device_name(query), milliseconds, list(dict.fromkeys(ways)))
