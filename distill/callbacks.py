"""What happens between the steps of a distillation: stages, progress, interruption.

Each is a `TrainerCallback`, so that further ones of the user's run beside them.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from qbert.distill.distiller import Distiller


class StageCallback(TrainerCallback):
    """Enters each stage of the recipe at its first step."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go over to the stage that the coming step belongs to."""
        self.distiller.enter_stage(self.distiller.recipe.stage_at(state.global_step, state.max_steps))


class TermsProgress(ProgressCallback):
    """The progress bar, with the stage and the mean of each loss term since the last log."""

    def __init__(self, distiller: Distiller) -> None:
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
