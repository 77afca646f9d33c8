"""Argument checks of the operators: one sentence naming the argument, what it was and what it should be.

They look at dtypes, shapes and devices only, never at values, so that they hold while a graph is traced as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import formats
from qbert.kernels.operands import E4m3Weight, Heads, InputGrid, PackedWeight, ProductWeight

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


def check_weight(weight: PackedWeight) -> None:
    """A packed weight: its bytes, and a grid that fits them."""
    formats.check_packed(weight.codes, weight.bits, weight.columns)
    scale, zero = weight.scale, weight.zero
    if scale.dim() != 2 or scale.shape != zero.shape:
        raise ValueError(
            f"scale and zero must both be [groups, input groups], got {list(scale.shape)} and {list(zero.shape)}."
        )
    if scale.shape[1] < 1 or weight.columns % scale.shape[1]:
        raise ValueError(f"scale has {scale.shape[1]} input groups, which do not divide {weight.columns} columns.")
    check_shape("row_group", weight.row_group, weight.rows)
    check_dtype("row_group", weight.row_group, torch.int32, torch.int64)
    if weight.row_group is None and scale.shape[0] not in (1, weight.rows):
        raise ValueError(f"row_group is needed to spread {scale.shape[0]} groups over {weight.rows} rows.")


def check_grid(grid: InputGrid) -> None:
    """A grid of 8 bits, static (a positive scale, a zero in the range of int8) or per token, or one of 0 bits."""
    if grid.bits not in (0, 8):
        raise ValueError(f"an input has 8 bits, or 0 where it is left in float, got {grid.bits}.")
    if not grid.scale >= 0:
        raise ValueError(f"a static scale must be positive, or 0 for one scale a token, got {grid.scale}.")
    if not -128 <= grid.zero <= 127:
        raise ValueError(f"a static zero must lie in -128..127, got {grid.zero}.")
    if grid.asymmetric and grid.scale:
        raise ValueError(f"asymmetric ranges are found per token; leave out the static scale, got {grid.scale}.")
    if grid.asymmetric and not grid.bits:
        raise ValueError("asymmetric ranges are those of 8-bit inputs; got asymmetric=True with 0 bits.")


def check_codes(grid: InputGrid, columns: int) -> None:
    """The grid of codes that are written: 8 bits; e4m3 ones have neither a zero nor offsets nor too many columns."""
    check_grid(grid)
    if not grid.bits:
        raise ValueError("codes are written with 8 bits, got a grid of 0 bits, which leaves its input in float.")
    if grid.codes_dtype not in CODES:
        raise TypeError(f"codes_dtype must be int8 or float8_e4m3fn, got {grid.codes_dtype}.")
    if grid.codes_dtype == torch.int8:
        return
    if grid.zero or grid.asymmetric:
        raise ValueError("e4m3 codes are symmetric; leave out the zero and asymmetric, or ask for int8 codes.")
    if columns > E4M3_COLUMNS:
        raise ValueError(f"e4m3 codes are for at most {E4M3_COLUMNS} columns, got {columns}; ask for int8 codes.")


def check_output(out: InputGrid, row_sum: Tensor | None, like: Tensor, columns: int) -> None:
    """A static 8-bit output of `columns` columns (or none, 0 bits) and its row sums [T].

    `like` has T rows and is on the device they should be on.
    """
    if not out.bits:
        if row_sum is not None:
            raise ValueError("out_row_sum is given for an output in float; give the grid of its codes too, or neither.")
        return
    check_codes(out, columns)
    if not out.scale:
        raise ValueError("an output is quantized with a static scale only: that of out must be positive, got 0.")
    if row_sum is not None:
        check_dtype("out_row_sum", row_sum, torch.int32)
        check_shape("out_row_sum", row_sum, like.shape[0])
        if not row_sum.is_contiguous():
            raise ValueError("out_row_sum must be contiguous, since it is written to.")
        check_same_device(out_row_sum=row_sum, input=like)


def check_float_dtype(out_dtype: torch.dtype) -> None:
    """The dtype of an output in float."""
    if out_dtype not in ACTIVATIONS:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}.")


def check_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> None:
    """The arguments of `dispatch.linear`."""
    check_dtype("x", x, *ACTIVATIONS)
    if x.dim() < 1 or x.shape[-1] != weight.columns:
        raise ValueError(f"x must have shape [..., {weight.columns}], the weight's columns, got {list(x.shape)}.")
    codes, scale, zero, row_group = weight[:4]
    check_same_device(x=x, codes=codes, scale=scale, zero=zero, row_group=row_group, bias=bias)
    check_weight(weight)
    check_shape("bias", bias, weight.rows)
    check_grid(grid)


def check_embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
    """The arguments of `dispatch.embedding`."""
    check_dtype("ids", ids, torch.int32, torch.int64)
    codes, scale, zero, row_group = weight[:4]
    check_same_device(ids=ids, codes=codes, scale=scale, zero=zero, row_group=row_group)
    check_weight(weight)


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


def check_product_weight(weight: ProductWeight, count: int, columns: int, *zero_dtypes: torch.dtype) -> None:
    """`count` packed weights of `columns` columns and of one height, and what an epilogue takes of them."""
    if len(weight.codes) != count or len(weight.bits) != count:
        wanted = {1: "one weight", 3: "three weights"}[count]
        raise ValueError(f"codes and bits must hold {wanted}, got {len(weight.codes)} and {len(weight.bits)}.")
    first = weight.codes[0]
    for index, (codes, bits) in enumerate(zip(weight.codes, weight.bits, strict=True)):
        formats.check_packed(codes, bits, columns)
        if codes.shape[0] != first.shape[0]:
            raise ValueError(f"codes[{index}] has {codes.shape[0]} rows, codes[0] has {first.shape[0]}.")
        check_same_device(codes=first, others=codes)
    for name, tensor, dtypes in (
        ("scale", weight.scale, (torch.float32,)),
        ("zero", weight.zero, zero_dtypes),
        ("bias", weight.bias, (torch.float32,)),
        ("weight_sum", weight.weight_sum, (torch.float32,)),
    ):
        check_shape(name, tensor, weight.rows)
        check_dtype(name, tensor, *dtypes)
    zero, bias, sums = weight[3:]
    check_same_device(codes=first, scale=weight.scale, zero=zero, bias=bias, weight_sum=sums)


def check_product(xq: Tensor, x_scale: Tensor, row_sum: Tensor | None, weight: ProductWeight, count: int) -> None:
    """8-bit activations and `count` weights that go with them."""
    check_activations(xq, x_scale, row_sum)
    check_product_weight(weight, count, xq.shape[1], torch.float32, torch.int32)
    check_same_device(xq=xq, x_scale=x_scale, row_sum=row_sum, codes=weight.codes[0])
    if weight.zero is not None and row_sum is None:
        raise ValueError("row_sum must be given with zero: quantize_rows returns it.")
    if (weight.weight_sum is not None) != (x_scale.dim() == 2):
        given = "no weight_sum" if weight.weight_sum is None else "weight_sum"
        raise ValueError(f"x_scale [2, tokens] and weight_sum go together, got {list(x_scale.shape)} and {given}.")
    if xq.dtype == torch.int8:
        return
    if max(weight.bits) > 4:
        bits = max(weight.bits)
        raise ValueError(f"e4m3 activations go with weights of 2 to 4 bits, got {bits}; quantize them to int8.")
    check_dtype("zero, with e4m3 activations,", weight.zero, torch.float32)
    if x_scale.dim() == 2:
        raise ValueError("e4m3 activations have no offsets; x_scale must have shape [1] or [tokens].")


def check_rows(name: str, x: Tensor) -> None:
    """Activations [T, I] in a floating dtype."""
    check_dtype(name, x, *ACTIVATIONS)
    check_shape(name, x, "tokens", "in")


def check_quantize_rows(x: Tensor, grid: InputGrid, gelu: bool) -> None:
    """The arguments of `operators.quantize_rows`."""
    check_rows("x", x)
    check_codes(grid, x.shape[1])


def check_matmul_a8(
    xq: Tensor,
    x_scale: Tensor,
    row_sum: Tensor | None,
    weight: ProductWeight,
    residual: Tensor | None,
    out_row_sum: Tensor | None,
    out: InputGrid,
    gelu: bool,
    out_dtype: torch.dtype,
) -> None:
    """The arguments of `operators.matmul_a8`."""
    check_product(xq, x_scale, row_sum, weight, 1)
    check_shape("residual", residual, xq.shape[0], weight.rows)
    check_dtype("residual", residual, *ACTIVATIONS)
    check_same_device(xq=xq, residual=residual)
    check_float_dtype(out_dtype)
    check_output(out, out_row_sum, xq, weight.rows)


def check_matmul_a8_mixed(
    xq: Tensor, x_scale: Tensor, row_sum: Tensor | None, weight: ProductWeight, out_dtype: torch.dtype
) -> None:
    """The arguments of `operators.matmul_a8_mixed`."""
    check_product(xq, x_scale, row_sum, weight, 3)
    check_float_dtype(out_dtype)


def check_matmul_e4m3(xq: Tensor, x_scale: Tensor | None, weight: E4m3Weight, out_dtype: torch.dtype) -> None:
    """The arguments of `operators.matmul_e4m3`."""
    check_dtype("xq", xq, torch.float8_e4m3fn)
    check_shape("xq", xq, "tokens", "in")
    check_dtype("x_scale", x_scale, torch.float32)
    check_shape("x_scale", x_scale, xq.shape[0])
    check_dtype("codes", weight.codes, torch.float8_e4m3fn)
    check_shape("codes", weight.codes, "out", xq.shape[1])
    check_dtype("scale", weight.scale, torch.float32)
    check_shape("scale", weight.scale, weight.rows)
    check_shape("bias", weight.bias, weight.rows)
    if out_dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"out_dtype must be float16 or bfloat16, got {out_dtype}.")
    check_dtype("bias", weight.bias, out_dtype)
    check_same_device(xq=xq, x_scale=x_scale, codes=weight.codes, scale=weight.scale, bias=weight.bias)
    for name, size in (("in", xq.shape[1]), ("out", weight.rows)):
        if size % 16:
            raise ValueError(f"codes must have multiples of 16 rows and columns, got {size} ({name}); use matmul_a8.")


def check_matmul_a16(x: Tensor, weight: ProductWeight) -> None:
    """The arguments of `operators.matmul_a16`."""
    check_rows("x", x)
    check_product_weight(weight, 1, x.shape[1], torch.float32)
    check_same_device(x=x, codes=weight.codes[0])


def check_norm(width: int, weight: Tensor, bias: Tensor) -> None:
    """Weight and bias [width] of a LayerNorm."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, width)
        check_dtype(name, tensor, *ACTIVATIONS)


