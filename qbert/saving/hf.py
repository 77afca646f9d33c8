"""Quantized models on disk: ``save_pretrained`` and ``from_pretrained`` through transformers' own quantizer registry.

A saved model is ``model.safetensors`` and ``config.json``, whose ``quantization_config`` holds the layout of every
quantized tensor under its name relative to the base model (so that `AutoModel` and every head class load it) and
SHA-256 digests of all, and a model card. The tensors are the packed ones, or float weights and grids of a model in
training. After ``import qbert`` every ``from_pretrained`` of transformers reads such a folder; without it, it finds no
weights (see `qbert.saving.folder`).

    >>> qbert.pack(student).save_pretrained("out")
    >>> model = AutoModelForSequenceClassification.from_pretrained("out")   # or qbert.load("out")

A file that is truncated, altered, of another version or not ours is refused with a ValueError that names it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qbert.bits import TensorSpec
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.encoders.weights import weight_matrix
from qbert.inference.forward import remove_fast_forwards
from qbert.layers.kind import kind_of
from qbert.layers.layout import PackedLayout
from qbert.layers.packed import PackedTensor
from qbert.layers.recurrent import open_recurrent
from qbert.layers.tables import close_tables, open_recorded
from qbert.saving.folder import NO_WEIGHTS, TRAINABLE_RECORD, check_configuration, check_folder
from qbert.saving.records import (
    GRID_PARTS,
    METHOD,
    VERSIONS,
    check_index,
    configuration,
    describe,
    find_module,
    is_complete,
    load_complete,
    read_layout,
)
from qbert.saving.sentences import is_sentence_model, load_sentence_model
from qbert.saving.trainable import load_trainable, make_trainable, refuse_lost_bits


@register_quantization_config(METHOD)
class QBertConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a quantized model: which tensors are quantized, and how.

    Attributes:
        format_version: version of the file format.
        specs: {label: layout of a tensor as plain JSON values}.
        tensors: {module name relative to the base model: label}.
        tied: {module name: name of the module whose codes it uses}.
        sha256: digest of this configuration and all tensors of the files; ``None`` before the model is saved.
        config_sha256: digest of the rest of config.json; ``None`` before the model is saved, and in older files.
        weights: name of the file of the tensors, or of its index; ``None`` likewise.
        form: ``packed``, ``trainable`` for float weights with the grids that they are quantized on, or ``float`` for
            those of a model with a changed structure (`qbert.encoders.structure`).
        prefix: path of the base model, under which a trainable one's grids lie in the files.
        replaces: files of an earlier model, where the save was killed before they were removed.

    Raises:
        ValueError: for a newer or unknown format.
    """

    def __init__(
        self,
        format_version: int | None = None,
        specs: dict[str, dict[str, Any]] | None = None,
        tensors: dict[str, str] | None = None,
        tied: dict[str, str] | None = None,
        sha256: str | None = None,
        config_sha256: str | None = None,
        weights: str | None = None,
        form: str = "packed",
        prefix: str | None = None,
        replaces: list[str] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version not in VERSIONS or unknown or quant_method != METHOD:
            found = f"field {sorted(unknown)[0]!r}" if unknown else f"format_version={format_version!r}"
            raise ValueError(
                f"quantization_config: {found} is not of format {' or '.join(map(str, VERSIONS))}, which this qbert "
                "reads; "
                "install the version of qbert that wrote the model, or pack it again"
            )
        if form not in ("packed", "trainable", "float") or not isinstance(weights, str | None):
            raise ValueError("quantization_config: 'form' or 'weights' is impossible; config.json is damaged")
        if not (isinstance(specs, dict) and isinstance(tensors, dict) and isinstance(tied, dict)) or (
            not tensors and form != "float"
        ):
            raise ValueError("quantization_config: 'specs', 'tensors' or 'tied' is missing; config.json is damaged")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.specs, self.tensors, self.tied, self.sha256 = specs, tensors, tied, sha256
        self.config_sha256, self.weights, self.form, self.prefix = config_sha256, weights, form, prefix
        self.replaces = replaces

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what older files do not have is left out where it says nothing."""
        values = super().to_dict()
        silent = {"config_sha256": None, "weights": None, "form": "packed", "prefix": None, "replaces": None}
        return {k: v for k, v in values.items() if k not in silent or v != silent[k]}

    def layout(self, name: str) -> PackedLayout:
        """The layout of the tensor of module `name`. Raises ValueError if the record is damaged."""
        return read_layout(name, self.tensors[name], self.specs)


@register_quantizer(METHOD)
class QBertHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a quantized model."""

    requires_calibration = False
    quantization_config: QBertConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize a float checkpoint on the fly. Raises ValueError."""
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: a QBertConfig describes a packed model; to quantize a float one, load it "
                "and call qbert.quantize_model and qbert.pack"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weights: the one call with the configuration that comes before transformers looks for them."""
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        elif getattr(config, "transformers_weights", None) == NO_WEIGHTS:
            del config.transformers_weights
        return config

    # What that call is named in older versions.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files is not None:
            check_folder(checkpoint_files, self.quantization_config.to_dict())
        if self.quantization_config.form == "packed":
            swap_in_packed(model, self.quantization_config)
            return
        if self.quantization_config.form == "float":
            return
        # Recurrent modules are opened later: the file holds their weights under the names of the float module.
        open_recorded(model, recorded_specs(model, self.quantization_config))
        self.files = [Path(file) for file in checkpoint_files or ()]
        known: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ours = {rf"\.{part.strip('.')}\." for part in GRID_PARTS}
        model._keys_to_ignore_on_load_unexpected = {*known, *ours}  # type: ignore[assignment] # read after the weights

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if self.quantization_config.form == "packed":
            for layer in model.modules():
                if isinstance(layer, PackedTensor):
                    layer.expand()
            _check_grids(model)
            mark_packed(model)
        elif self.quantization_config.form == "float":
            unmark_packed(model)
        else:
            make_trainable(model, self.quantization_config.to_dict(), self.files)
            del model._keys_to_ignore_on_load_unexpected
            unmark_packed(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for layer in {id(m): m for m in model.modules() if isinstance(m, PackedTensor)}.values():
            replace_everywhere(model, layer, _float_twin(layer, dtype or layer.dtype))
        close_tables(model)
        remove_fast_forwards(model)
        unmark_packed(model)
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed models cannot be trained; `qbert.unpack` gives the form that can."""
        return self.quantization_config.form != "packed"

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`; asked by a Trainer, to which it tells the way. Raises ValueError for a packed model."""
        if self.quantization_config.form == "packed":
            raise ValueError(
                "model: the model is packed, and packed weights cannot be trained; train what qbert.unpack(model) "
                "returns, and pack the result again"
            )
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed models can be compiled."""
        return True


def _check_grids(model: nn.Module) -> None:
    """Raises ValueError for a packed layer whose scales or zero points are NaN or infinite, which `pack` refuses."""
    for path, layer in model.named_modules():
        for name in ("scale", "zero") if isinstance(layer, PackedTensor) else ():
            values = getattr(layer, name, None)
            if isinstance(values, Tensor) and not values.is_meta and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{path}.{name} holds NaN or infinity, so the files are damaged; copy the folder again"
                )


def recorded_specs(model: nn.Module, config: QBertConfig) -> dict[str, TensorSpec]:
    """What `config` says of each tensor, under its name and under its path in `model`."""
    prefix, _ = base_model(model)
    return {path: config.layout(name).spec for name in config.tensors for path in (name, f"{prefix}.{name}")}


def swap_in_packed(model: nn.Module, config: QBertConfig) -> None:
    """Put empty packed layers in the places that `config` names (the model may be on the meta device).

    Names outside of the base model, and optional parts such as a pooler, may be absent: then another head is loaded.

    Raises:
        ValueError: if a name does not fit the model.
    """
    prefix, base = base_model(model)
    specs = recorded_specs(model, config)
    open_recurrent(model, specs.keys())
    open_recorded(model, specs)
    placed: dict[str, PackedTensor] = {}
    for name in sorted(config.tensors, key=lambda n: n in config.tied):
        path = find_module(model, prefix, base, name)
        if path is None:
            continue
        source = placed.get(config.tied[name]) if name in config.tied else None
        if name in config.tied and source is None:
            raise ValueError(f"quantization_config: {name} is tied to {config.tied[name]}, which is not packed")
        placed[name] = _empty_twin(model.get_submodule(path), name, config.layout(name), source)
        replace_everywhere(model, model.get_submodule(path), placed[name])
    if not placed:
        raise ValueError(
            f"quantization_config: none of its tensors exists in {type(model).__name__}; "
            "config.json belongs to another model"
        )
    _pack_tied_heads(model)


def _empty_twin(module: nn.Module, name: str, layout: PackedLayout, source: PackedTensor | None) -> PackedTensor:
    kind = kind_of(module)
    if kind is None or not kind.covers(module):
        raise ValueError(f"quantization_config: {name} is a {type(module).__name__}, no layer that could be packed")
    rows, columns = weight_matrix(module).shape
    if layout.groups > rows or columns % layout.input_groups or (layout.heads and rows % layout.heads):
        raise ValueError(f"quantization_config: the layout of {name} does not fit its shape [{rows}, {columns}]")
    with torch.device("meta"):
        return kind.packed.shaped_as(module, layout, source)


def _float_twin(layer: PackedTensor, dtype: torch.dtype) -> nn.Module:
    twin: Any = layer.float_module()
    if getattr(layer, "bias", None) is not None:
        twin.bias = layer.bias
    twin.weight = nn.Parameter(layer.stored(layer.quantized_weight()).to(dtype))
    return twin.eval()  # type: ignore[no-any-return]


def _pack_tied_heads(model: nn.Module) -> None:
    """Let a head that transformers ties to a packed table use its codes, and take the pair off transformers' list."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(ties.items()):
        (head_path, leaf), table_path = target.rsplit(".", 1), source.rsplit(".", 1)[0]
        head, table = model.get_submodule(head_path), model.get_submodule(table_path)
        if leaf != "weight" or not isinstance(table, PackedTensor):
            continue
        if type(head) is nn.Linear:
            layout = replace(table.layout, spec=replace(table.spec, activation_bits=None, activation_range=None))
            replace_everywhere(model, head, _empty_twin(head, head_path, layout, table))
        ties.pop(target)


def mark_packed(model: nn.Module) -> None:
    """Make every transformers model inside of `model` that has packed layers saveable by ``save_pretrained``."""
    from transformers import PreTrainedModel

    # Inside out, because a model and its encoder share one configuration, which must name the head too.
    for inner in reversed(list(model.modules())):
        if isinstance(inner, PreTrainedModel) and any(isinstance(m, PackedTensor) for m in inner.modules()):
            module: Any = inner
            if not is_complete(module):
                continue  # saving it alone is refused by name
            config = QBertConfig(**describe(module))
            module.config.quantization_config = config
            module.hf_quantizer = QBertHfQuantizer(config, pre_quantized=True)
            module.is_quantized, module.quantization_method = True, METHOD
            _pack_tied_heads(module)


def unmark_packed(model: nn.Module) -> None:
    """Undo `mark_packed`."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("hf_quantizer", "quantization_method", "is_quantized"):
                module.__dict__.pop(name, None)
            for name in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(name, None)


def load(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model in a folder or on the hub, of the class that was saved: packed, trainable, or a SentenceTransformer.

    Unlike ``from_pretrained`` it refuses anything that is not a complete quantized model.

    Args:
        path: folder that ``save_pretrained``, ``Trainer.save_model`` or `save_trainable` wrote, or a hub name.
        **kwargs: passed on to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...).

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the model is not quantized, or its files are damaged or incomplete.
        OSError: if there is no such model.
    """
    folder = Path(path) / kwargs.get("subfolder", "")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        raise ValueError(f"{path} is a folder without config.json; name the folder that holds the model")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith((".", "~"))):
        raise FileNotFoundError(f"{path} is not there; name a folder that holds a model, or a hub name")
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if k in kwargs}
    values = configuration(path, **hub)
    record = values.get("quantization_config")
    method = record.get("quant_method") if isinstance(record, dict) else record
    check_index(folder, record.get("weights") if isinstance(record, dict) else None)
    if (folder / TRAINABLE_RECORD).is_file() and record is None:
        return load_trainable(folder, **{k: v for k, v in kwargs.items() if k != "subfolder"})
    if method != METHOD or not isinstance(record, dict):
        refuse_lost_bits(folder)
        raise ValueError(f"{path} is not a packed model (qbert did not quantize it); load it with from_pretrained")
    if (folder / "config.json").is_file():
        check_configuration(folder)
    if is_sentence_model(path, **hub):
        return load_sentence_model(path, **kwargs)
    return load_complete(path, values, **kwargs)
