"""The kernels as torch operators `torch.ops.qbert.*`: one call, the right implementation for the tensor's device.

    CPU               int8 products of torch's own (`cpu`)
    CUDA, sm_80 on    Triton kernels (`gpu/`)
    anything else     plain torch on dequantized weights

Each operator has a fake implementation, so torch.compile(fullgraph=True) and torch.export pass through it, and checks
its arguments before any work. `linear` and `embedding` take weights as they are stored, and prepare what their kernel
wants at the first call (`PreparedCache`); single kernels, for fused encoder layers, are in `operators`.

    y = linear(x, packed, scale, zero, row_group, bias, bits=4)          # x [..., I] -> [..., O]
    h = embedding(ids, packed, scale, zero, row_group, bits=8, features=384)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qbert.kernels import cpu, formats, reference
from qbert.kernels.checks import check_embedding, check_linear, check_range

Value = TypeVar("Value")


class PreparedCache:
    """Remembers what was prepared from a set of tensors, for as long as they live and are not written to.

    Operators that torch.compile and torch.export see take plain tensors; what a kernel really wants (an operand in the
    layout of an int8 product, scales spread over rows) is made from them at the first call and found again at the next.
    Values are kept by the identity of tensors, for any number of threads. A value must not keep the tensors' memory
    alive itself.

        cache = PreparedCache()
        layer = cache.get((packed, scale), ("cpu", 4), build=lambda: CpuLinear.from_packed(...))
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


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    activation_bits: int | None = 8,
    activation_scale: float | None = None,
    activation_zero: int = 0,
    asymmetric: bool = False,
) -> Tensor:
    """y [..., O] = x W^T + bias in the dtype of x, W [O, I] packed in `bits` bits, x [..., I] quantized to int8 or not.

    packed uint8 [O, row bytes] (`formats.pack`); scale, zero [G, K]; row_group [O] (None: G = O or 1); bias [O].
    `activation_bits` 8: per token, symmetrically, with `asymmetric` from its smallest to its largest value, or with
    the static `activation_scale` and `activation_zero` (-128..127); None: x as it is. Raises TypeError or ValueError,
    before any work, for dtypes, shapes, devices and settings that do not fit.
    """
    static = 0.0 if activation_scale is None else activation_scale
    return torch.ops.qbert.linear(
        x,
        packed,
        scale,
        zero,
        row_group,
        bias,
        bits,
        0 if activation_bits is None else activation_bits,
        static,
        activation_zero,
        asymmetric,
    )


def embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None = None,
    *,
    bits: int,
    features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantized rows `ids` [...] of a packed table, [..., features] in `dtype`; only these rows are unpacked.

    packed uint8 [V, row bytes]; scale, zero [G, K]; row_group [V]. On a CPU an id outside the table raises IndexError;
    on a GPU it must not occur, as for torch's own embedding.
    """
    return torch.ops.qbert.embedding(ids, packed, scale, zero, row_group, bits, features, dtype)


def implementation(device: torch.device) -> str:
    """Which implementation `linear` and `embedding` use on `device`: "cpu", "triton" or "dense"."""
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            import triton  # noqa: F401
        except ImportError:
            return "dense"
        return "triton"
    return "dense"


@torch.library.custom_op("qbert::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_bits: int,
    activation_scale: float,
    activation_zero: int,
    asymmetric: bool = False,
) -> Tensor:
    check_linear(x, packed, scale, zero, row_group, bias, bits, activation_bits)
    check_range(activation_bits, activation_scale, activation_zero, asymmetric)
    tensors = (packed, scale, zero, row_group, bias)
    how = implementation(x.device)
    activation = (activation_bits, activation_scale, activation_zero, asymmetric)
    settings = (how, bits, x.shape[-1], *activation)
    if how == "cpu":
        prepared = _cache.get(
            tensors,
            settings,
            lambda: cpu.CpuLinear.from_packed(
                packed,
                x.shape[-1],
                scale,
                zero,
                row_group,
                bias,
                bits,
                activation_bits=activation_bits or None,
                activation_scale=activation_scale or None,
                activation_zero=activation_zero,
                asymmetric=asymmetric,
            ),
        )
        return prepared.forward(x)
    if how == "triton":
        from qbert.kernels.gpu.linear import GpuLinear

        gpu = _cache.get(
            tensors, settings, lambda: GpuLinear(packed, x.shape[-1], scale, zero, row_group, bias, bits, *activation)
        )
        return gpu.forward(x, packed)
    return _dense_linear(x, packed, scale, zero, row_group, bias, bits, activation)


def _dense_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation: tuple[int, float, int, bool],
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    spread = (reference.expand_groups(t.float(), row_group, packed.shape[0]) for t in (scale, zero))
    weight = reference.dequantize(formats.unpack(packed, bits, x.shape[-1]), *spread).to(x.dtype)
    if activation[0]:
        rows = reference.fake_quantize(rows, *activation[1:])
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], packed.shape[0])


@_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, zero, row_group, bias, bits, activation_bits, activation_scale, activation_zero, asymmetric=False
):
    check_linear(x, packed, scale, zero, row_group, bias, bits, activation_bits)
    check_range(activation_bits, activation_scale, activation_zero, asymmetric)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("qbert::embedding", mutates_args=())
def _embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bits: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_embedding(ids, packed, scale, zero, row_group, bits, features)
    if implementation(packed.device) == "triton":
        from qbert.kernels.gpu.embedding import Table, embedding

        table = Table.of(packed, scale, zero, row_group, bits, features)
        return embedding(ids.reshape(-1).contiguous(), table, dtype).reshape(*ids.shape, features)
    rows = cpu.embedding(ids, packed, scale.float(), zero.float(), row_group, bits=bits, features=features)
    return rows.to(dtype)


@_embedding.register_fake
def _(ids, packed, scale, zero, row_group, bits, features, dtype):  # type: ignore[no-untyped-def]
    check_embedding(ids, packed, scale, zero, row_group, bits, features)
    return packed.new_empty((*ids.shape, features), dtype=dtype)
