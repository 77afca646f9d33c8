"""Writing files whole: aside first, then renamed, so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call ``write(aside)`` on a temporary name beside `path`, then rename it to `path`.

    Folders on the way are made. If `write` fails or is interrupted, nothing is left behind and an existing file
    stays as it was. The temporary name keeps the suffix, which some writers look at. Raises IsADirectoryError, before
    `write` is called, if `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{os.getpid()}.part.{target.name}")
    try:
        write(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any] | list[Any]) -> None:
    """Write `content` as indented JSON; ValueError where it holds NaN or infinity, which JSON has not."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def json_array(values: np.ndarray) -> list[Any]:
    """Nested lists of an array; JSON has no NaN and no infinity, so they become null and text.

    ``np.array(values, dtype=np.float64)`` reads them back.
    """
    if values.dtype.kind != "f":
        return values.tolist()
    kept = values.astype(object)
    kept[np.isnan(values)] = None
    kept[np.isposinf(values)] = "inf"
    kept[np.isneginf(values)] = "-inf"
    return kept.tolist()


def read_saved(path: str | os.PathLike[str], tag: str, what: str) -> dict[str, Any]:
    """Content of a JSON file that `what`, a class, has written with ``"format": tag``.

    Raises:
        FileNotFoundError: no such file; ValueError: not valid JSON, or not of this format.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != tag:
        raise ValueError(f"path: {path} is not a saved {what} ({tag}); write one with its save method")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parsed content of a JSON file.

    Raises:
        FileNotFoundError: no such file; ValueError: not valid JSON, named with what may have happened.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be cut off or another kind of file") from error
