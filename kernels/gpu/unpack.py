"""Packed bytes to int8 or fp16 tiles inside a Triton kernel: one shift and one mask for four weights.

The planar layout (`qbert.kernels.formats`) keeps the codes of one bit field consecutive, so a 32-bit word of four bytes
becomes four int8 values of one plane without moving a byte. Codes are left at the TOP of their byte: what comes out
is q * 2^(8 - b), which sign-extends for free; the epilogue divides by 2^(8 - b). The planes of a block are joined along
the columns by a change of layout that costs no instruction (Triton >= 3.4).

    block of L codes, F fields of E = L / F codes; a tile takes P codes of every field, from code `start` of it on:
    tile column c = f * P + j   <->   weight column f * E + start + j        (`tile_columns`)

Every inline-assembly path has a plain twin (ASM=False) that computes the same.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Four bytes at a time: $0..$F-1 are the planes, the operand after them the packed word.
_ASM4 = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }")
_ASM2 = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $4, 6; and.b32 $0, t, 0xC0C0C0C0; shl.b32 t, $4, 4; and.b32 $1, t, 0xC0C0C0C0; "
    "shl.b32 t, $4, 2; and.b32 $2, t, 0xC0C0C0C0; and.b32 $3, $4, 0xC0C0C0C0; }"
)


def _asm3(half: int) -> str:
    """Four planes of 3-bit codes: two bits from the word $4, the third from bit 4 * half + f of every byte of $5."""
    lines = ["{ .reg .b32 t, u;"]
    for field in range(4):
        high_shift, low_shift = 6 - 2 * field, 5 - (4 * half + field)
        lines.append(f"shl.b32 t, $4, {high_shift};" if high_shift else "mov.b32 t, $4;")
        if low_shift:
            lines.append(f"{'shl' if low_shift > 0 else 'shr'}.b32 u, $5, {abs(low_shift)};")
        else:
            lines.append("mov.b32 u, $5;")
        # 0xE4 selects t where the mask is set and u elsewhere.
        lines.append(f"lop3.b32 t, t, u, 0xC0C0C0C0, 0xE4; and.b32 ${field}, t, 0xE0E0E0E0;")
    return " ".join([*lines, "}"])


_ASM3_LOW = tl.constexpr(_asm3(0))
_ASM3_HIGH = tl.constexpr(_asm3(1))


_FINISH = tl.constexpr("{ wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1; }")


@triton.jit
def finish(step, ASM: tl.constexpr):
    """Waits, where ASM (`launch.asm_kind`) asks for it, until the warpgroup products of this step are done."""
    if ASM >= 2:
        tl.inline_asm_elementwise(_FINISH, "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def join2(a, b):
    """[R, P] x 2 -> [R, 2P]: columns of `a`, then of `b`."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def join4(a, b, c, d):
    """[R, P] x 4 -> [R, 4P]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).permute(0, 2, 3, 1).reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def planes4(w, ASM: tl.constexpr):
    """Low and high nibbles of bytes w, each times 16."""
    if ASM:
        low, high = tl.inline_asm_elementwise(_ASM4, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = w << 4
        high = w & -16
    return low, high


@triton.jit
def planes2(w, ASM: tl.constexpr):
    """The four 2-bit fields of bytes w, each times 64."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM2, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        a = w << 6
        b = (w << 4) & -64
        c = (w << 2) & -64
        d = w & -64
    return a, b, c, d


@triton.jit
def planes3(high, low, HALF: tl.constexpr, ASM: tl.constexpr):
    """Four 3-bit fields, each times 32: two bits from bytes `high`, the third from bits 4 HALF.. of bytes `low`."""
    if ASM:
        CODE: tl.constexpr = _ASM3_LOW if HALF == 0 else _ASM3_HIGH
        a, b, c, d = tl.inline_asm_elementwise(
            CODE,
            "=&r,=&r,=&r,=&r,r,r",
            [high, low],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        if HALF == 1:
            low = low >> 4
        a = ((high << 6) & -64) | ((low << 5) & 32)
        b = ((high << 4) & -64) | ((low << 4) & 32)
        c = ((high << 2) & -64) | ((low << 3) & 32)
        d = (high & -64) | ((low << 2) & 32)
    return a, b, c, d


@triton.jit
def tile_columns(L: tl.constexpr, P: tl.constexpr, F: tl.constexpr):
    """Weight column, relative to block and `start`, of every tile column: [F * P]."""
    c = tl.arange(0, F * P)
    if F * P == L:
        return c
    else:
        return (c // P) * (L // F) + c % P


@triton.jit
def load_bytes(ptrs, j, E: tl.constexpr, PADDED: tl.constexpr):
    """[R, P] bytes at row pointers [R, 1] + j; where P was rounded up to a power of two, the surplus is 0."""
    if PADDED:
        return tl.load(ptrs + j[None, :], mask=j[None, :] < E, other=0)
    else:
        return tl.load(ptrs + j[None, :])


@triton.jit
def load_weight_tile(
    ptrs, start, BITS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr
):
    """int8 tile [R, F * P], times 2^(8 - BITS), of a block of L codes; `ptrs` [R, 1] point at the block of each row."""
    j = start + tl.arange(0, P)
    if BITS == 8:
        return load_bytes(ptrs, j, L, PADDED)
    elif BITS == 4:
        low, high = planes4(load_bytes(ptrs, j, L // 2, PADDED), ASM)
        return join2(low, high)
    elif BITS == 2:
        a, b, c, d = planes2(load_bytes(ptrs, j, L // 4, PADDED), ASM)
        return join4(a, b, c, d)
    else:
        E: tl.constexpr = L // 8
        last = load_bytes(ptrs + 2 * E, j, E, PADDED)
        a, b, c, d = planes3(load_bytes(ptrs, j, E, PADDED), last, 0, ASM)
        e, f, g, h = planes3(load_bytes(ptrs + E, j, E, PADDED), last, 1, ASM)
        return join2(join4(a, b, c, d), join4(e, f, g, h))
