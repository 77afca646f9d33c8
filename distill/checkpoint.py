"""Checkpoints of a distillation: student, projections and automatic weights in one safetensors file, no pickled code.

A checkpoint counts as good when everything that resuming needs is there and can be opened; one that was cut off by a
full disk or a killed process is passed over.

    >>> last_good_checkpoint("out")
    PosixPath('out/checkpoint-120')
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

WEIGHTS = "distillation.safetensors"
TEACHER = "teacher.safetensors"
_STATE = "trainer_state.json"


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the tensors of `module` (tied ones once), aside first, then renamed.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(f"the weight {name} is not finite; the checkpoint {path.parent} is not written")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_model(module, str(aside), metadata={"format": "pt"})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_weights(module: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into a module of the same make.

    Raises:
        ValueError: the file is missing, damaged, or of another student or recipe.
    """
    try:
        missing, unexpected = load_model(module, str(path), strict=False)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint file {path} cannot be read ({error}); resume from an earlier one") from error
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} is of another student: {str(error).splitlines()[-1].strip()}") from error
    if missing or unexpected:
        name = sorted([*missing, *unexpected])[0]
        raise ValueError(f"checkpoint {path} is of another student or recipe (tensor {name}); use the same ones")


def last_good_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The latest whole checkpoint in `folder`, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if is_whole(path):
            return path
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether all that resuming needs is there and can be opened."""
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        with safe_open(str(checkpoint / WEIGHTS), framework="pt") as file:
            file.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError):
        return False
    return True
