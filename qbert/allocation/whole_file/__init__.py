"""One exact choice for a whole file: the bits of every matrix and the form of every table, from unlabelled batches."""

from __future__ import annotations

from qbert.allocation.whole_file.file_plan import FilePlan, fitted_and_scored, smallest_file_mb, whole_file_bytes
from qbert.allocation.whole_file.matrices import rounded_matrix
from qbert.allocation.whole_file.options import FILE_DEFAULTS, Alternative, Item, Option
from qbert.allocation.whole_file.tables import row_splits

__all__ = [
    "FILE_DEFAULTS",
    "Alternative",
    "FilePlan",
    "Item",
    "Option",
    "fitted_and_scored",
    "rounded_matrix",
    "row_splits",
    "smallest_file_mb",
    "whole_file_bytes",
]
