"""The slow twins of single kernels on the very arguments of `operators`, and the shapes that those return.

Unlike `reference`, which defines the mathematics in float64, these take scales, offsets and sums as the kernels do.

    codes, scale, row_sum = quantize(x, static_scale=0.0, static_zero=0, asymmetric=True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import reference


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of `x`, whatever its strides."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_scale(x: Tensor, rows: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and row sums of `rows` quantized tokens, on the device of `x`."""
    scale = x.new_empty((2, rows) if asymmetric else (rows,), dtype=torch.float32)
    return scale, x.new_empty(rows, dtype=torch.int32)


def dense(tensor: Tensor | None) -> Tensor | None:
    """What a kernel can read: it knows no strides of vectors."""
    return None if tensor is None else tensor.contiguous()


def quantize(
    x: Tensor, static_scale: float, static_zero: int, asymmetric: bool, codes_dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and row sums of x [T, I]: the slow twin of the row kernels."""
    if not static_scale:
        e4m3 = codes_dtype != torch.int8
        return reference.quantize_rows_e4m3(x.float()) if e4m3 else reference.quantize_rows(x.float(), asymmetric)
    codes, row_sum = _static_codes(x.float(), static_scale, static_zero, codes_dtype)
    return codes, torch.full(x.shape[:1], static_scale, dtype=torch.float32, device=x.device), row_sum


def _static_codes(y: Tensor, scale: float, zero: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Static codes of y [T, ...] in int8 or e4m3, and their sums int32 [T]."""
    if dtype != torch.int8:
        codes = reference.e4m3(y / scale)
        return codes, reference.e4m3_sum(codes)
    codes = reference.requantize(y, scale, zero)
    return codes, codes.flatten(1).sum(dim=1, dtype=torch.int32)


def product(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    weight_sum: Tensor | None,
) -> Tensor:
    """Product and bias, float64 [T, O]: the slow twin of the matrix kernels, from what they are given."""
    # float64 sums of these codes are exact, and faster than int64 ones.
    acc = xq.to(torch.float64) @ codes.to(torch.float64).T
    if zero is not None and row_sum is not None:
        unit = 1 if xq.dtype == torch.int8 else reference.E4M3_UNITS
        acc -= row_sum.to(torch.float64)[:, None] / unit * zero.to(torch.float64)
    grid = x_scale.to(torch.float64)
    y = acc * scale.to(torch.float64) * (grid if weight_sum is None else grid[0])[:, None]
    if weight_sum is not None:
        y += grid[1][:, None] * weight_sum.to(torch.float64)
    return y if bias is None else y + bias


def requantize(y: Tensor, scale: float, zero: int, row_sum: Tensor | None, dtype: torch.dtype = torch.int8) -> Tensor:
    """Static codes of y [T, ...], their sums added to `row_sum` [T]: the slow twin of the int8 and e4m3 epilogues."""
    codes, sums = _static_codes(y, scale, zero, dtype)
    if row_sum is not None:
        row_sum += sums
    return codes
