"""What an encoder layer is made of, whatever its family calls it.

Families of the BERT kind, post-norm, differ in names only: BERT's ``intermediate.dense`` is DistilBERT's ``ffn.lin1``.
Others differ in a few pieces, each of which is a field: norms before instead of behind (ViT, ModernBERT), a gated
feed-forward net, rotated queries and keys, a window of tokens that are seen (ModernBERT), a bottleneck around the layer
and several feed-forward nets (MobileBERT), scores by relative position (DeBERTa-v2). A new family is described here,
and runs by what computes these pieces.

    >>> LayerParts.of(model.encoder.layer[0]).ffn_in
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "CamembertLayer")


class FeedForward(NamedTuple):
    """A feed-forward net inside of a layer, with the norm behind its residual sum."""

    ffn_in: nn.Module
    activation: nn.Module
    ffn_out: nn.Module
    norm: nn.Module


class Bottleneck(NamedTuple):
    """MobileBERT's way into a thin layer and out again.

    down, down_norm: from the model's width to the layer's; what they give is the residual of the attention.
    shared, shared_norm: the same again for query and key, ``None`` where they read something else.
    inside: whether query, key and value read what `down` gives. Otherwise value reads the wide input of the layer, and
    so do query and key without `shared`.
    up, up_norm: from the layer's width to the model's, and the norm behind the sum with the input of the layer.
    """

    down: nn.Module
    down_norm: nn.Module
    shared: nn.Module | None
    shared_norm: nn.Module | None
    inside: bool
    up: nn.Module
    up_norm: nn.Module


class RelativePositions(NamedTuple):
    """What DeBERTa adds to the scores of queries q and keys k (He et al. 2021, equation 4).

    They are (q k + q to_key(table[p]) + k to_query(table[p])) scale, with p the place of the distance of q from k.

    scale: of all three terms.
    places: int32 [2 n + 1], rows of the table for distances -n to n, which stand for all that are farther.
    table: [rows, H], the same for every input.
    to_key, to_query: the maps of its rows to the width of all heads; ``None`` where there is no such term.
    """

    scale: float
    places: Tensor
    table: Tensor
    to_key: nn.Module | None
    to_query: nn.Module | None


class LayerParts(NamedTuple):
    """What an encoder layer is made of.

    query, key, value: one and the same map where a family computes them by one matrix, in this order.
    attention_norm, output_norm: behind the residual sums of attention and feed-forward net, or before both where
    `pre_norm`; `nn.Identity` where there is none.
    gated: the second half of what `ffn_in` gives multiplies the activated first half.
    window: how many tokens on each side a token sees; 0 for all.
    rotation: float32 [positions, head width], cosines and then sines by which halves of queries and keys are rotated.
    relative: what is added to the scores by position.
    more_ffns: feed-forward nets between attention and the last one.
    """

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
    pre_norm: bool = False
    gated: bool = False
    window: int = 0
    rotation: Tensor | None = None
    more_ffns: tuple[FeedForward, ...] = ()
    bottleneck: Bottleneck | None = None
    relative: RelativePositions | None = None

    @classmethod
    def of_any_kind(cls, layer: Any) -> LayerParts | None:
        """The parts of a layer of the BERT kind (`of`), or of ViT, ModernBERT, MobileBERT or DeBERTa-v2; or ``None``.

        ModernBERT's rotation and DeBERTa's table of positions are not in their layers, and are left out.
        """
        kind = type(layer).__name__
        if kind == "ViTLayer" and hasattr(layer.attention, "q_proj"):
            attention, mlp = layer.attention, layer.mlp
            return cls(
                attention.num_attention_heads, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                layer.layernorm_before, mlp.fc1, mlp.activation_fn, mlp.fc2, layer.layernorm_after, pre_norm=True,
            )  # fmt: skip
        if kind == "ModernBertEncoderLayer":
            attention, mlp = layer.attn, layer.mlp
            return cls(
                attention.config.num_attention_heads, attention.Wqkv, attention.Wqkv, attention.Wqkv, attention.Wo,
                layer.attn_norm, mlp.Wi, mlp.act, mlp.Wo, layer.mlp_norm, pre_norm=True, gated=True,
                window=(attention.sliding_window or 1) - 1,  # which the layer holds with one more
            )  # fmt: skip
        if kind == "DebertaV2Layer":
            attention, output, inner = layer.attention.self, layer.attention.output, layer.intermediate
            return cls(
                attention.num_attention_heads, attention.query_proj, attention.key_proj, attention.value_proj,
                output.dense, output.LayerNorm,
                inner.dense, inner.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm,
            )  # fmt: skip
        return _mobilebert(layer) if kind == "MobileBertLayer" else cls.of(layer)

    @classmethod
    def of(cls, layer: Any) -> LayerParts | None:
        """The parts of a post-norm layer of the BERT kind that sees its own tokens only; ``None`` for any other."""
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
    def width(self) -> int:
        """Of the hidden states that pass through the layer."""
        last: Any = self.ffn_out if self.bottleneck is None else self.bottleneck.up
        return int(last.out_features)

    @property
    def inputs(self) -> list[Any]:
        """Query, key and value, or the one map that gives all three."""
        return [self.query] if self.query is self.key else [self.query, self.key, self.value]

    @property
    def ffns(self) -> list[FeedForward]:
        """All feed-forward nets in their order."""
        return [*self.more_ffns, FeedForward(self.ffn_in, self.activation, self.ffn_out, self.output_norm)]

    @property
    def linears(self) -> list[Any]:
        """`inputs`, then the other linear maps."""
        found = [*self.inputs, self.attention_output, self.ffn_in, self.ffn_out]
        found += [m for net in self.more_ffns for m in (net.ffn_in, net.ffn_out)]
        if self.bottleneck is not None:
            found += filter(None, (self.bottleneck.down, self.bottleneck.shared, self.bottleneck.up))
        return found

    @property
    def norms(self) -> list[Any]:
        """The two norms, and those of further feed-forward nets and of a bottleneck."""
        found = [self.attention_norm, self.output_norm, *(net.norm for net in self.more_ffns)]
        if self.bottleneck is not None:
            outer = self.bottleneck
            found += filter(None, (outer.down_norm, outer.shared_norm, outer.up_norm))
        return found


def _mobilebert(layer: Any) -> LayerParts:
    attention, output, inner = layer.attention.self, layer.attention.output, layer.intermediate
    nets = layer.ffn if layer.num_feedforward_networks > 1 else ()
    outer = None
    if layer.use_bottleneck:
        entry, way_out = layer.bottleneck, layer.output.bottleneck
        shares = entry.key_query_shared_bottleneck and not entry.use_bottleneck_attention
        shared = entry.attention if shares else None
        outer = Bottleneck(
            entry.input.dense, entry.input.LayerNorm,
            shared and shared.dense, shared and shared.LayerNorm, entry.use_bottleneck_attention,
            way_out.dense, way_out.LayerNorm,
        )  # fmt: skip
    return LayerParts(
        attention.num_attention_heads, attention.query, attention.key, attention.value, output.dense, output.LayerNorm,
        inner.dense, inner.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm,
        more_ffns=tuple(
            FeedForward(
                net.intermediate.dense, net.intermediate.intermediate_act_fn, net.output.dense, net.output.LayerNorm
            )
            for net in nets
        ),
        bottleneck=outer,
    )  # fmt: skip
