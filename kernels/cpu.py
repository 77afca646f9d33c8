"""Packed linear layers and embeddings on a CPU, fast: int8 products, one scale per token, exact integer sums.

Weights rest in the packed form (`formats`) and are expanded, when a layer is first used, into the int8 operand of
torch's own matrix product (`cpu_gemm`). That operator knows one activation scale for the whole tensor, which is what
makes 8-bit encoders on CPUs inaccurate: one outlier token coarsens all others. Per-token scales are had from it by
linearity: divide every row of x by its own maximum, multiply by the int8 weights with the fixed step 1/127, multiply
the output row by that maximum, add the bias. Asymmetric ranges are had in the same way: take the smallest value of a
row from it first, and add that value times the row sums of the weights to the output.

The integer product knows codes, not the zero of their grid. Three ways, the first that fits:
  fold     codes - zero (twice that where zeros are halves, as for symmetric 2-bit levels +-1/2, +-3/2) are still
           small integers of at most 7 bits: multiply those, no zero is left;
  point    integer zeros of 8-bit codes go to the operator, which subtracts them for free (fbgemm), or are folded in
           all the same where operands of more than 7 bits have to be taken apart anyway;
  sum      any other zero: y -= scale * zero * (row sum of the activation codes).

    layer = CpuLinear.prepare(codes, scale, zero, row_group, bias, bits=4)
    y = layer.forward(x)                           # [..., I] -> [..., O]
    h = embedding(ids, packed, scale, zero, row_group, bits=8, features=384)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert.kernels import formats, reference
from qbert.kernels.cpu_gemm import ACTIVATION_ZERO, Int8Gemm, available_engine, saturates

_LEVELS = 255  # steps of an asymmetric range: unsigned codes 0 to 255
_FOLD_LIMIT = 64  # 7 bits: wider operands could saturate 16-bit pair sums on CPUs without VNNI


class CpuLinear:
    """y = x W^T + b with low-bit W and int8 activations, prepared once and then called many times. Immutable."""

    def __init__(self, gemm: Int8Gemm | None, **parts: Any) -> None:
        """Use `prepare` or `from_packed`."""
        self._gemm = gemm
        self._weight: Tensor | None = parts["weight"]  # float [O, I], only where int8 cannot be used
        self._correction: Tensor | None = parts["correction"]  # scale * zero [O], only for zeros of the third way
        self._weight_sum: Tensor | None = parts["weight_sum"]  # of each row [O], only for asymmetric activations
        self._asymmetric: bool = parts["asymmetric"]
        self._bias: Tensor = parts["bias"]
        self._activation: tuple[float, int] | None = parts["activation"]
        self.bits: int = parts["bits"]
        self.in_features: int = parts["in_features"]
        self.out_features: int = parts["out_features"]
        self.reason: str = parts["reason"]

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
    ) -> CpuLinear:
        """Expands codes int8 [O, I] with scale, zero [G, K] and row_group [O] into the operand of the product.

        `activation_bits` 8 quantizes x per token, symmetrically; with `activation_scale` (and `activation_zero`, in
        -128..127) with that one static scale; with `asymmetric` per token from its smallest to its largest value;
        None leaves x alone. More than one input group (K > 1) and
        `activation_bits` None run in float, as does a torch without int8 operators; `reason` then says why.
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
        rows, columns = codes.shape
        scale = reference.expand_groups(scale, row_group, rows).float().contiguous()
        zero = reference.expand_groups(zero, row_group, rows).float().contiguous()
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}.")
        activation = None if activation_scale is None else (float(activation_scale), int(activation_zero) + 128)
        reason = _reason_for_float(codes, scale, activation_bits)
        weight = correction = weight_sum = gemm = None
        if reason:
            weight = reference.dequantize(codes, scale, zero)
        else:
            if asymmetric:
                sums = codes.sum(1, dtype=torch.int64).double() - zero[:, 0].double() * columns
                weight_sum = (sums * scale[:, 0].double()).float()
            operand, row_scale, point, correction = _operand(codes, scale[:, 0], zero[:, 0])
            gemm = Int8Gemm(operand, row_scale, point)
        return cls(
            gemm,
            weight=weight,
            correction=correction,
            weight_sum=weight_sum,
            asymmetric=asymmetric,
            bias=torch.zeros(rows) if bias is None else bias.detach().float().clone(),
            activation=activation if activation_bits == 8 else (0.0, 0),
            bits=bits,
            in_features=columns,
            out_features=rows,
            reason=reason,
        )

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        in_features: int,
        scale: Tensor,
        zero: Tensor,
        row_group: Tensor | None = None,
        bias: Tensor | None = None,
        bits: int = 8,
        **activation: Any,
    ) -> CpuLinear:
        """`prepare` from packed bytes (`formats.pack`)."""
        codes = formats.unpack(packed, bits, in_features)
        return cls.prepare(codes, scale, zero, row_group, bias, bits, **activation)

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuLinear:
        return self  # immutable, and torch's packed operands cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] (float32, float16 or bfloat16) to y [..., O] in the same dtype.

        Raises TypeError for another dtype, ValueError for another number of columns, another device or a wanted
        gradient.
        """
        self._check(x)
        if self._gemm is None or x.dim() < 2 or not x.numel():
            return self._forward_rare(x)
        # No reshape on the common path: at a few tokens each such call costs as much as a tenth of the product.
        work = x if x.dtype == torch.float32 else x.float()
        if self._activation is not None:
            y = self._forward_static(work, self._gemm, *self._activation)
        else:
            y = self._forward_dynamic(work, self._gemm)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    __call__ = forward

    def __repr__(self) -> str:
        how = self._gemm.engine if self._gemm is not None else f"float ({self.reason})"
        return f"CpuLinear({self.in_features} -> {self.out_features}, {self.bits} bits, {how})"

    def _forward_rare(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if not rows.numel():
            y = self._bias.expand(rows.shape[0], -1).to(x.dtype)
        else:
            y = self._forward_float(rows.float()).to(x.dtype) if self._gemm is None else self.forward(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _forward_dynamic(self, x: Tensor, gemm: Int8Gemm) -> Tensor:
        # A row of equal values gives 0/0 here; its codes are then arbitrary but finite, and the factor span = 0 ends
        # them.
        if self._weight_sum is None:
            unit = x.abs()
            span = unit.amax(dim=-1, keepdim=True)
            torch.div(x, span, out=unit)
            y = self._multiply(unit, gemm, reference.A8_MAX, ACTIVATION_ZERO)
            return torch.addcmul(self._bias, y, span, out=y)
        low = x.amin(dim=-1, keepdim=True)
        unit = x - low
        span = unit.amax(dim=-1, keepdim=True)
        y = self._multiply(unit.div_(span), gemm, _LEVELS, 0)
        torch.addcmul(self._bias, y, span, out=y)
        return torch.addcmul(y, low, self._weight_sum, out=y)

    def _multiply(self, unit: Tensor, gemm: Int8Gemm, levels: int, offset: int) -> Tensor:
        """Product with `unit`, whose values -1..1 or 0..1 are rounded to multiples of 1 / `levels`."""
        if self._correction is None and not gemm.has_excess:
            return gemm(unit, 1.0 / levels, offset)
        codes = torch.nan_to_num_(unit).mul_(levels).round_()
        y = gemm(codes, 1.0, offset, rounded=True)
        if self._correction is not None:
            y.sub_(codes.sum(dim=-1, keepdim=True) * self._correction)
        return y.mul_(1.0 / levels)

    def _forward_static(self, x: Tensor, gemm: Int8Gemm, scale: float, offset: int) -> Tensor:
        if self._correction is not None:
            x = (x / scale).round_().clamp_(-offset, 255 - offset)
            y = gemm(x, 1.0, offset, rounded=True).sub_(x.sum(dim=-1, keepdim=True) * self._correction)
            return torch.add(self._bias, y, alpha=scale)
        return gemm(x, scale, offset).add_(self._bias)

    def _forward_float(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        if self._asymmetric:
            low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
            step = (high - low) / _LEVELS
            x = torch.nan_to_num(torch.round((x - low) / step)) * step + low
        elif self._activation is None:
            x = reference.fake_quantize(x)
        elif self._activation[0] > 0:
            scale, offset = self._activation
            x = reference.fake_quantize(x, scale, offset - 128)
        return torch.nn.functional.linear(x, self._weight, self._bias)

    def _check(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it first.")
        if x.device.type != "cpu":
            raise ValueError(f"x is on {x.device} but this layer was prepared for the CPU.")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} columns, got shape {list(x.shape)}.")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires a gradient, which a packed layer cannot give: train before packing.")


def embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None = None,
    *,
    bits: int,
    features: int,
) -> Tensor:
    """Rows `ids` [...] of a packed embedding table, dequantized: [..., features] in the dtype of `scale`.

    packed uint8 [V, row_bytes]; scale, zero [G, K]; row_group [V]. Only the gathered rows are unpacked.
    Raises TypeError for ids that are not int32 or int64, IndexError for an id outside the table.
    """
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


def _operand(codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
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
        if saturates(available_engine()) and float(zero.abs().max()) <= 128:
            # What would saturate is fewest where codes are centred; the product takes such wide codes apart itself.
            return (codes.to(torch.int32) - point[:, None]).to(torch.int16), scale, none, None
        if Int8Gemm.takes_zero(available_engine()) and _fits_point(zero, codes.shape[1]):
            return codes, scale, point, None
    return codes, scale, none, None if bool((zero == 0).all()) else scale * zero


def _fits_point(zero: Tensor, columns: int) -> bool:
    """Whether the operator's 32-bit sum of activations times (code - zero) cannot overflow."""
    return (float(zero.abs().max()) + 128) * 255 * columns < 2**31
