"""Smaller models made from a teacher, one file a family.

>>> from qbert import students
>>> student = students.depth(teacher, [0, 4, 5])
>>> student = students.bilstm(teacher, hidden=150)
"""

from __future__ import annotations

from qbert.students.bilstm import bilstm
from qbert.students.cnn import cnn
from qbert.students.depth import compare_depths, depth, student_with_layers
from qbert.students.distilbert import distilbert
from qbert.students.lowrank import factorize, quantize_with_correction
from qbert.students.narrow import narrow
from qbert.students.pruned import prune
from qbert.students.scratch import small
from qbert.students.shared import narrow_table, share_layers
from qbert.students.vocabulary import student_with_vocabulary

__all__ = [
    "bilstm",
    "cnn",
    "compare_depths",
    "depth",
    "distilbert",
    "factorize",
    "narrow",
    "narrow_table",
    "prune",
    "quantize_with_correction",
    "share_layers",
    "small",
    "student_with_layers",
    "student_with_vocabulary",
]
