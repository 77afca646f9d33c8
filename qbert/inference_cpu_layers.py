"""Fused encoder layers on a CPU: post-norm layers of BERT, its relatives, DistilBERT and MPNet as one program.

`LayerParts` finds the pieces of a layer whatever its family calls them; `FusedLayer` computes the layer from them in
four int8 products; `FusedLayers` is the whole stack, and `FusedEmbeddings` what comes before it. TorchScript compiles
both (`qbert.kernels.cpu_chains.compiled`), so that one short sentence does not spend half of its time in Python.

    >>> layers = FusedLayers([LayerParts.of(layer) for layer in encoder.layer])
    >>> y = compiled(layers)(x, None)     # [B, T, H]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.fast_forward import reason_not_to_replace
from qbert.kernels.cpu import CpuLinear
from qbert.packed_modules import PackedEmbedding, PackedLinear

BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "CamembertLayer")
_COUNT_FROM_0 = ("BertEmbeddings", "ElectraEmbeddings", "Embeddings")  # the last are DistilBERT's
_SKIP_PADDING = ("RobertaEmbeddings", "XLMRobertaEmbeddings", "CamembertEmbeddings", "MPNetEmbeddings")


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
    def linears(self) -> list[nn.Module]:
        """Query, key and value, then the other three linear maps."""
        return [self.query, self.key, self.value, self.attention_output, self.ffn_in, self.ffn_out]

    @property
    def norms(self) -> list[nn.LayerNorm]:
        """The two norms."""
        return [self.attention_norm, self.output_norm]


def reason_not_to_fuse_layer(layer: Any) -> str:
    """Why `layer` is not a packed encoder layer of a known family with one input for Q, K and V; empty if it is."""
    parts = LayerParts.of(layer)
    if parts is None:
        return f"a {type(layer).__name__} is not an encoder layer of the BERT kind"
    inner = {id(m) for part in (*parts.linears, parts.activation) for m in part.modules()}
    altered = reason_not_to_replace(m for m in layer.modules() if id(m) not in inner)
    if altered:
        return altered
    if not all(
        type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None for norm in parts.norms
    ):
        return "its norms are not LayerNorm with weight and bias"
    if not all(isinstance(p, PackedLinear) for p in parts.linears):
        return "some of its linear maps are in float"
    if not all(_same_input(parts.query, p) for p in (parts.key, parts.value)):
        return "query, key and value quantize their input differently"
    return ""


class FusedLayers(nn.Module):
    """A stack of fused layers; `exact` as for `CpuLinear.prepare`."""

    def __init__(self, parts: Sequence[LayerParts], exact: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedLayer(p, exact) for p in parts)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x float32 [B, T, H] to [B, T, H]; `mask` broadcasts to [B, heads, T, T], true or 0 where a key is seen."""
        shape = x.shape
        y = x.reshape(-1, shape[2])
        for layer in self.layers:
            y = layer(y, shape[0], mask)
        return y.view(shape)


class FusedLayer(nn.Module):
    """One encoder layer, post-norm: int8 products and float attention, normalization and activation function."""

    def __init__(self, parts: LayerParts, exact: bool = True) -> None:
        super().__init__()
        self.heads = parts.heads
        self.qkv = _joined([parts.query, parts.key, parts.value], exact).chain
        self.attention_output = _chain(parts.attention_output, exact)
        self.ffn_in, self.ffn_out = _chain(parts.ffn_in, exact), _chain(parts.ffn_out, exact)
        exact = type(parts.activation).__name__ == "GELUActivation"
        self.activation = _GeluInPlace() if exact else parts.activation
        # Copies, because the model may be moved to another dtype while its layers go on in float32.
        self.norm1, self.shift1, self.eps1 = _norm(parts.attention_norm)
        self.norm2, self.shift2, self.eps2 = _norm(parts.output_norm)

    def forward(self, x: Tensor, batch: int, mask: Tensor | None) -> Tensor:
        """x [B T, H] to [B T, H]; `mask` as for `FusedLayers`."""
        tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens // batch, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, D] each
        mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(tokens, width)
        y = self.attention_output(mixed).add_(x)
        y = F.layer_norm(y, [width], self.norm1, self.shift1, self.eps1)
        hidden = self.activation(self.ffn_in(y))
        return F.layer_norm(self.ffn_out(hidden).add_(y), [width], self.norm2, self.shift2, self.eps2)


