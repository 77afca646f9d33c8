"""What every kernel must compute, in plain torch: slow, obvious, and the twin that the fast paths are compared with.

The grid of a weight matrix is ``W[o, i] = scale[o, k] * (q[o, i] - zero[o, k])`` with integer codes q, any real zero,
and k the input group of column i (one group, K = 1, is the usual case). Activations are quantized per token (row),
symmetrically: ``x[t, i] ~ x_scale[t] * xq[t, i]``, xq in [-127, 127], or with one static scale. Then

    y[t, o] = x_scale[t] * scale[o] * (sum_i xq[t, i] q[o, i] - zero[o] * sum_i xq[t, i]) + bias[o]

in which both sums are integers: only the epilogue is real arithmetic (the per-channel form of QServe,
arXiv 2405.04532, section 5.2.1, eq. 8-13; Q-BERT's row groups, arXiv 1909.05840, section 3.3, are rows that share a
scale and cost nothing here).

Asymmetrically quantized tokens, from their smallest to their largest value, have an offset beside the scale, the value
of code 0, and codes in [-128, 127]: ``x[t, i] ~ x_scale[0, t] * xq[t, i] + x_scale[1, t]``. It is a real number, not a
whole number of steps, because the range need not hold 0. The product then has one more term, x_scale[1, t] times
``weight_sum[o] = sum_i W[o, i]``, which is known beforehand.

Activations may be eight-bit floats instead, e4m3 (sign, four bits of exponent, three of mantissa; up to 448, in steps
of 1/512 near 0; arXiv 2209.05433, section 3): ``x[t, i] ~ x_scale[t] * xq[t, i]``, x_scale = max |x| / 448. Their row
sums are counted in 512ths, of which every e4m3 number is a whole number, and so stay exact integers.

Sums run in int64 and epilogues in float64 unless a function says otherwise. Nothing here is meant to be fast. Most
functions take scale and zero [O, K]; `quantize` and `product` take the operands that kernels take.

    xq, x_scale, row_sum = quantize_rows(x)
    y = matmul_a8(xq, x_scale, codes, scale, zero, bias)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbert.kernels import formats
from qbert.kernels.operands import E4M3_MAX, PER_TOKEN, E4m3Weight, InputGrid, ProductWeight

A8_MAX = 127  # symmetric int8: -128 is not used, so that negation is exact
E4M3_UNITS = 512  # every e4m3 number is a whole number of 1 / 512
A8_STEPS = 255  # asymmetric int8: from code -128, the smallest value, to 127, the largest


def expand_groups(table: Tensor, row_group: Tensor | None, rows: int) -> Tensor:
    """Spreads per-group values [G, K] over rows: [O, K], row o taking `table[row_group[o]]`.

    `row_group` None stands for one group a row (G = O) or one for all (G = 1).
    Raises ValueError where shapes or group numbers do not fit.
    """
    if table.dim() != 2:
        raise ValueError(f"group table must have shape [groups, input groups], got {tuple(table.shape)}.")
    if row_group is None:
        if table.shape[0] not in (1, rows):
            raise ValueError(f"row_group is needed to spread {table.shape[0]} groups over {rows} rows.")
        return table.expand(rows, table.shape[1])
    if row_group.shape != (rows,):
        raise ValueError(f"row_group must have shape [{rows}], got {tuple(row_group.shape)}.")
    if rows and not 0 <= int(row_group.min()) <= int(row_group.max()) < table.shape[0]:
        raise ValueError(f"row_group must hold group numbers 0 to {table.shape[0] - 1}.")
    return table[row_group.long()]


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Real weights [O, I] of codes [O, I] and scale, zero [O, K]; K must divide I. In the dtype of `scale`."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    if scale.shape != zero.shape or scale.shape[0] != rows:
        raise ValueError(
            f"scale and zero must both be [{rows}, input groups], got {list(scale.shape)}, {list(zero.shape)}."
        )
    if groups < 1 or columns % groups:
        raise ValueError(f"{groups} input groups do not divide {columns} columns.")
    grouped = codes.reshape(rows, groups, columns // groups).to(scale.dtype)
    return ((grouped - zero[:, :, None]) * scale[:, :, None]).reshape(rows, columns)


def quantize_rows(x: Tensor, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """int8 per token: x [T, I] to codes int8 [T, I], scale [T] (dtype of x) and row sums int32 [T] of the codes.

    scale = max |x| / 127, codes = round-half-even(x / scale). A row of zeros gets scale 0 and codes 0.
    With `asymmetric` scale is [2, T]: step = (max x - min x) / 255, and offset = min x + 128 step, the value of code 0;
    codes = round-half-even((x - min x) / step) - 128. A row of one value gets step 0 and codes -128.
    """
    if asymmetric:
        return _quantize_asymmetric(x)
    scale = divided(x.abs().amax(dim=1), A8_MAX) if x.shape[1] else x.new_zeros(x.shape[0])
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.round(x / safe[:, None]).clamp(-A8_MAX, A8_MAX).to(torch.int8)
    return codes, scale, code_sum(codes)


def divided(x: Tensor, steps: float) -> Tensor:
    """x / steps, correctly rounded: by a number of Python's, torch on a GPU multiplies with its rounded reciprocal."""
    return x / torch.full((), steps, dtype=x.dtype, device=x.device)


