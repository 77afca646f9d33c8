"""The score-against-size comparison of post-training quantization, which two scripts print.

>>> rows = ptq_report(model, {"4 bits": 4, "2/3 mixed": bits}, score=lambda m: evaluate(m, task, tokenizer))
>>> print(text_table(*ptq_table(rows, "accuracy")))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from qbert.bits import BitsConfig
from qbert.quantize import quantize_model
from qbert.sizes import model_size


@dataclass(frozen=True)
class PTQResult:
    """One row of a post-training comparison.

    Attributes:
        label: what was done, such as "4 bits".
        score: primary metric, 0 to 100.
        retention: score in percent of the float model's.
        agreement: percent of held-out examples that get the float model's class; ``None`` without classes.
        megabytes: exact size of the packed tensors, 10^6 bytes.
        ratio: how many times smaller than the float model, everything counted.
        seconds: time to quantize.
    """

    label: str
    score: float
    retention: float
    agreement: float | None
    megabytes: float
    ratio: float
    seconds: float


def ptq_report(
    model: nn.Module,
    configs: Mapping[str, int | Mapping[str, Any] | BitsConfig],
    score: Callable[[nn.Module], Any],
    *,
    calibration_data: Any = None,
    progress: bool = False,
) -> list[PTQResult]:
    """Score `model` in float and quantized under each configuration.

    Args:
        model: a float model.
        configs: label -> bits configuration.
        score: returns an `Evaluation` (with ``primary`` and ``logits``) of a model.
        calibration_data: as in `quantize_model`.
        progress: show a bar over the configurations.

    Returns:
        The float model's row, then one row a configuration in the given order.
    """
    reference = score(model)
    size = model_size(model)
    results = [PTQResult("float", reference.primary, 100.0, None, size.mb, 1.0, 0.0)]
    for label, config in tqdm(configs.items(), desc="quantized", disable=not progress):
        start = time.perf_counter()
        student = quantize_model(model, config, calibration_data=calibration_data)
        seconds = time.perf_counter() - start
        result, small = score(student), model_size(student)
        retention = 100.0 * result.primary / reference.primary if reference.primary else float("nan")
        results.append(
            PTQResult(label, result.primary, retention, _agreement(reference, result), small.mb, small.ratio, seconds)
        )
    return results


def ptq_table(results: Sequence[PTQResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for `text_table` or `markdown_table`."""
    header = ["weights", metric, "of float", "same class", "MB", "smaller"]
    rows = [
        [
            r.label,
            f"{r.score:.2f}",
            f"{r.retention:.1f} %",
            "" if r.agreement is None else f"{r.agreement:.1f} %",
            f"{r.megabytes:.1f}",
            f"{r.ratio:.1f}x",
        ]
        for r in results
    ]
    return header, rows


def _agreement(reference: Any, result: Any) -> float | None:
    expected, got = reference.logits, result.logits
    if expected.dim() != 2 or expected.shape != got.shape or expected.shape[1] < 2 or expected.shape[1] > 100:
        return None
    return 100.0 * float((expected.argmax(1) == got.argmax(1)).to(torch.float32).mean())
