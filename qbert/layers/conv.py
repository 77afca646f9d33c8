"""Convolutions over a sequence: every window is a token, every output channel a row.

`nn.Conv1d` with weight [O, I/g, K] is, for each of its g groups of channels, a linear map over windows of I/g * K
values. Its grids are those of the matrix [O, I/g * K]; its input is quantized window by window, so that the packed
layer is a `PackedLinear` over windows, with the same kernels.

    >>> qbert.quantize_model(nn.Sequential(nn.Conv1d(300, 100, 3)), 4)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.weights import is_matrix
from qbert.layers.kind import Kind, TrainableLayer, register
from qbert.layers.layout import PackedLayout
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor

_Module = TypeVar("_Module", bound=nn.Module)
_SHAPE = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def windows(input: Tensor, convolution: Any) -> Tensor:
    """The windows of a sequence [B, C, T] (or [C, T]) that a convolution sees, [..., T', g, C/g * K].

    A padding of ``same`` puts one more zero at the end where their number is odd, as torch does.
    """
    kernel, stride, dilation = (getattr(convolution, n)[0] for n in ("kernel_size", "stride", "dilation"))
    span = dilation * (kernel - 1)
    if isinstance(convolution.padding, str):
        left = span // 2 if convolution.padding == "same" else 0
        right = span - left if convolution.padding == "same" else 0
    else:
        left = right = convolution.padding[0]
    padded = F.pad(input, (left, right))
    taps = padded.unfold(-1, span + 1, stride)[..., ::dilation]  # [..., C, T', K]
    grouped = taps.unflatten(-3, (convolution.groups, -1))  # [..., g, C/g, T', K]
    return grouped.movedim(-2, -4).flatten(-2)


def over_windows(seen: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Windows [..., T', g, C/g * K] times a weight [O, C/g * K], plus bias: [..., O, T']."""
    if groups == 1:
        result = F.linear(seen.squeeze(-2), weight, bias)
    else:
        result = torch.einsum("...tgc,goc->...tgo", seen, weight.unflatten(0, (groups, -1))).flatten(-2)
        result = result if bias is None else result + bias
    return result.transpose(-1, -2)


def _take_shape(target: _Module, source: Any) -> _Module:
    for name in _SHAPE:
        setattr(target, name, getattr(source, name))
    return target


class QuantConv1d(TrainableLayer, nn.Module):
    """A convolution with fake-quantized weight and windows."""

    groups: int
    bias: nn.Parameter | None

    @classmethod
    def shaped_as(cls, module: Any) -> QuantConv1d:
        """A twin with the channels, kernel, stride, padding, dilation and groups of `module`."""
        return _take_shape(cls(), module)

    @property
    def matrix(self) -> Tensor:
        """The float weight as a matrix [O, I/g * K] (a view)."""
        return self.weight.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """[B, I, T] -> [B, O, T']."""
        seen = windows(input, self)
        if self.activation_quantizer is not None:
            seen = self.activation_quantizer(seen)
        return over_windows(seen, self.weight_quantizer(self.matrix), self.bias, self.groups)


class PackedConv1d(PackedLinear):
    """A convolution with packed weight: `PackedLinear` over windows; with several channel groups in float."""

    groups: int
    kernel_size: tuple[int]
    in_channels: int

    @classmethod
    def shaped_as(cls, module: Any, layout: PackedLayout, source: PackedTensor | None = None) -> PackedConv1d:
        """An empty packed twin with the shape of `module`, float or trainable."""
        columns = module.in_channels // module.groups * module.kernel_size[0]
        return _take_shape(cls(columns, module.out_channels, module.bias is not None, layout, source), module)

    def float_module(self) -> nn.Module:
        """A convolution of this shape without values (device meta)."""
        shape = {name: getattr(self, name) for name in _SHAPE}
        return nn.Conv1d(**shape, bias=self.bias is not None, device="meta")

    def stored(self, matrix: Tensor) -> Tensor:
        """A weight [O, I/g * K] as [O, I/g, K]."""
        return matrix.unflatten(1, (-1, self.kernel_size[0]))

    def prepare(self, exact: bool = True) -> None:
        """Make the operand of the int8 product over windows, which convolutions of one channel group have."""
        if self.groups == 1:
            super().prepare(exact)

    def forward(self, input: Tensor) -> Tensor:
        """[B, I, T] -> [B, O, T']. Raises RuntimeError in training mode."""
        seen = windows(input, self)
        if self.groups == 1:
            return super().forward(seen.squeeze(-2)).transpose(-1, -2)
        self._refuse_training()
        return over_windows(self.quantize_input(seen), self._dequantize(None, input.dtype), self.bias, self.groups)


def seen_windows(convolution: Any, mask: Tensor) -> Tensor:
    """Which windows [B, T'] hold a token that is no padding, from the attention mask [B, T]."""
    single = SimpleNamespace(**{name: getattr(convolution, name) for name in _SHAPE} | {"groups": 1})
    return windows(mask.reshape(-1, 1, mask.shape[-1]).float(), single).flatten(2).amax(-1).bool()


register(
    Kind(
        lambda module: type(module) is nn.Conv1d and is_matrix(module),
        QuantConv1d,
        PackedConv1d,
        rows=lambda module, input: windows(input, module),
        outputs=lambda module, output: output.transpose(-1, -2),
        mask=seen_windows,
    )
)
