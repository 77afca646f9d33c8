"""Exchange of one module of a model for another, in every place that holds it.

It stands alone because every room that converts layers needs it and none owns it.
"""

from __future__ import annotations

from torch import nn


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of `model` that holds `old` (a shared layer has several)."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
