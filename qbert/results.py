"""Results on paper: plain-text and Markdown tables, what a result was made of, and where it was made.

>>> print(text_table(["bits", "score"], [[4, "89.5"], [2, "81.8"]]))
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qbert.files import read_json, write_json
from qbert.version import __version__


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns padded to their width: the first flush left, the others flush right, a rule under the header."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table in Markdown, numbers flush right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)])


class Record:
    """What was asked and the rows found so far, in one JSON file, so that an interrupted measurement goes on.

    The file is written whole after every row, with its digest.

        >>> record = Record(Path("scores.json"), {"model": "minilm", "limit": 100}, resume=True)
        >>> if "4 bits" not in record:
        ...     record.add("4 bits", {"score": 91.2})

    Args:
        path: JSON file; its folder is made with the first row.
        asked: all that the rows depend on, as JSON values.
        resume: take over what the file has; without it, the first row sets the file aside (``.before``) and says so.

    Attributes:
        content: ``asked``, ``rows`` (key -> rows in the order they were added), and what was noted beside them.

    Raises:
        ValueError: the file to resume from answers another question, is damaged, or is no such record.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        asked = json.loads(json.dumps(asked, allow_nan=False))  # as it will be read
        self.content: dict[str, Any] = {"asked": asked, "rows": {}}
        self._earlier = path.is_file() and not resume
        if resume and path.is_file():
            found = read_json(path)
            refuse_foreign(path, found.get("asked") if isinstance(found, dict) else None, asked)
            rows = found.get("rows")
            if not isinstance(rows, dict) or not all(isinstance(kept, list) for kept in rows.values()):
                raise ValueError(f"--resume: {path} holds no rows by name; remove the file, or leave --resume out")
            self.content = found

    def __contains__(self, key: str) -> bool:
        return key in self.content["rows"]

    def __getitem__(self, key: str) -> list[Any]:
        """All rows under `key`, none if there are none."""
        return list(self.content["rows"].get(key, ()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.content["rows"])

    def add(self, key: str, row: Any, **beside: Any) -> None:
        """Keep one more row under `key`, and anything to note at the top of the file."""
        self.content["rows"].setdefault(key, []).append(row)
        self.content.update(beside)
        self.save()

    def save(self) -> None:
        """Write the file, after something was noted beside the rows."""
        if self._earlier:
            aside = self.path.with_name(f"{self.path.name}.before")
            self.path.replace(aside)
            warnings.warn(f"the earlier rows of {self.path} are kept in {aside.name}", stacklevel=3)
            self._earlier = False
        write_json(self.path, self.content)


def first_difference(found: Any, asked: Mapping[str, Any]) -> str | None:
    """The first name in `asked` under which `found`, as read from a file, has another value; None if there is none."""
    held = found if isinstance(found, Mapping) else None
    return next((name for name, value in asked.items() if held is None or held.get(name) != value), None)


def refuse_foreign(path: Path, found: Any, asked: Mapping[str, Any]) -> None:
    """Refuse to go on from a file that was made of another model, other rows or other settings.

    Raises:
        ValueError: naming the first difference.
    """
    name = first_difference(found, asked)
    if name is not None:
        raise ValueError(f"--resume: {path} was made with another {name}; remove the file, or leave --resume out")


COMMAND_FORMAT = "qbert.command/1"
COMMAND_FILE = "qbert_record.json"  # in the folder of a model that a command wrote


def write_command(
    path: str | os.PathLike[str],
    command: str,
    made_by: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    about: str = "",
    metric: str | None = None,
    curves: Mapping[str, Any] | None = None,
) -> None:
    """What a command of ``qbert`` was asked and what it found, as JSON that `qbert.report.write_report` shows.

    The file is an object with ``format`` (``qbert.command/1``) and the arguments by their names here. A reader has to
    pass over fields that it does not know; those that are here stay.

    Args:
        path: JSON file; ``qbert_record.json`` where it lies in the folder of a model.
        command: its name, such as ``distill``.
        made_by: the whole command line, machine and versions (`provenance`).
        settings: what was asked, JSON values.
        rows: what was found, a model or a step each: flat JSON values by name; ``MB`` is a size of 10^6 bytes.
        about: what the rows are about, such as the task in words.
        metric: the name in `rows` of what is drawn against ``MB``.
        curves: ``x`` and ``y``, names of axes, and ``lines``: name -> pairs (x, y).

    Raises:
        ValueError: a value that is NaN or infinite, or no JSON; OSError: the file cannot be written.
    """
    content = {"format": COMMAND_FORMAT, "command": command, "made_by": made_by, "about": about, "metric": metric}
    write_json(path, {**content, "settings": dict(settings), "rows": list(rows), "curves": curves})


def provenance(command: str | None = None) -> str:
    """One line for a results page: the command, the machine and the versions that made it.

    Args:
        command: what was run; None for the script of this process with its arguments.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    if command is None:
        command = " ".join(["python", *(a if " " not in a else f"'{a}'" for a in sys.argv)])
    return (
        f"`{command}` - {device}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, {versions}, "
        f"qbert {__version__}, {datetime.date.today()}"
    )


def _processor() -> str:
    """Processor name with the widest vector instructions that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
