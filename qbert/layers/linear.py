"""Linear maps with low-bit weights: `QuantLinear`, which trains, and `PackedLinear`, which is deployed.

`QuantLinear` computes fq(x) fq(W)^T + b, where fq quantizes and dequantizes with a straight-through gradient; its float
weight keeps its name and identity. `PackedLinear` keeps codes, computes the same values with the kernels of
`qbert.kernels`, and cannot be trained.

    >>> packed.encoder.layer[0].output.dense(x)                    # [..., I] -> [..., O]

Reference: Shen et al. 2020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.copied import CopiedParameters
from qbert.kernels import dispatch
from qbert.kernels.cpu import CpuLinear
from qbert.kernels.operands import InputGrid
from qbert.layers.kind import Kind, TrainableLayer, register
from qbert.layers.layout import PackedLayout
from qbert.layers.packed import PackedTensor
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.grid import code_range, fake_quantize


class QuantLinear(TrainableLayer, nn.Linear):
    """A linear map [O, I] with fake-quantized weight and input."""

    @classmethod
    def shaped_as(cls, module: nn.Linear) -> QuantLinear:
        """A twin with the shape of `module`, on device meta."""
        return cls(module.in_features, module.out_features, bias=module.bias is not None, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.activation_quantizer is not None:
            input = self.activation_quantizer(input)
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


class PackedLinear(PackedTensor):
    """A linear map [O, I] with packed weight; the input is quantized as in training.

    ``input_scale`` and ``input_zero`` (float32 scalars) exist if activations have a static range.
    """

    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: PackedLayout,
        source: PackedTensor | None = None,
    ) -> None:
        super().__init__(out_features, in_features, layout, source)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        static = layout.spec.activation_bits is not None and layout.spec.activation_range == "static"
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32) if static else None)
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.float32) if static else None)
        dynamic = layout.spec.activation_bits is not None and not static
        mode = layout.spec.activation_range or "dynamic"
        bits = layout.spec.activation_bits
        self.activation_quantizer = ActivationQuantizer(bits, mode) if dynamic and bits else None
        self._fast: Callable[[Tensor], Tensor] | None = None
        self._fast_device = torch.device("cpu")
        self._copied: CopiedParameters | None = None

    @classmethod
    def shaped_as(cls, module: nn.Linear, layout: PackedLayout, source: PackedTensor | None = None) -> PackedLinear:
        """An empty packed twin with the shape of `module`, float or trainable."""
        return cls(module.in_features, module.out_features, module.bias is not None, layout, source)

    def float_module(self) -> nn.Module:
        """A linear map of this shape without values (device meta)."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def activation_twin(self) -> ActivationQuantizer | None:
        """The trainable form of the input quantization; ``None`` if the input is not quantized."""
        bits = self.spec.activation_bits or 8
        if self.input_scale is None or self.input_zero is None:
            return self.activation_quantizer and ActivationQuantizer(bits, self.activation_quantizer.mode)
        static = ActivationQuantizer(bits, "static").to(self.input_scale.device)
        static.scale.copy_(self.input_scale)
        static.zero.copy_(self.input_zero)
        return static

    def fill(self, layer: Any, memo: dict[int, Any]) -> None:
        """Take bias, ranges, codes and grids of a trainable layer; `memo` is that of the copy under way."""
        # Copied under the shared memo, so that a bias that is tied to another parameter stays tied.
        self.bias = deepcopy(layer.bias, memo)
        if self.input_scale is not None:
            self.input_scale = layer.activation_quantizer.scale.detach().float().clone()
            self.input_zero = layer.activation_quantizer.zero.detach().float().clone()
        super().fill(layer, memo)

    def prepare(self, exact: bool = True) -> None:
        """Make the operand of the int8 product, which every later call on this device uses; `exact` as `cpu_linear`."""
        assert self.owner.codes is not None
        if self.spec.activation_bits not in (8, None):
            return  # the integer products know inputs of 8 bits
        self._fast_device = self.owner.codes.device
        if self._fast_device.type == "cpu":
            self._fast = self.cpu_linear(exact)
            self._copied = CopiedParameters({f"linear map {self.columns} to {self.rows}": self})
        else:
            self._fast = self._gpu_linear()

    def cpu_linear(self, exact: bool = True, engine: str | None = None) -> CpuLinear:
        """This layer, bias and activation quantization included, as a product of `qbert.kernels.cpu`.

        `exact` False gives up some exactness of 8-bit weights for speed on CPUs without VNNI; `engine` as for
        `CpuLinear.prepare`.
        """
        options = {"exact": exact, "engine": engine}
        return CpuLinear.from_packed(self.packed_weight(), self.bias, self.input_grid(), **options)

    def _gpu_linear(self) -> Callable[[Tensor], Tensor]:
        bias = None if self.bias is None else self.bias.detach()
        return dispatch.PreparedLinear(self.packed_weight(), bias, self.input_grid())

    def input_grid(self) -> InputGrid:
        """How the input is quantized, as the kernels take it. Raises ValueError for a static scale of 0."""
        bits = self.spec.activation_bits or 0
        if self.input_scale is not None and self.input_zero is not None:
            if not self.input_scale:
                raise ValueError("input_scale is 0, with which no input can be quantized; calibrate the model again")
            return InputGrid(float(self.input_scale), int(self.input_zero), bits=bits)
        quantizer = self.activation_quantizer
        return InputGrid(asymmetric=quantizer is not None and quantizer.mode == "asymmetric", bits=bits)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]. Raises RuntimeError in training mode."""
        self._refuse_training()
        if self._fast is not None and input.device == self._fast_device and not torch.compiler.is_compiling():
            differentiable = input.requires_grad and torch.is_grad_enabled()
            if not differentiable and input.dtype != torch.float64:
                if self._copied is not None:
                    self._copied.check(input.numel() // max(self.columns, 1))
                try:
                    return self._fast(input)
                except RuntimeError:
                    # A trace cannot record compiled programs. Asked only here, for it would cost small layers time.
                    if not torch.jit.is_tracing():
                        raise
        return F.linear(self.quantize_input(input), self._dequantize(None, input.dtype), self.bias)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantized and dequantized input [..., I], or `x` itself if activations stay in float."""
        if self.activation_quantizer is not None:
            return self.activation_quantizer(x)  # type: ignore[no-any-return]
        if self.input_scale is None or self.input_zero is None:
            return x
        limits = code_range(self.spec.activation_bits or 8)
        return fake_quantize(x, self.input_scale, self.input_zero, *limits)


register(Kind(lambda module: type(module) is nn.Linear, QuantLinear, PackedLinear))
