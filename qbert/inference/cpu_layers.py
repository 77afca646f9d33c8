"""Fused encoder layers on a CPU: post-norm layers of BERT, its relatives, DistilBERT and MPNet as one program.

`FusedLayer` computes a layer from its pieces (`qbert.inference.fits`) in four int8 products; a matrix in float takes
a float product instead, and a query, key and value that quantize their input differently take three. `FusedLayers` is
the whole stack, `FusedEmbeddings` what comes before it. TorchScript compiles both
(`qbert.kernels.cpu.chains.compiled`), so that one short sentence does not spend half of its time in Python.

    >>> layers = FusedLayers([LayerParts.of(layer) for layer in encoder.layer])
    >>> y = compiled(layers)(x, None)     # [B, T, H]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import LayerParts
from qbert.inference.fits import maps_of, one_input
from qbert.inference.forward import reason_not_to_replace
from qbert.kernels.cpu import CpuLinear
from qbert.kernels.cpu.chains import FloatChain
from qbert.kernels.cpu.native import ACTIVATIONS, NativeLayers, NativeProduct
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.tables import grids_of, is_packed_table

_COUNT_FROM_0 = ("BertEmbeddings", "ElectraEmbeddings", "Embeddings")  # the last are DistilBERT's
_SKIP_PADDING = ("RobertaEmbeddings", "XLMRobertaEmbeddings", "CamembertEmbeddings", "MPNetEmbeddings")


class FusedLayers(nn.Module):
    """A stack of fused layers; `exact` and `engine` as for `CpuLinear.prepare`.

    With engine "bf16" all that passes through the layers is bfloat16.
    """

    def __init__(self, parts: Sequence[LayerParts], exact: bool = True, engine: str | None = None) -> None:
        super().__init__()
        made: dict[int, FusedLayer] = {}  # ALBERT runs the same layer many times
        for part in parts:
            if id(part.query) not in made:
                made[id(part.query)] = FusedLayer(part, exact, engine)
        self.layers = nn.ModuleList(made[id(part.query)] for part in parts)
        self.like = torch.zeros((), dtype=torch.bfloat16 if engine == "bf16" else torch.float32, device="cpu")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x float32 [B, T, H] to [B, T, H]; `mask` broadcasts to [B, heads, T, T], true or 0 where a key is seen."""
        shape = x.shape
        y = x.reshape(-1, shape[2]).to(self.like.dtype)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(self.like.dtype)
        for layer in self.layers:
            y = layer(y, shape[0], mask)
        return y.view(shape).to(x.dtype)


class FusedLayer(nn.Module):
    """One encoder layer, post-norm: int8 products and float attention, normalization and activation function.

    Args:
        parts: those of a layer for which `reason_not_to_fuse_layer` has none.
        exact, engine: as for `CpuLinear.prepare`; one of torch's engines.
    """

    def __init__(self, parts: LayerParts, exact: bool = True, engine: str | None = None) -> None:
        super().__init__()
        self.heads = parts.heads
        if one_input(parts):
            self.qkv: nn.Module = _joined(parts.inputs, exact, engine).chain  # type: ignore[assignment]
        else:
            self.qkv = _Beside(*(_chain(p, exact, engine) for p in parts.inputs))
        self.attention_output = _chain(parts.attention_output, exact, engine)
        self.ffn_in, self.ffn_out = (_chain(p, exact, engine) for p in (parts.ffn_in, parts.ffn_out))
        exact = type(parts.activation).__name__ == "GELUActivation"
        self.activation = _GeluInPlace() if exact else parts.activation
        # Copies, because the model may be moved to another dtype while its layers go on in float32.
        self.norm1, self.shift1, self.eps1 = _norm(parts.attention_norm)
        self.norm2, self.shift2, self.eps2 = _norm(parts.output_norm)
        if engine == "bf16":
            self.norm1, self.shift1, self.norm2, self.shift2 = (
                v.bfloat16() for v in (self.norm1, self.shift1, self.norm2, self.shift2)
            )

    def forward(self, x: Tensor, batch: int, mask: Tensor | None) -> Tensor:
        """x [B T, H] to [B T, H]; `mask` as for `FusedLayers`."""
        tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens // batch, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, D] each
        mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(tokens, -1)
        y = self.attention_output(mixed).add_(x)
        y = F.layer_norm(y, [width], self.norm1, self.shift1, self.eps1)
        hidden = self.activation(self.ffn_in(y))
        return F.layer_norm(self.ffn_out(hidden).add_(y), [width], self.norm2, self.shift2, self.eps2)


