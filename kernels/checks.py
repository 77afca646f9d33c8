"""Argument checks of the operators: one sentence naming the argument, what it was and what it should be.

They look at dtypes, shapes and devices only, never at values, so that they hold while a graph is traced as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import formats

ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)
E4M3_COLUMNS = 9362  # the widest row of e4m3 codes whose sum, in 512ths, is below 2^31


def check_dtype(name: str, tensor: Tensor | None, *allowed: torch.dtype) -> None:
    """Raises TypeError unless `tensor` (None passes) has one of the allowed dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}; convert it first.")


def check_shape(name: str, tensor: Tensor | None, *shape: int | str) -> None:
    """Raises ValueError unless `tensor` (None passes) has this shape; a string stands for any size."""
    if tensor is None:
        return
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}.")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors that are given are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"all tensors must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}."
        )


def check_grid(packed: Tensor, scale: Tensor, zero: Tensor, row_group: Tensor | None, bits: int, columns: int) -> None:
    """A packed weight [O, columns] and its scale, zero [G, K] and row_group [O]."""
    formats.check_packed(packed, bits, columns)
    rows = packed.shape[0]
    if scale.dim() != 2 or scale.shape != zero.shape:
        raise ValueError(
            f"scale and zero must both be [groups, input groups], got {list(scale.shape)} and {list(zero.shape)}."
        )
    if scale.shape[1] < 1 or columns % scale.shape[1]:
        raise ValueError(f"scale has {scale.shape[1]} input groups, which do not divide {columns} columns.")
    check_shape("row_group", row_group, rows)
    check_dtype("row_group", row_group, torch.int32, torch.int64)
    if row_group is None and scale.shape[0] not in (1, rows):
        raise ValueError(f"row_group is needed to spread {scale.shape[0]} groups over {rows} rows.")


def check_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_bits: int,
) -> None:
    """The arguments of `dispatch.linear`."""
    check_dtype("x", x, *ACTIVATIONS)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the input features.")
    if activation_bits not in (0, 8):
        raise ValueError(f"activation_bits must be 8 or None, got {activation_bits}.")
    check_same_device(x=x, packed=packed, scale=scale, zero=zero, row_group=row_group, bias=bias)
    check_grid(packed, scale, zero, row_group, bits, x.shape[-1])
    check_shape("bias", bias, packed.shape[0])


def check_embedding(
    ids: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, row_group: Tensor | None, bits: int, features: int
) -> None:
    """The arguments of `dispatch.embedding`."""
    check_dtype("ids", ids, torch.int32, torch.int64)
    check_same_device(ids=ids, packed=packed, scale=scale, zero=zero, row_group=row_group)
    check_grid(packed, scale, zero, row_group, bits, features)


def check_codes(dtype: torch.dtype, columns: int, zero: int = 0, asymmetric: bool = False) -> None:
    """The dtype of a quantized output, and that e4m3 codes have neither a zero nor offsets nor too many columns."""
    if dtype not in CODES:
        raise TypeError(f"codes_dtype must be int8 or float8_e4m3fn, got {dtype}.")
    if dtype != torch.int8 and (zero or asymmetric):
        raise ValueError("e4m3 codes are symmetric; leave out the zero and asymmetric, or ask for int8 codes.")
    if dtype != torch.int8 and columns > E4M3_COLUMNS:
        raise ValueError(f"e4m3 codes are for at most {E4M3_COLUMNS} columns, got {columns}; ask for int8 codes.")


def check_e4m3_product(xq: Tensor, x_scale: Tensor, zero: Tensor | None, bits: list[int]) -> None:
    """What a product takes beside e4m3 activations: weights of 2 to 4 bits, no int32 zero, no offsets."""
    if xq.dtype == torch.int8:
        return
    if max(bits) > 4:
        raise ValueError(f"e4m3 activations go with weights of 2 to 4 bits, got {max(bits)}; quantize them to int8.")
    check_dtype("zero, with e4m3 activations,", zero, torch.float32)
    if x_scale.dim() == 2:
        raise ValueError("e4m3 activations have no offsets; x_scale must have shape [1] or [tokens].")


