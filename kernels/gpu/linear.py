"""A whole packed linear layer on a GPU: what is prepared once, and which kernel runs for how many tokens.

int8 activations    `quantize_rows`, then `matmul_a8`
float activations   `matmul_a16` up to 64 tokens; beyond, the weight is dequantized and torch's product used,
                    which is faster there
input groups        dequantized weight and torch's product (the int8 product knows one scale a row)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import reference
from qbert.kernels.gpu.embedding import Table, embedding
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a16 import matmul_a16
from qbert.kernels.gpu.quantize_rows import quantize_rows
from qbert.kernels.terms import Terms

MAX_A16_TOKENS = 64


class GpuLinear:
    """Prepared scales, zeros and bias of a packed layer; the packed weight itself stays with the caller."""

    def __init__(
        self,
        packed: Tensor,
        columns: int,
        scale: Tensor,
        zero: Tensor,
        row_group: Tensor | None,
        bias: Tensor | None,
        bits: int,
        activation_bits: int,
        activation_scale: float,
        activation_zero: int,
        asymmetric: bool,
    ) -> None:
        self.bits, self.columns = bits, columns
        self.activation_bits, self.input_grid = activation_bits, (activation_scale, activation_zero, asymmetric)
        self.grouped = scale.shape[1] > 1
        self.groups = None if row_group is None else row_group.int().contiguous().clone()
        self.table_scale, self.table_zero = (t.float().contiguous().clone() for t in (scale, zero))
        # Elsewhere the input is dequantized before the product, its zero or offsets with it.
        in_int8 = activation_bits == 8 and not self.grouped
        of_input = self.input_grid if in_int8 else ()
        self.terms = Terms.prepare(packed, columns, scale, zero, row_group, bias, bits, *of_input)

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [..., I] to y [..., O] in the dtype of x."""
        rows, packed = x.reshape(-1, self.columns).contiguous(), packed.contiguous()
        if self.grouped or self.activation_bits == 0:
            y = self._float(rows, packed)
        else:
            xq, x_scale, row_sum = quantize_rows(rows, *self.input_grid)
            y = matmul_a8(
                xq,
                x_scale,
                packed,
                self.terms.scale,
                bits=self.bits,
                zero=self.terms.zero,
                row_sum=row_sum,
                weight_sum=self.terms.weight_sum,
                bias=self.terms.bias,
                out_dtype=x.dtype,
            )
        return y.reshape(*x.shape[:-1], packed.shape[0])

    def _float(self, x: Tensor, packed: Tensor) -> Tensor:
        terms = self.terms
        if self.activation_bits == 8:
            x = reference.fake_quantize(x, *self.input_grid)
        elif x.shape[0] <= MAX_A16_TOKENS and x.dtype != torch.float32 and not self.grouped:
            zero = None if terms.zero is None else terms.row_zero
            return matmul_a16(x, packed, terms.scale, bits=self.bits, zero=zero, bias=terms.bias)
        table = Table(packed, self.table_scale, self.table_zero, self.groups, self.bits, self.columns)
        weight = embedding(torch.arange(packed.shape[0], device=packed.device), table, x.dtype)
        return torch.nn.functional.linear(x, weight, None if terms.bias is None else terms.bias.to(x.dtype))
