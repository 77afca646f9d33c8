"""Smaller models made from a teacher, one file a family.

>>> from qbert import students
>>> student = students.depth(teacher, [0, 4, 5])
>>> student = students.bilstm(teacher, hidden=150)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qbert.students.adabert import adabert, adabert_space
from qbert.students.bilstm import bilstm
from qbert.students.cells import random_cell
from qbert.students.cnn import cnn
from qbert.students.depth import compare_depths, depth, student_with_layers
from qbert.students.distilbert import distilbert
from qbert.students.mobilebert import fold_no_norms, mobilebert
from qbert.students.narrow import narrow
from qbert.students.scratch import small
from qbert.students.vocabulary import student_with_vocabulary

if TYPE_CHECKING:
    from qbert.students.lowrank import factorize, quantize_with_correction
    from qbert.students.pruned import prune
    from qbert.students.shared import narrow_table, share_layers

# Those that ask what a matrix is given, for which quantizers and the Hessian's room are loaded: not with transformers.
_LATER = {
    "factorize": "lowrank",
    "narrow_table": "shared",
    "prune": "pruned",
    "quantize_with_correction": "lowrank",
    "share_layers": "shared",
}

__all__ = [
    "adabert",
    "adabert_space",
    "bilstm",
    "cnn",
    "compare_depths",
    "depth",
    "distilbert",
    "factorize",
    "fold_no_norms",
    "mobilebert",
    "narrow",
    "narrow_table",
    "prune",
    "quantize_with_correction",
    "random_cell",
    "share_layers",
    "small",
    "student_with_layers",
    "student_with_vocabulary",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qbert.students' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qbert.students.{_LATER[name]}"), name)