class _GeluInPlace(nn.Module):
    """GELU with the exact error function, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)  # type: ignore[no-any-return]


class FusedEmbeddings(nn.Module):
    """Sum of word, position and type embeddings, normalized.

    Positions count from 0, or, in models descended from RoBERTa, the tokens that are not padding, from its id + 1.

    Args:
        embeddings: a module for which `reason_not_to_fuse_embeddings` has none.
    """

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        words = embeddings.word_embeddings
        self.codes = words.owner.codes.view(torch.int8)
        self.scale, self.zero = (grid.contiguous() for grid in words.row_grids())  # [V, 1]
        self.padding = int(embeddings.padding_idx) if type(embeddings).__name__ in _SKIP_PADDING else -1
        self.positions = _table(embeddings.position_embeddings)
        types = getattr(embeddings, "token_type_embeddings", None)
        self.types = None if types is None else _table(types)
        # What is added where no types are given.
        self.plain = self.positions if self.types is None else self.positions + self.types[0]
        self.norm, self.shift, self.eps = _norm(embeddings.LayerNorm)

    def forward(self, ids: Tensor, type_ids: Tensor | None) -> Tensor:
        """int64 [B, T], and the same for types (None: 0), to float32 [B, T, H]; RuntimeError for what is no id."""
        flat = ids.reshape(-1)
        rows = F.embedding(flat, self.codes).float()
        rows.sub_(F.embedding(flat, self.zero)).mul_(F.embedding(flat, self.scale))
        x = rows.view(ids.shape[0], ids.shape[1], rows.shape[1])
        places = self.plain
        if self.types is not None:  # noqa: SIM102  a condition that TorchScript decides when it compiles
            if type_ids is not None:
                x.add_(F.embedding(type_ids, self.types))
                places = self.positions
        if self.padding < 0:
            x.add_(places[: ids.shape[1]])
        else:
            keep = (ids != self.padding).long()
            x.add_(F.embedding(keep.cumsum(1) * keep + self.padding, places))
        return F.layer_norm(x, [x.shape[2]], self.norm, self.shift, self.eps)


def reason_not_to_fuse_embeddings(embeddings: Any) -> str:
    """Why embeddings cannot be computed by `FusedEmbeddings`; empty if they can."""
    kind = type(embeddings).__name__
    if kind not in _COUNT_FROM_0 + _SKIP_PADDING or type(getattr(embeddings, "LayerNorm", None)) is not nn.LayerNorm:
        return f"{kind} are not embeddings of the BERT kind"
    altered = reason_not_to_replace(m for m in embeddings.modules() if not isinstance(m, PackedEmbedding))
    if altered:
        return altered
    words = embeddings.word_embeddings
    if not isinstance(words, PackedEmbedding) or words.layout.bits != 8 or words.layout.input_groups > 1:
        return "the word embeddings are not packed in 8 bits with one scale a row"
    return ""


def _table(table: Any) -> Tensor:
    """Float values of a small table, packed or not."""
    values = table.quantized_weight() if isinstance(table, PackedEmbedding) else table.weight.detach()
    return values.float().clone()  # type: ignore[no-any-return]


def _same_input(one: Any, other: Any) -> bool:
    for field in ("activation_bits", "activation_range"):
        if getattr(one.spec, field) != getattr(other.spec, field):
            return False
    if one.layout.input_groups > 1 or other.layout.input_groups > 1:
        return False
    if one.input_scale is None or one.input_zero is None or other.input_scale is None or other.input_zero is None:
        return True
    return torch.equal(one.input_scale, other.input_scale) and torch.equal(one.input_zero, other.input_zero)


def _chain(linear: Any, exact: bool) -> nn.Module:
    return linear.cpu_linear(exact).chain  # type: ignore[no-any-return]


def _joined(parts: list[Any], exact: bool) -> CpuLinear:
    """One product for several packed layers with the same input: their rows under each other."""
    grids = [p.row_grids() for p in parts]
    codes = torch.cat([p.int_codes() for p in parts])
    biases = [codes.new_zeros(p.rows).float() if p.bias is None else p.bias.detach().float() for p in parts]
    return CpuLinear.prepare(
        codes,
        torch.cat([scale for scale, _ in grids]),
        torch.cat([zero for _, zero in grids]),
        torch.arange(len(codes), device=codes.device),
        torch.cat(biases),
        max(p.layout.bits for p in parts),
        **parts[0].activation_arguments(),
        exact=exact,
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float().clone(), norm.bias.detach().float().clone(), norm.eps