def _quantize_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.aminmax(x, dim=1) if x.shape[1] else (x.new_zeros(x.shape[0]),) * 2
    step = divided(high - low, A8_STEPS)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    codes = (torch.round((x - low[:, None]) / safe[:, None]).clamp(0, A8_STEPS) - 128).to(torch.int8)
    return codes, torch.stack([step, low + 128 * step]), code_sum(codes)


def e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number (float8_e4m3fn), half to even, within -448..448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)


def e4m3_sum(codes: Tensor) -> Tensor:
    """Row sums of e4m3 codes [T, ...] in 512ths, int32 [T]."""
    return (codes.flatten(1).double().sum(dim=1) * E4M3_UNITS).to(torch.int32)


def code_sum(codes: Tensor) -> Tensor:
    """Row sums of int8 or, in 512ths, e4m3 codes [T, ...], int32 [T]."""
    return codes.flatten(1).sum(dim=1, dtype=torch.int32) if codes.dtype == torch.int8 else e4m3_sum(codes)


def quantize_rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 per token: x [T, I] to codes [T, I], scale [T] (dtype of x) and row sums int32 [T] of the codes, in 512ths.

    scale = max |x| / 448, codes = e4m3(x / scale). A row of zeros gets scale 0 and codes 0.
    """
    scale = divided(x.abs().amax(dim=1), E4M3_MAX) if x.shape[1] else x.new_zeros(x.shape[0])
    codes = e4m3(x / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None])
    return codes, scale, code_sum(codes)


def requantize(
    y: Tensor, scale: float, zero: int = 0, row_sum: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> Tensor:
    """Static codes of real values y [T, ...]: clamp(round-half-even(y / scale) + zero, -128, 127), or e4m3(y / scale).

    The sums of every token's codes (e4m3 ones in 512ths) are added to `row_sum` (int32 [T]) where it is given.
    """
    if dtype == torch.int8:
        codes = (torch.round(divided(y, scale)) + zero).clamp(-128, 127).to(torch.int8)
    else:
        codes = e4m3(divided(y, scale))
    if row_sum is not None:
        row_sum += code_sum(codes)
    return codes


def quantize(x: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float32 scale and row sums of x [T, I] on any grid of 8 bits: the twin of the row kernels."""
    if not grid.scale:
        e4m3 = grid.codes_dtype != torch.int8
        return quantize_rows_e4m3(x.float()) if e4m3 else quantize_rows(x.float(), grid.asymmetric)
    codes = requantize(x.float(), grid.scale, grid.zero, dtype=grid.codes_dtype)
    return codes, torch.full(x.shape[:1], grid.scale, dtype=torch.float32, device=x.device), code_sum(codes)


def fake_quantize(x: Tensor, grid: InputGrid = PER_TOKEN) -> Tensor:
    """x [T, I] rounded to its int8 codes and back; x itself where the grid has 0 bits."""
    if not grid.bits:
        return x
    if grid.scale > 0:
        codes = requantize(x.float(), grid.scale, grid.zero).float()
        return ((codes - grid.zero) * grid.scale).to(x.dtype)
    codes, scale, _ = quantize_rows(x.float(), grid.asymmetric)
    if grid.asymmetric:
        return (codes * scale[0, :, None] + scale[1, :, None]).to(x.dtype)
    return (codes * scale[:, None]).to(x.dtype)


def gelu(y: Tensor) -> Tensor:
    """GELU with the exact error function, BERT's activation: y * Phi(y)."""
    return y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))


def accumulate(xq: Tensor, codes: Tensor) -> Tensor:
    """Exact products [T, O] of activation codes [T, I] and weight codes [O, I]: int64, or of e4m3 codes float64."""
    sums = torch.int64 if xq.dtype == torch.int8 else torch.float64
    return xq.to(sums) @ codes.to(sums).T


def matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y [T, O] in float64 from int8 or e4m3 activations and low-bit weights, with the kernels' epilogues.

    xq int8 or float8_e4m3fn [T, I], x_scale [T], [1] or [2, T] with the offsets (`quantize_rows`), codes [O, I], scale
    and zero [O, K], bias [O], residual [T, O]; `activation` is "none" or "gelu", applied after the bias and before the
    residual.
    """
    step, offset = x_scale.double() if x_scale.dim() == 2 else (x_scale.double(), None)
    columns, groups = codes.shape[1], scale.shape[1]
    width = columns // groups
    y = xq.new_zeros((xq.shape[0], codes.shape[0]), dtype=torch.float64)
    for k in range(groups):
        part = slice(k * width, (k + 1) * width)
        acc = accumulate(xq[:, part], codes[:, part]).double()
        row_sum = xq[:, part].double().sum(dim=1)
        y += (acc - row_sum[:, None] * zero[:, k].double()) * scale[:, k].double()
    y *= step[:, None]
    if offset is not None:
        y += offset[:, None] * dequantize(codes, scale.double(), zero.double()).sum(dim=1)
    if bias is not None:
        y += bias.double()
    if activation == "gelu":
        y = gelu(y)
    elif activation != "none":
        raise ValueError(f"activation must be 'none' or 'gelu', got {activation!r}.")
    return y if residual is None else y + residual.double()


def product_codes(weight: ProductWeight, columns: int) -> Tensor:
    """int8 codes [all rows, columns] of the weights of a product."""
    return torch.cat([formats.unpack(c, b, columns) for c, b in zip(weight.codes, weight.bits, strict=True)])


def product(xq: Tensor, x_scale: Tensor, row_sum: Tensor | None, weight: ProductWeight) -> Tensor:
    """Product and bias, float64 [T, all rows], from the row sums and weight sums given: the twin of the kernels."""
    codes = product_codes(weight, xq.shape[1])
    # float64 sums of these codes are exact, and faster than int64 ones.
    acc = xq.to(torch.float64) @ codes.to(torch.float64).T
    if weight.zero is not None and row_sum is not None:
        zero, unit = weight.zero.to(torch.float64), 1 if xq.dtype == torch.int8 else E4M3_UNITS
        if weight.zero.dtype == torch.int32:
            units = torch.tensor([1 << (8 - b) for b in weight.bits], device=zero.device)
            zero = zero / units.repeat_interleave(weight.codes[0].shape[0])
        acc -= row_sum.to(torch.float64)[:, None] / unit * zero
    grid = x_scale.to(torch.float64)
    y = acc * weight.scale.to(torch.float64) * (grid if weight.weight_sum is None else grid[0])[:, None]
    if weight.weight_sum is not None:
        y += grid[1][:, None] * weight.weight_sum.to(torch.float64)
    return y if weight.bias is None else y + weight.bias


def matmul_e4m3(xq: Tensor, x_scale: Tensor | None, weight: E4m3Weight) -> Tensor:
    """Product and bias, float64 [T, O], of e4m3 activations [T, I], steps [T] or 1, and e4m3 weights."""
    y = xq.double() @ weight.codes.double().T * weight.scale.double()
    y = y if x_scale is None else y * x_scale.double()[:, None]
    return y if weight.bias is None else y + weight.bias.double()


def matmul_a16(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [T, O] in float64 from real activations x [T, I] and low-bit weights."""
    y = x.double() @ dequantize(codes, scale.double(), zero.double()).T
    return y if bias is None else y + bias.double()


def linear_a8(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """Quantizes x [T, I] per token, then `matmul_a8`: the whole of a packed linear layer, float64 [T, O]."""
    xq, x_scale, _ = quantize_rows(x)
    return matmul_a8(xq, x_scale, codes, scale, zero, bias)


def layernorm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm(x + residual) [T, I] in float64, and its `quantize_rows`: (y, codes, scale, row sums)."""
    hidden = x.double() if residual is None else x.double() + residual.double()
    y = torch.nn.functional.layer_norm(hidden, (x.shape[1],), weight.double(), bias.double(), eps)
    return (y, *quantize_rows(y))


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Dequantized rows [..., I] of an embedding table: codes [V, I], scale and zero [V, K]."""
    return dequantize(codes[ids.reshape(-1)], scale[ids.reshape(-1)], zero[ids.reshape(-1)]).reshape(
        *ids.shape, codes.shape[1]
    )


def attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Self-attention inside each sequence of a packed batch, float64 [T, heads, D].

    query, key, value [T, heads, D]; sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1].
    """
    out = query.new_zeros(query.shape, dtype=torch.float64)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (t[start:end].double().transpose(0, 1) for t in (query, key, value))  # [heads, tokens, D]
        out[start:end] = (torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v).transpose(0, 1)
    return out