class _Beside(nn.Module):
    """Query, key and value as three products, beside each other: [T, I] to [T, 3 H]."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=1)


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
        # Codes in fewer than 8 bits, or in several tables, take longer to find than to read from one int8 table.
        self.codes, self.scale, self.zero, self.up = grids_of(embeddings.word_embeddings)  # [V, r], [V, 1], [V, 1]
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
        if self.up is not None:
            rows = F.linear(rows, self.up)
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
    words = embeddings.word_embeddings
    if not is_packed_table(words):
        return "the word embeddings are not packed with one scale a row"
    inner = {id(m) for m in words.modules()}
    return reason_not_to_replace(
        m for m in embeddings.modules() if not isinstance(m, PackedEmbedding) and id(m) not in inner
    )


def _table(table: Any) -> Tensor:
    """Float values of a small table, packed or not."""
    values = table.quantized_weight() if isinstance(table, PackedEmbedding) else table.weight.detach()
    return values.float().clone()  # type: ignore[no-any-return]


class _Corrected(nn.Module):
    """A whole map and a low-rank one of the same input, added: [T, I] to [T, O]."""

    def __init__(self, whole: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.whole, self.down, self.up = whole, down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x).add_(self.up(self.down(x)))  # type: ignore[no-any-return]


def _chain(linear: Any, exact: bool, engine: str | None) -> nn.Module:
    if is_factored(linear):
        chains = [_chain(part, exact, engine) for part in maps_of(linear)]
        return _Corrected(*chains) if len(chains) == 3 else nn.Sequential(*chains)
    if isinstance(linear, PackedLinear):
        return linear.cpu_linear(exact, engine).chain  # type: ignore[return-value]
    # A copy, as of the norms.
    weight = linear.weight.detach().float().clone()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().clone()
    return FloatChain(weight, bias, None)


def _joined(parts: list[Any], exact: bool, engine: str | None) -> CpuLinear:
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
        **parts[0].input_grid().options,
        exact=exact,
        engine=engine,
    )


def native_layers(parts: Sequence[LayerParts], exact: bool = True) -> NativeLayers:
    """The stack by the native engine; `parts` of layers for which `reason_not_native_layers` has none."""
    made: dict[int, tuple[list[NativeProduct], list[Any], int, int]] = {}
    for part in parts:
        if id(part.query) in made:
            continue
        products: list[Any] = [_joined(part.inputs, exact, "native").chain]
        products += [p.cpu_linear(exact, "native").chain for p in part.linears[3:]]
        norms = [_norm(norm) for norm in part.norms]
        activation = ACTIVATIONS[type(part.activation).__name__]
        made[id(part.query)] = (products, norms, part.heads, activation)
    return NativeLayers([made[id(part.query)] for part in parts])


def reason_not_to_choose(parts: Sequence[LayerParts]) -> str:
    """Why the engine of layers is settled beforehand; empty if all their products are int8, Q, K and V as one."""
    for part in parts:
        packed = [p for p in part.linears if isinstance(p, PackedLinear)]
        if len(packed) < len(part.linears) or any(p.spec.activation_bits is None for p in packed):
            return "some of its products are in float"
        if any(p.layout.input_groups > 1 for p in packed) or not one_input(part):
            return "its inputs are not quantized as one"
    return ""


def reason_not_native_layers(parts: Sequence[LayerParts]) -> str:
    """Why the native engine cannot run layers that `reason_not_to_choose` lets choose; empty if it can."""
    for part in parts:
        kind = type(part.activation).__name__
        if kind not in ACTIVATIONS:
            return f"it does not know the activation function {kind}"
        if part.attention_output.columns != part.attention_output.rows:
            return "it has fewer heads than its width has room for"
    if len({(part.heads, part.attention_output.rows, part.ffn_in.rows) for part in parts}) > 1:
        return "its layers are of several widths, and one room is laid out for all"
    return ""


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float().clone(), norm.bias.detach().float().clone(), norm.eps
