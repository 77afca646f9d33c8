"""What the launchers of the matrix kernels share: block tails, workspaces of split products, compile options."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qbert.kernels import formats
from qbert.kernels.gpu.tiles import E4M3, Tile


def tail_of(columns: int, bits: int) -> tuple[int, int]:
    """Codes in the last, shorter block of a row, as stored and as a kernel rounds them up to powers of two."""
    fields = 8 if bits == 3 else 8 // bits
    tail = formats.packed_row_nbytes(columns % 256, bits) * 8 // bits
    return (tail, fields * max(32 // fields, triton.next_power_of_2(tail // fields))) if tail else (0, 0)


def device_name(x: Tensor) -> str:
    """Key of the measured tiles: the GPU's name."""
    return torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"


def kernel_name(kernel: str, xq: Tensor) -> str:
    """The name under which tiles of `kernel` are kept: int8 and e4m3 activations have their own."""
    return kernel if xq.dtype == torch.int8 else kernel + E4M3


def zero_kind(zero: Tensor | None, xq: Tensor) -> str:
    """What the products call their zeros: "none", "e4m3" for float32 ones beside e4m3 xq, else "int32" or "float"."""
    if zero is None:
        return "none"
    return "e4m3" if xq.dtype != torch.int8 else "int32" if zero.dtype == torch.int32 else "float"


def output_kind(dtype: torch.dtype) -> str:
    """What the epilogue calls the dtype of its output."""
    return {torch.int32: "int32", torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}.get(dtype, "float")


def scale_kind(x_scale: Tensor) -> str:
    """What the products call x_scale: one for all tokens, [T], or [2, T] with offsets."""
    return "asymmetric" if x_scale.dim() == 2 else "token" if x_scale.numel() > 1 else "one"


def registers_option(tile: Tile, x: Tensor) -> dict[str, int]:
    """The tile's cap on registers as a compile option, where it is known to cause no spills: on sm_90 alone."""
    capped = tile.registers is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    return {"maxnreg": tile.registers} if capped and tile.registers is not None else {}


# Counters by device and stream, the last ones in use. Outgrown ones are kept: a captured CUDA graph may count in them.
_arrived: dict[tuple[torch.device, int], list[Tensor]] = {}


def split_workspace(device: torch.device, tiles: int, tile: Tile, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parts of a split product (BN x BM a part, and BM more for sums), and arrival counters int32 [tiles].

    Every launch leaves the counters at zero for the next one on its stream; each stream has its own. Run once on the
    stream that will capture a CUDA graph, before: counters made during the capture would be zeroed by that graph alone,
    so they are made for each launch of it.
    """
    parts = torch.empty(tiles * tile.split * tile.bm * (tile.bn + 1), dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _arrived.setdefault((device, stream), [])
    if known and known[-1].numel() >= tiles:
        return parts, known[-1]
    arrived = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        known.append(arrived)
    return parts, arrived
