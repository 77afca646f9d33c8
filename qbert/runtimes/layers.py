"""What the twins of packed layers share, whatever the runtime: quantized inputs and grids with integer zero points.

>>> grid = integer_grid(layer)
>>> layer.quantized_weight()          # = grid.weight() + grid.offset, where there is one
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.layers.linear import PackedLinear
from qbert.quantizers.activations import token_range, token_scale
from qbert.quantizers.grid import code_range


class IntegerGrid(NamedTuple):
    """A weight [O, I] as scale (codes - zero) + offset with integer zero points.

    codes: int32 [O, I]; scale: float32 [O, K]; zero: float32 [O, K], integers between the smallest and the largest
    code; offset: float32 [O, K], ``None`` where all zero points were such integers.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    offset: Tensor | None

    def weight(self) -> Tensor:
        """The float32 weight [O, I] without the offset."""
        codes = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        return ((codes - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).flatten(1)


def integer_grid(layer: PackedLinear) -> IntegerGrid:
    """The codes of a layer, its zero points rounded to codes.

    Runtimes know integer zero points only. What a real one is off its nearest code, times the scale, is an offset of
    all weights of a row, so it comes back as the sum of the inputs times that (`QuantizedInput.finish`).
    """
    scale, zero = layer.row_grids()
    codes = layer.int_codes().to(torch.int32)
    whole = zero.round().clamp(int(codes.min()), int(codes.max()))
    return IntegerGrid(codes, scale, whole, None if torch.equal(zero, whole) else scale * (whole - zero))


class QuantizedInput(nn.Module):
    """Fake quantization of a layer's input in operators that every runtime has.

    Args:
        layer: the packed layer.
        enabled: quantize its input, or leave it in float.
        offset: [O, K] of `IntegerGrid`.
    """

    offset: Tensor | None

    def __init__(self, layer: PackedLinear, enabled: bool, offset: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("offset", None if offset is None else offset.T.contiguous())  # [K, O]
        activation = layer.activation_quantizer if enabled else None
        self.mode: Any = None if activation is None else activation.mode
        self.low, self.high = code_range(layer.spec.activation_bits or 8)
        self.static: tuple[float, float] | None = None
        if enabled and layer.input_scale is not None and layer.input_zero is not None:
            self.static = float(layer.input_scale), float(layer.input_zero)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float())

    def quantize(self, x: Tensor) -> Tensor:
        """The input [..., I] as the packed layer rounds it."""
        if self.mode == "asymmetric":
            low, scale = token_range(x, self.high - self.low)
            return torch.round((x - low) / scale) * scale + low
        if self.mode is not None:
            scale = token_scale(x, self.high)
            return torch.round(x / scale) * scale
        if self.static is not None:
            scale_, zero = self.static
            return (torch.clamp(torch.round(x / scale_ + zero), self.low, self.high) - zero) * scale_
        return x

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The product `y` [..., O] of the quantized input `x` [..., I] with offsets and bias added."""
        if self.offset is not None:
            y = y + x.unflatten(-1, (self.offset.shape[0], -1)).sum(-1) @ self.offset
        return y if self.bias is None else y + self.bias


def packed_bytes(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [O, N] of `bits` bits, packed along N with the first in the lowest bits: uint8 [O, bytes]."""
    per_byte = 8 // bits
    padded = nn.functional.pad(values, (0, -values.shape[1] % per_byte)).view(values.shape[0], -1, per_byte)
    return (padded << (torch.arange(per_byte, device=values.device) * bits)).sum(2).to(torch.uint8)
