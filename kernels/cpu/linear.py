"""Packed linear layers and embeddings on a CPU, fast: int8 products, one scale per token, exact integer sums.

Weights rest in the packed form (`formats`) and are expanded, when a layer is first used, into the int8 operand of
torch's own matrix product (`gemm`). That operator knows one activation scale for the whole tensor, which is what
makes 8-bit encoders on CPUs inaccurate: one outlier token coarsens all others. Per-token scales are had from it by
linearity: divide every row of x by its own maximum, multiply by the int8 weights with the fixed step 1/127, multiply
the output row by that maximum, add the bias. Asymmetric ranges are had in the same way: take the smallest value of a
row from it first, and add that value times the row sums of the weights to the output (`chains`).

The integer product knows codes, not the zero of their grid. Three ways, the first that fits:
  fold     codes - zero (twice that where zeros are halves, as for symmetric 2-bit levels +-1/2, +-3/2) are still
           small integers of at most 7 bits: multiply those, no zero is left;
  point    integer zeros of 8-bit codes go to the operator, which subtracts them for free (fbgemm), or are folded in
           all the same where operands of more than 7 bits have to be taken apart anyway;
  sum      any other zero: y -= scale * zero * (row sum of the activation codes).

    layer = CpuLinear.prepare(codes, scale, zero, row_group, bias, bits=4)
    y = layer.forward(x)                           # [..., I] -> [..., O]
    h = embedding(ids, PackedWeight(packed, scale, zero, row_group, bits=8, columns=384))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbert.kernels import formats, reference
from qbert.kernels.cpu.chains import AsymmetricChain, FloatChain, Rounding, StaticChain, SymmetricChain, compiled
from qbert.kernels.cpu.gemm import Int8Gemm, available_engine, fit_pairs, saturates, takes_zero
from qbert.kernels.cpu.native import NativeProduct
from qbert.kernels.operands import PER_TOKEN, InputGrid, PackedWeight

logger = logging.getLogger(__name__)
Chain = nn.Module | NativeProduct

_FOLD_LIMIT = 64  # 7 bits: wider operands could saturate 16-bit pair sums on CPUs without VNNI


class CpuLinear:
    """y = x W^T + b with low-bit W and int8 activations, prepared once and then called many times. Immutable."""

    def __init__(self, chain: Chain, bias: Tensor, in_features: int, bits: int, engine: str, reason: str) -> None:
        """Use `prepare` or `from_packed`. `chain` computes the layer, see `chains`."""
        self.chain = chain
        self.in_features, self.out_features = in_features, len(bias)
        self.bits, self.engine, self.reason = bits, engine, reason
        self._bias = bias
        self._run: Callable[[Tensor], Tensor] | None = None  # the chain, compiled at the first call

    @classmethod
    def prepare(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        row_group: Tensor | None = None,
        bias: Tensor | None = None,
        bits: int = 8,
        *,
        activation_bits: int | None = 8,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        asymmetric: bool = False,
        exact: bool = True,
        engine: str | None = None,
    ) -> CpuLinear:
        """Expands codes int8 [O, I] with scale, zero [G, K] and row_group [O] into the operand of the product.

        `activation_bits` 8 quantizes x per token, symmetrically; with `activation_scale` (and `activation_zero`, in
        -128..127) with that one static scale; with `asymmetric` per token from its smallest to its largest value;
        None leaves x alone. More than one input group (K > 1) and `activation_bits` None run in float, as does a torch
        without int8 operators; `reason` and the log then say why. `exact` False rounds rows of 8-bit weights once more
        where this CPU would have to take them apart (`gemm.fit_pairs`): faster there, with a little more error; on
        other CPUs and for fewer bits it changes nothing. `engine` is "native", "fbgemm" or "onednn"; "bf16" and "fp32"
        multiply x as it is by expanded weights; None takes the first of torch's int8 operators that runs.
        Raises TypeError or ValueError for codes outside `bits` bits and for shapes that do not fit.
        """
        low, high = formats.code_range(bits)
        if codes.dim() != 2 or codes.dtype != torch.int8:
            raise TypeError(f"codes must be int8 [out, in], got {codes.dtype} {list(codes.shape)}.")
        if codes.device.type != "cpu":
            raise ValueError(f"codes are on {codes.device}; CpuLinear wants them on the CPU.")
        if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
            raise ValueError(f"codes must lie in [{low}, {high}] for {bits} bits.")
        if activation_bits not in (8, None):
            raise ValueError(f"activation_bits must be 8 or None, got {activation_bits!r}.")
        if asymmetric and (activation_bits is None or activation_scale is not None):
            raise ValueError("asymmetric is for 8-bit activations without a static scale; leave one of the two out.")
        if activation_scale is not None and not 0 < abs(activation_scale) < math.inf:
            raise ValueError(f"activation_scale must be a positive number or None, got {activation_scale}.")
        rows, columns = codes.shape
        scale = reference.expand_groups(scale, row_group, rows).float().contiguous()
        zero = reference.expand_groups(zero, row_group, rows).float().contiguous()
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}.")
        bias = scale.new_zeros(rows) if bias is None else bias.detach().float().clone()
        offset = int(activation_zero) + 128
        if engine in ("bf16", "fp32"):
            dtype = torch.bfloat16 if engine == "bf16" else torch.float32
            weight = reference.dequantize(codes, scale, zero).to(dtype)
            return cls(FloatChain(weight, bias.to(dtype), None), bias, columns, bits, engine, "")
        reason = _reason_for_float(codes, scale, activation_bits)
        if engine == "native" and not reason:
            product = NativeProduct.prepare(
                codes,
                scale[:, 0],
                zero[:, 0],
                bias,
                asymmetric=asymmetric,
                activation_scale=activation_scale,
                activation_zero=activation_zero,
                exact=exact,
            )
            return cls(product, bias, columns, bits, engine, "")
        if reason:
            logger.info("a matrix [%d, %d] multiplies in float, at four bytes a weight: %s", rows, columns, reason)
            quantize = Rounding(asymmetric, activation_scale or 0.0, offset) if activation_bits else None
            chain: Chain = FloatChain(reference.dequantize(codes, scale, zero), bias, quantize)
            return cls(chain, bias, columns, bits, "float", reason)
        engine = engine or available_engine()
        operand, row_scale, point, correction = _operand(codes, scale[:, 0], zero[:, 0], engine)
        if not exact and saturates(engine) and not bool(point.any()):
            operand, factor = fit_pairs(operand)
            row_scale = row_scale / factor
        gemm = Int8Gemm(operand, row_scale, point, engine=engine)
        if activation_scale is not None:
            chain = StaticChain(gemm, bias, correction, float(activation_scale), offset)
        elif asymmetric:
            sums = (operand.sum(1, dtype=torch.int64) - point.long() * columns).double() * row_scale.double()
            weight_sum = sums if correction is None else sums - correction.double() * columns
            chain = AsymmetricChain(gemm, bias, correction, weight_sum.float())
        else:
            chain = SymmetricChain(gemm, bias, correction)
        return cls(chain, bias, columns, bits, gemm.engine, reason)

    @classmethod
    def from_packed(
        cls, weight: PackedWeight, bias: Tensor | None = None, grid: InputGrid = PER_TOKEN, **options: Any
    ) -> CpuLinear:
        """`prepare` from a packed weight, for an input on `grid`, with its other options."""
        _, scale, zero, row_group, bits, _ = weight
        return cls.prepare(weight.unpacked(), scale, zero, row_group, bias, bits, **grid.options, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuLinear:
        return self  # immutable, and torch's packed operands cannot be copied

    def __getstate__(self) -> Any:
        raise TypeError(
            "a layer that was prepared for the CPU cannot be pickled: its int8 operand is laid out for this machine; "
            "send or save the packed model and call optimize_for_inference where it runs"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] (float32, float16 or bfloat16) to y [..., O] in the same dtype.

        Raises TypeError for another dtype, ValueError for another number of columns, another device or a wanted
        gradient.
        """
        self._check(x)
        if x.dim() < 2 or not x.numel():
            return self._forward_rare(x)
        if self._run is None:
            self._run = compiled(self.chain) if isinstance(self.chain, nn.Module) else self.chain
        # No reshape on the common path: at a few tokens each such call costs as much as a tenth of the product.
        return self._run(x) if x.dtype == torch.float32 else self._run(x.float()).to(x.dtype)

    __call__ = forward

    def __repr__(self) -> str:
        how = f"float ({self.reason})" if self.reason else self.engine
        return f"CpuLinear({self.in_features} -> {self.out_features}, {self.bits} bits, {how})"

    def _forward_rare(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.forward(rows) if rows.numel() else self._bias.expand(rows.shape[0], -1).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it first.")
        if x.device.type != "cpu":
            raise ValueError(f"x is on {x.device} but this layer was prepared for the CPU.")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} columns, got shape {list(x.shape)}.")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires a gradient, which a packed layer cannot give: train before packing.")


