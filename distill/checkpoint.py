"""Checkpoints of a distillation: student, projections and automatic weights in one safetensors file, no pickled code.

A checkpoint counts as good when every file in it is the one that was written, by the digests in ``files.json``, which
is written last; one that was cut off by a full disk or a killed process, or damaged later, is passed over.

    >>> last_good_checkpoint("out")
    PosixPath('out/checkpoint-120')
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from qbert.distill.features import OWN
from qbert.distill.outputs import teacher_digest
from qbert.distill.recipe import Recipe
from qbert.encoders.targets import base_model
from qbert.files import (
    SEAL,
    check_tensors,
    close_seal,
    content_sha256,
    damaged_file,
    files_sha256,
    open_seal,
    read_json,
    write_json,
    write_whole,
)

WEIGHTS = "distillation.safetensors"
TEACHER = "teacher.safetensors"
FILES = "files.json"
ORIGIN = "origin.json"
_INSIDE = frozenset({"hidden", "embeddings", "cls", "scores"})  # features that no head has a part in
_STATE = "trainer_state.json"


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the tensors of `module` (tied ones once), aside first, then renamed.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written. OSError: `path` cannot be written.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(f"the weight {name} is not finite; the checkpoint {path.parent} is not written")

    def write(aside: Path) -> None:
        save_model(module, str(aside), metadata={"format": "pt", **open_seal()})
        close_seal(aside)

    write_whole(path, write)


def load_weights(module: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into a module of the same make.

    Raises:
        ValueError: the file is missing, damaged, or of another student or recipe.
    """
    try:
        check_tensors(path)
        missing, unexpected = load_model(module, str(path), strict=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint file {path} cannot be read ({error}); resume from an earlier one") from error
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} is of another student: {str(error).splitlines()[-1].strip()}") from error
    if missing or unexpected:
        name = sorted([*missing, *unexpected])[0]
        raise ValueError(f"checkpoint {path} is of another student or recipe (tensor {name}); use the same ones")


def origin(teacher: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Digests of what a student learns from: the teacher, and the stages with their terms.

    Settings at their defaults are left out, so that one that a later version adds makes no other recipe; and so are
    the teacher's head and pooler where no term asks for them, as a general stage's may be new ones each time.
    """
    parts = [recipe.stages, recipe.steps, recipe.activations, recipe.zeros]
    features = {match.feature for stage in recipe.stages for match in stage.matches} - OWN
    inside = all(name in _INSIDE or name.startswith("relations.") for name in features)
    read = teacher_digest(base_model(teacher)[1], without="pooler.") if inside else teacher_digest(teacher)
    return {"teacher": read, "recipe": content_sha256({"parts": [_plain(part) for part in parts]})}


def check_origin(checkpoint: Path, expected: Mapping[str, str]) -> None:
    """Whether a checkpoint is of this teacher and recipe (`origin`); one of an earlier version, which has none, warns.

    Raises:
        ValueError: it is of others, or its file is damaged.
    """
    if not (checkpoint / ORIGIN).is_file():
        warnings.warn(
            f"checkpoint {checkpoint} is of an earlier version, which kept no digests of teacher and recipe; be sure "
            "that they are the same",
            stacklevel=2,
        )
        return
    found = read_json(checkpoint / ORIGIN)
    for name, digest in expected.items():
        if not isinstance(found, dict) or found.get(name) != digest:
            raise ValueError(
                f"checkpoint {checkpoint} is of another {name}; resume with the {name} that it was begun with, or "
                "train anew in another output_dir"
            )


def _plain(value: Any) -> Any:
    """A part of a recipe as JSON has it; a function by its name."""
    if isinstance(value, str | bool | None):
        return value
    if isinstance(value, int | float):
        return float(value)
    if is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
        return {name: _plain(one) for name, one in given.items() if one != defaults[name]}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def last_good_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The latest whole checkpoint in `folder`, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if is_whole(path):
            return path
    return None


def finish_checkpoint(checkpoint: Path, alone: bool = True) -> None:
    """Note the digests of all files of a checkpoint.

    Args:
        checkpoint: its folder, complete.
        alone: False where other processes may still be writing their random states, which are then left out.
    """
    write_json(checkpoint / FILES, {"files": files_sha256(checkpoint, FILES if alone else "rng_state*")})


def is_whole(checkpoint: Path) -> bool:
    """Whether all that resuming needs is there and is what was written."""
    return damage(checkpoint) is None


def damage(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is missing or damaged, None if it is whole.

    Of a checkpoint of an earlier version, which has no digests, it is asked whether its files can be opened.
    """
    if (checkpoint / FILES).is_file():
        try:
            return damaged_file(checkpoint, read_json(checkpoint / FILES)["files"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return checkpoint / FILES
    file = checkpoint / _STATE
    # Anything may come out of a damaged file, and all of it means the same.
    try:
        json.loads(file.read_text(encoding="utf-8"))
        file = checkpoint / WEIGHTS
        with safe_open(str(file), framework="pt") as tensors:
            if SEAL in (tensors.metadata() or {}):
                return checkpoint / FILES  # killed before the digests were written
        for name in ("optimizer.pt", "scheduler.pt"):
            file = checkpoint / name
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return file
    return None
