"""The native engine: int8 products and whole encoder layers in `native.cpp`, built once where a compiler is at hand.

The library is plain C++ without torch's headers: a few seconds of compiling, once for each source and instruction set.
It rests in the cache folder (``$QBERT_CACHE``) and is tried on exact integers before it is used. Where it is there
already, neither a compiler nor a folder that can be written is needed: `build_libraries` fills a cache while an image
is built. Nothing needs the engine: where it cannot be had, `reason_not_native` says why, and the chains of torch
operators (`linear`), which are its slow twin, do the same work.

    if not reason_not_native():
        product = NativeProduct.prepare(codes, scale, zero, bias, asymmetric=True)
        y = product(x)                              # float32 [..., I] -> [..., O]
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qbert.files import cache_folder, cache_path, write_whole
from qbert.kernels.cpu.gemm import fit_pairs, split_excess

logger = logging.getLogger(__name__)

# Instruction sets that the source knows, best first: what /proc/cpuinfo calls them, and how a compiler is asked.
INSTRUCTIONS = {
    "avx512_vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "avx_vnni": ("-march=x86-64-v3", "-mavxvnni"),
    "avx2": ("-march=x86-64-v3",),
}
_OPTIONS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-fopenmp")
_RANGES = {"symmetric": 0, "asymmetric": 1, "static": 2}
ACTIVATIONS = {"GELUActivation": 0, "NewGELUActivation": 1, "GELUTanh": 1, "ReLU": 2}
# Whatever torch's defaults are.
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_CHUNK_TOKENS = 128  # that pass through all layers before the next ones, so that they stay in the cache


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "columns", "depth", "wide", "range", "offset", "place", "adds")),
        *((name, ctypes.c_float) for name in ("step", "unused")),
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "start", "scale", "bias", "sum", "correction", "down", "next")
        ),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "output", "ffn_in", "ffn_out")),
        *((name, ctypes.c_void_p) for name in ("norm1", "shift1", "norm2", "shift2")),
        *((name, ctypes.c_float) for name in ("eps1", "eps2")),
        *((name, ctypes.c_int32) for name in ("heads", "activation", "pre_norm", "gated", "window", "unused")),
        ("rotation", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
    ]


class _Positions(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "queries", "places")),
        *((name, ctypes.c_int64) for name in ("farthest", "rows", "columns")),
        *((name, ctypes.c_float) for name in ("scale", "unused")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "shift")),
        *((name, ctypes.c_float) for name in ("eps", "unused")),
    ]


class _FeedForward(ctypes.Structure):
    _fields_ = [("ffn_in", _Matrix), ("ffn_out", _Matrix), ("norm", _Norm)]


class _ThinLayer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("wide", "inner", "output", "up")),
        *((name, _Norm) for name in ("down", "shared", "attention", "last")),
        ("nets", ctypes.POINTER(_FeedForward)),
        *((name, ctypes.c_int32) for name in ("count", "heads", "activation", "shares", "inside", "unused")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "keys", "bias")),
        ("strides", ctypes.c_int64 * 3),
    ]


# ------------------------------------------------------------------------------------------------ the library


@functools.cache
def reason_not_native() -> str:
    """Why the native engine cannot run here; empty if it can. The library is built by the first call, and tried."""
    level = logging.INFO
    try:
        instructions = instruction_set()
        level = logging.WARNING  # this processor could run it
        _library(instructions)
    except (RuntimeError, OSError) as error:
        reason = str(error)
        logger.log(level, "no native engine: %s; torch's operators do its work, more slowly", reason)
        return reason
    return ""


@functools.cache
def instruction_set() -> str:
    """The best of `INSTRUCTIONS` of this processor, within what ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA allow.

    Raises RuntimeError where there is none.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"it is written for Linux on x86-64, and this is {platform.system()} {platform.machine()}")
    flags, reached = processor()[1], torch.backends.cpu.get_cpu_capability()
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    with_vnni = allowed not in ("SSE41", "AVX", "AVX2", "AVX512_CORE")
    if with_vnni and reached == "AVX512" and {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
        return "avx512_vnni"
    if with_vnni and {"avx2", "fma", "avx_vnni"} <= flags and not _told_avx2():
        return "avx_vnni"
    if {"avx2", "fma"} <= flags and reached != "DEFAULT" and allowed not in ("SSE41", "AVX"):
        return "avx2"
    raise RuntimeError("this processor has no AVX2, or was told not to use it")


def _told_avx2() -> bool:
    return os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("avx2", "default")


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Name of the processor and the names of its features, as Linux tells them."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key == "flags":
            return name, frozenset(value.split())
    return name, flags


@functools.cache
def _library(instructions: str) -> ctypes.CDLL:
    """The library for one of `INSTRUCTIONS`, built if need be. Raises RuntimeError or OSError that says why not."""
    found = _target(instructions).is_file()
    try:
        library = ctypes.CDLL(str(_built(instructions)))
    except OSError:
        if not found or _compiler() is None:
            raise
        library = ctypes.CDLL(str(_built(instructions, again=True)))  # that one was built for another system
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.qbert_linear.argtypes = [pointer, pointer, integer, pointer, ctypes.c_int32]
    for stack in (library.qbert_layers, library.qbert_thin_layers):
        stack.argtypes = [pointer, integer, pointer, pointer, integer, pointer, pointer, ctypes.c_int32]
    _try(library, instructions)
    return library


def build_libraries() -> dict[str, Path]:
    """Build the library for all of `INSTRUCTIONS` where it is not in the cache: instruction set -> file.

    For images, which may run on another processor than the one they are built on; nothing is tried here.

    Raises:
        RuntimeError: without a compiler, or where it fails.
        OSError: where the cache folder cannot be written.
    """
    return {instructions: _built(instructions) for instructions in INSTRUCTIONS}


_KEPT = 4  # libraries of other versions of the source, of each instruction set


def _options(instructions: str) -> list[str]:
    return [*_OPTIONS, *INSTRUCTIONS[instructions]]


def _source() -> Path:
    return Path(__file__).with_name("native.cpp")


def _target(instructions: str) -> Path:
    """The file of the library in the cache, found without a compiler."""
    key = [_source().read_text(encoding="utf-8"), *_options(instructions)]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_path() / "native" / f"{instructions}-{digest}.so"


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def _built(instructions: str, again: bool = False) -> Path:
    """The file of the library, compiled where it is not there or `again`; none that others could have written."""
    target = _target(instructions)
    if again or not target.is_file():
        _compile(instructions, target)
    owner = target.stat()
    if owner.st_uid not in (0, os.getuid()) or owner.st_mode & 0o022:
        raise RuntimeError(f"{target} can be written by others, and will not be run; remove it, or set QBERT_CACHE")
    return target


def _compile(instructions: str, target: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler was found (g++, clang++ or $CXX), and no {target} built before")

    def build(aside: Path) -> None:
        command = [compiler, *_options(instructions), str(_source()), "-o", str(aside)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"{compiler} failed: {next((x for x in lines if 'error' in x), lines[-1:])}")
        aside.chmod(0o755)  # for other users of a cache that came with an image

    cache_folder()  # says how to mend a folder that cannot be written
    try:
        write_whole(target, build)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{compiler} took more than {error.timeout:.0f} seconds") from error
    _remove_old(target, instructions)


def _remove_old(target: Path, instructions: str) -> None:
    """Leave the latest libraries of other sources, which other installations may use; processes keep what they run."""
    times = {}
    for other in target.parent.glob(f"{instructions}-*.so"):
        with contextlib.suppress(FileNotFoundError):
            times[other] = other.stat().st_mtime_ns
    times.pop(target, None)
    for other in sorted(times, key=lambda path: times[path])[:-_KEPT]:
        with contextlib.suppress(OSError):  # another process has removed it, or it is another user's
            other.unlink()


def _try(library: ctypes.CDLL, instructions: str) -> None:
    """Raises RuntimeError unless products of whole numbers come out exactly, the largest included."""
    codes = (
        torch.arange(40 * 37, dtype=torch.int32, device="cpu")
        .mul_(89)
        .remainder_(255)
        .sub_(127)
        .view(40, 37)
        .to(torch.int8)
    )
    codes[0], codes[1] = 127, -128
    x = torch.arange(13 * 37, device="cpu").mul_(53).remainder_(255).sub_(127).view(13, 37).float()
    x[:, 0], x[3] = 127, 127
    ones = torch.ones(40, **_PLAIN)
    product = NativeProduct.prepare(codes, ones, ones * 0, ones * 0, instructions=instructions, library=library)
    if not torch.equal(product(x), (x.double() @ codes.double().T).float()):
        raise RuntimeError(f"the library built for {instructions} multiplies wrongly here")


# ------------------------------------------------------------------------------------------------ products


@dataclass(frozen=True)
class NativeProduct:
    """y = x W^T + b by the native engine. Immutable.

    Attributes:
        matrix: what the library reads; points into `tensors`.
        tensors: the operand and the vectors of the epilogue, padded.
    """

    matrix: _Matrix
    tensors: tuple[Tensor, ...]
    library: ctypes.CDLL
    bias: Tensor

    @classmethod
    def prepare(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor,
        *,
        asymmetric: bool = False,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        exact: bool = True,
        instructions: str | None = None,
        library: ctypes.CDLL | None = None,
    ) -> NativeProduct:
        """From codes int8 [O, I] and scale, zero, bias float32 [O]; the other arguments as for `CpuLinear.prepare`.

        Raises RuntimeError where the engine cannot be had.
        """
        instructions = instructions or instruction_set()
        library = library or _library(instructions)
        tile = library.qbert_columns_of_a_tile()
        rows, columns = codes.shape
        operand, factor, correction = _operand(codes, zero)
        whole = bool((zero == zero.round()).all()) and float(zero.abs().max()) <= 128
        if instructions == "avx2" and not exact and correction is not None and whole:
            # Fewest pairs could saturate where codes are centred, and they are rounded once more anyway.
            operand, correction = codes.to(torch.int16) - zero.to(torch.int16)[:, None], None
        row_scale = (scale / factor).float()
        left = torch.zeros_like(scale) if correction is None else row_scale * correction
        wide = False
        if instructions == "avx2" and bool((split_excess(operand)[1] != 0).any()):
            wide = exact
            if not exact:
                operand, more = fit_pairs(operand)
                row_scale = row_scale / more
        group = 2 if wide else 4
        depth, height = -(-columns // 4) * 4, -(-rows // tile) * tile
        weight = F.pad(operand, (0, depth - columns, 0, height - rows))
        weight = weight.view(height // tile, tile, depth // group, group).permute(0, 2, 1, 3).contiguous()
        kind = "static" if activation_scale is not None else "asymmetric" if asymmetric else "symmetric"
        offset = 0 if asymmetric else 128 + (activation_zero if activation_scale is not None else 0)
        sums = operand.sum(1, dtype=torch.int64)

        def wider(values: Tensor) -> Tensor:
            return F.pad(values, (0, height - rows)).contiguous()

        total = sums.double() * row_scale.double() - left.double() * columns
        tensors = [weight, wider((-offset * sums).int()), *map(wider, (row_scale, bias.float(), total.float()))]
        tensors += [] if correction is None else [wider(left)]
        pointers = [t.data_ptr() for t in tensors] + [None] * (correction is None)
        step = 1.0 if activation_scale is None else abs(activation_scale)
        matrix = _Matrix(rows, columns, depth, wide, _RANGES[kind], offset, 0, 0, step, 0.0, *pointers)
        return cls(matrix, tuple(tensors), library, bias)

    @property
    def wide(self) -> bool:
        """Whether the operand multiplies in 16 bits, which keeps 8-bit weights exact without VNNI."""
        return bool(self.matrix.wide)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., I] to [..., O]. Raises RuntimeError for another width, dtype or device, and in a trace."""
        if torch.jit.is_tracing():
            raise RuntimeError("a trace cannot record products of the native engine")
        _check_input(x, self.matrix.columns)
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self.matrix.rows), **_PLAIN)
        tokens = x.numel() // self.matrix.columns
        threads = torch.get_num_threads()
        if tokens and self.library.qbert_linear(ctypes.byref(self.matrix), x.data_ptr(), tokens, y.data_ptr(), threads):
            raise MemoryError(f"no memory for the activations of {tokens} tokens")
        return y


def _operand(codes: Tensor, zero: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """Integer operand int8 [O, I], the factor it is larger by, and the zeros [O] that are not in it, or None."""
    for factor in (1, 2):
        shift = zero * factor
        if bool((shift == shift.round()).all()):
            folded = codes.to(torch.int32) * factor - shift.to(torch.int32)[:, None]
            if not folded.numel() or -128 <= int(folded.min()) <= int(folded.max()) <= 127:
                return folded.to(torch.int8), factor, None
    return codes, 1, zero


# ------------------------------------------------------------------------------------------------ layers


class NativePositions(NamedTuple):
    """What is added to scores by relative position, as in `qbert.encoders.parts.RelativePositions`.

    keys, queries: float32 [heads, rows, D], what the maps make of the table; ``None`` where there is no such term.
    """

    scale: float
    places: Tensor
    keys: Tensor | None
    queries: Tensor | None


class NativeTerm(NamedTuple):
    """One term of a linear map: a product, alone or behind another one.

    product: gives the rows of the output from `place` on.
    down: what the input goes through first, where the map is two factors.
    adds: whether the rows are added to those of the term before.
    """

    product: NativeProduct
    down: NativeProduct | None = None
    place: int = 0
    adds: bool = False


class NativeLayer(NamedTuple):
    """One layer of a stack.

    maps: query, key and value as one, attention output, both of the feed-forward net, each as its terms in the order of
    their places; norms: the two, as (weight, shift, epsilon), or ``None`` where there is none; activation: the number
    of its function in `ACTIVATIONS`; the others as in `qbert.encoders.parts.LayerParts`.
    """

    maps: Sequence[Sequence[NativeTerm]]
    norms: Sequence[Any]
    heads: int
    activation: int
    pre_norm: bool = False
    gated: bool = False
    window: int = 0
    rotation: Tensor | None = None
    positions: NativePositions | None = None


class NativeLayers:
    """A stack of layers of one width, with any heads and feed-forward columns inside of each. Immutable.

    Args:
        layers: for each layer what `NativeLayer` names, in its order.
    """

    def __init__(self, layers: Sequence[Sequence[Any]]) -> None:
        first = NativeLayer(*layers[0]).maps[1][0].product
        self.library, self.width = first.library, first.matrix.rows
        self._run: Any = self.library.qbert_layers
        self._heads = {NativeLayer(*layer).heads for layer in layers}
        tile = self.library.qbert_columns_of_a_tile()
        padding = (0, -self.width % tile)
        self.positions = 2**62  # of the longest sequence
        self._kept: list[Any] = []
        self._layers: Any = (_Layer * len(layers))()
        for place, layer in enumerate(NativeLayer(*given) for given in layers):
            matrices = [self._first_of(terms) for terms in layer.maps]
            vectors = [
                None if norm is None else F.pad(norm[i], padding).contiguous() for norm in layer.norms for i in (0, 1)
            ]
            rotation = None if layer.rotation is None else layer.rotation.float().contiguous()
            if rotation is not None:
                self.positions = min(self.positions, len(rotation))
            self._kept += [*vectors, rotation]
            self._layers[place] = _Layer(
                *matrices, *map(_pointer, vectors), *(0.0 if n is None else n[2] for n in layer.norms),
                layer.heads, layer.activation, layer.pre_norm, layer.gated, layer.window, 0, _pointer(rotation),
                None if layer.positions is None else ctypes.addressof(self._positions(layer.positions, tile)),
            )  # fmt: skip

    def _first_of(self, terms: Sequence[NativeTerm]) -> _Matrix:
        following: _Matrix | None = None
        for term in reversed(terms):
            made = _Matrix.from_buffer_copy(term.product.matrix)
            made.place, made.adds = term.place, term.adds
            made.down = None if term.down is None else ctypes.addressof(term.down.matrix)
            made.next = None if following is None else ctypes.addressof(following)
            self._kept += [term, made]
            following = made
        assert following is not None
        return following

    def _positions(self, given: NativePositions, tile: int) -> _Positions:
        keys, queries, places = given.keys, given.queries, given.places.to(torch.int32).contiguous()
        rows = next((t.shape[1] for t in (keys, queries) if t is not None), 0)
        columns = -(-rows // tile) * tile
        if keys is not None:
            keys = F.pad(keys.float().transpose(1, 2), (0, columns - rows)).contiguous()
        if queries is not None:
            queries = (queries.float() * given.scale).contiguous()
        made = _Positions(*map(_pointer, (keys, queries, places)), len(places) // 2, rows, columns, given.scale, 0.0)
        self._kept += [keys, queries, places, made]
        return made

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """float32 [B, T, H] to [B, T, H]; `mask` broadcasts to [B, heads, T, T], true or 0 where a key is seen."""
        batch, length, _ = x.shape
        whole = torch.full((batch,), length, dtype=torch.int64, device="cpu")
        return self.run(x.reshape(-1, self.width), whole, whole, mask).view(x.shape)

    def run(self, x: Tensor, lengths: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """float32 [tokens, H] of sequences behind each other to the same shape.

        Args:
            lengths, keys: int64 [B], tokens of each sequence, and how many of them, from the first, are seen.
            mask: for sequences of equal lengths T, as for `__call__`.

        Raises:
            RuntimeError: for a width, a dtype or lengths that do not fit, or a mask that does not broadcast.
            ValueError: for a sequence longer than the rotated positions.
        """
        _check_input(x, self.width)
        listed, seen = lengths.tolist(), keys.tolist()
        fits = len(listed) == len(seen) and all(0 <= k <= n for k, n in zip(seen, listed, strict=True))
        if not fits or sum(listed) != len(x) or lengths.dtype != torch.int64 or keys.dtype != torch.int64:
            raise RuntimeError(f"lengths {listed} with {seen} seen do not fit {len(x)} tokens of int64 lengths")
        if max(listed, default=0) > self.positions:
            raise ValueError(
                f"a sequence of {max(listed)} tokens is longer than the {self.positions} rotated positions"
            )
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(lengths, 0, out=starts[1:])
        chunks = torch.tensor(_chunks(listed, torch.get_num_threads()), dtype=torch.int64, device="cpu")
        x, keys, y = x.contiguous(), keys.contiguous(), torch.empty(x.shape, **_PLAIN)
        bias = None if mask is None else self._bias(mask, listed)
        strides = (0, 0, 0) if bias is None else bias.stride()[:3]
        place = None if bias is None else bias.data_ptr()
        given = _Batch(len(lengths), starts.data_ptr(), keys.data_ptr(), place, (ctypes.c_int64 * 3)(*strides))
        failed = self._run(
            self._layers, len(self._layers), ctypes.byref(given), chunks.data_ptr(), len(chunks) - 1,
            x.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the activations of {len(x)} tokens")
        return y

    def _bias(self, mask: Tensor, lengths: list[int]) -> Tensor:
        """What `mask` adds to scores, float32 [B, heads, T, T], keys next to each other; strides 0 where it repeats.

        The library reads at these strides and knows no sizes. RuntimeError for a mask that does not broadcast.
        """
        length = lengths[0] if lengths else 0
        shape = (len(lengths), max(self._heads), length, length)
        alike = mask.dim() < 3 or mask.shape[-3] == 1 or len(self._heads) == 1
        try:
            expanded = mask.expand(shape) if alike and len(set(lengths)) < 2 else None
        except RuntimeError:
            expanded = None
        if expanded is None or mask.is_complex() or mask.device.type != "cpu":
            raise RuntimeError(
                f"a {mask.dtype} mask {list(mask.shape)} on {mask.device} does not broadcast to {list(shape)}, "
                "[batch, heads, tokens, tokens] of equal lengths"
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, **_PLAIN).masked_fill_(~mask, float("-inf"))
        mask = mask.float()
        if mask.dim() == 0 or mask.shape[-1] != length:
            mask = mask.expand((*mask.shape[:-1], length))
        return (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(shape)


class NativeThinLayer(NamedTuple):
    """One of MobileBERT's layers.

    wide: the way down and what else reads the wide input, as one: nothing (`inside`), or a way down for query and key
    and value (`shares`), or query, key and value; inner: what reads a way down, query and key or all three, ``None`` if
    nothing does; output, up: of the attention, and the way up; nets: feed-forward nets as (in, out, norm); the four
    norms as (weight, shift, epsilon), epsilon below 0 for NoNorm, or ``None`` where there is none.
    """

    wide: NativeProduct
    inner: NativeProduct | None
    output: NativeProduct
    up: NativeProduct
    nets: Sequence[tuple[NativeProduct, NativeProduct, Any]]
    down: Any
    shared: Any
    attention: Any
    last: Any
    heads: int
    activation: int
    shares: bool
    inside: bool


class NativeThinLayers(NativeLayers):
    """A stack of MobileBERT's layers, all of the same widths. Immutable."""

    def __init__(self, layers: Sequence[NativeThinLayer]) -> None:
        self.library = layers[0].wide.library
        self._run = self.library.qbert_thin_layers
        self._heads = {layer.heads for layer in layers}
        self.width, self.positions = layers[0].up.matrix.rows, 2**62
        self._kept = [*layers]
        self._layers = (_ThinLayer * len(layers))()
        for place, layer in enumerate(layers):
            nets = [_FeedForward(first.matrix, second.matrix, self._norm(norm)) for first, second, norm in layer.nets]
            held = (_FeedForward * len(nets))(*nets)
            self._kept.append(held)
            inner = _Matrix() if layer.inner is None else layer.inner.matrix
            norms = map(self._norm, (layer.down, layer.shared, layer.attention, layer.last))
            self._layers[place] = _ThinLayer(
                layer.wide.matrix, inner, layer.output.matrix, layer.up.matrix, *norms, held,
                len(nets), layer.heads, layer.activation, layer.shares, layer.inside, 0,
            )  # fmt: skip

    def _norm(self, norm: Any) -> _Norm:
        if norm is None:
            return _Norm()
        tile = self.library.qbert_columns_of_a_tile()
        vectors = [F.pad(v, (0, -len(v) % tile)).contiguous() for v in norm[:2]]
        self._kept += vectors
        return _Norm(*map(_pointer, vectors), norm[2], 0.0)


def _check_input(x: Tensor, width: int) -> None:
    """Raises RuntimeError unless the library, which knows no sizes, may read x as float32 [..., width]."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != width:
        raise RuntimeError(
            f"the native engine takes float32 [..., {width}] on the CPU, and this is {x.dtype} {list(x.shape)} on "
            f"{x.device}"
        )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _chunks(lengths: list[int], threads: int) -> list[int]:
    """Where sequences are cut into groups that pass through all layers together, about equal work for each thread."""
    room = max(min(_CHUNK_TOKENS, -(-sum(lengths) // threads)), 1)
    places, tokens = [0], 0
    for place, length in enumerate(lengths):
        if tokens and tokens + length > room:
            places.append(place)
            tokens = 0
        tokens += length
    return [*places, len(lengths)]
