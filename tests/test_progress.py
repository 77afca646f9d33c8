"""Progress is seen and not heard: nothing for short work, whole lines in a pipe, a bar on a terminal."""

import io
from typing import Any

import pytest

from qbert import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that each bar reads; tests move it by hand."""
    now = [1000.0]
    plain = progress._Plain.__init__

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self._time = lambda: now[0]
        self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(progress._Plain, "__init__", started)
    return now


def test_short_work_in_a_pipe_is_silent() -> None:
    out = io.StringIO()
    assert list(progress.progress_bar(range(5), desc="short", file=out)) == list(range(5))
    assert out.getvalue() == ""


def test_long_work_in_a_pipe_is_a_line_a_minute(clock: list[float]) -> None:
    out = io.StringIO()
    shown = progress.progress_bar(total=30, desc="long", file=out)
    for _ in range(30):
        clock[0] += 10
        shown.set_postfix(run=1)
        shown.update()
    shown.close()
    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 7 and "\r" not in out.getvalue()
    assert all(line.startswith("long:") for line in lines) and "30/30" in lines[-1]


def test_on_a_terminal_a_bar_is_redrawn_each_second(clock: list[float]) -> None:
    out = Terminal()
    shown = progress.progress_bar(total=100, desc="work", file=out, dynamic_ncols=False, ncols=80)
    for _ in range(100):
        clock[0] += 0.1
        shown.update()
    shown.close()
    assert 7 <= out.getvalue().count("\r") <= 14


def test_what_is_disabled_shows_nothing(clock: list[float]) -> None:
    out = io.StringIO()
    for _ in progress.progress_bar(range(3), disable=True, file=out):
        clock[0] += 100
    assert out.getvalue() == ""


def test_a_training_in_a_pipe_is_a_line_a_minute(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qbert.distill.progress import TermsProgress

    out = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", out)
    settings, state, control = TrainingArguments("unused", use_cpu=True), TrainerState(max_steps=6), TrainerControl()
    bar = TermsProgress(lambda: "task")
    bar.on_train_begin(settings, state, control)
    for step in range(1, 7):
        clock[0] += 25
        bar.on_step_begin(settings, state, control)
        state.global_step = step
        bar.on_step_end(settings, state, control)
        bar.on_log(settings, state, control, logs={"loss": 0.5, "loss_logits": 0.25, "learning_rate": 1.0})
    bar.on_train_end(settings, state, control)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in out.getvalue()
    assert "task" in lines[0] and "3/6" in lines[0] and "loss_logits=0.25" in lines[0] and "6/6" in lines[-1]
