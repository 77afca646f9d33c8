"""Milliseconds of a model, or a refusal where the clock says more of other work than of the model.

It stands alone because it alone asks for the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qbert.calibration import reads_mappings
from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode

_TIMINGS, _ATTEMPTS = 15, 3
_NOISY = 0.5  # share by which half of the calls may take longer than the fastest


def milliseconds(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """The fastest of some calls of `model` on `inputs`, in evaluation mode, after a few that are left out.

    A call ends when its device is done with it, on a GPU well after Python is.

    Raises:
        ValueError: if half of them took much longer than the fastest, several times over; the spread is named.
    """
    spread, fastest = float("inf"), float("inf")
    inputs = to_device(inputs, model)
    with torch.inference_mode(), evaluation_mode(model):
        for _ in range(_ATTEMPTS):
            kept = _timed(model, inputs)
            fastest = min(fastest, *kept)
            spread = min(spread, statistics.median(kept) / min(kept) - 1)
            if spread <= _NOISY:
                return fastest
    raise ValueError(
        f"latency_ms: half of the calls took {100 * spread:.0f} % longer than the fastest ({fastest:.2f} ms), "
        f"{_ATTEMPTS} times over; this machine's clock says little now; stop other work, or plan by size_mb"
    )


def _timed(model: Any, inputs: Mapping[str, Tensor]) -> list[float]:
    """Milliseconds of some calls, the first of which are left out."""
    device = next(model.parameters()).device
    takes_mapping = reads_mappings(model)
    times = []
    for _ in range(_TIMINGS + 3):
        _wait(device)
        start = time.perf_counter()
        _ = model(dict(inputs)) if takes_mapping else model(**inputs)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[3:]


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for; a CPU has when the call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
