"""`quantize_model`: from a float encoder and a bits configuration to its trainable, fake-quantized twin.

    >>> student = quantize_model(model, {"encoder.layer.0": 8, "embeddings": 8, "*": 4})

Everything that can be refused is refused before the first tensor is touched. Tied and shared weights stay tied and
shared; task heads stay in float unless the configuration names them.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, TensorSpec
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import Target, encoder_weights, find_targets
from qbert.encoders.weights import weight_matrix
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.recurrent import open_recurrent
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
        model: any encoder built from the kinds of layer in `qbert.layers` (linear maps, tables, convolutions over a
            sequence, LSTMs and GRUs), with or without a task head, or a wrapper of one or several
            (``SentenceTransformer``, a bi-encoder). It is left alone unless `inplace`.
        bits_config: bits for all encoder matrices (2, 3, 4 or 8), a mapping from name patterns, a `BitsConfig`, or
            the path of its JSON file.
        calibration_data: batches (a DataLoader, or a list of dicts of tensors) that are run through the model to fix
            static activation ranges; ``None`` gives activations a range per token at run time.
        inplace: convert `model` itself instead of a copy.

    Warns:
        UserWarning: if weights of the encoder stay in float because no kind of layer covers their modules.

    Returns:
        The converted model, of the same class and in the same mode. Every converted module has
        ``quantized_weight()`` and the hooks of the module whose place it takes.

    Raises:
        ValueError: if the configuration does not fit the model (see `BitsConfig.resolve`), the model is quantized
            already, nothing in its layers can be quantized, a weight is not finite, or static activation ranges are
            asked for without `calibration_data`.
        TypeError: for a `model`, `bits_config` or `calibration_data` of another type.

    Source: Shen et al. 2020, sections 3.1 and 3.3.
    """
    config = BitsConfig.parse(bits_config)
    _check_model(model)
    specs = config.resolve(model)
    targets = {t.path: t for t in find_targets(model)}
    _tell_what_is_not_covered(model, targets.values())
    _check_weights(targets, specs)
    batches = check_batches(calibration_data)
    static = [p for p, s in specs.items() if s.activation_range == "static" and not targets[p].is_embedding]
    if static and batches is None:
        raise ValueError(f"activation_range='static' of {static[0]} needs calibration_data; pass a few batches")
    if not inplace:
        model = copy.deepcopy(model)
    open_recurrent(model, specs.keys())
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


def _tell_what_is_not_covered(model: nn.Module, targets: Iterable[Target]) -> None:
    """Name the weights of the encoder that no kind of layer covers, and so stay in float whatever is asked.

    Raises:
        ValueError: if those are all the weights of its layers.
    """
    covered = {id(t.weight) for t in targets}
    weights = encoder_weights(model)
    left = [w for w in weights if id(w.tensor) not in covered]
    if not left:
        return
    share = sum(w.tensor.numel() for w in left) / sum(w.tensor.numel() for w in weights)
    left.sort(key=lambda w: (not w.in_layers, -w.tensor.numel()))
    names = ", ".join(f"{w.path} ({w.owner})" for w in left[:3]) + (f" and {len(left) - 3} more" if left[3:] else "")
    in_layers = [w for w in weights if w.in_layers]
    if in_layers and not any(id(w.tensor) in covered for w in in_layers):
        raise ValueError(
            f"model: none of the weights in the layers of {type(model).__name__} can be quantized: {names}; pass an "
            "encoder built from Linear, Embedding, Conv1d, LSTM or GRU modules, or register a kind of layer for these"
        )
    warnings.warn(
        f"{share:.1%} of the weights of {type(model).__name__}'s encoder stay in float, because no kind of layer "
        f"covers them, or they are read without calling one: {names}",
        stacklevel=4,  # past the decorator of quantize_model
    )


def _with_activation_range(spec: TensorSpec, calibrated: bool) -> TensorSpec:
    if spec.activation_range is not None:
        return spec
    return replace(spec, activation_range="static" if calibrated else "dynamic")


def _convert(model: nn.Module, target: Target, spec: TensorSpec) -> tuple[nn.Module, nn.Module]:
    """Put the quantized twin in the place of a target; (old, new)."""
    module = model.get_submodule(target.path)
    kind = kind_of(module)
    assert kind is not None
    weight = weight_matrix(module).detach()
    row_group, input_groups = group_layout(target, spec)
    quantizer = WeightQuantizer(row_group, input_groups, spec).to(weight.device)
    quantizer.find(weight)
    activation = None
    if spec.activation_bits is not None and not target.is_embedding:
        activation = ActivationQuantizer(spec.activation_bits, spec.activation_range or "dynamic").to(weight.device)
    twin: Any = kind.trainable.from_float(module, quantizer, activation)
    return _replace(model, module, twin)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Put `new`, with the hooks of `old`, in its place."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    replace_everywhere(model, old, new)
    return old, new


def _convert_tied(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Give a float layer that shares its weight with a quantized one (a head with its table) that one's quantizer."""
    converted = []
    tables = {id(m.weight): m.weight_quantizer for m in model.modules() if isinstance(m, TrainableLayer)}
    for module in list(model.modules()):
        kind = None if isinstance(module, TrainableLayer) else kind_of(module)
        if kind is not None and id(module.weight) in tables:
            twin: Any = kind.trainable.from_float(module, tables[id(module.weight)])
            converted.append(_replace(model, module, twin))
    return converted


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an encoder (nn.Module), got {type(model).__name__}")
    if kind_of(model) is not None:
        raise ValueError(
            f"model: a bare {type(model).__name__} has no place to be replaced in; pass nn.Sequential of it"
        )
    for path, module in model.named_modules():
        if hasattr(module, "quantized_weight"):
            raise ValueError(f"model: {path} is quantized already; pass an encoder that is not quantized yet")


def _check_weights(targets: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> None:
    for path in specs:
        module, weight = targets[path].module, targets[path].weight
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
        if isinstance(m, TrainableLayer) and m.activation_quantizer and m.activation_quantizer.mode == "static"
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


def _observe(model: nn.Module, batches: list[Batch], layers: Iterable[Any], see: Callable[[Any, Tensor], None]) -> None:
    """Run `batches` through the model; `see(layer, x)` gets what each layer quantizes, padding left out."""
    mask: Tensor | None = None

    def watch(layer: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if mask is not None and mask.dim() == 2 and x.shape[:2] == mask.shape:
                x = x[mask.bool()]
            see(layer, x)

        return hook

    handles = [layer.activation_quantizer.register_forward_pre_hook(watch(layer)) for layer in layers]
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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode and give each its own mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
