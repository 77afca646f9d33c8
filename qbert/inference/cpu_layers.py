"""Fused encoder layers on a CPU: of BERT and its relatives, ViT, ModernBERT, MobileBERT and DeBERTa, as one program.

`FusedLayers` is a stack of layers, each made from its pieces (`qbert.encoders.parts`): where the norms stand, how
attention is rotated or told positions, which tokens it sees, how many feed-forward nets there are, gated or not. A
layer of the BERT kind is four int8 products; a matrix in float takes a float product instead, and maps that quantize
the same input differently take one each. `FusedEmbeddings` is what comes before the layers of the BERT kind.
TorchScript compiles both (`qbert.kernels.cpu.chains.compiled`), so that one short sentence does not spend half of its
time in Python.

    >>> layers = FusedLayers([LayerParts.of(layer) for layer in encoder.layer])
    >>> y = compiled(layers)(x, None)     # [B, T, H]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import Bottleneck, LayerParts, RelativePositions
from qbert.inference.fits import can_join, maps_of
from qbert.inference.forward import reason_not_to_replace
from qbert.kernels.cpu import CpuLinear
from qbert.kernels.cpu.chains import FloatChain
from qbert.kernels.cpu.native import (
    ACTIVATIONS,
    NativeLayer,
    NativeLayers,
    NativePositions,
    NativeTerm,
    NativeThinLayer,
    NativeThinLayers,
)
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
        made: dict[int, nn.Module] = {}  # ALBERT runs the same layer many times
        for part in parts:
            if id(part.query) not in made:
                made[id(part.query)] = _fused_layer(part, _Makers(exact, engine))
        self.layers = nn.ModuleList(made[id(part.query)] for part in parts)
        self.like = torch.zeros((), dtype=torch.bfloat16 if engine == "bf16" else torch.float32, device="cpu")
        self.window = max(part.window for part in parts)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x float32 [B, T, H] to [B, T, H]; `mask` broadcasts to [B, heads, T, T], true or 0 where a key is seen."""
        shape = x.shape
        y = x.reshape(-1, shape[2]).to(self.like.dtype)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(self.like.dtype)
        near = mask
        if self.window > 0 and shape[1] > self.window + 1:
            near = _within(self.window, shape[1], mask)
        for layer in self.layers:
            y = layer(y, shape[0], mask, near)
        return y.view(shape).to(x.dtype)


def _within(window: int, length: int, mask: Tensor | None) -> Tensor:
    """`mask` of keys, which shows no more than `window` tokens on each side of a query; [T, T] or [B, 1, T, T]."""
    places = torch.arange(length)
    seen = (places[:, None] - places).abs_() <= window
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


class _Makers(NamedTuple):
    """How the pieces of a layer are prepared: `exact` and `engine` as for `CpuLinear.prepare`."""

    exact: bool
    engine: str | None

    def chain(self, *linears: Any) -> nn.Module:
        """The product of one or several maps of the same input, their rows under each other: [T, I] to [T, O]."""
        if len(linears) == 1 and not isinstance(linears[0], PackedLinear):
            return _chain(linears[0], self.exact, self.engine)
        if can_join(list(linears)):
            return _joined(list(linears), self.exact, self.engine).chain  # type: ignore[return-value]
        return _Beside(_chain(linear, self.exact, self.engine) for linear in linears)

    def norm(self, norm: Any) -> nn.Module:
        """What a norm computes from copies: the model may be moved to another dtype, its layers go on in float32."""
        if isinstance(norm, nn.Identity):
            return norm
        weight, shift, eps = _norm(norm)
        if self.engine == "bf16":
            weight, shift = weight.bfloat16(), shift.bfloat16()
        if isinstance(norm, nn.LayerNorm):
            return _LayerNorm(weight, shift, eps)
        folded = bool((weight == 1).all()) and not bool(shift.any())
        return nn.Identity() if folded else _NoNorm(weight, shift)

    def feed_forward(self, ffn_in: Any, activation: nn.Module, ffn_out: Any, gated: bool = False) -> nn.Module:
        """A feed-forward net, [T, H] to [T, H]."""
        exact = type(activation).__name__ == "GELUActivation"
        made: list[nn.Module] = [self.chain(ffn_in), _GeluInPlace() if exact else activation, self.chain(ffn_out)]
        return _Gated(*made) if gated else nn.Sequential(*made)


