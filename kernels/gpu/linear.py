"""A whole packed linear layer on a GPU: what is prepared once, and which kernel runs for how many tokens.

int8 activations    `quantize_rows`, then `matmul_a8`
float activations   `matmul_a16` up to 64 tokens; beyond, the weight is dequantized and torch's product used,
                    which is faster there
input groups        dequantized weight and torch's product (the int8 product knows one scale a row)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import formats, reference
from qbert.kernels.gpu.embedding import Table, embedding
from qbert.kernels.gpu.matmul_a8 import matmul_a8
from qbert.kernels.gpu.matmul_a16 import matmul_a16
from qbert.kernels.gpu.quantize_rows import quantize_rows

MAX_A16_TOKENS = 64


def fixed_point_zero(zero: Tensor, bits: int, columns: int) -> Tensor | None:
    """zero [O] for `matmul_a8`: None where all are 0, int32 zero * 2^(8 - bits) where that is exact, else float32.

    int32 also wants |zero| * 2^(8 - bits) * 127 * columns, plus the product itself, below 2^31.
    """
    if not bool((zero != 0).any()):
        return None
    scaled = zero.double() * (1 << (8 - bits))
    room = float(scaled.abs().max()) * 127 + 127 * 128
    if bool((scaled == scaled.round()).all()) and room * columns < 2**31:
        return scaled.to(torch.int32)
    return zero.float().contiguous()


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
    ) -> None:
        rows = packed.shape[0]
        self.bits, self.columns = bits, columns
        self.activation_bits, self.static = activation_bits, activation_scale
        self.static_zero = activation_zero
        self.grouped = scale.shape[1] > 1
        self.groups = None if row_group is None else row_group.int().contiguous().clone()
        self.table_scale, self.table_zero = scale.float().clone(), zero.float().clone()
        self.scale = reference.expand_groups(scale, row_group, rows)[:, 0].float().contiguous().clone()
        row_zero = reference.expand_groups(zero, row_group, rows)[:, 0].float()
        self.zero = fixed_point_zero(row_zero, bits, columns)
        self.float_zero = None if self.zero is None else row_zero.contiguous().clone()
        self.bias = None if bias is None else bias.detach().float().clone()
        if activation_bits == 8 and self.static > 0:
            self.x_scale = torch.full((1,), self.static, device=packed.device)
            if self.static_zero and not self.grouped:
                # sum (xq - z)(q - zero): the part with z does not depend on x.
                sums = formats.unpack(packed, bits, columns).sum(dim=1, dtype=torch.int64).float()
                shift = self.static * self.static_zero * self.scale * (sums - columns * row_zero)
                self.bias = -shift if self.bias is None else self.bias - shift

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [..., I] to y [..., O] in the dtype of x."""
        rows = x.reshape(-1, self.columns).contiguous()
        if self.grouped or self.activation_bits == 0:
            y = self._float(rows, packed)
        else:
            if self.static > 0:
                xq = reference.requantize(rows.float(), self.static, self.static_zero)
                x_scale, row_sum = self.x_scale, xq.sum(dim=1, dtype=torch.int32)
            else:
                xq, x_scale, row_sum = quantize_rows(rows)
            y = matmul_a8(
                xq,
                x_scale,
                packed,
                self.scale,
                bits=self.bits,
                zero=self.zero,
                row_sum=row_sum,
                bias=self.bias,
                out_dtype=x.dtype,
            )
        return y.reshape(*x.shape[:-1], packed.shape[0])

    def _float(self, x: Tensor, packed: Tensor) -> Tensor:
        if self.activation_bits == 8:
            x = reference.fake_quantize(x, self.static, self.static_zero)
        elif x.shape[0] <= MAX_A16_TOKENS and x.dtype != torch.float32 and not self.grouped:
            return matmul_a16(x, packed, self.scale, bits=self.bits, zero=self.float_zero, bias=self.bias)
        table = Table(packed, self.table_scale, self.table_zero, self.groups, self.bits, self.columns)
        weight = embedding(torch.arange(packed.shape[0], device=packed.device), table, x.dtype)
        return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
