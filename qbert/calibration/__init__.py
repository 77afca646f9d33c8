"""Calibration: what is read off a few batches of data, without labels.

Static activation ranges (`activations`), the second moments of the inputs of every matrix (`moments`), and the rows
themselves, put together by length (`by_length`).
"""

from __future__ import annotations

from qbert.calibration.activations import calibrate_activations
from qbert.calibration.batches import Batch, check_batches, check_readable, reads_mappings, run_batch
from qbert.calibration.by_length import by_length
from qbert.calibration.moments import input_moments
from qbert.calibration.outputs import Run, gives_logits, mean_logits, model_outputs
from qbert.calibration.totals import Moment

__all__ = [
    "Batch",
    "Moment",
    "Run",
    "by_length",
    "calibrate_activations",
    "check_batches",
    "check_readable",
    "gives_logits",
    "input_moments",
    "mean_logits",
    "model_outputs",
    "reads_mappings",
    "run_batch",
]
