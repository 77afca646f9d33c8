"""Bars of long work: redrawn once a second on a terminal, a line a minute where the output goes to a file or a pipe.

Alone because every room has long work, and none should fill a log with half-drawn bars.

    >>> for batch in progress_bar(batches, desc="calibrating", unit="batch", disable=not progress): ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as _Plain
from tqdm.auto import tqdm as _Best

_TERMINAL_SECONDS, _PIPE_SECONDS = 1.0, 60.0
# What is done sooner shows nothing.
_DELAY = 0.5


class _Lines(_Plain):  # type: ignore[type-arg]
    """A bar that writes whole lines, none of which takes the place of an earlier one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg != "":  # which clears a line elsewhere
            self.fp.write((str(self) if msg is None else msg).strip() + "\n")
            self.fp.flush()
        return msg != ""

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **kwargs: Any) -> None:
        # Words beside the bar, such as the number of the run, are no reason for a line of their own.
        super().set_postfix(ordered_dict, refresh=False, **kwargs)

    def close(self) -> None:
        if not self.disable and self.last_print_t >= self.start_t + self.delay and self.last_print_n < self.n:
            self.display()
        self.leave = False
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar with this library's pace; `options` are tqdm's own.

    Args:
        iterable: what is looped over; None for a bar that is updated by hand (``total=``).
        **options: ``desc``, ``total``, ``unit``, ``disable``, ``leave``, ``file``, ...
    """
    file = options.get("file") or sys.stderr
    if getattr(file, "isatty", lambda: False)() or (_Best is not _Plain and _in_notebook()):
        return _Best(iterable, **{"mininterval": _TERMINAL_SECONDS, "delay": _DELAY, **options})
    pace = {"mininterval": _PIPE_SECONDS, "maxinterval": _PIPE_SECONDS, "delay": _PIPE_SECONDS}
    return _Lines(iterable, **{**pace, **options})


def write(text: str) -> None:
    """Print a line of its own above the bars."""
    _Plain.write(text)


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules
