r"""Uniform grids: codes, dequantized values, and the straight-through gradient.

One grid serves every scheme. With signed ``bits``-bit codes q,

.. math:: \hat w = s\,(q - z), \qquad q = \mathrm{clamp}(\mathrm{round}(w / s + z),\ q_{min},\ q_{max}),

where the scale s > 0 and the zero point z belong to a group. ``asymmetric`` has an integer z in the code range, so
that 0 is a level (a grid without it costs 28 points of accuracy at 4 bits on SST-2); ``symmetric`` has z = 0 and drops
the most negative code (ternary at 2 bits); ``midrise`` has z = -1/2; ``offset`` has any real z, which is the same as
an offset -s z of the group.

References: Shen et al. 2020, eq. 1-2; Bengio et al. 2013 (straight-through estimator);
Esser et al. 2020, "Learned step size quantization", eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert.bits import Scheme

_SMALLEST_HALF = 2.0**-24


def code_range(bits: int, scheme: Scheme = "asymmetric") -> tuple[int, int]:
    """Smallest and largest code of a scheme: two's complement of `bits` bits, without -2^(bits-1) if symmetric."""
    half = 1 << (bits - 1)
    return (1 - half if scheme == "symmetric" else -half), half - 1


def least_scale(dtype: torch.dtype, wanted: float) -> float:
    """`wanted`, or the smallest positive float16 where `dtype` is that and `wanted` would round to 0 in it."""
    return max(wanted, _SMALLEST_HALF) if dtype == torch.float16 else wanted


def quantize(w: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of `w` as int8, same shape; `scale` and `zero` broadcast against it. Halves round to even.

    Computed in float32 or wider, so that a half-precision weight has the codes that it has in float32.
    """
    return torch.clamp(torch.round(_wide(w) / scale + zero), qmin, qmax).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values scale * (codes - zero) in the dtype of `scale`."""
    return scale * (codes.to(scale.dtype) - zero)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; gradients: straight-through inside the range, zero outside; LSQ for scale and zero."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
        rounded = torch.div(_wide(w), scale).add_(zero).round_()
        value = rounded.clamp(qmin, qmax)
        # In the dtype of w, because multiplying by a boolean mask is five times slower on CPUs.
        inside = rounded.eq_(value).to(w.dtype)
        value.sub_(zero).mul_(scale)
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(inside, *((w, scale, zero, value) if learned else ()))
        return value.to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, *saved = ctx.saved_tensors
        grad_w = grad * inside
        grad_scale = grad_zero = None
        if saved:
            w, scale, zero, value = saved
            w, grad, inside_grad = (_wide(x) for x in (w, grad, grad_w))
            # With value = s (q - z), the slope is (value - w) / s inside and value / s outside.
            if ctx.needs_input_grad[1]:
                grad_scale = (_sum_like(grad, value, scale) - _sum_like(inside_grad, w, scale)) / scale
            if ctx.needs_input_grad[2]:
                grad_zero = ((inside_grad - grad) * scale).sum_to_size(zero.shape)
        return grad_w, grad_scale, grad_zero, None, None


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: half precision has too few digits to count 255 steps, or to round what it divided."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_like(a: Tensor, b: Tensor, shape: Tensor) -> Tensor:
    """The products a * b summed to the size of `shape`, which broadcasts against them."""
    if shape.shape == (*a.shape[:-1], 1):
        return torch.linalg.vecdot(a, b).unsqueeze(-1)
    return (a * b).sum_to_size(shape.shape)


def fake_quantize(w: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    """`dequantize(quantize(w))` in the dtype of `w`, differentiable.

    The gradient with respect to `w` is straight-through inside the range and zero outside; with respect to `scale`
    it is (q - w/s - z) inside and (q_min or q_max) - z outside (LSQ eq. 3, with a zero point); with respect to `zero`
    it is -s outside and zero inside. `scale` and `zero` broadcast against `w`. All is computed in float32 or
    wider, and only what is returned is rounded to the dtype of `w`.
    """
    if torch.jit.is_tracing():  # a trace with a Python function in it cannot be saved
        value = (torch.div(_wide(w), scale).add_(zero).round_().clamp_(qmin, qmax) - zero) * scale
        return value.to(w.dtype)
    return _FakeQuantize.apply(w, scale, zero, qmin, qmax)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged, its gradient multiplied by `factor` (Esser et al. 2020, appendix A)."""
    return _ScaleGradient.apply(x, factor)