def _fused_layer(parts: LayerParts, make: _Makers) -> nn.Module:
    """The module of a layer for which `reason_not_to_fuse_layer` has none, by one of torch's engines."""
    if parts.bottleneck is not None:
        return _BottleneckLayer(parts, parts.bottleneck, make)
    return _PreNormLayer(parts, make) if parts.pre_norm else _PostNormLayer(parts, make)


class _PostNormLayer(nn.Module):
    """A layer of the BERT kind: int8 products and float attention, normalization and activation function."""

    def __init__(self, parts: LayerParts, make: _Makers) -> None:
        super().__init__()
        self.attention = _Attention(parts, make)
        self.feed_forward, self.norms = _feed_forwards(parts, make)
        self.attention_norm = make.norm(parts.attention_norm)

    def forward(self, x: Tensor, batch: int, mask: Tensor | None, near: Tensor | None) -> Tensor:
        """x [B T, H] to [B T, H]; `mask` as for `FusedLayers`, `near` the same within the window."""
        y = self.attention_norm(self.attention(x, batch, mask, near).add_(x))
        for net, norm in zip(self.feed_forward, self.norms):  # noqa: B905  TorchScript knows no strict
            y = norm(net(y).add_(y))
        return y  # type: ignore[no-any-return]


class _PreNormLayer(nn.Module):
    """A layer whose norms stand before attention and feed-forward net: ViT, ModernBERT."""

    def __init__(self, parts: LayerParts, make: _Makers) -> None:
        super().__init__()
        self.attention = _Attention(parts, make)
        self.feed_forward = make.feed_forward(parts.ffn_in, parts.activation, parts.ffn_out, parts.gated)
        self.attention_norm, self.output_norm = make.norm(parts.attention_norm), make.norm(parts.output_norm)

    def forward(self, x: Tensor, batch: int, mask: Tensor | None, near: Tensor | None) -> Tensor:
        """As for `_PostNormLayer`."""
        y = self.attention(self.attention_norm(x), batch, mask, near).add_(x)
        return self.feed_forward(self.output_norm(y)).add_(y)  # type: ignore[no-any-return]


