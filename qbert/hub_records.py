"""The record of a packed model: which tensor has which layout, as plain JSON values.

Names are relative to the base model (full paths for modules outside of it), so that the record of a classifier also
fits the bare encoder and every other head. Equal layouts are written once and referred to by a label.

    >>> describe(packed)["tensors"]["encoder.layer.0.output.dense"]
    'w4'
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from qbert.bits import TensorSpec, spec_to_dict
from qbert.packed_layout import PackedLayout
from qbert.packed_modules import PackedTensor
from qbert.targets import base_model

METHOD = "qbert"
FORMAT_VERSION = 1
_LAYOUT_FIELDS = ("heads", "input_groups", "zero")


def describe(model: nn.Module) -> dict[str, Any]:
    """The record of `model`: format_version, specs {label: values}, tensors {name: label} and tied {name: name}.

    Raises:
        ValueError: if two packed modules have the same name relative to the base model, or a layer is tied to one
            outside of `model`.
    """
    prefix, _ = base_model(model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedTensor)}
    specs, tensors = record_layouts(prefix, {path: layer.layout for path, layer in layers.items()})
    names = {id(layer): name for layer, name in zip(layers.values(), tensors, strict=True)}
    tied: dict[str, str] = {}
    for layer in layers.values():
        if id(layer.owner) not in names:
            raise ValueError(
                f"model: the codes of {names[id(layer)]} belong to a layer outside of {type(model).__name__}; "
                "save the whole model"
            )
        if layer.owner is not layer:
            tied[names[id(layer)]] = names[id(layer.owner)]
    return {"format_version": FORMAT_VERSION, "specs": specs, "tensors": tensors, "tied": tied}


def is_complete(model: nn.Module) -> bool:
    """Whether `model` has packed layers and all of their codes: a part of a model may be tied to another part."""
    layers = [m for m in model.modules() if isinstance(m, PackedTensor)]
    inside = {id(layer) for layer in layers}
    return bool(layers) and all(id(layer.owner) in inside for layer in layers)


def record_layouts(
    prefix: str, layouts: Mapping[str, PackedLayout]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({label: values}, {name relative to the module at `prefix`: label}) of layouts by path, in their order."""
    labels: dict[str, str] = {}
    specs: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    for path, layout in layouts.items():
        name = path.removeprefix(prefix + ".") if prefix else path
        if name in tensors:
            raise ValueError(f"model: two quantized modules are called {name!r} relative to the base model; rename one")
        values = {**spec_to_dict(layout.spec), **{f: getattr(layout, f) for f in _LAYOUT_FIELDS}}
        key = json.dumps(values, sort_keys=True)
        if key not in labels:
            count = sum(label.split("-")[0] == f"w{layout.bits}" for label in specs)
            labels[key] = f"w{layout.bits}" + (f"-{count + 1}" if count else "")
            specs[labels[key]] = values
        tensors[name] = labels[key]
    return specs, tensors


def read_layout(name: str, label: str, specs: Mapping[str, Mapping[str, Any]]) -> PackedLayout:
    """The layout that the record gives to tensor `name`. Raises ValueError if the record is damaged or too new."""
    try:
        values = dict(specs[label])
        heads, input_groups, zero = (values.pop(field) for field in _LAYOUT_FIELDS)
        spec = TensorSpec(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"quantization_config: the layout {label!r} of {name} cannot be read ({type(error).__name__}: {error}); "
            "config.json is damaged or was written by another version"
        ) from error
    counts = (spec.groups, input_groups) if heads is None else (spec.groups, input_groups, heads)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts)
    if not whole or zero not in ("none", "int8", "float32") or spec.is_float:
        raise ValueError(f"quantization_config: the layout {label!r} of {name} is impossible; config.json is damaged")
    return PackedLayout(spec, heads, input_groups, zero)
