"""What a packed linear layer computes on a CPU, from activations to outputs, as modules that TorchScript compiles.

A layer of a few tokens is over in ten microseconds, of which half a dozen calls from Python would take as much again.
So each kind of activation quantization is one small module without Python in its forward, and `compiled` makes one
program of it, or of a whole encoder layer that contains it. The module itself is the slow twin: where TorchScript is
missing or refuses, it runs as it is.

    chain = AsymmetricChain(Int8Gemm(codes, scale, zero), bias, correction, weight_sum)
    y = compiled(chain)(x)                         # float32 [..., I] -> [..., O]
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbert.kernels import reference
from qbert.kernels.cpu.gemm import ACTIVATION_ZERO, Int8Gemm

logger = logging.getLogger(__name__)

_LEVELS = 255  # steps of an asymmetric range: unsigned codes 0 to 255


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The forward of `module` as one TorchScript program; `module` itself, the reason logged, if that cannot be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is announced as deprecated; without it we go on, slower
        try:
            return torch.jit.script(module).forward  # type: ignore[no-any-return]
        except Exception as error:  # compilers fail in many ways: unknown types, missing sources, a torch without it
            reason = str(error).strip().splitlines()
            logger.info("%s runs uncompiled: %s", type(module).__name__, reason[0] if reason else type(error).__name__)
            return module


class _Int8Chain(nn.Module):
    """The common part: the product of rows that were brought to a range of one step.

    Args:
        gemm: product with the integer weights.
        bias: float32 [O].
        correction: scale * zero [O] of zeros that are not in the weights; ``None`` if there are none.
    """

    def __init__(self, gemm: Int8Gemm, bias: Tensor, correction: Tensor | None) -> None:
        super().__init__()
        self.gemm, self.bias_row, self.correction = gemm, bias, correction
        self.rounds_first = correction is not None or gemm.has_excess

    def multiply(self, unit: Tensor, levels: int, offset: int) -> Tensor:
        """Product with `unit`, whose values -1..1 or 0..1 are rounded to multiples of 1 / `levels`."""
        if not self.rounds_first:
            return self.gemm(unit, 1.0 / levels, offset, False)  # type: ignore[no-any-return]
        codes = torch.nan_to_num_(unit).mul_(levels).round_()
        y = self.gemm(codes, 1.0, offset, True)
        if self.correction is not None:
            y.sub_(codes.sum(dim=-1, keepdim=True) * self.correction)
        return y.mul_(1.0 / levels)  # type: ignore[no-any-return]


# In both dynamic chains a row of equal values gives 0/0; its codes are then arbitrary but finite, and the factor
# span = 0 ends them.


class SymmetricChain(_Int8Chain):
    """One symmetric scale a token, max |x| / 127."""

    def __init__(self, gemm: Int8Gemm, bias: Tensor, correction: Tensor | None) -> None:
        super().__init__(gemm, bias, correction)
        self.levels, self.offset = reference.A8_MAX, ACTIVATION_ZERO

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] to [..., O]."""
        unit = x.abs()
        span = unit.amax(dim=-1, keepdim=True)
        torch.div(x, span, out=unit)
        y = self.multiply(unit, self.levels, self.offset)
        return torch.addcmul(self.bias_row, y, span, out=y)


class AsymmetricChain(_Int8Chain):
    """One scale and smallest value a token; `weight_sum` float32 [O] is the sum of each row of the real weights."""

    def __init__(self, gemm: Int8Gemm, bias: Tensor, correction: Tensor | None, weight_sum: Tensor) -> None:
        super().__init__(gemm, bias, correction)
        self.weight_sum = weight_sum
        self.levels = _LEVELS

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] to [..., O]."""
        low = x.amin(dim=-1, keepdim=True)
        unit = x - low
        span = unit.amax(dim=-1, keepdim=True)
        y = self.multiply(unit.div_(span), self.levels, 0)
        torch.addcmul(self.bias_row, y, span, out=y)
        return torch.addcmul(y, low, self.weight_sum, out=y)


class StaticChain(_Int8Chain):
    """One scale for all tokens; `offset` is the unsigned code of 0."""

    def __init__(self, gemm: Int8Gemm, bias: Tensor, correction: Tensor | None, scale: float, offset: int) -> None:
        super().__init__(gemm, bias, correction)
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] to [..., O]."""
        # No code stands for NaN: what the integer product makes of one looks like any number.
        one = x.amax(dim=-1, keepdim=True).clamp_(1.0, 1.0)  # or NaN
        if self.correction is not None:
            codes = (x / self.scale).round_().clamp_(-self.offset, 255 - self.offset)
            y = self.gemm(codes, 1.0, self.offset, True)
            y.sub_(codes.sum(dim=-1, keepdim=True) * self.correction)
            return torch.addcmul(self.bias_row, y, one.mul_(self.scale), out=y)
        y = self.gemm(x, self.scale, self.offset, False)
        return torch.addcmul(self.bias_row, y, one, out=y)


class FloatChain(nn.Module):
    """Real weights [O, I] where the int8 product cannot be used; `quantize` rounds x [..., I] as the layer should."""

    def __init__(self, weight: Tensor, bias: Tensor, quantize: nn.Module | None) -> None:
        super().__init__()
        self.real_weight, self.bias_row, self.quantize = weight, bias, quantize

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] to [..., O]; in the dtype of the weights, if x comes in it."""
        if self.quantize is not None:
            x = self.quantize(x)
        y = torch.nn.functional.linear(x.to(self.real_weight.dtype), self.real_weight, self.bias_row)
        return y.to(x.dtype)


class Rounding(nn.Module):
    """Rounds activations to their 8-bit codes and back, for `FloatChain`.

    Args:
        asymmetric: per token from its smallest to its largest value; else per token, symmetric, or
        scale, offset: statically, where scale is positive; `offset` is the unsigned code of 0.
    """

    def __init__(self, asymmetric: bool, scale: float, offset: int) -> None:
        super().__init__()
        self.asymmetric, self.scale, self.offset = asymmetric, scale, offset
        self.levels, self.largest = _LEVELS, reference.A8_MAX

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] to the same shape."""
        if self.asymmetric:
            low = x.amin(dim=-1, keepdim=True)
            step = (x.amax(dim=-1, keepdim=True) - low) / self.levels
            return torch.nan_to_num((x - low).div_(step).round_()) * step + low
        if self.scale > 0:
            return (x / self.scale).round_().clamp_(-self.offset, 255 - self.offset).mul_(self.scale)
        step = x.abs().amax(dim=-1, keepdim=True) / self.largest
        return torch.nan_to_num(torch.round(x / step)) * step