class _BottleneckLayer(nn.Module):
    """A thin post-norm layer between wide ones: MobileBERT.

    What reads the wide input, up to three maps, is one product where they quantize it in the same way; so are query
    and key.
    """

    def __init__(self, parts: LayerParts, outer: Bottleneck, make: _Makers) -> None:
        super().__init__()
        self.heads, self.inside, self.shares = parts.heads, outer.inside, outer.shared is not None
        wide, thin = _read_by_bottleneck(parts, outer)
        self.sizes: list[int] = [int(m.out_features) for m in wide]
        self.read_wide, self.read_thin = make.chain(*wide), make.chain(*thin) if thin else nn.Identity()
        self.down_norm = make.norm(outer.down_norm)
        self.shared_norm = nn.Identity() if outer.shared_norm is None else make.norm(outer.shared_norm)
        self.mix = _Mix(parts)
        self.attention_output, self.attention_norm = make.chain(parts.attention_output), make.norm(parts.attention_norm)
        self.feed_forward, self.norms = _feed_forwards(parts, make)
        self.up, self.up_norm = make.chain(outer.up), make.norm(outer.up_norm)

    def forward(self, x: Tensor, batch: int, mask: Tensor | None, near: Tensor | None) -> Tensor:
        """As for `_PostNormLayer`."""
        read = self.read_wide(x).split(self.sizes, 1)
        thin = self.down_norm(read[0]).contiguous()
        if self.inside:
            query, key, value = self.read_thin(thin).chunk(3, 1)
        elif self.shares:
            query, key = self.read_thin(self.shared_norm(read[1]).contiguous()).chunk(2, 1)
            value = read[2]
        else:
            query, key, value = read[1], read[2], read[3]
        shape = (batch, x.shape[0] // batch, self.heads, -1)
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        y = self.attention_output(self.mix(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask))
        y = self.attention_norm(y.add_(thin))
        for net, norm in zip(self.feed_forward, self.norms):  # noqa: B905  TorchScript knows no strict
            y = norm(net(y).add_(y))
        return self.up_norm(self.up(y).add_(x))  # type: ignore[no-any-return]


def _feed_forwards(parts: LayerParts, make: _Makers) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The feed-forward nets of a post-norm layer in their order, and their norms."""
    return (
        nn.ModuleList(make.feed_forward(net.ffn_in, net.activation, net.ffn_out) for net in parts.ffns),
        nn.ModuleList(make.norm(net.norm) for net in parts.ffns),
    )


class _Attention(nn.Module):
    """Query, key and value of one input, attention, and the map of what it mixes."""

    def __init__(self, parts: LayerParts, make: _Makers) -> None:
        super().__init__()
        self.qkv, self.output = make.chain(*parts.inputs), make.chain(parts.attention_output)
        self.mix = _Mix(parts) if parts.relative is None else _RelativeMix(parts.heads, parts.relative, make.engine)
        self.heads, self.is_local = parts.heads, parts.window > 0

    def forward(self, x: Tensor, batch: int, mask: Tensor | None, near: Tensor | None) -> Tensor:
        """[B T, H] to [B T, H]."""
        tokens = x.shape[0]
        qkv = self.qkv(x).view(batch, tokens // batch, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.output(self.mix(query, key, value, near if self.is_local else mask))  # type: ignore[no-any-return]


class _Mix(nn.Module):
    """Attention itself, with rotated queries and keys where a family rotates them."""

    def __init__(self, parts: LayerParts) -> None:
        super().__init__()
        self.rotates = parts.rotation is not None
        self.rotation = torch.zeros(0, 2, device="cpu") if parts.rotation is None else parts.rotation

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, heads, T, D] each to the mixed values [B T, heads D]."""
        if self.rotates:
            query, key = self._rotated(query), self._rotated(key)
        mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        return mixed.reshape(mixed.shape[0] * mixed.shape[1], -1)

    def _rotated(self, x: Tensor) -> Tensor:
        cosine, sine = self.rotation[: x.shape[2]].chunk(2, 1)
        first, second = x.chunk(2, 3)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], 3)
        return turned.to(x.dtype)


