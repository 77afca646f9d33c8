"""What happens between the steps of a distillation: stages, progress, interruption.

They stand alone because they see a training from outside: what a step computes is for `objective`.

Each is a `TrainerCallback`, so that further ones of the user's run beside them.
"""

from __future__ import annotations

import csv
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.distill.recipe import Recipe, Timetable
from qbert.extras import is_installed
from qbert.files import write_whole
from qbert.plots import new_figure
from qbert.progress import progress_bar


class StageCallback(TrainerCallback):
    """Enters each stage of the recipe at its first step.

    Args:
        recipe: whose stages.
        enter: called with a stage's index at each step of it.
    """

    def __init__(self, recipe: Recipe, enter: Callable[[int], None]) -> None:
        self.recipe, self.enter = recipe, enter
        self._table: Timetable | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The number of steps is known: when does each stage begin?"""
        self._table = Timetable(self.recipe, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go over to the stage that the coming step belongs to."""
        if self._table is not None:
            self.enter(self._table.stage_at(state.global_step))


class TermsProgress(ProgressCallback):
    """The progress bar, with the stage and the mean of each loss term since the last log.

    Args:
        stage: gives the name of the present stage, "" where there is only one.
    """

    def __init__(self, stage: Callable[[], str]) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A bar at this library's pace: transformers' own is redrawn ten times a second, in a pipe too."""
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc="training", unit="step")
        self.current_step = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the stage."""
        if self.training_bar is not None and self.stage():
            self.training_bar.set_description(self.stage(), refresh=False)

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


def time_steps(distillation: nn.Module, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[float]:
    """Seconds that a forward and backward pass of each batch takes, which are already on the device."""
    times = []
    distillation.train()
    for batch in batches:
        start = time.perf_counter()
        distillation(**batch)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times


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

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "name", "value"])
            writer.writerows((step, key, value) for key, points in curves.items() for step, value in points)

    write_whole(table, write)
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
    write_whole(path, lambda aside: figure.savefig(aside, dpi=120))


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
