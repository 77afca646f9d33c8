"""What a Hessian block is made of: whole parameters, or runs of rows of a weight matrix.

>>> head = Rows(layer.attention.self.query.weight, 0, 32)   # the first head's rows, [32, I]
>>> cut(head, head.parameter.grad)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `start` to `stop` (not included) of a weight matrix [O, I]."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def shape(self) -> torch.Size:
        """[stop - start, I]."""
        return torch.Size((self.stop - self.start, *self.parameter.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrix."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """That of the matrix."""
        return self.parameter.device

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an entry."""
        return self.parameter.element_size()

    def detach(self) -> Tensor:
        """The rows themselves, without gradients; shares the matrix's memory."""
        return self.parameter.detach()[self.start : self.stop]


Part = nn.Parameter | Rows


def whole(part: Part) -> nn.Parameter:
    """The parameter that a part belongs to."""
    return part.parameter if isinstance(part, Rows) else part


def cut(part: Part, tensor: Tensor) -> Tensor:
    """The part's entries of a tensor of its parameter's shape (a view)."""
    return tensor[part.start : part.stop] if isinstance(part, Rows) else tensor


def vector_options(parts: Sequence[Part]) -> dict[str, Any]:
    """``dtype`` and ``device`` of the vectors [n] of a block: those of its first part, but at least float32."""
    return {"dtype": torch.promote_types(parts[0].dtype, torch.float32), "device": parts[0].device}


def distinct_parameters(parts: Iterable[Part]) -> list[nn.Parameter]:
    """The parameters that the parts belong to, each once, in order."""
    return list({id(whole(part)): whole(part) for part in parts}.values())
