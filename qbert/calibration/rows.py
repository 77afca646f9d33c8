"""The rows that a matrix is multiplied with in one call of its float module, without padding.

It stands alone because ranges of activations and moments of inputs must leave out the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qbert.encoders.inputs import unmasked
from qbert.layers.kind import kind_of
from qbert.layers.recurrent import StepMasks


def padding_left_out(module: nn.Module, masks: StepMasks, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """What leaves the padding out of the rows that a matrix reads in one call, and out of others of their shape."""
    if module in masks:
        steps = masks.of(module, rows)
        return lambda x: x if steps is None else x[steps]
    kind, mask = kind_of(module), masks.mask
    if mask is not None and mask.dim() > 1 and kind is not None:
        mask = kind.mask(module, mask.to(rows.device))
    return lambda x: unmasked(x, mask)


def matrix_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of a float module is multiplied with: [..., I], or [..., g, I] for several groups of rows."""
    kind = kind_of(module)
    rows = x if kind is None else kind.rows(module, x)
    return rows if reads_rows(module) or _several(module) else rows.squeeze(-2)


def flat_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows [N, I], or [N, g, I] for several groups of rows."""
    return rows.flatten(0, -3 if _several(module) else -2)


def _several(module: nn.Module) -> bool:
    """Whether groups of the matrix's rows have inputs of their own."""
    groups: Any = getattr(module, "groups", 1)
    return not reads_rows(module) and groups > 1


def reads_rows(module: nn.Module) -> bool:
    """Whether the matrix is multiplied with the module's input as it is."""
    kind = kind_of(module)
    return kind is None or kind.reads_rows
