"""Training and evaluation mode of every module of a model, given back afterwards.

>>> with evaluation_mode(teacher):
...     output = teacher(**batch)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Every module is afterwards in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode and give each its own mode back afterwards."""
    with modes_kept(model):
        model.eval()
        yield
