"""The course of a training as a table and a picture.

>>> save_curves(trainer.state.log_history, Path("out"))   # out/curves.csv, out/curves.png
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]


def curves_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """(step, value) of every number in a Trainer's log, by name; only names that were logged during training."""
    curves: dict[str, Curve] = {}
    for entry in history:
        if "train_runtime" in entry:  # the summary at the end is no point of a curve
            continue
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                curves.setdefault(name, []).append((float(entry["step"]), float(value)))
    return curves


def save_curves(history: Sequence[Mapping[str, Any]], folder: Path, name: str = "curves") -> list[Path]:
    """Write FOLDER/NAME.csv (long format: step, name, value) and FOLDER/NAME.png, each aside first.

    Returns:
        The paths written; none if nothing was logged.
    """
    curves = curves_of(history)
    if not curves:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.csv"
    aside = table.with_name(f".{table.name}.{os.getpid()}")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "name", "value"])
        writer.writerows((step, key, value) for key, points in curves.items() for step, value in points)
    os.replace(aside, table)
    picture = folder / f"{name}.png"
    plot_curves({"": curves}, picture)
    return [table, picture]


def plot_curves(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """One panel a quantity (loss, each of its terms, held-out scores), one line a run."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(n for curves in runs.values() for n in curves if _is_shown(n)))
    columns = min(3, max(len(names), 1))
    rows = max(-(-len(names) // columns), 1)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        for index, (label, curves) in enumerate(runs.items()):
            if name in curves:
                steps, values = zip(*curves[name], strict=True)
                marker = "." if len(steps) < 30 else None
                axis.plot(steps, values, marker=marker, color=f"C{index}", label=label or None)
        axis.set_title(name)
        axis.set_xlabel("step")
        if len(runs) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)


def _is_shown(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "grad_norm"))
