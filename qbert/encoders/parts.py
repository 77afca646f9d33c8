"""What a post-norm encoder layer is made of, whatever its family calls it.

Families differ in names only: BERT's ``intermediate.dense`` is DistilBERT's ``ffn.lin1``.

    >>> LayerParts.of(model.encoder.layer[0]).ffn_in
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

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
        if kind == "AlbertLayer" and not layer.chunk_size_feed_forward:
            attention = layer.attention
            return cls(
                attention.num_attention_heads, attention.query, attention.key, attention.value, attention.dense,
                attention.LayerNorm, layer.ffn, layer.activation, layer.ffn_output, layer.full_layer_layer_norm,
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
