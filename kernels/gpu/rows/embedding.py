"""Rows of packed embedding tables: gathered, unpacked and dequantized; or summed, normalized and quantized at once.

Tables stay packed in memory (2, 3, 4 or 8 bits): a token reads I * b / 8 bytes of its own row. `embed_layernorm`
adds up to three tables (word, position, type), each of its own bits, applies LayerNorm and writes what the first
layer's products read: y, its int8 codes, scale and row sum.

    h = embedding(ids, table)                                  # [T] -> [T, I]
    y, yq, y_scale, row_sum = embed_layernorm([(ids, words), (positions, places)], weight, bias, eps)
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbert.kernels import formats
from qbert.kernels.gpu.dependent import after_previous, dependent_launch
from qbert.kernels.gpu.rows.chunks import chunk_of, columns_of, load_chunks, rule
from qbert.kernels.gpu.rows.layernorm_quant import MAX_COLUMNS, normalize_row, store_row
from qbert.kernels.gpu.rows.quantize_rows import empty_codes, range_kind
from qbert.kernels.operands import PER_TOKEN, InputGrid, PackedWeight


@triton.jit
def load_codes(row_ptr, k, inside, width, TAIL: tl.constexpr, BITS: tl.constexpr):
    """Codes, as float32, of columns k of the packed row at `row_ptr` (layout: `qbert.kernels.formats`)."""
    base = (k // 256) * (32 * BITS)
    within = k % 256
    if BITS == 8:
        return tl.load(row_ptr + base + within, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        F: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        E = tl.where(k < width // 256 * 256, 256 // F, TAIL // F) if TAIL > 0 else 256 // F
        field = within // E
        j = within % E
        if BITS == 3:
            high = tl.load(row_ptr + base + (field // 4) * E + j, mask=inside, other=0).to(tl.int32)
            low = tl.load(row_ptr + base + 2 * E + j, mask=inside, other=0).to(tl.int32)
            code = ((high >> (2 * (field % 4))) & 3) * 2 + ((low >> field) & 1)
        else:
            byte = tl.load(row_ptr + base + j, mask=inside, other=0).to(tl.int32)
            code = (byte >> (BITS * field)) & ((1 << BITS) - 1)
        return ((code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def load_row(
    ids_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    token,
    column,
    inside,
    width,
    input_group,
    INPUT_GROUPS: tl.constexpr,
    stride,
    rows,
    TAIL: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Dequantized row of the table that token `token` asks for, float32 [BLOCK]; NaN for an id outside the table."""
    wanted = tl.load(ids_ptr + token).to(tl.int64)
    row = tl.minimum(tl.maximum(wanted, 0), rows - 1)
    code = load_codes(packed_ptr + row * stride, column, inside, width, TAIL, BITS)
    if GROUPS == "table":
        group = tl.load(group_ptr + row).to(tl.int64)
    elif GROUPS == "one":
        group = row * 0
    else:
        group = row
    if INPUT_GROUPS == 1:
        scale, zero = tl.load(scale_ptr + group), tl.load(zero_ptr + group)
    else:
        at = group * INPUT_GROUPS + column // input_group
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
        zero = tl.load(zero_ptr + at, mask=inside, other=0.0)
    # A scalar added to the row, because a select of its values would hold on to the row's number all the while.
    missing = tl.where(row == wanted, 0.0, float("nan"))
    return tl.where(inside, (code - zero) * scale + missing, 0.0)


