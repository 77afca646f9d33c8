"""Students with fewer layers, started from the teacher's own.

    >>> student = student_with_layers(teacher, [0, 2, 4])

Sources: Sanh et al. 2019, DistilBERT, section 3 (every other layer); Sun et al. 2019 (the first k layers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import nn

from qbert.encoders.structure import changes, of_layers, replace_record
from qbert.encoders.targets import base_model, main_layers
from qbert.encoders.zeros import note_zeros, noted_zeros

Model = TypeVar("Model", bound=nn.Module)
_DEPTH_NAMES = ("num_hidden_layers", "n_layers")


def student_with_layers(teacher: Model, layers: Sequence[int]) -> Model:
    """A copy of `teacher` that keeps only some of its encoder layers (and everything outside of them).

    Args:
        teacher: any encoder with a list of layers, with or without a head.
        layers: which to keep, from 0, in the order they will be applied; negative numbers count from the end.

    Returns:
        A model of the same class, in evaluation mode, whose config says its new depth, so that it can be saved.

    Raises:
        ValueError: no layers, a layer that does not exist, or layers that share their weights (ALBERT), of which
            there is only one to keep: lower ``config.num_hidden_layers`` instead.
    """
    stem, found = main_layers(teacher)
    _, base = base_model(teacher)
    config: Any = base.config
    depth = next((getattr(config, name) for name in _DEPTH_NAMES if hasattr(config, name)), len(found))
    if depth != len(found):
        raise ValueError(
            f"{type(teacher).__name__} applies {len(found)} shared layer(s) {depth} times; to make it shallower, set "
            "config.num_hidden_layers"
        )
    if not layers:
        raise ValueError("layers is empty; keep at least one")
    wrong = next((i for i in layers if not -len(found) <= i < len(found)), None)
    if wrong is not None:
        raise ValueError(f"the teacher has no layer {wrong}; it has {len(found)}, numbered 0 to {len(found) - 1}")
    student = copy.deepcopy(teacher)
    _, base = base_model(student)
    parent_name, _, list_name = stem.rpartition(".")
    parent = base.get_submodule(parent_name)
    kept = cast(nn.ModuleList, getattr(parent, list_name))
    setattr(parent, list_name, nn.ModuleList(copy.deepcopy(kept[i]) for i in layers))
    replace_record(student, of_layers(changes(teacher), stem, found, layers))
    (zeros,) = of_layers([{"change": "zeros", "names": noted_zeros(teacher)}], stem, found, layers)
    note_zeros(student, zeros["names"])
    for holder in (base, student):
        for name in _DEPTH_NAMES:
            if hasattr(getattr(holder, "config", None), name):
                setattr(holder.config, name, len(layers))
    return student.eval()
