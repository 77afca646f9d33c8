"""Batches as a model takes them, by name and device: calibrating, measuring and distilling all call models with them.

>>> model(**accepted_inputs(model, to_device(batch, model)))
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def forward_arguments(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's forward, without the catch-all ones."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `inputs` that the model's forward names (DistilBERT has no token types); all if it names none."""
    names = set(forward_arguments(model))
    return {key: value for key, value in inputs.items() if not names or key in names}


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`batch` with its tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` without what it is labelled with: classes, values or tags, or the places of an answer."""
    return {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}


def unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of `x` that are no padding.

    Args:
        x: [B, T, ...], or [B T, ...] in that order; anything else is given back whole.
        mask: attention mask [..., T] whose leading dimensions have B entries (pairs may be encoded apart), or None.
    """
    if mask is None or mask.dim() < 2:
        return x
    flat = mask.reshape(-1, mask.shape[-1]).bool()
    if x.shape[:2] == flat.shape:
        return x[flat]
    return x[flat.flatten()] if x.dim() == 2 and len(x) == flat.numel() else x


def most_tokens(model: nn.Module, base: nn.Module) -> int | None:
    """Tokens of the longest row that `model` says it takes: by its table of positions, else by the config of `base`."""
    return most_positions(model) or getattr(getattr(base, "config", None), "max_position_embeddings", None)


def most_positions(model: nn.Module) -> int | None:
    """Tokens that a row may have; None where positions are not looked up in a table.

    Where the table knows a position of padding (RoBERTa, MPNet), the rows up to that one are no token's.
    """
    found = []
    for name, module in model.named_modules():
        rows = getattr(module, "num_embeddings", None)
        if name.endswith("position_embeddings") and isinstance(rows, int):
            padding = getattr(module, "padding_idx", None)
            found.append(rows - (0 if padding is None else padding + 1))
    return max(found, default=None)