@triton.jit
def embedding_kernel(
    ids_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    y_ptr,
    width,
    input_group,
    INPUT_GROUPS: tl.constexpr,
    stride,
    rows,
    TAIL: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T,)."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    y = load_row(
        ids_ptr, packed_ptr, scale_ptr, zero_ptr, group_ptr, token, column, inside, width, input_group, INPUT_GROUPS,
        stride, rows, TAIL, BITS, GROUPS,
    )  # fmt: skip
    tl.store(y_ptr + token.to(tl.int64) * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embed_layernorm_kernel(
    ids0, packed0, scale0, zero0, group0, input_group0, INPUT_GROUPS0: tl.constexpr, stride0, rows0,
    ids1, packed1, scale1, zero1, group1, input_group1, INPUT_GROUPS1: tl.constexpr, stride1, rows1,
    ids2, packed2, scale2, zero2, group2, input_group2, INPUT_GROUPS2: tl.constexpr, stride2, rows2,
    weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, row_sum_ptr, eps, static_scale, static_zero,
    TAIL0: tl.constexpr, BITS0: tl.constexpr, GROUPS0: tl.constexpr,
    TAIL1: tl.constexpr, BITS1: tl.constexpr, GROUPS1: tl.constexpr,
    TAIL2: tl.constexpr, BITS2: tl.constexpr, GROUPS2: tl.constexpr,
    RANGE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). A table of 0 bits is absent."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    after_previous(PDL)
    token = tl.program_id(0)
    sums = ()
    for c in tl.static_range(COUNT):
        column = columns_of(c, CHUNK)
        inside = column < WIDTH
        h = load_row(
            ids0, packed0, scale0, zero0, group0, token, column, inside, WIDTH, input_group0, INPUT_GROUPS0, stride0,
            rows0, TAIL0, BITS0, GROUPS0,
        )  # fmt: skip
        if BITS1 > 0:
            h += load_row(
                ids1, packed1, scale1, zero1, group1, token, column, inside, WIDTH, input_group1, INPUT_GROUPS1,
                stride1, rows1, TAIL1, BITS1, GROUPS1,
            )  # fmt: skip
        if BITS2 > 0:
            h += load_row(
                ids2, packed2, scale2, zero2, group2, token, column, inside, WIDTH, input_group2, INPUT_GROUPS2,
                stride2, rows2, TAIL2, BITS2, GROUPS2,
            )  # fmt: skip
        sums += (h,)
    weight, bias = load_chunks(weight_ptr, WIDTH, CHUNK), load_chunks(bias_ptr, WIDTH, CHUNK)
    y = normalize_row(sums, weight, bias, eps, WIDTH, CHUNK)
    store_row(
        token, y, y_ptr, q_ptr, scale_ptr, row_sum_ptr, tl.num_programs(0), static_scale, static_zero, RANGE, WIDTH,
        CHUNK,
    )  # fmt: skip


def embedding(ids: Tensor, table: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Launches `embedding_kernel`: ids [T] (int32 or int64) -> [T, I] in `dtype`; NaN for an id outside the table.

    The table is as `PackedWeight.dense` makes it.
    """
    y = torch.empty((ids.numel(), table.columns), dtype=dtype, device=ids.device)
    if y.numel():
        constants = _constants(table)
        embedding_kernel[(ids.numel(),)](
            ids,
            *table[:4],
            y,
            table.columns,
            table.columns // table.scale.shape[1],
            table.scale.shape[1],
            table.codes.stride(0),
            table.rows,
            TAIL=constants[0],
            BITS=constants[1],
            GROUPS=constants[2],
            BLOCK=triton.next_power_of_2(table.columns),
        )
    return y


def embed_layernorm(
    tables: list[tuple[Tensor, PackedWeight]],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float16,
    grid: InputGrid = PER_TOKEN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of the sum of one to three tables' rows: (y [T, I], its codes, their scale [T], row sums [T]).

    `tables` holds (ids [T], dense table); all tables have the same number of features, at most 16,384. With an
    asymmetric grid the scale is [2, T], steps and offsets. An id outside its table gives a row of NaN.
    """
    if not 1 <= len(tables) <= 3:
        raise ValueError(f"tables must hold one to three tables, got {len(tables)}.")
    ids, first = tables[0]
    tokens, columns = ids.numel(), first.columns
    if columns > MAX_COLUMNS:
        raise ValueError(f"embed_layernorm keeps a row in registers: at most {MAX_COLUMNS} features, got {columns}.")
    y = torch.empty((tokens, columns), dtype=dtype, device=ids.device)
    codes, scale, row_sum = empty_codes(tokens, columns, grid, ids.device)
    if tokens == 0:
        return y, codes, scale, row_sum
    warps = rule(tokens, columns).warps
    arguments: list[object] = []
    constants: list[object] = []
    for index in range(3):
        present = index < len(tables)
        its_ids, table = tables[index] if present else tables[0]
        groups = table.scale.shape[1]
        arguments += [its_ids, *table[:4], columns // groups, groups, table.codes.stride(0), table.rows]
        constants += _constants(table) if present else (0, 0, "one")
    embed_layernorm_kernel[(tokens,)](
        *arguments, weight, bias, y, codes, scale, row_sum, eps, grid.scale, float(grid.zero), *constants,
        range_kind(grid), columns, chunk_of(columns, warps), num_warps=warps, **dependent_launch(y, tokens, first=True),
    )  # fmt: skip
    return y, codes, scale, row_sum


def _constants(table: PackedWeight) -> tuple[int, int, str]:
    """Codes in the last block, bits, and where a row's group number comes from."""
    tail = formats.packed_row_nbytes(table.columns % 256, table.bits) * 8 // table.bits
    groups = "table" if table.row_group is not None else "one" if table.scale.shape[0] == 1 else "row"
    return tail, table.bits, groups
