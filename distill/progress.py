"""What happens between the steps of a distillation: stages, progress, interruption.

Each is a `TrainerCallback`, so that further ones of the user's run beside them.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.extras import is_installed
from qbert.plots import new_figure


class StageCallback(TrainerCallback):
    """Enters each stage of the recipe at its first step."""

    def __init__(self, distiller: Any) -> None:
        self.distiller = distiller

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go over to the stage that the coming step belongs to."""
        self.distiller.enter_stage(self.distiller.recipe.stage_at(state.global_step, state.max_steps))


class TermsProgress(ProgressCallback):
    """The progress bar, with the stage and the mean of each loss term since the last log."""

    def __init__(self, distiller: Any) -> None:
        super().__init__()
        self.distiller = distiller

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the stage."""
        if self.training_bar is not None and len(self.distiller.recipe.stages) > 1:
            self.training_bar.set_description(self.distiller.distillation.stage.name, refresh=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and its terms in the bar instead of printing a line."""
        if self.training_bar is not None and logs:
            shown = {name: f"{value:.3g}" for name, value in logs.items() if name.startswith(("loss", "eval_loss"))}
            self.training_bar.set_postfix(shown)


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save a checkpoint, stop. The second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, where Python lets us: only the main thread may."""
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if Ctrl-C was pressed during the step."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Give Ctrl-C back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def estimate_cost(distiller: Any, steps: int) -> dict[str, float]:
    """See `Distiller.estimate`."""
    args = distiller.args
    collate = distiller._get_collator_with_removed_columns(distiller.data_collator)
    with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
        loader: Any = DataLoader(distiller.rows, args.train_batch_size, collate_fn=collate)
        times = [_time_step(distiller, batch) for batch in itertools.islice(iter(loader), steps)]
    distiller.distillation.zero_grad(set_to_none=True)
    warm = times[1:] or times
    per_step = sum(warm) / len(warm) * args.gradient_accumulation_steps
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    total = args.max_steps if args.max_steps > 0 else args.num_train_epochs * -(-len(distiller.rows) // rows_a_step)
    return {"seconds_per_step": per_step, "steps": float(total), "seconds": per_step * total}


def _time_step(distiller: Any, batch: Any) -> float:
    inputs = distiller._prepare_inputs(batch)
    distiller.distillation.train()
    start = time.perf_counter()
    distiller.distillation(**inputs)["loss"].backward()
    if distiller.args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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

    The training is over when they are written, so a missing matplotlib costs the picture, with a warning.

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
    if not is_installed("matplotlib"):
        warnings.warn(f"{table} gets no picture without matplotlib; run: pip install matplotlib", stacklevel=2)
        return [table]
    picture = folder / f"{name}.png"
    plot_curves({"": curves}, picture)
    return [table, picture]


def plot_curves(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """One panel a quantity (loss, each of its terms, held-out scores), one line a run."""
    names = list(dict.fromkeys(n for curves in runs.values() for n in curves if _is_shown(n)))
    columns = min(3, max(len(names), 1))
    rows = max(-(-len(names) // columns), 1)
    figure = new_figure(4.2 * columns, 2.8 * rows)
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


class TermMeans:
    """Running sums of the terms, kept on the device of the losses."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, names: Sequence[str], terms: Tensor, loss: Tensor) -> tuple[str, float] | None:
        """Take the `terms` [len(names)] of one batch, unless a term or their weighted sum `loss` is not finite.

        Returns:
            None, or (what is not finite, in words; its value).
        """
        if not bool(torch.isfinite(terms).all() & torch.isfinite(loss)):
            values = dict(zip([*names, "sum"], [*terms.tolist(), float(loss.detach())], strict=True))
            name = next(n for n, v in values.items() if not math.isfinite(v))
            return f"loss term {name!r}", values[name]
        for name, value in zip(names, terms, strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        return None

    def pop(self) -> dict[str, float]:
        """The mean of each term since the last call."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
