"""What a post-norm encoder layer is made of, whatever its family calls it, and why it cannot be fused.

Families differ in names only: BERT's ``intermediate.dense`` is DistilBERT's ``ffn.lin1``. What a layer of a known name
really computes is looked at closely, since the fused layer takes its place without calling it.

    >>> LayerParts.of(model.encoder.layer[0]).ffn_in
    >>> reason_not_to_fuse_layer(model.encoder.layer[0])              # '' if it can be
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from qbert.fast_forward import reason_not_to_replace
from qbert.packed_modules import PackedLinear

BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "CamembertLayer")


class LayerParts(NamedTuple):
    """What a post-norm encoder layer is made of."""

    heads: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.LayerNorm
    ffn_in: nn.Module
    activation: nn.Module
    ffn_out: nn.Module
    output_norm: nn.LayerNorm

    @classmethod
    def of(cls, layer: Any) -> LayerParts | None:
        """The parts of a layer of a known family that attends to its own tokens only; ``None`` for any other."""
        kind = type(layer).__name__
        if kind == "TransformerBlock" and type(layer.attention).__name__ == "DistilBertSelfAttention":
            attention, ffn = layer.attention, layer.ffn
            return cls(
                attention.n_heads, attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin,
                layer.sa_layer_norm, ffn.lin1, ffn.activation, ffn.lin2, layer.output_layer_norm,
            )  # fmt: skip
        if kind == "MPNetLayer":
            attention = layer.attention.attn
            first = (attention.q, attention.k, attention.v, attention.o, layer.attention.LayerNorm)
        elif kind in BERT_LAYERS and not layer.is_decoder and not layer.add_cross_attention:
            attention, output = layer.attention.self, layer.attention.output
            first = (attention.query, attention.key, attention.value, output.dense, output.LayerNorm)
        else:
            return None
        inner = layer.intermediate
        return cls(
            attention.num_attention_heads, *first,
            inner.dense, inner.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm,
        )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        """Query, key and value."""
        return [self.query, self.key, self.value]

    @property
    def linears(self) -> list[Any]:
        """Query, key and value, then the other three linear maps."""
        return [*self.inputs, self.attention_output, self.ffn_in, self.ffn_out]

    @property
    def norms(self) -> list[nn.LayerNorm]:
        """The two norms."""
        return [self.attention_norm, self.output_norm]


def reason_not_to_fuse_layer(layer: Any) -> str:
    """Why `layer` is not an encoder layer of a known family, with linear maps packed or some in float; empty if it is.

    A layer wholly in float would gain little, and take its weights a second time.
    """
    parts = LayerParts.of(layer)
    if parts is None:
        return f"a {type(layer).__name__} is not an encoder layer of the BERT kind"
    packed = [p for p in parts.linears if isinstance(p, PackedLinear)]
    inner = {id(m) for part in (*packed, parts.activation) for m in part.modules()}
    altered = reason_not_to_replace(m for m in layer.modules() if id(m) not in inner)
    if altered:
        return altered
    if not all(
        type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None for norm in parts.norms
    ):
        return "its norms are not LayerNorm with weight and bias"
    for part in parts.linears:
        if not isinstance(part, PackedLinear) and type(part) is not nn.Linear:
            return f"its {_name(layer, part)} is a {type(part).__name__}"
    return "" if packed else "its linear maps are in float"


def reason_not_four_products(layer: Any) -> str:
    """Why a `layer` that can be fused cannot be four products of packed weights; empty if it can."""
    parts = LayerParts.of(layer)
    assert parts is not None
    in_float = [_name(layer, p) for p in parts.linears if not isinstance(p, PackedLinear)]
    if in_float:
        return f"{', '.join(in_float)} in float"
    if any(p.layout.input_groups > 1 for p in parts.inputs):
        return "query, key or value has input groups"
    return "" if one_input(parts) else "query, key and value quantize their input differently"


def one_input(parts: LayerParts) -> bool:
    """Whether Q, K and V are packed and quantize what they get in the same way."""
    query, *others = parts.inputs
    return all(isinstance(p, PackedLinear) for p in parts.inputs) and all(_same_input(query, p) for p in others)


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
