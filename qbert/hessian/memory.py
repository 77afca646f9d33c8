"""How much memory autograd graphs hold, and how much is free.

>>> with saved_tensor_bytes(model) as saved:
...     loss = model(**batch).loss
>>> saved.total <= free_bytes(torch.device("cpu"))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that graphs built inside of `saved_tensor_bytes` hold on to."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Sum over distinct storages, in bytes."""
        return sum(self.storages.values())


@contextlib.contextmanager
def saved_tensor_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves for backward in this context, the parameters of `model` apart: they live anyway."""
    saved = SavedBytes()
    living = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in living:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device` without pushing anything out, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 4 * 2**30  # no /proc (macOS, Windows): assume what a small machine has