class _RelativeMix(nn.Module):
    """Attention whose scores depend on the distance of query and key too: `RelativePositions`."""

    def __init__(self, heads: int, positions: RelativePositions, engine: str | None) -> None:
        super().__init__()
        dtype = torch.bfloat16 if engine == "bf16" else torch.float32
        nothing = torch.zeros(heads, 0, 1, device="cpu")
        keys, queries = (_of_positions(heads, positions, m, engine) for m in (positions.to_key, positions.to_query))
        self.keys = (nothing if keys is None else keys).to(dtype).transpose(1, 2)  # [heads, D, rows]
        self.queries = (nothing if queries is None else queries).to(dtype).transpose(1, 2)
        self.by_key, self.by_query = keys is not None, queries is not None
        self.places, self.scale = positions.places.long(), positions.scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As for `_Mix`."""
        length, farthest = query.shape[2], len(self.places) // 2
        order = torch.arange(length)
        places = self.places[(order[:, None] - order).clamp_(-farthest, farthest) + farthest]  # [query, key]
        shape = (query.shape[0], query.shape[1], length, length)
        first = int(places[0, length - 1])
        count = int(places[length - 1, 0]) + 1 - first
        places = places - first
        added: Tensor | None = None
        if self.by_key:
            scores = torch.matmul(query, self.keys.narrow(2, first, count))
            added = scores.gather(3, places.expand(shape))
        if self.by_query:
            scores = torch.matmul(key, self.queries.narrow(2, first, count))
            by_query = scores.gather(3, places.t().expand(shape)).transpose(2, 3)
            added = by_query if added is None else added + by_query
        bias = mask
        if added is not None:
            bias = added * self.scale
            if mask is not None:
                bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        mixed = F.scaled_dot_product_attention(query, key, value, bias, scale=self.scale).transpose(1, 2)
        return mixed.reshape(mixed.shape[0] * mixed.shape[1], -1)


@torch.no_grad()
def _of_positions(heads: int, positions: RelativePositions, of: Any, engine: str | None) -> Tensor | None:
    """What `of` makes of the table, float32 [heads, rows, D]: once, since it is the same for every input.

    In int8 it is what the layer itself computes; engines that do not round inputs do not round the table either.
    """
    if of is None:
        return None
    if engine in ("bf16", "fp32") and isinstance(of, PackedLinear):
        bias = None if of.bias is None else of.bias.float()
        rows = F.linear(positions.table.float(), of.quantized_weight().float(), bias)
    else:
        rows = of(positions.table).float()
    return rows.view(len(rows), heads, -1).transpose(0, 1).contiguous()  # type: ignore[no-any-return]


class _LayerNorm(nn.Module):
    def __init__(self, weight: Tensor, shift: Tensor, eps: float) -> None:
        super().__init__()
        self.gain, self.shift, self.eps = weight, shift, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, [x.shape[1]], self.gain, self.shift, self.eps)


class _NoNorm(nn.Module):
    """MobileBERT's: a scale and a shift."""

    def __init__(self, weight: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.gain, self.shift = weight, shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.gain)


class _Gated(nn.Module):
    """A feed-forward net whose first map gives values and, behind them, what multiplies them."""

    def __init__(self, ffn_in: nn.Module, activation: nn.Module, ffn_out: nn.Module) -> None:
        super().__init__()
        self.ffn_in, self.activation, self.ffn_out = ffn_in, activation, ffn_out

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.ffn_in(x).chunk(2, 1)
        return self.ffn_out(self.activation(value) * gate)  # type: ignore[no-any-return]


