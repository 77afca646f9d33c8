"""Smaller models made from a teacher, one file a family.

>>> from qbert import students
>>> students.bilstm(teacher, hidden=150)
"""

from __future__ import annotations

from qbert.students.bilstm import bilstm
from qbert.students.cnn import cnn

__all__ = ["bilstm", "cnn"]
