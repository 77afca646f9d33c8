"""Why an encoder layer cannot be fused: what a layer of a known name really computes is looked at closely.

A fused layer takes the place of the original without calling it, on CPUs and GPUs alike.

    >>> reason_not_to_fuse_layer(model.encoder.layer[0])              # '' if it can be
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import LayerParts
from qbert.inference.forward import reason_not_to_replace
from qbert.layers.linear import PackedLinear


def reason_not_to_fuse_layer(layer: Any) -> str:
    """Why `layer` is not an encoder layer of a known family, with linear maps packed or some in float; empty if it is.

    A layer wholly in float would gain little, and take its weights a second time.
    """
    parts = LayerParts.of_any_kind(layer)
    if parts is None:
        return f"a {type(layer).__name__} is not an encoder layer of the BERT kind"
    maps = [m for part in parts.linears for m in maps_of(part)]
    packed = [p for p in maps if isinstance(p, PackedLinear)]
    if any(p.spec.activation_bits not in (8, None) for p in packed):
        return "some of its inputs have fewer than 8 bits"
    whole = [part for part in parts.linears if is_factored(part)]
    activations = [net.activation for net in parts.ffns]
    # MobileBERT has a map that it does not use where attention is inside of the bottleneck.
    every = [m for m in layer.modules() if isinstance(m, PackedLinear)]
    inner = {id(m) for part in (*every, *whole, *activations) for m in part.modules()}
    altered = reason_not_to_replace(m for m in layer.modules() if id(m) not in inner)
    if altered:
        return altered
    if not all(_is_known_norm(norm, parts.pre_norm) for norm in parts.norms):
        return "its norms are not LayerNorm with weight and bias"
    for part in maps:
        if not isinstance(part, PackedLinear) and type(part) is not nn.Linear:
            return f"its {_name(layer, part)} is a {type(part).__name__}"
    return "" if packed else "its linear maps are in float"


def reason_not_four_products(layer: Any) -> str:
    """Why a `layer` that can be fused cannot be four products of packed weights; empty if it can."""
    parts = LayerParts.of_any_kind(layer)
    assert parts is not None
    if any(is_factored(p) for p in parts.linears):
        return f"{', '.join(_name(layer, p) for p in parts.linears if is_factored(p))} in factors"
    in_float = [_name(layer, p) for p in parts.linears if not isinstance(p, PackedLinear)]
    if in_float:
        return f"{', '.join(in_float)} in float"
    if any(p.layout.input_groups > 1 for p in parts.inputs):
        return "query, key or value has input groups"
    return "" if parts.bottleneck or one_input(parts) else "query, key and value quantize their input differently"


def maps_of(part: nn.Module) -> list[nn.Module]:
    """The linear maps that a part of a layer is computed by: itself, or those of its factors."""
    return list(part.children()) if is_factored(part) else [part]


def one_input(parts: LayerParts) -> bool:
    """Whether Q, K and V are packed and quantize what they get in the same way."""
    return can_join(parts.inputs)


def can_join(maps: list[Any]) -> bool:
    """Whether linear maps of one input are packed and quantize it in the same way, so that one product does for all."""
    return all(isinstance(m, PackedLinear) for m in maps) and all(_same_input(maps[0], m) for m in maps[1:])


def _is_known_norm(norm: Any, pre_norm: bool) -> bool:
    if type(norm) is nn.LayerNorm:
        return norm.elementwise_affine and (pre_norm or norm.bias is not None)
    return type(norm) is nn.Identity if pre_norm else type(norm).__name__ == "NoNorm"


def _name(layer: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in layer.named_modules() if module is part)


def _same_input(one: Any, other: Any) -> bool:
    for field in ("activation_bits", "activation_range"):
        if getattr(one.spec, field) != getattr(other.spec, field):
            return False
    if one.layout.input_groups > 1 or other.layout.input_groups > 1:
        return False
    if one.input_scale is None or one.input_zero is None or other.input_scale is None or other.input_zero is None:
        return True
    return torch.equal(one.input_scale, other.input_scale) and torch.equal(one.input_zero, other.input_zero)
