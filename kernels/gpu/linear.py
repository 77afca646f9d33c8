"""A whole packed linear layer on a GPU: what is prepared once, and which kernel runs for how many tokens.

It stands alone because it chooses between kernels, of which none knows another.

int8 activations    `quantize_rows`, then `matmul_a8`
float activations   `matmul_a16` up to 64 tokens; beyond, the weight is dequantized and torch's product used,
                    which is faster there
input groups        dequantized weight and torch's product (the int8 product knows one scale a row)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import reference
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a16 import matmul_a16
from qbert.kernels.gpu.rows.embedding import embedding
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.operands import FLOAT, PER_TOKEN, InputGrid, PackedWeight
from qbert.kernels.terms import Terms

MAX_A16_TOKENS = 64


class GpuLinear:
    """Prepared scales, zeros and bias of a packed layer; the packed codes themselves stay with the caller."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, grid: InputGrid = PER_TOKEN) -> None:
        self.input_grid, self.bits, self.columns = grid, weight.bits, weight.columns
        self.grouped = weight.scale.shape[1] > 1
        _, scale, zero, groups, *_ = weight.dense()
        self.scale, self.zero, self.groups = (None if t is None else t.clone() for t in (scale, zero, groups))
        # Elsewhere the input is dequantized before the product, its zero or offsets with it.
        in_int8 = bool(grid.bits) and not self.grouped
        self.terms = Terms.prepare(weight, bias, grid if in_int8 else FLOAT)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """x [..., I] to y [..., O] in the dtype of x; `codes` are those of the weight."""
        rows, codes = x.reshape(-1, self.columns).contiguous(), codes.contiguous()
        if self.grouped or not self.input_grid.bits:
            y = self._float(rows, codes)
        else:
            xq, x_scale, row_sum = quantize_rows(rows, self.input_grid)
            weight = self.terms.of([codes], [self.bits])
            y = matmul_a8(xq, x_scale, weight, row_sum=row_sum, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], codes.shape[0])

    def _float(self, x: Tensor, codes: Tensor) -> Tensor:
        terms = self.terms
        if self.input_grid.bits:
            x = reference.fake_quantize(x, self.input_grid)
        elif x.shape[0] <= MAX_A16_TOKENS and x.dtype != torch.float32 and not self.grouped:
            exact = terms._replace(zero=None if terms.zero is None else terms.row_zero)
            return matmul_a16(x, exact.of([codes], [self.bits]))
        assert self.scale is not None and self.zero is not None
        table = PackedWeight(codes, self.scale, self.zero, self.groups, self.bits, self.columns)
        weight = embedding(torch.arange(codes.shape[0], device=codes.device), table, x.dtype)
        return torch.nn.functional.linear(x, weight, None if terms.bias is None else terms.bias.to(x.dtype))
