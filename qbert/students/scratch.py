"""A small encoder of the teacher's class with random weights: what every start from the teacher's own is compared with.

    >>> student = small(teacher, layers=4, width=312, intermediate=1200)

Source: Turc et al. 2019, "Well-Read Students Learn Better: On the Importance of Pre-training Compact Models"
(BERT-small and its siblings), whose students are pre-trained before they are distilled; this one is not.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from qbert.encoders.structure import refuse_changed
from qbert.encoders.targets import base_model

Model = TypeVar("Model", bound=nn.Module)
# What families call their sizes: (as BERT does, as DistilBERT does).
_SIZES = {
    "layers": ("num_hidden_layers", "n_layers"),
    "width": ("hidden_size", "dim"),
    "heads": ("num_attention_heads", "n_heads"),
    "intermediate": ("intermediate_size", "hidden_dim"),
}


def small(
    teacher: Model,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    intermediate: int | None = None,
    seed: int = 0,
) -> Model:
    """A new model of the teacher's class, with its labels and vocabulary.

    Args:
        teacher: a transformers encoder, with or without a head.
        layers, width, heads, intermediate: sizes; the teacher's where None.
        seed: of the weights.

    Returns:
        The student in evaluation mode.

    Raises:
        ValueError: a size below 1, one that the teacher's family does not have, or heads that do not divide the width.
    """
    config: Any = copy.deepcopy(getattr(base_model(teacher)[1], "config", None))
    if config is None:
        raise ValueError(f"teacher: {type(teacher).__name__} has no config; give a transformers encoder")
    refuse_changed(teacher, "small")
    for name, value in (("layers", layers), ("width", width), ("heads", heads), ("intermediate", intermediate)):
        if value is None:
            continue
        key = next((key for key in _SIZES[name] if hasattr(config, key)), None)
        if key is None or value < 1:
            reason = "use at least 1" if key else f"{type(teacher).__name__} has no such size"
            raise ValueError(f"{name}={value} is not possible; {reason}")
        kinds = getattr(config, "layer_types", None) if name == "layers" else None
        if kinds:  # one of each layer
            if value > len(kinds):
                raise ValueError(f"layers={value} is not possible; the teacher's config lists {len(kinds)} layer_types")
            config.layer_types = list(kinds[:value])
        setattr(config, key, value)
    size, parts = (next((getattr(config, k) for k in _SIZES[n] if hasattr(config, k)), 1) for n in ("width", "heads"))
    if size % parts:
        raise ValueError(
            f"width={size} is not possible with {parts} heads; use a multiple, such as {size // parts * parts}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(teacher)(config).eval().to(next(teacher.parameters()).device)