def check_layernorm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, grid: InputGrid
) -> None:
    """The arguments of `operators.layernorm_quantize`."""
    check_rows("x", x)
    check_shape("residual", residual, *x.shape)
    check_dtype("residual", residual, *ACTIVATIONS)
    check_norm(x.shape[1], weight, bias)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)
    check_codes(grid, x.shape[1])


def check_embed_layernorm(
    ids: list[Tensor],
    tables: list[PackedWeight],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grid: InputGrid,
    out_dtype: torch.dtype,
) -> None:
    """The arguments of `operators.embed_layernorm`."""
    if len(ids) != len(tables) or not 1 <= len(ids) <= 3:
        raise ValueError(f"ids and tables must both hold one to three, got {len(ids)} and {len(tables)}.")
    check_float_dtype(out_dtype)
    check_shape("weight", weight, "features")
    check_norm(weight.shape[0], weight, bias)
    check_same_device(weight=weight, bias=bias, ids=ids[0])
    for some, table in zip(ids, tables, strict=True):
        check_shape("ids", some, ids[0].shape[0])
        check_embedding(some, table)
        if table.columns != weight.shape[0]:
            raise ValueError(f"a table has {table.columns} features, its LayerNorm {weight.shape[0]}.")
        check_dtype("scale", table.scale, torch.float32)
        check_dtype("zero", table.zero, torch.float32)
        check_same_device(weight=weight, ids=some)
    check_codes(grid, weight.shape[0])


def check_attention(heads: Heads, out: InputGrid, out_row_sum: Tensor | None) -> None:
    """The arguments of `operators.attention`."""
    query, key, value, cu_seqlens, *_ = heads
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
    sequences = cu_seqlens.shape[0] - 1
    if heads.uniform and sequences * heads.longest != query.shape[0]:
        raise ValueError(
            f"uniform sequences fill all tokens, but {sequences} of {heads.longest} are not {query.shape[0]} tokens; "
            "leave uniform out."
        )
    check_output(out, out_row_sum, query, query.shape[1] * query.shape[2])
