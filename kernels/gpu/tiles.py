"""Tile sizes of the matrix kernels: at most twelve candidates a shape, a rule that needs no GPU, and a measured choice.

BM tokens x BN weight rows x BK columns a step. Few tokens: small tiles and SPLIT > 1, so that more than a handful of
the chip's processors have work; many tokens: 128 x 128, two programs a processor, whose loads and products overlap.

The rule is used until `measure` has timed the candidates for a (kernel, bits, O, I, token bucket) on the GPU at hand;
measured choices are kept in memory, and in the JSON file that the environment variable QBERT_TILES names, if it is set.

Below that, what else the launchers share: block tails, compile options, workspaces of split products.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from qbert.kernels import formats


@dataclasses.dataclass(frozen=True)
class Tile:
    """One way to cut the work: tokens, weight rows, columns a step, column splits, warps, pipeline stages.

    `registers` caps the registers of a thread on sm_90 and later: at 128 two programs of 8 warps share a processor.
    """

    bm: int
    bn: int
    bk: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    registers: int | None = None


UNPACKED = Tile(0, 0, 0, warps=0, stages=0)  # stands for the product with unpacked weights in the measured table
_UNPACKED_FROM, _UNPACKED_3_FROM = 4096, 1024  # tokens from which those are taken for shapes that were not measured

E4M3 = "_e4m3"  # ends the names of kernels with e4m3 activations, whose tiles are chosen apart

_SMALL = [Tile(16, 64, 256), Tile(32, 64, 256), Tile(16, 32, 256), Tile(32, 64, 128), Tile(64, 64, 128)]
_LARGE = [
    Tile(64, 128, 128),
    Tile(128, 64, 128),
    Tile(128, 128, 128, warps=8, stages=3, registers=128),
    Tile(128, 128, 128, warps=8, stages=4),
    Tile(128, 128, 256, warps=8, stages=2),
    Tile(256, 128, 128, warps=8, stages=3),
    Tile(128, 256, 128, warps=8, stages=3),
]

_measured: dict[str, Tile] = {}


def token_bucket(tokens: int) -> int:
    """Token counts that share a choice: the next power of two, from 16 to 8192."""
    return min(8192, max(16, 1 << (max(tokens, 1) - 1).bit_length()))


def candidates(tokens: int, rows: int, columns: int, bits: int, e4m3: bool = False) -> list[Tile]:
    """At most twelve tiles worth trying for x [tokens, columns] and W [rows, columns], the rule's among them."""
    steps = columns // 256
    if tokens <= 128:
        tiles = [t for t in _SMALL if t.bm <= max(16, token_bucket(tokens))]
        splits = [dataclasses.replace(t, split=s) for t in tiles[:3] for s in (2, 4) if steps >= s]
        tiles = (tiles + splits)[:12]
    elif tokens <= 1024:
        tiles = [_SMALL[1], *_SMALL[3:], *_LARGE[:3]]
    else:
        tiles = _LARGE
    if bits == 3:  # at 128 columns a step its activations come in runs of 16 bytes, half a memory sector
        tiles += [Tile(64, 128, 256, stages=2), Tile(128, 128, 256, warps=8, stages=2)] if tokens > 128 else []
    return list(dict.fromkeys([rule(tokens, rows, columns, bits, e4m3), *tiles]))[:12]


