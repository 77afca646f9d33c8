"""From trained to deployed form and back: `pack` and `unpack`.

`pack` replaces the fake-quantized layers of a model by `PackedLinear` and `PackedEmbedding`, which keep 2-, 3-, 4- or
8-bit codes instead of floats and give the same outputs; `unpack` turns them back into layers that can be trained.

    >>> packed = pack(quantize_model(model, 4))
    >>> packed.save_pretrained("out")
"""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

from qbert.inference.forward import remove_fast_forwards
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.layout import layout_of
from qbert.layers.packed import PackedTensor, check_module
from qbert.layers.quantizer import WeightQuantizer

Model = TypeVar("Model", bound=nn.Module)
# Modules that take a child's weight and multiply by it themselves: what a quantized child computes, they never see.
_READS_WEIGHTS = {"MobileBertLMPredictionHead": ("decoder", "dense")}


@torch.inference_mode(False)  # tensors made in inference mode could be used nowhere else
def pack(model: Model) -> Model:
    """The deployed form of a fake-quantized model: same outputs, weights in 2 to 8 bits.

    Args:
        model: what `qbert.quantize_model` returned, trained or not. It is left alone.

    Returns:
        A copy in eval mode in which `PackedLinear` and `PackedEmbedding` stand for the quantized layers; shared
        layers stay shared and tied weights tied. A transformers model can be saved with ``save_pretrained``.

    Raises:
        ValueError: if the model has no quantized layer, row groups that no number of groups describes, a weight or
            scale that is not finite, a static activation range that was never calibrated, or a quantized layer whose
            weight another module reads past its quantizer (MobileBERT's language-model head).
        TypeError: if it is not a torch module.
    """
    check_module("model", model)
    quantized = [m for m in model.modules() if isinstance(m, TrainableLayer)]
    if not quantized:
        done = any(isinstance(m, PackedTensor) for m in model.modules())
        mend = "it is packed already" if done else "call qbert.quantize_model first"
        raise ValueError(f"model: {type(model).__name__} has no fake-quantized layer; {mend}")
    _check_weights_are_not_read(model)
    _check_finite(model)
    # Packed layers are put into the memo of the copy, so that the float weights they replace are never copied.
    memo: dict[int, Any] = {}
    packed: list[tuple[TrainableLayer, PackedTensor]] = []
    for module in quantized:
        source = next((p for m, p in packed if not p._source and _same_weight(m, module)), None)
        twin = _packed_twin(module, source, memo)
        memo[id(module)] = twin
        packed.append((module, twin))
    result = deepcopy(model, memo).eval()
    if "transformers" in sys.modules:
        from qbert.saving.hf import mark_packed

        mark_packed(result)
    return result


@torch.inference_mode(False)
def unpack(packed: Model) -> Model:
    """The trainable form of a packed model: float weights that lie on their grids, fake-quantized in each forward.

    Args:
        packed: what `pack` or ``from_pretrained`` returned. It is left alone.

    Returns:
        A copy in eval mode with `TrainableLayer`s, whose outputs and `quantized_weight` are the same.

    Raises:
        ValueError: if the model has no packed layer; TypeError if it is not a torch module.
    """
    check_module("packed", packed)
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; it is unpacked already")
    memo: dict[int, Any] = {}
    shared: dict[int, tuple[nn.Parameter, WeightQuantizer]] = {}
    for layer in layers:
        key = id(layer.owner)
        if key not in shared:
            owner = layer.owner
            shared[key] = nn.Parameter(owner.stored(owner.quantized_weight())), owner._quantizer()
        memo[id(layer)] = _trainable_twin(layer, *shared[key], memo)
    result = deepcopy(packed, memo)
    remove_fast_forwards(result)
    if "transformers" in sys.modules:
        from qbert.saving.hf import unmark_packed

        unmark_packed(result)
    return result


def _check_weights_are_not_read(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for child in _READS_WEIGHTS.get(type(module).__name__, ()):
            if isinstance(getattr(module, child), TrainableLayer):
                raise ValueError(
                    f"model: {type(module).__name__} multiplies by the weight of {path}.{child} without calling the "
                    "layer, past its quantizer, so a packed model would give other outputs; leave the embeddings and "
                    "the head in float ({'embeddings': 32, ...}), or pack the base model alone"
                )


def _check_finite(model: nn.Module) -> None:
    """Integer codes know no NaN: the packed model would go on with numbers where the quantized one has none."""
    for path, module in model.named_modules():
        if isinstance(module, TrainableLayer):
            quantizer = module.weight_quantizer
            for name, tensor in (("weight", module.weight), ("scale", quantizer.scale), ("zero point", quantizer.zero)):
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(
                        f"model: the {name} of {path} holds NaN or infinity, so training has diverged; "
                        "load an earlier checkpoint, or train again with a lower learning rate"
                    )
            activation = module.activation_quantizer
            if activation is not None and activation.mode == "static" and not bool(torch.isfinite(activation.scale)):
                raise ValueError(
                    f"model: the static activation range of {path} is {float(activation.scale)}, so it was never "
                    "calibrated; pass calibration_data to quantize_model"
                )


def _same_weight(one: TrainableLayer, other: TrainableLayer) -> bool:
    if one.weight is not other.weight:
        return False
    a, b = one.weight_quantizer, other.weight_quantizer
    return a is b or (
        a.bits == b.bits and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("scale", "zero", "row_group"))
    )


def _packed_twin(layer: TrainableLayer, source: PackedTensor | None, memo: dict[int, Any]) -> PackedTensor:
    kind = kind_of(layer)  # type: ignore[arg-type]
    assert kind is not None
    twin = kind.packed.shaped_as(layer, layout_of(layer), source)
    twin.fill(layer, memo)
    return twin


def _trainable_twin(layer: PackedTensor, weight: nn.Parameter, quantizer: WeightQuantizer, memo: dict[int, Any]) -> Any:
    kind = kind_of(layer)
    assert kind is not None
    module: Any = layer.float_module()
    module.weight = weight
    if getattr(layer, "bias", None) is not None:
        module.bias = deepcopy(layer.bias, memo)
    twin: Any = kind.trainable.from_float(module, quantizer, layer.activation_twin())
    return twin.eval()
