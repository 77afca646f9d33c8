"""`quantize_model`: from a float encoder and a bits configuration to its trainable, fake-quantized twin.

    >>> student = quantize_model(model, {"encoder.layer.0": 8, "embeddings": 8, "*": 4})

Everything that can be refused is refused before the first tensor is touched. Tied and shared weights stay tied and
shared; task heads stay in float unless the configuration names them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, TensorSpec
from qbert.calibration import calibrate_activations, check_batches
from qbert.modules import QuantEmbedding, QuantLinear, WeightQuantizer, replace_everywhere
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import group_layout
from qbert.targets import Target, find_targets

Model = TypeVar("Model", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@torch.inference_mode(False)  # else the copy's parameters could never be trained
def quantize_model(
    model: Model,
    bits_config: int | Mapping[str, Any] | BitsConfig | str | os.PathLike[str],
    *,
    calibration_data: Any = None,
    inplace: bool = False,
) -> Model:
    """The fake-quantized twin of an encoder, ready to be evaluated, trained or packed.

    Args:
        model: any encoder that transformers builds from ``nn.Linear`` and ``nn.Embedding``, with or without a task
            head, or a wrapper of one (``SentenceTransformer``). It is left alone unless `inplace`.
        bits_config: bits for all encoder matrices (2, 3, 4 or 8), a mapping from name patterns, a `BitsConfig`, or
            the path of its JSON file.
        calibration_data: batches (a DataLoader, or a list of dicts of tensors) that are run through the model to fix
            static activation ranges; ``None`` gives activations a range per token at run time.
        inplace: convert `model` itself instead of a copy.

    Returns:
        The converted model, of the same class and in the same mode. Every converted module has
        ``quantized_weight()`` and the hooks of the module whose place it takes.

    Raises:
        ValueError: if the configuration does not fit the model (see `BitsConfig.resolve`), the model is quantized
            already, a weight is not finite, or static activation ranges are asked for without `calibration_data`.
        TypeError: for a `model`, `bits_config` or `calibration_data` of another type.

    Source: Shen et al. 2020, sections 3.1 and 3.3.
    """
    config = BitsConfig.parse(bits_config)
    _check_model(model)
    specs = config.resolve(model)
    targets = {t.path: t for t in find_targets(model)}
    _check_weights(targets, specs)
    batches = check_batches(calibration_data)
    static = [p for p, s in specs.items() if s.activation_range == "static" and not targets[p].is_embedding]
    if static and batches is None:
        raise ValueError(f"activation_range='static' of {static[0]} needs calibration_data; pass a few batches")
    if not inplace:
        model = copy.deepcopy(model)
    converted = [
        _convert(model, targets[path], _with_activation_range(spec, batches is not None))
        for path, spec in specs.items()
    ]
    converted += _convert_tied(model)
    if batches is not None:
        try:
            calibrate_activations(model, batches)
        except BaseException:
            for old, new in converted:
                replace_everywhere(model, new, old)
            raise
    return model


def _with_activation_range(spec: TensorSpec, calibrated: bool) -> TensorSpec:
    if spec.activation_range is not None:
        return spec
    return replace(spec, activation_range="static" if calibrated else "dynamic")


def _convert(model: nn.Module, target: Target, spec: TensorSpec) -> tuple[nn.Module, nn.Module]:
    """Put the quantized twin in the place of a target; (old, new)."""
    module = model.get_submodule(target.path)
    row_group, input_groups = group_layout(target, spec)
    quantizer = WeightQuantizer(row_group, input_groups, spec).to(module.weight.device)  # type: ignore[arg-type]
    quantizer.find(module.weight.detach())  # type: ignore[operator, union-attr, arg-type]
    converted: nn.Module
    if isinstance(module, nn.Embedding):
        converted = QuantEmbedding.from_float(module, quantizer)
    else:
        activation = None
        if spec.activation_bits is not None:
            activation = ActivationQuantizer(spec.activation_bits, spec.activation_range or "dynamic")
            activation.to(module.weight.device)  # type: ignore[arg-type]
        converted = QuantLinear.from_float(module, quantizer, activation)  # type: ignore[arg-type]
    return _replace(model, module, converted)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Put `new`, with the hooks of `old`, in its place."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    replace_everywhere(model, old, new)
    return old, new


def _convert_tied(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Give a float matrix that shares its weight with a quantized embedding that embedding's quantizer."""
    converted = []
    tables = {id(m.weight): m for m in model.modules() if isinstance(m, QuantEmbedding)}
    for module in list(model.modules()):
        if type(module) is nn.Linear and id(module.weight) in tables:
            quantizer = tables[id(module.weight)].weight_quantizer
            converted.append(_replace(model, module, QuantLinear.from_float(module, quantizer, None)))
    return converted


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an encoder (nn.Module), got {type(model).__name__}")
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"model: a bare {type(model).__name__} has no place to be replaced in; pass nn.Sequential of it"
        )
    for path, module in model.named_modules():
        if hasattr(module, "quantized_weight"):
            raise ValueError(f"model: {path} is quantized already; pass an encoder that is not quantized yet")


def _check_weights(targets: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> None:
    for path in specs:
        module = targets[path].module
        weight = module.weight
        assert isinstance(weight, Tensor)
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"model: {path} rescales its rows when they are used (max_norm); set max_norm to None")
        if weight.is_meta:
            raise ValueError(f"model: {path} has no values (device 'meta'); load the weights first")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"model: the weight of {path} holds NaN or infinity; reload or retrain the model")
