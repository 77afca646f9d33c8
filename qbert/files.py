"""Writing files whole, with a digest, and reading back only what was written.

A file is written aside, flushed to the disk and renamed, so that a reader never sees half of one. Every JSON object
and every safetensors file carries a SHA-256 digest of itself under ``file_sha256``, and is refused by name when it does
not fit; a file without one (of an older version, or written by hand) is read as it is.

    >>> write_json("bits.json", {"bits": {"*": 4}})
    >>> read_json("bits.json")
    {'bits': {'*': 4}}
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "file_sha256"
_OPEN_SEAL = "0" * 64
_ABANDONED_AFTER = 24 * 3600.0  # seconds, for what a process left that cannot be looked up from here


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call ``write(aside)`` on a temporary name beside `path`, flush it to the disk, and rename it to `path`.

    Folders on the way are made. If `write` fails or is interrupted, nothing is left behind and an existing file
    stays as it was; what a killed process left beside it is removed. The temporary name keeps the suffix, which some
    writers look at, and no two writers share one.

    Raises:
        IsADirectoryError: `path` is a folder; before `write` is called.
        OSError: the disk is full, or the file cannot be written for another reason; names `path`.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, f".part.{glob.escape(target.name)}")
    aside = target.with_name(own_name("", f".part.{target.name}"))
    try:
        with writing(target):
            write(aside)
            flush(aside)
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(target.parent)


class writing:  # noqa: N801 (reads as a statement)
    """Inside, a failure to write becomes an OSError of one sentence that names `path`.

    safetensors and tokenizers report a full disk by errors of their own, and Python by one that often names no file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # What is written in Rust names the system's error by its number, in an exception of any kind.
        if not (isinstance(error, OSError) or "(os error" in str(error)):
            return
        if isinstance(error, OSError) and str(self.path) in str(error):
            return
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        told = type(error) if isinstance(error, OSError) else OSError
        mended = told(f"{self.path} cannot be written ({reason}); make room there, or name another place")
        mended.errno = number
        raise mended from error


def flush(path: Path) -> None:
    """Have the content of a file on the disk, not only in the system's memory."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    if sys.platform == "win32":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # a file system that knows no such thing keeps its names in its own way
    finally:
        os.close(handle)


def own_name(before: str, after: str) -> str:
    """A hidden name ``.BEFOREplace-process-random AFTER`` that no other thread, process or container uses."""
    return f".{before}{_place()}-{os.getpid()}-{secrets.token_hex(4)}{after}"


def remove_abandoned(folder: Path, after: str, before: str = "") -> None:
    """Remove files and folders with names of `own_name` in `folder` whose process has ended; `after` is a glob.

    Earlier versions named only the process.
    """
    ending = fnmatch.translate(after)
    pattern = re.compile(rf"\.{re.escape(before)}(?:([0-9a-f]{{8}})-)?(\d+)(?:-[0-9a-f]{{8}})?{ending}")
    for found in list(folder.iterdir()):
        match = pattern.fullmatch(found.name)
        if match and _is_abandoned(found, match.group(1), int(match.group(2))):
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def _is_abandoned(path: Path, place: str | None, process: int) -> bool:
    if place in (None, _place()) and sys.platform != "win32":  # where asking about a process would end it
        if process == os.getpid():
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
    except OSError:
        return False  # just renamed or removed by its owner


@functools.cache
def _place() -> str:
    """8 hex digits for what numbers processes: this start of this machine, and its container."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii") + os.readlink("/proc/self/ns/pid")
    except OSError:
        start = ""
    return hashlib.sha256(f"{platform.node()} {start}".encode()).hexdigest()[:8]


def cache_folder(folder: str | Path | None = None) -> Path:
    """The cache folder, made if need be and found writable.

    Raises:
        PermissionError: the folder cannot be made or written to; names QBERT_CACHE as the mend.
    """
    chosen = cache_path(folder)
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            pass
    except OSError as error:
        raise PermissionError(
            f"the cache folder {str(chosen)!r} cannot be written ({error.strerror}); "
            "set QBERT_CACHE (or cache_dir=...) to a folder of yours"
        ) from error
    return chosen