def embedding(ids: Tensor, weight: PackedWeight) -> Tensor:
    """Rows `ids` [...] of a packed embedding table, dequantized: [..., I] in the dtype of its scale.

    Only the gathered rows are unpacked.
    Raises TypeError for ids that are not int32 or int64, IndexError for an id outside the table.
    """
    packed, scale, zero, row_group, bits, features = weight
    formats.check_packed(packed, bits, features)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}.")
    flat = ids.reshape(-1)
    vocabulary = packed.shape[0]
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocabulary:
        raise IndexError(
            f"ids must lie in 0..{vocabulary - 1}, got values from {int(flat.min())} to {int(flat.max())}."
        )
    codes = formats.unpack(packed[flat], bits, features)
    if row_group is None and scale.shape[0] == 1:
        groups = torch.zeros_like(flat)
    else:
        groups = flat if row_group is None else row_group[flat].long()
    return reference.dequantize(codes, scale[groups], zero[groups]).reshape(*ids.shape, features)


def _reason_for_float(codes: Tensor, scale: Tensor, activation_bits: int | None) -> str:
    if activation_bits is None:
        return "activations are not quantized"
    if scale.shape[1] > 1:
        return f"{scale.shape[1]} input groups"
    if codes.numel() == 0:
        return "empty weight"
    if available_engine() == "none":
        return "this build of torch has no int8 product for this CPU"
    return ""


