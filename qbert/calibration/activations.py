"""Static activation ranges, read off a few batches without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qbert.calibration.batches import Batch, check_readable, run_batch
from qbert.calibration.rows import padding_left_out
from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode
from qbert.layers.kind import TrainableLayer
from qbert.layers.recurrent import StepMasks
from qbert.quantizers.activations import ActivationObserver


@torch.no_grad()
def calibrate_activations(model: nn.Module, batches: list[Batch]) -> None:
    """Fix the static activation ranges of `model` in two passes over `batches` (extent, then histogram).

    Raises:
        ValueError: if the input of a layer is not finite, or none is seen: the layer is never called, or every token is
            masked; or if batches are longer than the model can read.
    """
    names = {
        m: name
        for name, m in model.named_modules()
        if isinstance(m, TrainableLayer) and m.activation_quantizer and m.activation_quantizer.mode == "static"
    }
    layers = list(names)
    if not layers:
        return
    check_readable(model, batches)
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
    masks = StepMasks(model)

    def watch(layer: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda quantizer, args: see(layer, padding_left_out(layer, masks, args[0])(args[0]))

    handles = [layer.activation_quantizer.register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        with evaluation_mode(model):
            for batch in batches:
                inputs = to_device(batch, model)
                masks.mask = inputs.get("attention_mask")
                run_batch(model, inputs)
    finally:
        masks.close()
        for handle in handles:
            handle.remove()
