"""Embeddings and layers of a BERT-kind encoder as chains of int8 kernels over the tokens of a batch without padding.

A layer is seven kernels where its inputs are quantized statically:

    query, key, value    int8 product, bits may differ            -> fp16 [T, 3 H]
    attention            inside each sequence                     -> int8, row sums
    attention output     int8 product + bias + residual
    LayerNorm            + quantization                           -> int8, scale, row sums
    ffn in               int8 product + bias + GELU + requantization -> int8, row sums
    ffn out              int8 product + bias + residual
    LayerNorm            + quantization, as the next layer wants it

With a range per token, symmetric or not, which is known only when a whole row is there, attention and ffn in write
fp16 and two row quantizations follow: nine kernels. For many tokens weights are unpacked (`dispatch.takes_unpacked`):
int8 ones take the 8-bit product; those of eight-bit floats are cuBLASLt's, whose epilogue is a bias: GELU is then the
row quantization's, the residual LayerNorm's. All are operators of `qbert.kernels.operators`, so on a CPU the
same chain runs their slow twins, which is what tests compare with.
It stands alone because it knows rows of tokens only: padding and requests are those of `qbert.inference.gpu`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.encoders.parts import BERT_LAYERS
from qbert.inference.fits import reason_not_four_products, reason_not_to_fuse_layer
from qbert.inference.forward import reason_not_to_replace
from qbert.kernels import dispatch, operators
from qbert.kernels.checks import E4M3_COLUMNS
from qbert.kernels.operands import FLOAT, E4m3Weight, Heads, InputGrid, ProductWeight, Spans
from qbert.kernels.terms import Terms, e4m3_weight, unpacked_weight
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear

_BERT_EMBEDDINGS = (
    "BertEmbeddings",
    "RobertaEmbeddings",
    "XLMRobertaEmbeddings",
    "ElectraEmbeddings",
    "CamembertEmbeddings",
)
_MAX_HEAD_DIM = 128
_MAX_WIDTH = 16384
_COUNTS = [1 << n for n in range(4, 14)]  # tokens: where none of these take unpacked weights, none are unpacked


class Tokens(NamedTuple):
    """What passes between layers: x [T, H] in the model's dtype, and its int8 or e4m3 codes [T, H] with their grid.

    scale float32 [T], or steps and offsets [2, T] where asymmetric; row_sum int32 [T].
    """

    x: Tensor
    codes: Tensor
    scale: Tensor
    row_sum: Tensor

    @classmethod
    def quantized(cls, x: Tensor, grid: InputGrid) -> Tokens:
        """x [T, H] with its codes."""
        return cls(x, *operators.quantize_rows(x, grid))


class Projection:
    """One int8 or e4m3 product, of one layer or several with the same input: packed codes, terms, the input's grid.

    Args:
        layers: what is multiplied, their rows one under the other.
        dtype: the model's.
        e4m3: give it e4m3 inputs.
    """

    def __init__(self, layers: list[PackedLinear], dtype: torch.dtype, e4m3: bool = False) -> None:
        weights = [layer.packed_weight() for layer in layers]
        self.grid = layers[0].input_grid().in_e4m3 if e4m3 else layers[0].input_grid()
        parts = [Terms.prepare(w, layer.bias, self.grid) for w, layer in zip(weights, layers, strict=True)]
        if e4m3:
            parts = [t if t.zero is None else t._replace(zero=t.row_zero) for t in parts]
        terms = parts[0] if len(parts) == 1 else Terms.join(parts)
        self.weight = terms.of([w.codes for w in weights], [w.bits for w in weights])
        self.static_scale = terms.scale.new_full((1,), self.grid.scale)
        self.shape = (self.weight.rows, weights[0].columns, max(self.weight.bits))
        self.unpacked: E4m3Weight | ProductWeight | None = None
        device = terms.scale.device
        counts = _COUNTS if min(self.weight.bits) < 8 else ()
        if any(dispatch.takes_unpacked(device, tokens, *self.shape, e4m3) for tokens in counts):
            if not e4m3:
                self.unpacked = unpacked_weight(weights, terms)
            # cuBLASLt multiplies matrices of multiples of 16, and gives halves.
            elif dtype != torch.float32 and not any(n % 16 for n in self.shape[:2]):
                self.unpacked = e4m3_weight(weights, terms, self.grid, dtype)

    @property
    def output_grid(self) -> InputGrid:
        """The grid on which the kernel that makes the input writes it: float where ranges are known per row only."""
        return self.grid if self.grid.scale else FLOAT

    def of(self, tokens: Tensor) -> E4m3Weight | ProductWeight:
        """The weight as so many tokens [T, ...] are multiplied with it: e4m3 by cuBLASLt, unpacked or packed."""
        if self.unpacked is None:
            return self.weight
        e4m3 = isinstance(self.unpacked, E4m3Weight)
        taken = dispatch.takes_unpacked(tokens.device, len(tokens), *self.shape, e4m3)
        return self.unpacked if taken else self.weight

    def quantized(self, x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the input x [T, I], which are x itself where its kernel wrote them, their scale and sums."""
        return (x, self.static_scale, sums) if self.grid.scale else operators.quantize_rows(x, self.grid)

    def wanted(self, sums: Tensor) -> Tensor | None:
        """`sums`, to be filled by the kernel that makes the input, where the product has a zero to multiply them by."""
        weight = self.of(sums)
        return None if isinstance(weight, E4m3Weight) or weight.zero is None else sums

    def plain(self, weight: E4m3Weight, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, O] = product + bias, by cuBLASLt."""
        return operators.matmul_e4m3(codes, None if self.grid.scale else scale, weight, dtype)


class FusedGpuLayer:
    """One encoder layer of the BERT kind, post-norm.

    Args:
        layer: a layer for which `reason_not_to_fuse_on_gpu` has none.
        e4m3: give e4m3 inputs to the products whose weights e4m3 holds exactly; those with 8-bit weights stay int8.
    """

    def __init__(self, layer: Any, e4m3: bool = False) -> None:
        attention, dtype = layer.attention.self, layer.output.LayerNorm.weight.dtype
        self.heads: int = attention.num_attention_heads
        parts = [attention.query, attention.key, attention.value]
        self.qkv = Projection(parts, dtype, e4m3 and all(map(_fits_e4m3, parts)))  # they share an input
        output, ffn_in, ffn_out = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        self.attention_output, self.ffn_in, self.ffn_out = (
            Projection([p], dtype, e4m3 and _fits_e4m3(p)) for p in (output, ffn_in, ffn_out)
        )
        self.norms = [layer.attention.output.LayerNorm, layer.output.LayerNorm]

    @property
    def input_grid(self) -> InputGrid:
        """The grid of the tokens that it takes."""
        return self.qkv.grid

    def __call__(self, tokens: Tokens, spans: Spans, sums: Tensor, next_grid: InputGrid) -> Tokens:
        """Tokens in, tokens out; `sums` int32 [2, T] is zero, `next_grid` the input grid of the next layer."""
        mixed = self._attend(tokens, spans, sums[0])
        tokens = self._add_and_normalize(self.attention_output, mixed, tokens.x, 0, self.ffn_in.grid)
        return self._add_and_normalize(self.ffn_out, self._expand(tokens, sums[1]), tokens.x, 1, next_grid)

    def _attend(self, tokens: Tokens, spans: Spans, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, grid, dtype = self.attention_output, self.attention_output.output_grid, _half(tokens.x)
        weight = self.qkv.of(tokens.x)
        if isinstance(weight, E4m3Weight):
            fused = self.qkv.plain(weight, tokens.codes, tokens.scale, dtype)
        else:
            product = operators.matmul_a8 if len(weight.codes) == 1 else operators.matmul_a8_mixed
            fused = product(*tokens[1:], weight, out_dtype=dtype)
        count = fused.shape[0]
        query, key, value = fused.view(count, 3, self.heads, -1).unbind(1)
        heads = Heads(query, key, value, spans.starts, spans.longest, query.shape[-1] ** -0.5, spans.uniform)
        wanted = output.wanted(sums) if grid.bits else None
        mixed = operators.attention(heads, grid, wanted).view(count, -1)
        return output.quantized(mixed, sums)

    def _expand(self, tokens: Tokens, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grid, dtype, weight = self.ffn_out.output_grid, _half(tokens.x), self.ffn_in.of(tokens.x)
        if isinstance(weight, E4m3Weight):
            hidden = self.ffn_in.plain(weight, tokens.codes, tokens.scale, dtype)
            return operators.quantize_rows(hidden, self.ffn_out.grid, gelu=True)
        wanted = self.ffn_out.wanted(sums) if grid.bits else None
        hidden = operators.matmul_a8(*tokens[1:], weight, None, wanted, grid, gelu=True, out_dtype=dtype)
        return self.ffn_out.quantized(hidden, sums)

    def _add_and_normalize(
        self, product: Projection, codes: tuple[Tensor, Tensor, Tensor], x: Tensor, index: int, grid: InputGrid
    ) -> Tokens:
        """LayerNorm(x + product), and its codes on `grid`; the residual x [T, H] is added where that costs nothing."""
        residual, weight = None, product.of(x)
        if isinstance(weight, E4m3Weight):
            y, residual = product.plain(weight, *codes[:2], x.dtype), x
        else:
            y = operators.matmul_a8(*codes, weight, x, out_dtype=x.dtype)
        norm = self.norms[index]
        return Tokens(*operators.layernorm_quantize(y, residual, norm.weight, norm.bias, norm.eps, grid))


class FusedGpuEmbeddings:
    """Word, position and type embeddings, their LayerNorm and its quantization, in one kernel over packed tables.

    Args:
        embeddings: a module for which `reason_not_to_fuse_embeddings` has none.
    """

    def __init__(self, embeddings: Any) -> None:
        self.module = embeddings
        tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
        self.tables = [t.packed_weight() for t in tables]
        # Positions that padding does not take: RoBERTa's begin after the padding's own row.
        own = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = embeddings.padding_idx + 1 if own else 0
        self.positions = tables[1].rows - self.first_position

    def own_positions(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """Rows of the position table for ids [B, L], where they are not simply 0 to L - 1.

        Raises ValueError for sequences longer than the model knows.
        """
        if position_ids is None and input_ids.shape[1] > self.positions:
            raise ValueError(
                f"input_ids holds sequences of {input_ids.shape[1]} tokens, but the model knows {self.positions} "
                "positions; truncate them"
            )
        if position_ids is None and self.first_position:
            # As create_position_ids_from_input_ids counts, in half as many launches.
            seen = input_ids != self.module.padding_idx
            return seen.cumsum(1).mul_(seen).add_(self.module.padding_idx)
        return position_ids

    def __call__(self, ids: tuple[Tensor, ...], grid: InputGrid) -> Tokens:
        """Row numbers [T] of the three tables to tokens."""
        norm = self.module.LayerNorm
        return Tokens(
            *operators.embed_layernorm(
                list(ids), self.tables, norm.weight, norm.bias, norm.eps, grid, norm.weight.dtype
            )
        )


def reason_not_to_fuse_on_gpu(layer: Any) -> str:
    """Why an encoder layer cannot run as a chain of int8 kernels; empty if it can."""
    linears = [m for m in layer.modules() if isinstance(m, PackedLinear)]
    if any(m.layout.input_groups > 1 for m in linears):
        return "some of its weights have input groups"
    reason = reason_not_to_fuse_layer(layer) or reason_not_four_products(layer)
    if reason:
        return reason
    if type(layer).__name__ not in BERT_LAYERS:
        return f"a {type(layer).__name__} is fused on CPUs only"
    attention = layer.attention.self
    parts = [attention.query, attention.key, attention.value, layer.attention.output.dense]
    parts += [layer.intermediate.dense, layer.output.dense]
    if any(p.spec.activation_bits != 8 for p in parts):
        return "some of its inputs are in float"
    if len({p.rows for p in parts[:3]}) > 1:
        return "query, key and value differ in height"
    activation = type(layer.intermediate.intermediate_act_fn).__name__
    if activation != "GELUActivation":
        return f"its activation function is {activation}, not the exact GELU"
    if parts[0].rows // attention.num_attention_heads > _MAX_HEAD_DIM:
        return f"its heads are wider than {_MAX_HEAD_DIM}"
    if parts[0].columns > _MAX_WIDTH:
        return f"it is wider than {_MAX_WIDTH}"
    return ""


def reason_not_to_fuse_embeddings(embeddings: Any) -> str:
    """Why embeddings cannot be gathered, summed and normalized in one kernel; empty if they can."""
    if type(embeddings).__name__ not in _BERT_EMBEDDINGS or not isinstance(embeddings.LayerNorm, nn.LayerNorm):
        return f"{type(embeddings).__name__} are not embeddings of the BERT kind"
    altered = reason_not_to_replace(m for m in embeddings.modules() if not isinstance(m, PackedEmbedding))
    if altered:
        return altered
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    if not all(isinstance(t, PackedEmbedding) for t in tables):
        return "some of the tables are in float"
    if tables[0].columns > _MAX_WIDTH:
        return f"they are wider than {_MAX_WIDTH}"
    return ""


def _fits_e4m3(layer: PackedLinear) -> bool:
    """Whether e4m3 holds the layer's codes exactly, and int32 the sums of its e4m3 inputs."""
    return layer.layout.bits <= 4 and layer.columns <= E4M3_COLUMNS


def _half(x: Tensor) -> torch.dtype:
    """The dtype of what only lives between two kernels."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