def check_activations(xq: Tensor, x_scale: Tensor, row_sum: Tensor | None) -> None:
    """int8 or e4m3 activations [T, I], their scale [T], [1] or, with offsets, [2, T], their row sums [T]."""
    check_dtype("xq", xq, *CODES)
    check_shape("xq", xq, "tokens", "in")
    check_dtype("x_scale", x_scale, torch.float32)
    tokens = xq.shape[0]
    if x_scale.shape not in ((1,), (tokens,), (2, tokens)):
        raise ValueError(f"x_scale must have shape [1], [{tokens}] or [2, {tokens}], got {list(x_scale.shape)}.")
    check_shape("row_sum", row_sum, xq.shape[0])
    check_dtype("row_sum", row_sum, torch.int32)


def check_terms(rows: int, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *zero_dtypes: torch.dtype) -> None:
    """scale and bias float32 [rows], zero [rows] in one of its dtypes: what an epilogue takes."""
    for name, tensor, dtypes in (
        ("scale", scale, (torch.float32,)),
        ("zero", zero, zero_dtypes),
        ("bias", bias, (torch.float32,)),
    ):
        check_shape(name, tensor, rows)
        check_dtype(name, tensor, *dtypes)


def check_row_sum(zero: Tensor | None, row_sum: Tensor | None) -> None:
    """Row sums are given wherever a zero is."""
    if zero is not None and row_sum is None:
        raise ValueError("row_sum must be given with zero: quantize_rows returns it.")


def check_weight_sum(x_scale: Tensor, weight_sum: Tensor | None, scale: Tensor) -> None:
    """Weight sums float32 [O], given with offsets (x_scale [2, T]) and only with them; `scale` is [O]."""
    if (weight_sum is not None) != (x_scale.dim() == 2):
        given = "no weight_sum" if weight_sum is None else "weight_sum"
        raise ValueError(f"x_scale [2, tokens] and weight_sum go together, got {list(x_scale.shape)} and {given}.")
    check_shape("weight_sum", weight_sum, scale.shape[0])
    check_dtype("weight_sum", weight_sum, torch.float32)
    check_same_device(scale=scale, weight_sum=weight_sum)


def check_rows(name: str, x: Tensor) -> None:
    """Activations [T, I] in a floating dtype."""
    check_dtype(name, x, *ACTIVATIONS)
    check_shape(name, x, "tokens", "in")


def check_static(scale: float, zero: int, asymmetric: bool = False) -> None:
    """A static quantization: scale 0 (none) or positive, zero in the range of int8; none where asymmetric."""
    if not scale >= 0:
        raise ValueError(f"a static scale must be positive, or 0 for one scale a token, got {scale}.")
    if not -128 <= zero <= 127:
        raise ValueError(f"a static zero must lie in -128..127, got {zero}.")
    if asymmetric and scale:
        raise ValueError(f"asymmetric ranges are found per token; leave out the static scale, got {scale}.")


def check_range(activation_bits: int, scale: float, zero: int, asymmetric: bool) -> None:
    """The range of a layer's input: `check_static`, and nothing to be asymmetric in float."""
    check_static(scale, zero, asymmetric)
    if asymmetric and not activation_bits:
        raise ValueError(
            "asymmetric ranges are those of 8-bit activations; got asymmetric=True without activation_bits."
        )


def check_requantized(scale: float, zero: int, row_sum: Tensor | None, like: Tensor) -> None:
    """A static int8 output and its row sums [T]; `like` has T rows and is on the device they should be on."""
    check_static(scale, zero)
    if row_sum is not None:
        if not scale:
            raise ValueError("out_row_sum is given for an output that is not int8; set out_scale, or leave it out.")
        check_dtype("out_row_sum", row_sum, torch.int32)
        check_shape("out_row_sum", row_sum, like.shape[0])
        if not row_sum.is_contiguous():
            raise ValueError("out_row_sum must be contiguous, since it is written to.")
        check_same_device(out_row_sum=row_sum, input=like)


def check_matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    out_dtype: torch.dtype,
    out_scale: float,
    weight_sum: Tensor | None,
) -> None:
    """The arguments of `operators.matmul_a8`."""
    check_activations(xq, x_scale, row_sum)
    formats.check_packed(packed, bits, xq.shape[1])
    check_terms(packed.shape[0], scale, zero, bias, torch.float32, torch.int32)
    check_row_sum(zero, row_sum)
    check_weight_sum(x_scale, weight_sum, scale)
    check_shape("residual", residual, xq.shape[0], packed.shape[0])
    check_dtype("residual", residual, *ACTIVATIONS)
    check_same_device(xq=xq, x_scale=x_scale, row_sum=row_sum, packed=packed, scale=scale, zero=zero, bias=bias)
    check_same_device(xq=xq, residual=residual)
    check_e4m3_product(xq, x_scale, zero, [bits])
    if out_dtype not in (*ACTIVATIONS, *CODES):
        raise TypeError(f"out_dtype must be float32, float16, bfloat16, int8 or float8_e4m3fn, got {out_dtype}.")
    if (out_dtype in CODES) != (out_scale > 0):
        raise ValueError(
            f"out_scale must be positive for int8 and e4m3 output and left out for others, got {out_scale}."
        )


