r"""Activations of 8 bits (or 6, or 4): the input of every quantized matrix product.

``dynamic`` gives each token its own symmetric range, :math:`s = \max|x| / 127`, at run time; ``asymmetric`` gives it
the range from its smallest to its largest value, :math:`s = (\max x - \min x) / 255`; ``static`` has one affine range
a tensor, fixed from calibration data. Per-token ranges leave about a third of the error of per-tensor ones on BERT,
because a few tokens carry outliers, and asymmetric ones two thirds of that, because the outliers of a token have one
sign, as have the large outputs of GELU; static ranges need no reduction at run time.

References: Shen et al. 2020, section 3.1 (8-bit activations); Yao et al. 2022, ZeroQuant (token-wise quantization).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import ActivationRange
from qbert.quantizers.grid import code_range, fake_quantize, least_scale, scale_gradient

_SMALLEST_SCALE = 1e-8
_HISTOGRAM_BINS = 2048
_SHRINK_STEPS = 50


class _PerToken(torch.autograd.Function):
    """Quantize and dequantize each token; the range covers every value, so the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qmax: int) -> Tensor:
        scale = token_scale(x, qmax)
        return torch.div(x, scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _PerTokenAsymmetric(torch.autograd.Function):
    """As `_PerToken`, from the smallest to the largest value of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        low, scale = token_range(x, levels)
        return torch.sub(x, low).div_(scale).round_().mul_(scale).add_(low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _quantized_once(x: Tensor, function: type[torch.autograd.Function], levels: int) -> Tensor:
    """``function.apply(x, levels)``, kept with the very tensor `x`, since query, key and value read the same one.

    What is kept dies with `x`, and is not used after `x` was changed in place.
    """
    if torch.jit.is_tracing():  # a trace with a Python function in it cannot be saved
        return function.forward(None, x, levels)  # type: ignore[no-any-return]
    # A leaf is referred to by the graph of what is made of it, so the two would keep each other alive.
    if torch.compiler.is_compiling() or x.is_inference() or (x.is_leaf and x.requires_grad):
        return function.apply(x, levels)  # type: ignore[no-any-return]
    key = (function, levels, x._version, torch.is_grad_enabled())
    kept = getattr(x, "_qbert_quantized", None)
    if kept is None or kept[0] != key:
        kept = (key, function.apply(x, levels))
        x._qbert_quantized = kept  # type: ignore[attr-defined]
    return kept[1]


def token_range(x: Tensor, levels: int = 255) -> tuple[Tensor, Tensor]:
    """Lowest value and scale (max x - min x) / levels of each token, both [..., 1] for x [..., I]."""
    low = x.amin(-1, keepdim=True)
    return low, ((x.amax(-1, keepdim=True) - low) / levels).clamp_min(least_scale(x.dtype, _SMALLEST_SCALE))


def token_scale(x: Tensor, qmax: int = 127) -> Tensor:
    """Symmetric scale max|x| / qmax of each token, [..., 1] for x [..., I]."""
    return (x.abs().amax(-1, keepdim=True) / qmax).clamp_min(least_scale(x.dtype, _SMALLEST_SCALE))


class ActivationQuantizer(nn.Module):
    """Fake quantization of a layer's input.

    Args:
        bits: 4, 6 or 8.
        mode: ``dynamic`` (per token, symmetric), ``asymmetric`` (per token, affine) or ``static`` (per tensor, affine).

    A static quantizer starts uncalibrated; its first use raises until `set_range` was called.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, mode: ActivationRange) -> None:
        super().__init__()
        self.bits, self.mode = bits, mode
        self.enabled = True
        self.momentum: float | None = None
        self._real: Callable[[Tensor], Tensor] | None = None
        self.qmin, self.qmax = code_range(bits)
        if mode == "static":
            self.register_buffer("scale", torch.tensor(float("nan"), dtype=torch.float32, device="cpu"))
            self.register_buffer("zero", torch.tensor(0.0, dtype=torch.float32, device="cpu"))

    def set_range(self, low: float, high: float) -> None:
        """Fix the static range to cover [low, high] and 0, with an integer zero point."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / (self.qmax - self.qmin), least_scale(torch.float16, _SMALLEST_SCALE))
        self.scale.fill_(scale)
        self.zero.fill_(min(max(self.qmin - round(low / scale), self.qmin), self.qmax))

    def follow(self, momentum: float | None, real: Callable[[Tensor], Tensor] | None = None) -> None:
        """In training mode, let the static range follow a moving average of each batch's extent; None stops it.

        Args:
            momentum: share of the old range that stays at each batch, in [0, 1): 0.99 for instance.
            real: what leaves the padding out of an input [..., I]; all of it counts where None.

        Raises:
            ValueError: for a dynamic quantizer, which has no range to keep, or another share.
        """
        if self.mode != "static":
            raise ValueError(f"a range of mode {self.mode!r} is found at run time; use activation_range='static'")
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} is no share of the old range; use a number from 0 to below 1")
        self.momentum, self._real = momentum, real

    def learn(self, enabled: bool = True) -> None:
        """Let the optimizer train the static scale (LSQ), or make it a plain buffer again.

        Raises:
            ValueError: for a dynamic quantizer, which has no scale to learn.
        """
        if self.mode != "static":
            raise ValueError(f"a range of mode {self.mode!r} is found at run time; use activation_range='static'")
        scale = self.scale.detach()
        del self.scale
        if enabled:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def _follow_batch(self, x: Tensor, momentum: float) -> None:
        x = x if self._real is None else self._real(x)
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not bool(torch.isnan(self.scale)):
            old_low = float((self.qmin - self.zero) * self.scale)
            old_high = float((self.qmax - self.zero) * self.scale)
            low, high = (
                momentum * old + (1 - momentum) * new for old, new in ((old_low, min(low, 0)), (old_high, max(high, 0)))
            )
        self.set_range(low, high)

    def forward(self, x: Tensor) -> Tensor:
        """Quantized and dequantized `x` [..., I], same shape and dtype, straight-through gradient."""
        if not self.enabled:
            return x
        if self.training and self.momentum is not None:
            self._follow_batch(x, self.momentum)
        if self.mode == "dynamic":
            return _quantized_once(x, _PerToken, self.qmax)
        if self.mode == "asymmetric":
            return _quantized_once(x, _PerTokenAsymmetric, self.qmax - self.qmin)
        if not torch.compiler.is_compiling() and torch.isnan(self.scale):
            raise RuntimeError("static activation range is not calibrated; pass calibration_data to quantize_model")
        scale = self.scale
        if scale.requires_grad:
            scale = scale_gradient(scale, (max(x.numel(), 1) * self.qmax) ** -0.5)
        return fake_quantize(x, scale, self.zero, self.qmin, self.qmax)

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"bits={self.bits}, {self.mode}"


class ActivationObserver:
    """Collects the distribution of one tensor in two passes: first its extent, then a histogram of it."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.histogram: Tensor | None = None

    def see_extent(self, x: Tensor) -> None:
        """First pass: widen the extent to hold `x`; NaN makes it infinite."""
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if math.isnan(low):
            low, high = -math.inf, math.inf
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def is_finite(self) -> bool:
        """Whether anything was seen, and neither NaN nor infinity."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def see_values(self, x: Tensor) -> None:
        """Second pass: count the values of `x` in 2048 bins over the extent."""
        counts = torch.histc(x.detach().float().cpu(), _HISTOGRAM_BINS, self.low, self.high)
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def best_range(self, bits: int) -> tuple[float, float]:
        """The (low, high) whose affine grid has the least squared error on the histogram."""
        if self.histogram is None:
            raise RuntimeError("no activation was seen; the module is not called in the model's forward pass")
        edges = torch.linspace(self.low, self.high, _HISTOGRAM_BINS + 1, dtype=torch.float64, device="cpu")
        centres, counts = (edges[1:] + edges[:-1]) / 2, self.histogram.double()
        steps = 2**bits - 1
        best = (float("inf"), self.low, self.high)
        for step in range(_SHRINK_STEPS):
            share = 1.0 - step / _SHRINK_STEPS
            low, high = min(self.low * share, 0.0), max(self.high * share, 0.0)
            scale = max((high - low) / steps, _SMALLEST_SCALE)
            # Values inside err by up to half a step, uniformly; values outside by their distance to the range.
            outside = (centres - centres.clamp(low, high)).square()
            error = float((counts * torch.where(outside > 0, outside, scale**2 / 12)).sum())
            best = min(best, (error, low, high))
        return best[1], best[2]