def cache_path(folder: str | Path | None = None) -> Path:
    """Where the cache folder is, whether it is there or not; to read from, where it may be another user's."""
    return Path(folder or os.environ.get("QBERT_CACHE") or _platform_cache() / "qbert").expanduser()


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any] | list[Any]) -> None:
    """Write `content` as indented JSON, an object with its digest; ValueError where it holds NaN or infinity."""
    if isinstance(content, Mapping):
        plain = json.loads(json.dumps(content, allow_nan=False))  # as a reader will see it
        content = {**plain, SEAL: content_sha256(plain)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of JSON values, whatever their order and spacing."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


class AlteredFileError(ValueError):
    """A file that is readable and not the one that was written."""


def read_saved(path: str | os.PathLike[str], tag: str, what: str) -> dict[str, Any]:
    """Content of a JSON file that `what`, a class, has written with ``"format": tag``, its digest not yet checked.

    The class looks first for what is wrong with its own fields, of which it can say more, then calls `check_seal`.

    Raises:
        FileNotFoundError: no such file; ValueError: not valid JSON, or not of this format.
    """
    content = _parsed(path)
    if not isinstance(content, dict) or content.get("format") != tag:
        raise ValueError(f"path: {path} is not a saved {what} ({tag}); write one with its save method")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parsed content of a JSON file, its digest checked and taken off.

    Raises:
        FileNotFoundError: no such file; ValueError: not valid JSON, or (AlteredFileError) not what was written; named
            with what may have happened.
    """
    content = _parsed(path)
    return check_seal(path, content) if isinstance(content, dict) else content


def check_seal(path: str | os.PathLike[str], content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the JSON file at `path` without its digest, once that was found to fit; without one as it is.

    Raises:
        AlteredFileError: it does not fit.
    """
    plain = {name: value for name, value in content.items() if name != SEAL}
    sealed = content.get(SEAL)
    if (sealed is not None and sealed != content_sha256(plain)) or any(map(_is_damaged_seal, plain)):
        raise AlteredFileError(
            f"{path} is damaged or was altered after it was written (its {SEAL} does not fit); fetch or make it again, "
            f"or remove its line {SEAL!r} if you changed it yourself"
        )
    return plain


def _parsed(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be cut off or another kind of file") from error


def _is_damaged_seal(name: str) -> bool:
    """Whether `name` is the seal's with one character changed: a file must not lose its digest by that."""
    return len(name) == len(SEAL) and sum(a != b for a, b in zip(name, SEAL, strict=True)) == 1


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of the bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_sha256(folder: Path, leave_out: str = "") -> dict[str, str]:
    """Name -> SHA-256 of the files in a folder and below, but those whose names match the glob `leave_out`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_sha256(folder / name) for name in names if not fnmatch.fnmatch(name, leave_out)}


def damaged_file(folder: Path, digests: Mapping[str, str]) -> Path | None:
    """The first file of `folder` that is missing or not the one of these digests; None if all are."""
    for name, digest in digests.items():
        try:
            if file_sha256(folder / name) != digest:
                return folder / name
        except OSError:
            return folder / name
    return None


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with its digest; nothing is left if that fails.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        save_file(dict(tensors), aside, metadata={**(metadata or {}), **open_seal()})
        close_seal(aside)

    write_whole(path, write)


def open_seal() -> dict[str, str]:
    """The metadata of a safetensors file that `close_seal` will complete."""
    return {SEAL: _OPEN_SEAL}


def close_seal(path: Path) -> None:
    """Put the digest of a safetensors file, written with `open_seal` in its metadata, in its place."""
    with open(path, "rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        place = 8 + header.index(_OPEN_SEAL.encode())
        digest = _tensors_sha256(path, place)
        file.seek(place)
        file.write(digest.encode())


def check_tensors(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, once its digest was found to fit (a file without one is taken as it is).

    Raises:
        FileNotFoundError: no such file; ValueError: it is damaged, or no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))
        metadata = json.loads(header).get("__metadata__") or {}
        sealed = metadata.pop(SEAL, None)
        damaged = any(map(_is_damaged_seal, metadata)) or (sealed is None and SEAL.encode() in header)
        if sealed is not None and not damaged:
            damaged = sealed != _tensors_sha256(Path(path), 8 + header.index(sealed.encode()))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    if damaged:
        raise ValueError(f"{path} is damaged or was altered after it was written (its {SEAL} does not fit)")
    return dict(metadata)


def _tensors_sha256(path: Path, place: int) -> str:
    """Digest of the bytes of a file, with that of the digest itself at `place` left open."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(place))
        file.seek(place + len(_OPEN_SEAL))
        digest.update(_OPEN_SEAL.encode())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
