"""What a plan has measured, kept in a folder, so that an interrupted one goes on where it was.

In a file of its own, since a plan knows nothing of files otherwise. Every measurement is kept by what it is about; what
all of them were made of (weights, batches, settings) stands beside them, and another model's are refused.

    >>> kept = Kept("plan.partial", {"weights": ..., "batches": ...})
    >>> start = kept.once(["start", steps], lambda: measure(steps))
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qbert.files import read_json
from qbert.results import Record, first_difference

FORMAT = "qbert.planned/1"
_FILE = "measured.json"


class Kept:
    """Measurements by name, in the folder `path`; nowhere where that is None.

    Args:
        path: folder, made with the first measurement.
        asked: all that every measurement depends on, as JSON values.

    Raises:
        ValueError: the folder holds measurements of something else (the sentence names the first difference), or a
            damaged file; or it is a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, asked: Mapping[str, Any]) -> None:
        self._record: Record | None = None
        if path is None:
            return
        folder, asked = Path(path), json.loads(json.dumps({"format": FORMAT, **asked}, default=str))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint: {path} is a file; give the path of a folder")
        file = folder / _FILE
        if file.is_file():
            found = read_json(file)
            other = first_difference(found.get("asked") if isinstance(found, dict) else None, asked)
            if other is not None:
                raise ValueError(
                    f"checkpoint: {file} was measured with another {other}; give another folder, or the same model, "
                    "batches and settings"
                )
        self._record = Record(file, asked, resume=True)

    def once(self, about: Any, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, JSON values, or has returned before about the same.

        Numbers that are none (NaN, infinity) come back as text, of which ``float`` makes them again.
        """
        if self._record is None:
            return measure()
        key = json.dumps(about, sort_keys=True)
        if key not in self._record:
            self._record.add(key, json.loads(json.dumps(_finite(measure()))))
        (value,) = self._record[key]
        return value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
