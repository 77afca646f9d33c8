"""Tile sizes of the matrix kernels: at most twelve candidates a shape, a rule that needs no GPU, and a measured choice.

BM tokens x BN weight rows x BK columns a step. Few tokens: small tiles and SPLIT > 1, so that more than a handful of
the chip's processors have work; many tokens: 128 x 128, two programs a processor, whose loads and products overlap.

The rule is used until `measure` has timed the candidates for a (kernel, bits, O, I, token bucket) on the GPU at hand;
measured choices are kept in memory, and in the JSON file that the environment variable QBERT_TILES names, if it is set.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