def rule(tokens: int, rows: int, columns: int, bits: int, e4m3: bool = False) -> Tile:
    """The choice without measuring: enough programs to fill about 132 processors, then the largest tile.

    Unpacking to e4m3 takes more instructions than to int8, which eight warps share.
    """
    if tokens <= 128:
        bm = 16 if tokens <= 16 else 32
        programs = -(-tokens // bm) * -(-rows // 64)
        split = next((s for s in (4, 2) if columns // 256 >= 2 * s and programs * s <= 264), 1)
        return Tile(bm, 64, 256, split=split, stages=3)
    if tokens <= 1024:
        return Tile(64, 128, 128, warps=8 if e4m3 else 4, stages=3)
    return Tile(128, 128, 128, warps=8, stages=3, registers=128)


def choose_tile(kernel: str, tokens: int, rows: int, columns: int, bits: int, device: str) -> Tile:
    """The measured tile for this shape on `device` (its name) where there is one, else the rule."""
    found = known_tile(kernel, tokens, rows, columns, bits, device)
    return rule(tokens, rows, columns, bits, kernel.endswith(E4M3)) if found is None else found


def known_tile(kernel: str, tokens: int, rows: int, columns: int, bits: int, device: str) -> Tile | None:
    """The measured tile for this shape on `device`, if there is one."""
    _load_once()
    return _measured.get(_key(kernel, tokens, rows, columns, bits, device))


def ways(e4m3: bool) -> str:
    """What choices between packed and unpacked weights are kept by."""
    return "weights" + (E4M3 if e4m3 else "")


def unpacked_is_faster(device: torch.device, tokens: int, rows: int, columns: int, bits: int, e4m3: bool) -> bool:
    """Whether so many tokens are multiplied with unpacked weights: as was measured, or else by the rule.

    Unpacked, int8 codes take the 8-bit product and e4m3 ones cuBLASLt's. On sm_90, where the rule was found
    (`experiments/results/kernels_gpu.md`), both are faster than unpacking in the product from 4,096 tokens on, which
    waits for its instructions; 3-bit codes take the most.
    """
    measured = known_tile(ways(e4m3), tokens, rows, columns, bits, torch.cuda.get_device_name(device))
    if measured is not None:
        return measured == UNPACKED
    return tokens >= (_UNPACKED_3_FROM if bits == 3 else _UNPACKED_FROM) and (
        not e4m3 or torch.cuda.get_device_capability(device) >= (9, 0)
    )


def measure(
    kernel: str,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    device: str,
    milliseconds: Callable[[Tile], float],
    among: list[Tile] | None = None,
) -> Tile:
    """Times every candidate (or those of `among`) with `milliseconds(tile)`, keeps and returns the fastest.

    `milliseconds` gives inf for a tile that cannot run; RuntimeError where none can.
    """
    tiles = candidates(tokens, rows, columns, bits, kernel.endswith(E4M3)) if among is None else among
    times = {tile: milliseconds(tile) for tile in tiles}
    best = min(times, key=lambda tile: times[tile])
    if times[best] == float("inf"):
        raise RuntimeError(f"no tile of {kernel} runs at {tokens} x {rows} x {columns}, {bits} bits, on {device}.")
    _load_once()
    _measured[_key(kernel, tokens, rows, columns, bits, device)] = best
    _store()
    return best


def _key(kernel: str, tokens: int, rows: int, columns: int, bits: int, device: str) -> str:
    return f"{device}/{kernel}/{bits}/{rows}/{columns}/{token_bucket(tokens)}"


_loaded: list[str] = []


def _load_once() -> None:
    path = os.environ.get("QBERT_TILES", "")
    if path in _loaded:
        return
    _loaded[:] = [path]
    if path and Path(path).exists():
        for key, sizes in json.loads(Path(path).read_text()).items():
            _measured[key] = Tile(**sizes)


def _store() -> None:
    path = os.environ.get("QBERT_TILES", "")
    if not path:
        return
    table = {key: dataclasses.asdict(tile) for key, tile in sorted(_measured.items())}
    with tempfile.NamedTemporaryFile("w", dir=Path(path).parent, delete=False) as aside:
        json.dump(table, aside, indent=1)
    os.replace(aside.name, path)


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


def asm_kind(asm: bool, x: Tensor) -> int:
    """`asm_for` activations x."""
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    return asm_for(asm, hopper and x.dtype != torch.int8)


def asm_for(asm: bool, running_on: bool) -> int:
    """What the products call `asm`: 0 plain, 1 inline assembly; 2 that, 3 plain, with a wait for every step's products.

    `running_on` says that Triton lets products run on while the next step is unpacked: on sm_90, with float32 sums.
    Before 3.9 (with ptxas 13.4) this may overwrite the registers that hold unpacked weights while a product of the
    step before still reads them (triton-lang/triton issue 9433). With the wait the products of one step still overlap
    with its unpacking.
    """
    if running_on and _TRITON < (3, 9):
        return 2 if asm else 3
    return int(asm)


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


_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

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
