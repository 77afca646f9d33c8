"""Packed models on disk: ``save_pretrained`` and ``from_pretrained`` through transformers' own quantizer registry.

A saved model is ``model.safetensors`` with the packed tensors, ``config.json`` whose ``quantization_config`` holds the
layout of every packed tensor under its name relative to the base model (so that `AutoModel` and every head class load
it) and a SHA-256 digest of both, and a model card. After ``import qbert`` every ``from_pretrained`` of transformers
reads such a folder; without it transformers only warns and returns random weights, which `load` cannot do.

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
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.inference.forward import remove_fast_forwards
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.layout import PackedLayout
from qbert.layers.linear import PackedLinear, PackedTensor
from qbert.saving.folder import Saver, check_digest
from qbert.saving.records import (
    FORMAT_VERSION,
    METHOD,
    check_index,
    configuration,
    describe,
    find_module,
    is_complete,
    load_complete,
    read_layout,
)
from qbert.saving.trainable import RECORD, load_trainable


@register_quantization_config(METHOD)
class QBertConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model: which tensors are packed, and how.

    Attributes:
        format_version: version of the file format.
        specs: {label: layout of a tensor as plain JSON values}.
        tensors: {module name relative to the base model: label}.
        tied: {module name: name of the module whose codes it uses}.
        sha256: digest of this configuration and all tensors of the files; ``None`` before the model is saved.

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
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION or unknown or quant_method != METHOD:
            found = f"field {sorted(unknown)[0]!r}" if unknown else f"format_version={format_version!r}"
            raise ValueError(
                f"quantization_config: {found} is not of format {FORMAT_VERSION}, which this qbert reads; "
                "install the version of qbert that wrote the model, or pack it again"
            )
        if not (isinstance(specs, dict) and isinstance(tensors, dict) and isinstance(tied, dict)) or not tensors:
            raise ValueError("quantization_config: 'specs', 'tensors' or 'tied' is missing; config.json is damaged")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.specs, self.tensors, self.tied, self.sha256 = specs, tensors, tied, sha256

    def layout(self, name: str) -> PackedLayout:
        """The layout of the tensor of module `name`. Raises ValueError if the record is damaged."""
        return read_layout(name, self.tensors[name], self.specs)


@register_quantizer(METHOD)
class QBertHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a packed model."""

    requires_calibration = False
    quantization_config: QBertConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize a float checkpoint on the fly. Raises ValueError."""
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: a QBertConfig describes a packed model; to quantize a float one, load it "
                "and call qbert.quantize_model and qbert.pack"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files is not None:
            check_digest(checkpoint_files, self.quantization_config.to_dict())
        swap_in_packed(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        mark_packed(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for layer in {id(m): m for m in model.modules() if isinstance(m, PackedTensor)}.values():
            replace_everywhere(model, layer, _float_twin(layer, dtype or layer.dtype))
        remove_fast_forwards(model)
        unmark_packed(model)
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed models cannot be trained; `qbert.unpack` gives the form that can."""
        return False

    @property
    def is_qat_trainable(self) -> bool:
        """Only asked by Trainer, whose own refusal sends the user to adapters. Raises ValueError."""
        raise ValueError(
            "the model is packed, and packed weights cannot be trained; train qbert.unpack(model), and pack the result"
        )

    @property
    def is_compileable(self) -> bool:
        """Packed models can be compiled."""
        return True


def swap_in_packed(model: nn.Module, config: QBertConfig) -> None:
    """Put empty packed layers in the places that `config` names (the model may be on the meta device).

    Names outside of the base model, and optional parts such as a pooler, may be absent: then another head is loaded.

    Raises:
        ValueError: if a name does not fit the model.
    """
    prefix, base = base_model(model)
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
    if type(module) not in (nn.Linear, nn.Embedding):
        raise ValueError(f"quantization_config: {name} is a {type(module).__name__}, not nn.Linear or nn.Embedding")
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    if layout.groups > rows or columns % layout.input_groups or (layout.heads and rows % layout.heads):
        raise ValueError(f"quantization_config: the layout of {name} does not fit its shape [{rows}, {columns}]")
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(rows, columns, module.padding_idx, layout, source)
        return PackedLinear(columns, rows, module.bias is not None, layout, source)


def _float_twin(layer: PackedTensor, dtype: torch.dtype) -> nn.Module:
    twin: nn.Linear | nn.Embedding
    if isinstance(layer, PackedEmbedding):
        twin = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    else:
        assert isinstance(layer, PackedLinear)
        twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        twin.bias = layer.bias  # type: ignore[assignment]
    twin.weight = nn.Parameter(layer.quantized_weight().to(dtype))
    return twin.eval()


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
            module.save_pretrained = Saver(module)
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
            for name in ("hf_quantizer", "quantization_method", "save_pretrained", "is_quantized"):
                module.__dict__.pop(name, None)
            module.config.__dict__.pop("quantization_config", None)


def load(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model in a folder or on the hub, of the class that was saved: packed, or as `save_trainable` wrote it.

    Unlike ``from_pretrained`` it refuses anything that is not a complete packed model.

    Args:
        path: folder that ``save_pretrained`` wrote, or a hub name.
        **kwargs: passed on to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...).

    Raises:
        ValueError: if the model is not packed, or its files are damaged or incomplete.
        OSError: if there is no such model.
    """
    folder = Path(path) / kwargs.get("subfolder", "")
    check_index(folder)
    if (folder / RECORD).is_file():
        return load_trainable(folder, **{k: v for k, v in kwargs.items() if k != "subfolder"})
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if k in kwargs}
    values = configuration(path, **hub)
    record = values.get("quantization_config")
    method = record.get("quant_method") if isinstance(record, dict) else record
    if method != METHOD:
        raise ValueError(f"{path} is not a packed model (quant_method is {method!r}); load it with from_pretrained")
    return load_complete(path, values, **kwargs)
