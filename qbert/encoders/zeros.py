"""Which matrices of a pruned model have zeros in a pattern, as its config tells.

The zeros themselves are in the weights, and transformers alone loads them; that they are to stay zeros, nothing in the
weights says: those of a model on a low-bit grid are zero here and there too.

    >>> note_zeros(model, {"encoder.layer.0.output.dense": "2:4"})
    >>> noted_zeros(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qbert.encoders.targets import base_model

ZEROS = "qbert_zeros"


def noted_zeros(model: nn.Module) -> dict[str, str | float]:
    """Name of a matrix, relative to the base model -> its pattern, "2:4" or a share of zeros."""
    _, base = base_model(model)
    return dict(getattr(getattr(base, "config", None), ZEROS, None) or {})


def note_zeros(model: nn.Module, patterns: Mapping[str, str | float]) -> None:
    """Let the config of `model` (and of its base model, if that is another one) tell `patterns` and no others."""
    _, base = base_model(model)
    for holder in (base, model):
        config: Any = getattr(holder, "config", None)
        if config is not None and patterns:
            setattr(config, ZEROS, dict(patterns))
        elif config is not None:
            config.__dict__.pop(ZEROS, None)
