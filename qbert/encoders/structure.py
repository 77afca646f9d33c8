"""How a model differs from what its class builds: recorded in its config, and built again whenever it is loaded.

A pruned layer has other widths than its config says, a factorised matrix is two, a shared layer is applied several
times. transformers can say none of that, so such a model saves and does not load. Here every change is an entry of
``config.qbert_structure``, a list in the order in which the changes were made; `rebuild` makes them on a model that was
just built from the config (by ``from_pretrained``, ``from_config``, or its class), before there are weights. Names are
relative to the base model, so that `AutoModel` and every head find them.

    >>> change(model, "factors", ranks={"encoder.layer.0.output.dense": 64})
    >>> model.save_pretrained("out"); qbert.load("out")
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qbert.encoders.targets import base_model

STRUCTURE = "qbert_structure"
# Name of a change -> module whose `build(base, **values)` makes it.
_BUILDERS = {
    "factors": "qbert.encoders.factors",
    "sharing": "qbert.encoders.sharing",
    "tables": "qbert.encoders.tables",
    "widths": "qbert.encoders.widths",
}


def changes(model: nn.Module) -> list[dict[str, Any]]:
    """The changes that the config of `model` records, oldest first."""
    _, base = base_model(model)
    return list(getattr(getattr(base, "config", None), STRUCTURE, None) or ())


def record(model: nn.Module, kind: str, **values: Any) -> None:
    """Write a change that was made to `model` into its config.

    Args:
        model: a transformers model, changed already.
        kind: which builder makes the change again.
        **values: what that builder is called with; plain JSON values.
    """
    if kind not in _BUILDERS:
        raise ValueError(f"kind={kind!r} is no change of a structure; use one of {', '.join(_BUILDERS)}")
    replace_record(model, [*changes(model), {"change": kind, **values}])


def replace_record(model: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Let the config of `model` (and of its base model, if that is another one) record `entries`."""
    _, base = base_model(model)
    for holder in (base, model):
        config: Any = getattr(holder, "config", None)
        if config is not None and entries:
            setattr(config, STRUCTURE, [dict(entry) for entry in entries])
        elif config is not None:
            config.__dict__.pop(STRUCTURE, None)


def refuse_changed(model: nn.Module, maker: str) -> None:
    """Raise ValueError where layers were pruned, factorised or shared: a model of another shape is made before that."""
    if changes(model):
        kinds = ", ".join(sorted({str(entry["change"]) for entry in changes(model)}))
        raise ValueError(f"teacher: its layers were changed already ({kinds}); call {maker} on the model before that")


def of_layers(
    entries: Sequence[Mapping[str, Any]], stem: str, layers: nn.ModuleList, kept: Sequence[int]
) -> list[dict[str, Any]]:
    """The changes `entries` of a model of which some layers are kept, each as a copy of its own.

    Args:
        entries: what `changes` returned for the model.
        stem: dotted name of its list of layers.
        layers: that list.
        kept: depths of the layers that are kept, bottom first.
    """
    names = [next(name for name, m in layers._modules.items() if m is layers[depth]) for depth in kept]

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, value in values.items():
            inside = re.fullmatch(rf"{re.escape(stem)}\.(\d+)(\..*)?", path)
            places = [i for i, name in enumerate(names) if inside and name == inside[1]]
            found |= {f"{stem}.{i}{inside[2] or ''}": value for i in places} if inside else {path: value}
        return found

    result = []
    for entry in entries:
        if entry["change"] != "sharing":  # copies are not shared
            result.append({k: renamed(v) if isinstance(v, Mapping) else v for k, v in entry.items()})
    return result


def rebuild(base: nn.Module) -> None:
    """Make the changes that the config of `base` records on its freshly built modules, which have no weights yet.

    Raises:
        ValueError: for a change that is not known, or does not fit the model.
    """
    for entry in changes(base):
        kind = entry.get("change") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or kind not in _BUILDERS:
            raise ValueError(
                f"config.json: {STRUCTURE} holds the change {kind!r}, which this qbert does not know; install the "
                "version that wrote the model"
            )
        values = {name: value for name, value in entry.items() if name != "change"}
        try:
            importlib.import_module(_BUILDERS[kind]).build(base, **values)
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"config.json: the change {kind!r} of {STRUCTURE} does not fit {type(base).__name__} ({error}); "
                "config.json is damaged or belongs to another model"
            ) from error
