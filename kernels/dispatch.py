"""The kernels as torch operators `torch.ops.qbert.*`: one call, the right implementation for the tensor's device.

    CPU               int8 products of torch's own (`cpu`)
    CUDA, sm_80 on    Triton kernels (`gpu/`)
    anything else     plain torch on dequantized weights

Each operator has a fake implementation, so torch.compile(fullgraph=True) and torch.export pass through it, and checks
its arguments before any work. `linear` and `embedding` take weights as they are stored, and prepare what their kernel
wants at the first call (`PreparedCache`); single kernels, for fused encoder layers, are in `operators`.

    y = linear(x, PackedWeight(codes, scale, zero, row_group, bits=4, columns=384), bias)       # [..., I] -> [..., O]
    h = embedding(ids, PackedWeight(codes, scale, zero, row_group, bits=8, columns=384))
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qbert.kernels import cpu, reference
from qbert.kernels.checks import ACTIVATIONS, check_embedding, check_linear
from qbert.kernels.operands import PER_TOKEN, InputGrid, PackedWeight
from qbert.kernels.registration import operator

Value = TypeVar("Value")


class PreparedCache:
    """Remembers what was prepared from a set of tensors, for as long as they live and are not written to.

    Operators that torch.compile and torch.export see take plain tensors; what a kernel really wants (an operand in the
    layout of an int8 product, scales spread over rows) is made from them at the first call and found again at the next.
    Values are kept by the identity of tensors, for any number of threads. A value must not keep the tensors' memory
    alive itself.

        cache = PreparedCache()
        layer = cache.get((packed, scale), ("cpu", 4), build=lambda: CpuLinear.from_packed(weight))
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # taken to change the entries only: finding one stays as fast as it was
        self._entries: dict[Hashable, tuple[tuple[int, ...], list[StorageWeakRef], Any]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tensors: tuple[Tensor | None, ...], settings: Hashable, build: Callable[[], Value]) -> Value:
        """The value built before from these very tensors, unchanged, and these settings; else `build()`, remembered.

        A tensor counts as changed once an in-place operation has counted up its version. Tensors made under
        torch.inference_mode have no version: do not write to those.
        """
        present = [t for t in tensors if t is not None]
        key = (settings, tuple(None if t is None else _identity(t) for t in tensors))
        versions = tuple(0 if t.is_inference() else t._version for t in present)
        entry = self._entries.get(key)
        if entry is not None and entry[0] == versions:
            return entry[2]
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry[0] == versions:
                return entry[2]  # another thread built it while this one waited
            self.drop_dead()
            value = build()
            # The weak references also keep the storages' addresses from being used again, so that keys stay unique.
            self._entries[key] = (versions, [StorageWeakRef(t.untyped_storage()) for t in present], value)
        return value

    def drop_dead(self) -> None:
        """Forgets values whose tensors are gone."""
        with self._lock:
            dead = [key for key, (_, references, _) in self._entries.items() if any(r.expired() for r in references)]
            for key in dead:
                del self._entries[key]


def _identity(tensor: Tensor) -> Hashable:
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


_cache = PreparedCache()