def check_matmul_a8_mixed(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    packed: list[Tensor],
    bits: list[int],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_sum: Tensor | None,
) -> None:
    """The arguments of `operators.matmul_a8_mixed`."""
    if len(packed) != 3 or len(bits) != 3:
        raise ValueError(f"packed and bits must hold three weights, got {len(packed)} and {len(bits)}.")
    check_activations(xq, x_scale, row_sum)
    for index, (weight, width) in enumerate(zip(packed, bits, strict=True)):
        formats.check_packed(weight, width, xq.shape[1])
        if weight.shape[0] != packed[0].shape[0]:
            raise ValueError(f"packed[{index}] has {weight.shape[0]} rows, packed[0] has {packed[0].shape[0]}.")
    check_terms(3 * packed[0].shape[0], scale, zero, bias, torch.float32, torch.int32)
    check_row_sum(zero, row_sum)
    check_weight_sum(x_scale, weight_sum, scale)
    check_e4m3_product(xq, x_scale, zero, bits)
    if out_dtype not in ACTIVATIONS:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}.")
    check_same_device(xq=xq, x_scale=x_scale, row_sum=row_sum, query=packed[0], key=packed[1], value=packed[2])
    check_same_device(xq=xq, scale=scale, zero=zero, bias=bias)


def check_matmul_a16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> None:
    """The arguments of `operators.matmul_a16`."""
    check_rows("x", x)
    formats.check_packed(packed, bits, x.shape[1])
    check_terms(packed.shape[0], scale, zero, bias, torch.float32)
    check_same_device(x=x, packed=packed, scale=scale, zero=zero, bias=bias)


def check_norm(width: int, weight: Tensor, bias: Tensor) -> None:
    """Weight and bias [width] of a LayerNorm."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, width)
        check_dtype(name, tensor, *ACTIVATIONS)


def check_layernorm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """The arguments of `operators.layernorm_quantize`."""
    check_rows("x", x)
    check_shape("residual", residual, *x.shape)
    check_dtype("residual", residual, *ACTIVATIONS)
    check_norm(x.shape[1], weight, bias)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)


def check_embed_layernorm(
    ids: list[Tensor],
    packed: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    row_group: list[Tensor],
    bits: list[int],
    weight: Tensor,
    bias: Tensor,
    out_dtype: torch.dtype,
) -> None:
    """The arguments of `operators.embed_layernorm`."""
    counts = {len(part) for part in (ids, packed, scale, zero, row_group, bits)}
    if len(counts) != 1 or not 1 <= len(ids) <= 3:
        raise ValueError(f"ids, packed and the other lists must all hold one to three tables, got {sorted(counts)}.")
    if out_dtype not in ACTIVATIONS:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}.")
    check_shape("weight", weight, "features")
    check_norm(weight.shape[0], weight, bias)
    check_same_device(weight=weight, bias=bias, ids=ids[0])
    for i, p, s, z, g, b in zip(ids, packed, scale, zero, row_group, bits, strict=True):
        check_shape("ids", i, ids[0].shape[0])
        check_embedding(i, p, s, z, g if g.numel() else None, b, weight.shape[0])
        check_dtype("scale", s, torch.float32)
        check_dtype("zero", z, torch.float32)
        check_same_device(weight=weight, ids=i)


def check_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
    """The arguments of `operators.attention`."""
    check_dtype("query", query, *ACTIVATIONS)
    check_shape("query", query, "tokens", "heads", "head_dim")
    for name, tensor in (("key", key), ("value", value)):
        check_shape(name, tensor, *query.shape)
        check_dtype(name, tensor, query.dtype)
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    check_shape("cu_seqlens", cu_seqlens, "sequences + 1")
    if not cu_seqlens.shape[0]:
        raise ValueError("cu_seqlens must hold at least the 0 at which the first sequence starts, got no element.")
    check_same_device(query=query, key=key, value=value, cu_seqlens=cu_seqlens)
    if any(t.stride(2) != 1 for t in (query, key, value)):
        raise ValueError("query, key and value must have unit stride over head_dim; call .contiguous().")