def _operand(codes: Tensor, scale: Tensor, zero: Tensor, engine: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Integer operand, its scale [O], its zero points [O] and what is left, scale * zero [O] or None."""
    none = torch.zeros_like(zero, dtype=torch.int32)
    for factor in (1, 2):
        shift = zero * factor
        if bool((shift == shift.round()).all()):
            folded = codes.to(torch.int32) * factor - shift.to(torch.int32)[:, None]
            if int(folded.abs().max()) <= _FOLD_LIMIT:
                return folded.to(torch.int8), scale / factor, none, None
    if bool((zero == zero.round()).all()):
        point = zero.to(torch.int32)
        if saturates(engine) and float(zero.abs().max()) <= 128:
            # What would saturate is fewest where codes are centred; the product takes such wide codes apart itself.
            return (codes.to(torch.int32) - point[:, None]).to(torch.int16), scale, none, None
        if takes_zero(engine) and _fits_point(zero, codes.shape[1]):
            return codes, scale, point, None
    return codes, scale, none, None if bool((zero == 0).all()) else scale * zero


def _fits_point(zero: Tensor, columns: int) -> bool:
    """Whether the operator's 32-bit sum of activations times (code - zero) cannot overflow."""
    return (float(zero.abs().max()) + 128) * 255 * columns < 2**31