class _Beside(nn.Module):
    """Several products of one input, beside each other: [T, I] to [T, O], the sum of their rows."""

    def __init__(self, maps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([m(x) for m in self.maps], dim=1)


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
    if parts[0].bottleneck is not None:
        return NativeThinLayers([_native_thin_layer(part, part.bottleneck, exact) for part in parts if part.bottleneck])
    made: dict[int, NativeLayer] = {}
    for part in parts:
        if id(part.query) in made:
            continue
        maps = (part.inputs, [part.attention_output], [part.ffn_in], [part.ffn_out])
        made[id(part.query)] = NativeLayer(
            [_native_terms(m, exact) for m in maps],
            [None if isinstance(n, nn.Identity) else _norm(n) for n in part.norms], part.heads,
            ACTIVATIONS[type(part.activation).__name__], part.pre_norm, part.gated, part.window, part.rotation,
            _native_positions(part.heads, part.relative),
        )  # fmt: skip
    return NativeLayers([made[id(part.query)] for part in parts])


def _native_terms(maps: list[Any], exact: bool) -> list[NativeTerm]:
    """Maps of one input, whole or in factors, their rows under each other."""
    if can_join(maps):
        return [NativeTerm(_joined(maps, exact, "native").chain)]  # type: ignore[arg-type]
    terms: list[NativeTerm] = []
    place = 0
    for one in maps:
        *whole, product = products = [m.cpu_linear(exact, "native").chain for m in maps_of(one)]  # type: ignore[operator]
        if len(products) == 3:
            terms.append(NativeTerm(products[0], None, place))
        terms.append(NativeTerm(product, whole[-1] if whole else None, place, adds=len(products) == 3))
        place += product.matrix.rows
    return terms


def _native_positions(heads: int, positions: RelativePositions | None) -> NativePositions | None:
    if positions is None:
        return None
    maps = (positions.to_key, positions.to_query)
    return NativePositions(
        positions.scale, positions.places, *(_of_positions(heads, positions, m, "native") for m in maps)
    )


def _native_thin_layer(part: LayerParts, outer: Bottleneck, exact: bool) -> NativeThinLayer:
    def product(*maps: Any) -> Any:
        return _joined(list(maps), exact, "native").chain

    def norm(of: nn.Module | None) -> tuple[Tensor, Tensor, float] | None:
        return None if of is None else _norm(of)

    wide, thin = _read_by_bottleneck(part, outer)
    return NativeThinLayer(
        product(*wide), product(*thin) if thin else None, product(part.attention_output), product(outer.up),
        [(product(net.ffn_in), product(net.ffn_out), norm(net.norm)) for net in part.ffns],
        norm(outer.down_norm), norm(outer.shared_norm), norm(part.attention_norm), norm(outer.up_norm),
        part.heads, ACTIVATIONS[type(part.activation).__name__], outer.shared is not None, outer.inside,
    )  # fmt: skip


def _read_by_bottleneck(parts: LayerParts, outer: Bottleneck) -> tuple[list[Any], list[Any]]:
    """The maps of the wide input of a bottleneck, the way down first, and those of what a way down gives."""
    heads = [parts.query, parts.key, parts.value]
    if outer.shared is not None:
        return [outer.down, outer.shared, parts.value], heads[:2]
    return ([outer.down], heads) if outer.inside else ([outer.down, *heads], [])


def reason_not_to_choose(parts: Sequence[LayerParts]) -> str:
    """Why the engine of layers is settled beforehand; empty if all their products are int8."""
    for part in parts:
        maps = [m for linear in part.linears for m in maps_of(linear)]
        packed = [m for m in maps if isinstance(m, PackedLinear)]
        if len(packed) < len(maps) or any(p.spec.activation_bits is None for p in packed):
            return "some of its products are in float"
        if any(p.layout.input_groups > 1 for p in packed):
            return "its inputs are quantized in groups"
    return ""


def reason_not_native_layers(parts: Sequence[LayerParts]) -> str:
    """Why the native engine cannot run layers that `reason_not_to_choose` lets choose; empty if it can."""
    for part in parts:
        if part.bottleneck is not None and not all(
            can_join(maps) for maps in _read_by_bottleneck(part, part.bottleneck)
        ):
            return "what reads the input of a layer does not quantize it as one"
        if part.more_ffns and part.bottleneck is None:
            return "it knows several feed-forward nets in bottlenecks only"
        kinds = {type(net.activation).__name__ for net in part.ffns}
        if not kinds <= ACTIVATIONS.keys() or len(kinds) > 1:
            return f"it does not know the activation function {' and '.join(sorted(kinds))}"
    thin = [p for p in parts if p.bottleneck is not None]
    if any(is_factored(m) for p in thin for m in p.linears):
        return "its thin layers have maps in factors"
    if len({(p.heads, p.attention_output.rows, p.width, *(n.ffn_in.rows for n in p.ffns)) for p in thin}) > 1:
        return "its thin layers are of several widths, and one room is laid out for all"
    return ""


def _norm(norm: Any) -> tuple[Tensor, Tensor, float]:
    """Weight, shift and epsilon of a norm, the last below 0 for a NoNorm."""
    weight = norm.weight.detach().float().clone()
    shift = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach().float().clone()
    return weight, shift, getattr(norm, "eps", -1.0)
