"""Knowledge distillation and quantization-aware training: where low-bit encoders get their accuracy back.

>>> from qbert.distill import Distiller, recipes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Distiller": "qbert.distill.distiller",
    "Match": "qbert.distill.recipe",
    "Recipe": "qbert.distill.recipe",
    "Stage": "qbert.distill.recipe",
    "TeacherOutputs": "qbert.distill.outputs",
}

__all__ = ["Distiller", "Match", "Recipe", "Stage", "TeacherOutputs", "recipes"]

if TYPE_CHECKING:
    from qbert.distill import recipes
    from qbert.distill.distiller import Distiller
    from qbert.distill.outputs import TeacherOutputs
    from qbert.distill.recipe import Match, Recipe, Stage


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("qbert.distill.recipes")
    if name not in _HOME:
        raise AttributeError(f"module 'qbert.distill' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
