"""What a model's forward takes, by name: measuring and distilling both call models with batches that hold more.

>>> model(**accepted_inputs(model, batch))
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def forward_arguments(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's forward, without the catch-all ones."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `inputs` that the model's forward names (DistilBERT has no token types); all if it names none."""
    names = set(forward_arguments(model))
    return {key: value for key, value in inputs.items() if not names or key in names}
