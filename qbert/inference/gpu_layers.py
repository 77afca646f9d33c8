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
fp16 and two row quantizations follow: nine kernels. All are operators of `qbert.kernels.operators`, so on a CPU the
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
from qbert.kernels import operators
from qbert.kernels.checks import E4M3_COLUMNS
from qbert.kernels.reference import E4M3_MAX
from qbert.kernels.terms import Terms
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.quantizers.groups import row_group_of

_BERT_EMBEDDINGS = (
    "BertEmbeddings",
    "RobertaEmbeddings",
    "XLMRobertaEmbeddings",
    "ElectraEmbeddings",
    "CamembertEmbeddings",
)
_MAX_HEAD_DIM = 128
_MAX_WIDTH = 16384


class InputGrid(NamedTuple):
    """How a product's input is quantized: x ~ scale (code - zero), in int8 or, without a zero, e4m3 codes.

    Where scale is 0, with one symmetric scale a token, or, if asymmetric, from its smallest to its largest value.
    """

    scale: float = 0.0
    zero: int = 0
    asymmetric: bool = False
    codes_dtype: torch.dtype = torch.int8

    @property
    def in_e4m3(self) -> InputGrid:
        """e4m3 codes of the same range: static up to the larger of its ends, or per token."""
        largest = self.scale * max(128 + self.zero, 127 - self.zero)
        return InputGrid(largest / E4M3_MAX, codes_dtype=torch.float8_e4m3fn)

    @classmethod
    def of(cls, layer: PackedLinear) -> InputGrid:
        """The int8 grid of a layer with 8-bit input."""
        if layer.input_scale is None or layer.input_zero is None:
            return cls(asymmetric=layer.spec.activation_range == "asymmetric")
        return cls(float(layer.input_scale), int(layer.input_zero))


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
        return cls(x, *operators.quantize_rows(x, *grid))


class Projection:
    """One int8 or e4m3 product: packed codes, their terms, and how its input is quantized."""

    def __init__(self, layer: PackedLinear, e4m3: bool = False) -> None:
        assert layer.owner.codes is not None
        self.packed, self.bits, self.columns = layer.owner.codes, layer.layout.bits, layer.columns
        self.grid = InputGrid.of(layer).in_e4m3 if e4m3 else InputGrid.of(layer)
        scale, zero = layer.row_grids()
        self.terms = Terms.prepare(self.packed, self.columns, scale, zero, None, layer.bias, self.bits, *self.grid[:3])
        if e4m3 and self.terms.zero is not None:
            self.terms = self.terms._replace(zero=self.terms.row_zero)
        self.static_scale = self.terms.scale.new_full((1,), self.grid.scale)

    def wanted(self, sums: Tensor) -> Tensor | None:
        """`sums`, to be filled by the kernel that makes the input, where the product has a zero to multiply them by."""
        return None if self.terms.zero is None else sums

    def __call__(self, codes: Tensor, scale: Tensor, row_sum: Tensor, residual: Tensor) -> Tensor:
        """[T, O] = product + bias + residual, in the dtype of the residual."""
        terms = self.terms
        return operators.matmul_a8(
            codes, scale, row_sum, self.packed, terms.scale, terms.zero, terms.bias, residual,
            bits=self.bits, out_dtype=residual.dtype, weight_sum=terms.weight_sum,
        )  # fmt: skip


