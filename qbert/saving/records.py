"""The record of a packed model: which tensor has which layout, as plain JSON values.

Names are relative to the base model (full paths for modules outside of it), so that the record of a classifier also
fits the bare encoder and every other head. Equal layouts are written once and referred to by a label.

    >>> describe(packed)["tensors"]["encoder.layer.0.output.dense"]
    'w4'
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qbert.bits import TensorSpec, spec_to_dict
from qbert.encoders.targets import base_model, join_path
from qbert.files import read_json
from qbert.layers.kind import TrainableLayer
from qbert.layers.layout import PackedLayout, layout_of
from qbert.layers.packed import PackedTensor

METHOD = "qbert"
FORMAT_VERSION = 1
SPARSE_VERSION = 2  # of models with a 2:4 matrix, which a reader of version 1 would take for damaged
VERSIONS = (FORMAT_VERSION, SPARSE_VERSION)
GRID_PARTS = (".weight_quantizer.", ".activation_quantizer.")
_LAYOUT_FIELDS = ("heads", "input_groups", "zero")


def is_quantized(model: nn.Module) -> bool:
    """Whether a layer of `model` is fake-quantized or packed."""
    return any(isinstance(m, (PackedTensor, TrainableLayer)) for m in model.modules())


def is_trainable(model: nn.Module) -> bool:
    """Whether a layer of `model` is fake-quantized."""
    return any(isinstance(m, TrainableLayer) for m in model.modules())


def describe(model: nn.Module) -> dict[str, Any]:
    """The record of `model`: format_version, specs {label: values}, tensors {name: label} and tied {name: name}.

    That of a fake-quantized model also has ``form`` and the ``prefix`` of its base model, under which its grids lie;
    that of a float model, whose structure alone is recorded (in the config), has ``form`` and nothing else to tell.

    Raises:
        ValueError: if two quantized modules have the same name relative to the base model, a layer is tied to one
            outside of `model`, or some layers are packed and others fake-quantized.
    """
    prefix, _ = base_model(model)
    if is_trainable(model):
        mixed = next((path for path, m in model.named_modules() if isinstance(m, PackedTensor)), None)
        if mixed is not None:
            raise ValueError(f"model: {mixed} is packed and other layers are not; pack or unpack the whole model")
        found = {p: m for p, m in model.named_modules() if isinstance(m, TrainableLayer)}
        for path, trained in found.items():
            if len(trained.matrix) != len(trained.weight_quantizer.row_group):
                raise ValueError(f"model: {path}: {trained.weight_quantizer.resized(len(trained.matrix))}")
        specs, tensors = record_layouts(prefix, {path: layout_of(trained) for path, trained in found.items()})
        record = {"format_version": FORMAT_VERSION, "specs": specs, "tensors": tensors, "tied": {}}
        return {**record, "form": "trainable", "prefix": prefix}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedTensor)}
    if not layers:
        return {"format_version": FORMAT_VERSION, "specs": {}, "tensors": {}, "tied": {}, "form": "float"}
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
    version = SPARSE_VERSION if any("sparsity" in spec for spec in specs.values()) else FORMAT_VERSION
    return {"format_version": version, "specs": specs, "tensors": tensors, "tied": tied}


def file_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is written of a float or fake-quantized `model`: `state`, or its own, with grids that layers share for each.

    transformers knows which weights are tied, but not that their grids are.
    """
    content = dict(model.state_dict() if state is None else state)
    return {k: v.clone() if any(part in k for part in GRID_PARTS) else v for k, v in content.items()}


def counts_by_bits(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Bits -> (tensors, values) of the quantized tensors of `model`, each shared one once."""
    counts: dict[int, tuple[int, int]] = {}
    seen: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, PackedTensor):
            key, bits, values = id(layer.owner), layer.layout.bits, layer.rows * layer.columns
        elif isinstance(layer, TrainableLayer):
            key, bits, values = id(layer.weight), layer.weight_quantizer.bits, layer.weight.numel()
        else:
            continue
        if key not in seen:
            seen.add(key)
            tensors, before = counts.get(bits, (0, 0))
            counts[bits] = tensors + 1, before + values
    return counts


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
        if layout.sparsity:
            values["sparsity"] = layout.sparsity
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
        sparsity = values.pop("sparsity", None)
        spec = TensorSpec(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"quantization_config: the layout {label!r} of {name} cannot be read ({type(error).__name__}: {error}); "
            "config.json is damaged or was written by another version"
        ) from error
    counts = (spec.groups, input_groups) if heads is None else (spec.groups, input_groups, heads)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts)
    impossible = zero not in ("none", "int8", "float32") or sparsity not in (None, "2:4") or spec.is_float
    if not whole or impossible:
        raise ValueError(f"quantization_config: the layout {label!r} of {name} is impossible; config.json is damaged")
    return PackedLayout(spec, heads, input_groups, zero, sparsity)


def configuration(path: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """The values in ``config.json`` of a folder or hub name; keyword arguments say where on the hub.

    Raises:
        OSError: if there is none; ValueError: if it does not hold a table of values.
    """
    import transformers

    local = Path(path) / hub.get("subfolder", "") / "config.json"
    if local.is_file():
        values = read_json(local)
    else:
        values, _ = transformers.PreTrainedConfig.get_config_dict(path, **hub)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config.json does not hold the configuration of a model; copy the folder again")
    return values


def check_index(folder: Path, weights: str | None = None) -> None:
    """Check the index of a model in several files, if that is what `folder` holds, before transformers trips over it.

    Args:
        folder: of the model.
        weights: name of the file of its tensors or of its index; as transformers looks for them where None.

    Raises:
        ValueError: if it is damaged, or names a file that is not there or outside of the folder.
    """
    index = folder / (weights or "model.safetensors.index.json")
    if not index.name.endswith(".index.json") or not index.is_file():
        return
    if weights is None and (folder / "model.safetensors").is_file():
        return  # what is left of another model
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if isinstance(content, dict) and not isinstance(content.get("metadata"), dict):
        files = None  # transformers reads it
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} does not say which file holds which tensor; copy or download the folder again")
    for name in sorted(set(files.values())):
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {name}, outside of its folder; copy or download the folder again")
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
    import transformers.models.auto.modeling_auto  # which has the students of this library registered

    from qbert.encoders.own_classes import OWN_CLASSES

    names = values.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) else names
    model_class: Any = OWN_CLASSES.get(name, getattr(transformers, name, None)) if isinstance(name, str) else None
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known and name != "AutoModel":
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model class {name!r}, which config.json names; "
            "install the version that wrote it, or load with from_pretrained of your own class"
        )
    # Foreign code that config.json may name is never run, and nobody is asked to.
    kwargs = {"trust_remote_code": False, **kwargs} if name == "AutoModel" else kwargs
    try:
        model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, ValueError) and "\n" not in text:
            if str(path) in text:
                raise
            if "quantization_config" in text:
                raise ValueError(f"{path}: {text}") from error
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if key in (*values, "num_labels"))
        if "ignore_mismatched_sizes" in text and given:
            with_others = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
            tensor, held, wanted = min(model_class.from_pretrained(path, **with_others)[1]["mismatched_keys"])
            raise ValueError(
                f"{path}: tensor {tensor!r} has the shape {list(held)} in the files, and {list(wanted)} with {given}; "
                "leave that argument out"
            ) from error
        raise ValueError(
            f"{path} cannot be loaded as {name} ({text.splitlines()[0]}); copy the folder again"
        ) from error
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
    for path in (join_path(prefix, name), name):
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
