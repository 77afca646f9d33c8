"""Results on paper: plain-text and Markdown tables, what a result was made of, and where it was made.

>>> print(text_table(["bits", "score"], [[4, "89.5"], [2, "81.8"]]))
"""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

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


def refuse_foreign(path: Path, found: Any, asked: dict[str, Any]) -> None:
    """Refuse to go on from a file that was made of another model, other rows or other settings.

    Raises:
        ValueError: naming the first difference.
    """
    for name, value in asked.items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise ValueError(f"--resume: {path} was made with another {name}; remove the file, or leave --resume out")


def provenance() -> str:
    """One line for a results page: the command, the machine and the versions that made it."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
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