def implementation(device: torch.device) -> str:
    """Which implementation `linear` and `embedding` use on `device`: "cpu", "triton" or "dense"."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "dense"
    return _on_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _on_gpu(index: int) -> str:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0):
        try:
            import triton  # noqa: F401
        except ImportError:
            return "dense"
        return "triton"
    return "dense"


def takes_unpacked(device: torch.device, tokens: int, rows: int, columns: int, bits: int, e4m3: bool = False) -> bool:
    """Whether tokens are multiplied with W [rows, columns] as it is unpacked, a byte a weight, or as it is stored.

    Unpacked weights of 2 to 4 bits go through the 8-bit product or, where activations are in e4m3, `matmul_e4m3`.
    The environment variable QBERT_WEIGHTS decides: "packed" or "unpacked"; without it what was measured on this GPU,
    or a rule (`gpu.tiles.unpacked_is_faster`). Raises ValueError for another value.
    """
    forced = os.environ.get("QBERT_WEIGHTS", "")
    if forced not in ("", "packed", "unpacked"):
        raise ValueError(f"QBERT_WEIGHTS must be 'packed', 'unpacked' or not set, got {forced!r}.")
    if forced or implementation(device) != "triton":
        return forced == "unpacked"
    from qbert.kernels.gpu.tiles import unpacked_is_faster

    return unpacked_is_faster(device, tokens, rows, columns, bits, e4m3)


@operator(check_linear, like=lambda x, weight, bias, grid: x.new_empty((*x.shape[:-1], weight.rows)))
def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, grid: InputGrid = PER_TOKEN) -> Tensor:
    """y [..., O] = x W^T + bias in the dtype of x, W [O, I] packed, x [..., I] quantized as `grid` says; bias [O].

    Raises TypeError or ValueError, before any work, for dtypes, shapes, devices and settings that do not fit.
    """
    tensors = (*weight[:4], bias)
    how = implementation(x.device)
    settings = (how, weight.bits, weight.columns, grid)
    if how == "cpu":
        prepared = _cache.get(tensors, settings, lambda: cpu.CpuLinear.from_packed(weight, bias, grid))
        return prepared.forward(x)
    if how == "triton":
        from qbert.kernels.gpu.linear import GpuLinear

        gpu = _cache.get(tensors, settings, lambda: GpuLinear(weight, bias, grid))
        return gpu.forward(x, weight.codes)
    return _dense_linear(x, weight, bias, grid)


class PreparedLinear:
    """`linear` with one weight, bias and grid; where nobody records it, kernels are launched without an operator.

    What checks the arguments, finds what was prepared and calls the operator costs 20 microseconds of Python, which is
    more than a small product takes.

        run = PreparedLinear(weight, bias, grid)
        y = run(x)
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> None:
        self.weight, self.bias, self.grid = weight, bias, grid
        self._tensors = [t for t in (*weight[:4], bias) if t is not None and not t.is_inference()]
        self._prepared: tuple[list[int], Any] = ([], None)  # versions of the tensors, and what was made of them

    def __call__(self, x: Tensor) -> Tensor:
        """As `linear`."""
        weight = self.weight
        if implementation(x.device) != "triton" or _is_recorded(x):
            return linear(x, weight, self.bias, self.grid)
        versions, kernel = self._prepared
        now = [t._version for t in self._tensors]
        if kernel is None or now != versions:
            from qbert.kernels.gpu.linear import GpuLinear

            check_linear(x, weight, self.bias, self.grid)
            kernel = GpuLinear(weight, self.bias, self.grid)
            self._prepared = now, kernel
        if x.dtype not in ACTIVATIONS or x.shape[-1:] != (weight.columns,) or x.device != weight.codes.device:
            check_linear(x, weight, self.bias, self.grid)
        return kernel.forward(x, weight.codes)  # type: ignore[no-any-return]


def _is_recorded(x: Tensor) -> bool:
    """Whether operators on x are looked at by others than the device: traced, exported, made fake, counted."""
    modes = torch._C._len_torch_dispatch_stack()
    return type(x) is not Tensor or modes > 0 or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _dense_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    rows = reference.fake_quantize(x.reshape(-1, weight.columns), grid)
    spread = (reference.expand_groups(t.float(), weight.row_group, weight.rows) for t in (weight.scale, weight.zero))
    matrix = reference.dequantize(weight.unpacked(), *spread).to(x.dtype)
    y = torch.nn.functional.linear(rows, matrix, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], weight.rows)


@operator(
    check_embedding,
    like=lambda ids, weight, dtype: weight.codes.new_empty((*ids.shape, weight.columns), dtype=dtype),
)
def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantized rows `ids` [...] of a packed table, [..., I] in `dtype`; only these rows are unpacked.

    On a CPU an id outside the table raises IndexError; on a GPU it must not occur, as for torch's own embedding.
    """
    if implementation(weight.codes.device) == "triton":
        from qbert.kernels.gpu.rows.embedding import embedding as kernel

        return kernel(ids.reshape(-1).contiguous(), weight.dense(), dtype).reshape(*ids.shape, weight.columns)
    return cpu.embedding(ids, weight._replace(scale=weight.scale.float(), zero=weight.zero.float())).to(dtype)
