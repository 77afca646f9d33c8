"""Calibration: fixing static activation ranges on a few batches of data.

Batches are run through the model in evaluation mode without gradients; modes and hooks are restored afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qbert.modules import QuantLinear
from qbert.quantizers.activations import ActivationObserver

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