class FusedGpuLayer:
    """One encoder layer of the BERT kind, post-norm.

    Args:
        layer: a layer for which `reason_not_to_fuse_on_gpu` has none.
        e4m3: give e4m3 inputs to the products whose weights e4m3 holds exactly; those with 8-bit weights stay int8.
    """

    def __init__(self, layer: Any, e4m3: bool = False) -> None:
        attention = layer.attention.self
        self.heads: int = attention.num_attention_heads
        parts = [attention.query, attention.key, attention.value]
        together = e4m3 and all(map(_fits_e4m3, parts))  # they share an input
        self.qkv = [Projection(p, together) for p in parts]
        self.qkv_terms = Terms.join([p.terms for p in self.qkv])
        self.input_grid = self.qkv[0].grid
        output, ffn_in, ffn_out = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        self.attention_output, self.ffn_in, self.ffn_out = (
            Projection(p, e4m3 and _fits_e4m3(p)) for p in (output, ffn_in, ffn_out)
        )
        self.norms = [layer.attention.output.LayerNorm, layer.output.LayerNorm]

    def __call__(self, tokens: Tokens, starts: Tensor, longest: int, sums: Tensor, next_grid: InputGrid) -> Tokens:
        """Tokens in, tokens out; `sums` int32 [2, T] is zero, `next_grid` the input grid of the next layer."""
        mixed = self._attend(tokens, starts, longest, sums[0])
        y = self.attention_output(*mixed, residual=tokens.x)
        tokens = self._normalize(y, 0, self.ffn_in.grid)
        y = self.ffn_out(*self._expand(tokens, sums[1]), residual=tokens.x)
        return self._normalize(y, 1, next_grid)

    def _attend(self, tokens: Tokens, starts: Tensor, longest: int, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms, output = self.qkv_terms, self.attention_output
        fused = operators.matmul_a8_mixed(
            tokens.codes, tokens.scale, tokens.row_sum, [p.packed for p in self.qkv], [p.bits for p in self.qkv],
            terms.scale, terms.zero, terms.bias, out_dtype=_half(tokens.x), weight_sum=terms.weight_sum,
        )  # fmt: skip
        count = fused.shape[0]
        query, key, value = fused.view(count, 3, self.heads, -1).unbind(1)
        scale = query.shape[-1] ** -0.5
        if not output.grid.scale:
            mixed = operators.attention(query, key, value, starts, longest, scale)
            return operators.quantize_rows(mixed.view(count, -1), *output.grid)
        mixed = operators.attention(
            query, key, value, starts, longest, scale, *output.grid[:2], output.wanted(sums), output.grid.codes_dtype
        )
        return mixed.view(count, -1), output.static_scale, sums

    def _expand(self, tokens: Tokens, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms, grid = self.ffn_in.terms, self.ffn_out.grid
        arguments = (tokens.codes, tokens.scale, tokens.row_sum, self.ffn_in.packed, *terms[:2], terms.bias, None)
        if not grid.scale:
            hidden = operators.matmul_a8(
                *arguments, bits=self.ffn_in.bits, gelu=True, out_dtype=_half(tokens.x), weight_sum=terms.weight_sum
            )
            return operators.quantize_rows(hidden, *grid)
        hidden = operators.matmul_a8(
            *arguments, self.ffn_out.wanted(sums), bits=self.ffn_in.bits, gelu=True, out_dtype=grid.codes_dtype,
            out_scale=grid.scale, out_zero=grid.zero, weight_sum=terms.weight_sum,
        )  # fmt: skip
        return hidden, self.ffn_out.static_scale, sums

    def _normalize(self, y: Tensor, index: int, grid: InputGrid) -> Tokens:
        norm = self.norms[index]
        return Tokens(*operators.layernorm_quantize(y, None, norm.weight, norm.bias, norm.eps, *grid))


class FusedGpuEmbeddings:
    """Word, position and type embeddings, their LayerNorm and its quantization, in one kernel over packed tables.

    Args:
        embeddings: a module for which `reason_not_to_fuse_embeddings` has none.
    """

    def __init__(self, embeddings: Any) -> None:
        self.module = embeddings
        tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
        self.packed = [t.owner.codes for t in tables]
        self.bits = [t.layout.bits for t in tables]
        grids = [_table_grid(t) for t in tables]
        self.scale, self.zero, self.row_group = (list(part) for part in zip(*grids, strict=True))
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
            return self.module.create_position_ids_from_input_ids(input_ids, self.module.padding_idx)
        return position_ids

    def __call__(self, ids: tuple[Tensor, ...], grid: InputGrid) -> Tokens:
        """Row numbers [T] of the three tables to tokens."""
        norm = self.module.LayerNorm
        return Tokens(
            *operators.embed_layernorm(
                list(ids), self.packed, self.scale, self.zero, self.row_group, self.bits, norm.weight, norm.bias,
                norm.eps, out_dtype=norm.weight.dtype, static_scale=grid.scale, static_zero=grid.zero,
                asymmetric=grid.asymmetric, codes_dtype=grid.codes_dtype,
            )
        )  # fmt: skip


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


def _table_grid(table: PackedEmbedding) -> tuple[Tensor, Tensor, Tensor]:
    """scale and zero float32 [G, K] of a table, and row_group int32 [V], empty where the kernel needs none."""
    scale = table.owner.scale
    assert scale is not None
    groups, rows = scale.shape[0], torch.arange(table.rows, device=scale.device)
    group = row_group_of(rows, table.rows, groups, table.layout.heads)
    # The zero of a group is that of its first row.
    first = torch.searchsorted(group, torch.arange(groups, device=scale.device))
    zero = table.row_grids(first)[1]
    return scale, zero.contiguous(), group.int() if groups not in (1, table.rows) else group.new_empty(0).int()


def _fits_e4m3(layer: PackedLinear) -> bool:
    """Whether e4m3 holds the layer's codes exactly, and int32 the sums of its e4m3 inputs."""
    return layer.layout.bits <= 4 and layer.columns <= E4M3_COLUMNS


def _half(x: Tensor) -> torch.dtype:
    """The dtype of what only lives between two kernels."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
