"""`quantize_model`: from a float encoder and a bits configuration to its trainable, fake-quantized twin.

    >>> student = quantize_model(model, {"encoder.layer.0": 8, "embeddings": 8, "*": 4})

Everything that can be refused is refused before the first tensor is touched. Tied and shared weights stay tied and
shared; task heads stay in float unless the configuration names them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, TensorSpec
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import Target, find_targets
from qbert.layers.embedding import QuantEmbedding
from qbert.layers.linear import QuantLinear
from qbert.layers.quantizer import WeightQuantizer
from qbert.quantizers.activations import ActivationObserver, ActivationQuantizer
from qbert.quantizers.groups import group_layout

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


Batch = Mapping[str, Tensor]


def check_batches(data: Any) -> list[Batch] | None:
    """`data` as a list of batches (a single batch is accepted), or ``None`` if it is None.

    Raises:
        TypeError: if it is not an iterable of mappings; ValueError if it is empty.
    """
    if data is None:
        return None
    if isinstance(data, Mapping):
        data = [data] if data else []
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration_data: expected batches (dicts of tensors), got {type(data).__name__}")
    batches = list(data)
    if not batches:
        raise ValueError("calibration_data is empty; pass at least one batch")
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError(
                "calibration_data: every batch must be a dict of tensors, such as a tokenizer returns with "
                f"return_tensors='pt'; got a {type(batch).__name__}"
                + (f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
            )
    return batches


@torch.no_grad()
def calibrate_activations(model: nn.Module, batches: list[Batch]) -> None:
    """Fix the static activation ranges of `model` in two passes over `batches` (extent, then histogram).

    Raises:
        ValueError: if the input of a layer is not finite, or none is seen: the layer is never called, or every token is
            masked.
    """
    names = {
        m: name
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear) and m.activation_quantizer is not None and m.activation_quantizer.mode == "static"
    }
    layers = list(names)
    if not layers:
        return
    observers = {layer: ActivationObserver() for layer in layers}
    quantizers = [layer.activation_quantizer for layer in layers if layer.activation_quantizer is not None]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        _observe(model, batches, layers, lambda layer, x: observers[layer].see_extent(x))
        for layer, observer in observers.items():
            if not observer.is_finite:
                raise ValueError(
                    f"calibration_data: the input of {names[layer]} runs from {observer.low} to {observer.high}; pass "
                    "batches on which the layer sees unmasked tokens and the float model computes no NaN or infinity"
                )
        _observe(model, batches, layers, lambda layer, x: observers[layer].see_values(x))
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
    for layer, quantizer in zip(layers, quantizers, strict=True):
        quantizer.set_range(*observers[layer].best_range(quantizer.bits))


def _observe(
    model: nn.Module, batches: list[Batch], modules: Iterable[nn.Module], see: Callable[[Any, Tensor], None]
) -> None:
    """Run `batches` through the model; `see(module, x)` gets the input of each module, padding left out."""
    mask: Tensor | None = None

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if mask is not None and mask.dim() == 2 and x.shape[:2] == mask.shape:
            x = x[mask.bool()]
        see(module, x)

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        with evaluation_mode(model):
            for batch in batches:
                inputs = to_device(batch, model)
                mask = inputs.get("attention_mask")
                run_batch(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def run_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `model` on a dict batch: by keyword, or as one mapping where that is the model's own convention."""
    if type(model).__name__ == "SentenceTransformer":
        return model(dict(inputs))
    return model(**inputs)


def to_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
