"""Fake-quantized models on disk: an ordinary float checkpoint, with the grids in a file beside it.

A model in training keeps float weights, so `save_trainable` writes them as transformers does, under their usual names:
the folder is a valid float checkpoint for everybody. Scales, zero points and static activation ranges go to
``qbert_grids.safetensors``, their layout and a SHA-256 digest of everything to ``qbert_grids.json``; `qbert.load`
reads all of it back into the same trainable model. (The deployed form is saved by ``qbert.pack(student)``.)

    >>> save_trainable(student, "checkpoint")
    >>> student = qbert.load("checkpoint")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.encoders.weights import is_table, weight_matrix
from qbert.files import read_json, write_json, write_whole
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.layout import PackedLayout, layout_of
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.recurrent import open_recurrent
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import row_group_of
from qbert.saving.folder import GRIDS, TRAINABLE_RECORD, check_digest, digest, output_folder
from qbert.saving.records import FORMAT_VERSION, configuration, find_module, load_complete, read_layout, record_layouts

RECORD = TRAINABLE_RECORD
_GRID_PARTS = (".weight_quantizer.", ".activation_quantizer.")


def save_trainable(student: Any, folder: str | os.PathLike[str]) -> None:
    """Write a fake-quantized transformers model so that `qbert.load` gives it back and others read its float weights.

    Args:
        student: what `qbert.quantize_model` returned, trained or not.
        folder: made if it does not exist.

    Raises:
        ValueError: if the model has no fake-quantized layer, or `folder` is a file; TypeError if it is not a
            transformers model.
    """
    from transformers import PreTrainedModel

    if not isinstance(student, PreTrainedModel):
        raise TypeError(f"student: {type(student).__name__} is not a transformers model; save its state_dict instead")
    prefix, _ = base_model(student)
    layers = {p: m for p, m in student.named_modules() if isinstance(m, TrainableLayer)}
    if not layers:
        raise ValueError(f"student: {type(student).__name__} has no fake-quantized layer; call quantize_model first")
    target = output_folder("folder", folder)
    (target / RECORD).unlink(missing_ok=True)
    state = {k: v for k, v in student.state_dict().items() if not any(part in k for part in _GRID_PARTS)}
    student.save_pretrained(target, state_dict=state)
    grids: dict[str, Tensor] = {}
    for path, layer in layers.items():
        name = path.removeprefix(prefix + ".") if prefix else path
        grids[f"{name}.scale"] = layer.weight_quantizer.scale.detach().cpu().clone()
        grids[f"{name}.zero"] = layer.weight_quantizer.zero.detach().cpu().clone()
        activation = getattr(layer, "activation_quantizer", None)
        if activation is not None and activation.mode == "static":
            grids[f"{name}.input_scale"] = activation.scale.detach().cpu().clone()
            grids[f"{name}.input_zero"] = activation.zero.detach().cpu().clone()
    write_whole(target / GRIDS, lambda aside: save_file(grids, aside))
    specs, tensors = record_layouts(prefix, {path: layout_of(layer) for path, layer in layers.items()})
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "specs": specs, "tensors": tensors}
    write_json(target / RECORD, {**record, "sha256": digest(_files(target), record)})


def load_trainable(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model that `save_trainable` wrote, in eval mode; keyword arguments go to ``from_pretrained``.

    Raises:
        ValueError: if a file is damaged, of another version, or does not belong to the others.
    """
    source = Path(folder)
    record = read_json(source / RECORD)
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION or "tensors" not in record:
        raise ValueError(f"{source / RECORD} is not of format {FORMAT_VERSION}; it is damaged or of another version")
    check_digest(_files(source), record)
    model = load_complete(source, configuration(source), **kwargs)
    grids = load_file(source / GRIDS)
    prefix, base = base_model(model)
    open_recurrent(model, {path for name in record["tensors"] for path in (name, f"{prefix}.{name}")})
    quantizers: dict[int, WeightQuantizer] = {}
    for name, label in record["tensors"].items():
        path = find_module(model, prefix, base, name)
        if path is None:
            raise ValueError(f"{source / RECORD}: {type(model).__name__} has no module {name!r}; copy the folder again")
        module: Any = model.get_submodule(path)
        layout = read_layout(name, label, record["specs"])
        # Layers that share a weight share its grids too, as quantize_model has it.
        quantizer = quantizers.setdefault(id(module.weight), _quantizer(name, layout, module, grids))
        replace_everywhere(model, module, _converted(name, layout, module, quantizer, grids))
    return model.eval()


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("model*.safetensors")), folder / GRIDS]


def _quantizer(name: str, layout: PackedLayout, module: Any, grids: dict[str, Tensor]) -> WeightQuantizer:
    rows = len(weight_matrix(module))
    group = row_group_of(torch.arange(rows), rows, layout.groups, layout.heads)
    quantizer = WeightQuantizer(group, layout.input_groups, layout.spec)
    with torch.no_grad():
        quantizer.scale.copy_(grids[f"{name}.scale"])
        quantizer.zero.copy_(grids[f"{name}.zero"])
    return quantizer.to(module.weight.device)


def _converted(
    name: str, layout: PackedLayout, module: Any, quantizer: WeightQuantizer, grids: dict[str, Tensor]
) -> nn.Module:
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{RECORD}: {name} is a {type(module).__name__}, no layer that could be quantized")
    activation = None
    if layout.spec.activation_bits is not None and not is_table(module):
        activation = ActivationQuantizer(layout.spec.activation_bits, layout.spec.activation_range or "dynamic")
        if activation.mode == "static":
            activation.scale.copy_(grids[f"{name}.input_scale"])
            activation.zero.copy_(grids[f"{name}.input_zero"])
        activation.to(module.weight.device)
    twin: Any = kind.trainable.from_float(module, quantizer, activation)
    return twin  # type: ignore[no-any-return]
