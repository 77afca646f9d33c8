"""Parameters that a fast path holds copies of, and whether they are still what was copied.

Single layers (`qbert.layers`) and fused ones (`qbert.inference`) compute from such copies, which a change of the
original would silently leave behind. To look at version counters and addresses takes half a microsecond a parameter,
which is a twentieth of the time of one short sentence; so short calls look now and then, others always. Values are
compared where a counter or an address says that something happened.

    >>> copied = CopiedParameters({"norm": norm})
    >>> with torch.no_grad():
    ...     norm.weight.mul_(2)
    >>> copied.check(tokens=512)
    RuntimeError: norm.weight was changed ...
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from copy import deepcopy
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

_version = attrgetter("_version")
# A call of so many tokens always looks; of smaller ones the first, and then one of so many.
_TOKENS, _CALLS = 128, 32


class CopiedParameters:
    """Parameters of some modules as they are now.

    What is written through ``parameter.data`` in place (``p.data.mul_(2)``) is seen by nobody: torch does not count it.

    Args:
        modules: by the names under which errors speak of them, with all that is inside of them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._held = [
            (".".join(filter(None, (name, inner, leaf))), module, leaf)
            for name, outer in modules.items()
            for inner, module in outer.named_modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._known: list[tuple[torch.Size, torch.dtype, int]] = []
        self._calls, self._doubted = 0, False
        self._note()

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedParameters:
        """That of the copied modules, which need not be whole yet: their values are compared at the first `check`."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin._held = [(name, deepcopy(module, memo), leaf) for name, module, leaf in self._held]
        twin._known, twin._calls, twin._doubted = list(self._known), 0, False
        twin._tables, twin._leaves, twin._parameters, twin._counted = [], [], [], []
        twin._versions, twin._places = [-1], []
        return twin

    def doubt(self) -> None:
        """The next `check` looks, whatever its size: gradients were wanted, so that a training may be under way."""
        self._doubted = True

    def check(self, tokens: int) -> None:
        """Raises RuntimeError if values of a parameter are no longer those that were copied.

        A parameter that was moved, to other memory or another dtype, is taken for the same.

        Args:
            tokens: of the call. Calls of less than 128 look only if gradients are enabled, after a `doubt`, and one
                time in 32, the first included.
        """
        looks = self._doubted or tokens >= _TOKENS or not self._calls % _CALLS or torch.is_grad_enabled()
        self._calls += 1
        if not looks:
            return
        if (
            list(map(_version, self._counted)) != self._versions
            or list(map(Tensor.data_ptr, self._parameters)) != self._places
            or not all(map(is_, map(getitem, self._tables, self._leaves), self._parameters))
        ):
            self._compare()
        self._doubted = False

    def _compare(self) -> None:
        for (name, module, leaf), known in zip(self._held, self._known, strict=True):
            now = module._parameters.get(leaf)
            if now is None or now.shape != known[0] or (now.dtype == known[1] and _digest(now) != known[2]):
                raise RuntimeError(
                    f"{name} was changed after qbert.optimize_for_inference, which computes from a copy of it; change "
                    "the packed model instead, or call qbert.optimize_for_inference on this one again"
                )
        self._note()

    def _note(self) -> None:
        self._tables = [module._parameters for _, module, _ in self._held]
        self._leaves = [leaf for _, _, leaf in self._held]
        self._parameters: list[Any] = list(map(getitem, self._tables, self._leaves))
        self._counted = [p for p in self._parameters if not p.is_inference()]  # others have no counter
        self._known = [(p.shape, p.dtype, _digest(p)) for p in self._parameters]
        self._versions = list(map(_version, self._counted))
        self._places = list(map(Tensor.data_ptr, self._parameters))


def _digest(parameter: Tensor) -> int:
    values = parameter.detach().contiguous()
    return zlib.crc32(values.reshape(-1).view(torch.uint8).cpu().numpy().data)
