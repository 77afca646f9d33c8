"""Packed layers as modules that the ONNX exporter turns into low-bit operators, each the twin of one packed layer.

Their forward computes with dequantized weights, which is what the exporter traces; the symbolic functions put
``MatMulNBits`` or ``DequantizeLinear`` over the packed codes in the place of those weights.

    >>> replace_everywhere(model, layer, onnx_linear(layer, quantize_activations=True))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbert.packed_modules import PackedEmbedding, PackedLinear
from qbert.quantizers.activations import token_range, token_scale

_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 16  # what MatMulNBits takes


def onnx_linear(layer: nn.Module, quantize_activations: bool) -> nn.Module:
    """The twin of a `PackedLinear`: MatMulNBits where its codes fit, else DequantizeLinear, else floats."""
    assert isinstance(layer, PackedLinear)
    scale, zero = layer.row_grids()
    codes = layer.int_codes().to(torch.int32)
    if not bool((zero == zero.round()).all()):
        # Zeros of one half become integers on the grid of half the step.
        codes, scale, zero = codes * 2, scale / 2, zero * 2
    whole = bool((zero == zero.round()).all())
    block = _block(layer.columns // layer.layout.input_groups)
    for bits in (2, 4):
        half = 1 << (bits - 1)
        shift = 0 if bits == 4 and int(codes.min()) >= -half else _centre(codes, zero, bits)
        q, z = codes - shift, zero - shift
        fits = -half <= min(int(q.min()), int(z.min())) and max(int(q.max()), int(z.max())) < half
        if whole and fits and block and layer.layout.bits < 8:
            return _OnnxNBits(layer, q + half, scale, z.to(torch.int32) + half, bits, block, quantize_activations)
    return _OnnxLinear(layer, quantize_activations)


def _centre(codes: Tensor, zero: Tensor, bits: int) -> int:
    """The offset that puts the lowest code or zero at the lowest code of `bits` bits."""
    return min(int(codes.min()), int(zero.min())) + (1 << (bits - 1))


def _block(columns: int) -> int:
    """The largest block size of MatMulNBits that divides a run of columns with one scale; 0 if none does."""
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK and columns % block:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


class _OnnxInput(nn.Module):
    """Fake quantization of a layer's input in operators that ONNX has."""

    def __init__(self, layer: PackedLinear, enabled: bool) -> None:
        super().__init__()
        activation = layer.activation_quantizer if enabled else None
        self.mode = None if activation is None else activation.mode
        self.static: tuple[float, float] | None = None
        if enabled and layer.input_scale is not None and layer.input_zero is not None:
            self.static = float(layer.input_scale), float(layer.input_zero)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float())

    def quantize(self, x: Tensor) -> Tensor:
        if self.mode == "asymmetric":
            low, scale = token_range(x)
            return torch.round((x - low) / scale) * scale + low
        if self.mode is not None:
            scale = token_scale(x)
            return torch.round(x / scale) * scale
        if self.static is not None:
            scale_, zero = self.static
            return (torch.clamp(torch.round(x / scale_ + zero), -128, 127) - zero) * scale_
        return x


class _OnnxNBits(_OnnxInput):
    """A matrix as MatMulNBits: unsigned codes [O, I] of 2 or 4 bits, lowest first in a byte."""

    def __init__(
        self, layer: PackedLinear, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, block: int, quantize: bool
    ) -> None:
        super().__init__(layer, quantize)
        self.bits, self.block = bits, block
        rows, columns = codes.shape
        self.shape = rows, columns
        blocks = columns // block
        spread = blocks // scale.shape[1]
        self.register_buffer("codes", _bytes(codes, bits).view(rows, blocks, -1))
        self.register_buffer("scale", scale.repeat_interleave(spread, 1).reshape(-1).contiguous())
        self.register_buffer("zero", _bytes(zero.repeat_interleave(spread, 1), bits).reshape(-1))
        self.register_buffer("weight", layer.quantized_weight().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _MatMulNBits.apply(
            self.quantize(x), self.codes, self.scale, self.zero, self.weight, *self.shape, self.bits, self.block
        )
        return y if self.bias is None else y + self.bias


class _MatMulNBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, *sizes: int) -> Tensor:
        return x @ weight.T

    @staticmethod
    def symbolic(
        g: Any, x: Any, codes: Any, scale: Any, zero: Any, weight: Any, rows: int, columns: int, bits: int, block: int
    ) -> Any:
        y = g.op(
            "com.microsoft::MatMulNBits",
            x,
            codes,
            scale,
            zero,
            K_i=columns,
            N_i=rows,
            bits_i=bits,
            block_size_i=block,
        )
        sizes = x.type().sizes()
        return y.setType(x.type().with_sizes([*sizes[:-1], rows])) if sizes is not None else y


class _OnnxLinear(_OnnxInput):
    """A matrix as int8 codes behind DequantizeLinear, or in float where zeros or input groups do not allow that."""

    def __init__(self, layer: PackedLinear, quantize: bool) -> None:
        super().__init__(layer, quantize)
        scale, zero = layer.row_grids()
        self.register_buffer("weight", layer.quantized_weight().float())
        self.plain = scale.shape[1] > 1 or not bool((zero == zero.round()).all())
        if not self.plain:
            self.register_buffer("codes", layer.int_codes())
            self.register_buffer("scale", scale[:, 0].contiguous())
            self.register_buffer("zero", zero[:, 0].to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.plain else _Dequantize.apply(self.codes, self.scale, self.zero, self.weight)
        return nn.functional.linear(self.quantize(x), weight, self.bias)  # type: ignore[arg-type]


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero: Any, weight: Any) -> Any:
        return g.op("DequantizeLinear", codes, scale, zero, axis_i=0).setType(weight.type())


class OnnxTable(nn.Module):
    """A lookup table as int8 codes; the rows that are looked up are dequantized."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        scale, zero = table.row_grids()
        self.groups = scale.shape[1]
        self.register_buffer("codes", table.int_codes())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.int8) if bool((zero == zero.round()).all()) else zero)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to float32 rows [..., D]."""
        rows = self.codes[ids].float().unflatten(-1, (self.groups, -1))  # type: ignore[index]
        zero = self.zero[ids].float().unsqueeze(-1)  # type: ignore[index]
        return (self.scale[ids].unsqueeze(-1) * (rows - zero)).flatten(-2)  # type: ignore[index]


def _bytes(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [O, N] of `bits` bits, packed along N with the first in the lowest bits: uint8 [O, bytes]."""
    per_byte = 8 // bits
    padded = nn.functional.pad(values, (0, -values.shape[1] % per_byte)).view(values.shape[0], -1, per_byte)
    return (padded << (torch.arange(per_byte, device=values.device) * bits)).sum(2).to(torch.uint8)
