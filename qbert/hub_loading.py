"""What every way of loading has in common: the class that was saved, all of its tensors, modules by recorded name.

>>> model = load_complete("out", configuration("out"))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qbert.files import read_json


def configuration(path: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """The values in ``config.json`` of a folder or hub name; keyword arguments say where on the hub.

    Raises:
        OSError: if there is none; ValueError: if it does not hold a table of values.
    """
    import transformers

    values, _ = transformers.PreTrainedConfig.get_config_dict(path, **hub)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config.json does not hold the configuration of a model; copy the folder again")
    return values


def check_index(folder: Path) -> None:
    """Check the index of a model in several files, if `folder` has one, before transformers trips over it.

    Raises:
        ValueError: if it is damaged, or names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} does not say which file holds which tensor; copy or download the folder again")
    for name in sorted(set(files.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there; copy or download the folder again")


def load_complete(path: str | os.PathLike[str], values: Mapping[str, Any], **kwargs: Any) -> Any:
    """The model at `path`, of the first class among ``architectures`` of its configuration `values`.

    Args:
        path: folder or hub name.
        values: what `configuration` returned.
        **kwargs: passed on to ``from_pretrained``.

    Raises:
        ValueError: if transformers has no such class, or the files hold other tensors than the class has.
    """
    import transformers

    names = values.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) else names
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known and name != "AutoModel":
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model class {name!r}, which config.json names; "
            "install the version that wrote it, or load with from_pretrained of your own class"
        )
    model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)  # type: ignore[union-attr]
    incomplete = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if incomplete:
        raise ValueError(f"{path}: tensor {incomplete[0]!r} does not fit {name}; the files are not one model")
    return model


def find_module(model: nn.Module, prefix: str, base: nn.Module, name: str) -> str | None:
    """Path in `model` of a recorded name: relative to its base model at `prefix`, or of a module outside of it.

    ``None`` for what another head or a base model without its optional parts does not have.

    Raises:
        ValueError: if a part that the model has does not contain `name`.
    """
    for path in ((f"{prefix}.{name}" if prefix else name), name):
        try:
            model.get_submodule(path)
            return path
        except AttributeError:
            continue
    first = name.split(".")[0]
    if "." in name and any(isinstance(getattr(parent, first, None), nn.Module) for parent in (base, model)):
        raise ValueError(
            f"quantization_config: {type(model).__name__} has no module {name!r}; config.json belongs to another model"
        )
    return None
