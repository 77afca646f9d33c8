"""Fake-quantized models on disk: float weights and their grids in one file, their bits in ``config.json``.

A model in training keeps float weights; scales, zero points and static activation ranges lie beside them under the
names that they have in the model, so that a Trainer resumes from the very same file. ``from_pretrained`` and
`qbert.load` read all of it back into the same trainable model. (The deployed form is ``qbert.pack(student)``.)

    >>> student.save_pretrained("checkpoint")        # or Trainer.save_model, or `save_trainable`
    >>> student = qbert.load("checkpoint")

Earlier versions wrote an ordinary float checkpoint with the grids in ``qbert_grids.safetensors`` and their layout in
``qbert_grids.json``, which `load_trainable` still reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.encoders.weights import is_table, weight_matrix
from qbert.files import read_json
from qbert.layers.kind import kind_of
from qbert.layers.layout import PackedLayout
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.recurrent import open_recurrent
from qbert.quantize import convert_tied
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import row_group_of
from qbert.saving.folder import GRIDS, TRAINABLE_RECORD, check_digest, output_folder
from qbert.saving.records import (
    FORMAT_VERSION,
    GRID_PARTS,
    configuration,
    find_module,
    is_trainable,
    load_complete,
    read_layout,
)

RECORD = TRAINABLE_RECORD
_GRID_NAMES = {
    "scale": "weight_quantizer.scale",
    "zero": "weight_quantizer.zero",
    "input_scale": "activation_quantizer.scale",
    "input_zero": "activation_quantizer.zero",
}


def save_trainable(student: Any, folder: str | os.PathLike[str]) -> None:
    """Write a fake-quantized transformers model so that `qbert.load` and ``from_pretrained`` give it back.

    The same as ``student.save_pretrained(folder)``, for a `student` that is checked first.

    Args:
        student: what `qbert.quantize_model` returned, trained or not.
        folder: made if it does not exist.

    Raises:
        ValueError: if the model has no fake-quantized layer, or `folder` is a file; TypeError if it is not a
            transformers model; OSError if the folder cannot be written.
    """
    from transformers import PreTrainedModel

    if not isinstance(student, PreTrainedModel):
        raise TypeError(f"student: {type(student).__name__} is not a transformers model; save its state_dict instead")
    if not is_trainable(student):
        raise ValueError(f"student: {type(student).__name__} has no fake-quantized layer; call quantize_model first")
    student.save_pretrained(output_folder("folder", folder))


def make_trainable(model: Any, record: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Turn float layers of `model`, whose weights are loaded, into the fake-quantized ones of a record.

    Args:
        model: of the class that was saved, its base model, or another head on it.
        record: what `qbert.saving.records.describe` returned for the saved model.
        files: safetensors files with its grids.

    Raises:
        ValueError: if a grid is missing, or a name does not fit the model.
    """
    stored: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            ours = [name for name in tensors.keys() if any(part in name for part in GRID_PARTS)]  # noqa: SIM118
            stored |= {name: tensors.get_tensor(name) for name in ours}
    grids: dict[str, Tensor] = {}
    for name in record["tensors"]:
        path = f"{record.get('prefix')}.{name}"
        path = path if f"{path}.{_GRID_NAMES['scale']}" in stored else name
        grids |= {f"{name}.{own}": stored[key] for own, n in _GRID_NAMES.items() if (key := f"{path}.{n}") in stored}
    _convert(model, record, grids, "quantization_config", whole=False)
    convert_tied(model)


def refuse_lost_bits(folder: Path) -> None:
    """Tell apart a folder that transformers wrote from a fake-quantized model before qbert took part in it.

    Raises:
        ValueError: its file holds grids, but nothing says of how many bits.
    """
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            lost = any(part in name for name in tensors.keys() for part in GRID_PARTS)  # noqa: SIM118
    except (OSError, SafetensorError):
        return
    if lost:
        raise ValueError(
            f"{folder} holds the weights and grids of a fake-quantized model, but not its bits; make the student as "
            "before with quantize_model, load the file with load_state_dict, and save it again"
        )


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
    _convert(model, record, load_file(source / GRIDS), str(source / RECORD), whole=True)
    return model.eval()


def _convert(model: Any, record: Mapping[str, Any], grids: Mapping[str, Tensor], where: str, whole: bool) -> None:
    prefix, base = base_model(model)
    open_recurrent(model, {path for name in record["tensors"] for path in (name, f"{prefix}.{name}")})
    quantizers: dict[int, WeightQuantizer] = {}
    for name, label in record["tensors"].items():
        path = find_module(model, prefix, base, name)
        if path is None:
            if whole:
                raise ValueError(f"{where}: {type(model).__name__} has no module {name!r}; copy the folder again")
            continue
        module: Any = model.get_submodule(path)
        layout = read_layout(name, label, record["specs"])
        missing = next((n for n in ("scale", "zero") if f"{name}.{n}" not in grids), None)
        if missing:
            raise ValueError(f"{where}: the {missing} of {name} is in no file; copy the folder again")
        # Layers that share a weight share its grids too, as quantize_model has it.
        quantizer = quantizers.setdefault(id(module.weight), _quantizer(name, layout, module, grids))
        replace_everywhere(model, module, _converted(name, layout, module, quantizer, grids))


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("model*.safetensors")), folder / GRIDS]


def _quantizer(name: str, layout: PackedLayout, module: Any, grids: Mapping[str, Tensor]) -> WeightQuantizer:
    rows = len(weight_matrix(module))
    group = row_group_of(torch.arange(rows), rows, layout.groups, layout.heads)
    quantizer = WeightQuantizer(group, layout.input_groups, layout.spec)
    with torch.no_grad():
        quantizer.scale.copy_(grids[f"{name}.scale"])
        quantizer.zero.copy_(grids[f"{name}.zero"])
    return quantizer.to(module.weight.device)


def _converted(
    name: str, layout: PackedLayout, module: Any, quantizer: WeightQuantizer, grids: Mapping[str, Tensor]
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
