"""Smaller models made from a teacher, one file a family.

>>> from qbert import students
>>> student = students.depth(teacher, [0, 4, 5])
"""

from __future__ import annotations

from qbert.students.depth import compare_depths, depth, student_with_layers
from qbert.students.vocabulary import student_with_vocabulary

__all__ = ["compare_depths", "depth", "student_with_layers", "student_with_vocabulary"]
