"""Remembers what was prepared from a set of tensors, for as long as they live and are not written to.

Operators that torch.compile and torch.export see take plain tensors; what a kernel really wants (an operand in the
layout of an int8 product, scales spread over rows) is made from them at the first call and found again at the next.
It stands alone because it knows nothing of what it remembers.

    cache = PreparedCache()
    layer = cache.get((packed, scale), ("cpu", 4), build=lambda: CpuLinear.from_packed(...))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")


class PreparedCache:
    """Values by the identity of tensors, for any number of threads.

    A value must not keep the tensors' memory alive itself.
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
