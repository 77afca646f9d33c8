"""Packed bytes to fp16 tiles: codes become halves by writing them into the mantissa of 1024.

The half 0x6400 is 1024, and its last mantissa bit counts 1: 0x6400 | n is 1024 + n for any byte n. So a plane of four
codes, made unsigned by flipping the sign bit, needs two byte permutes and two packed subtractions for four exact halves
(the trick of Kim et al., arXiv 2211.10017, section 3.2, for bytes). Out come the codes themselves, not their multiples.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from qbert.kernels.gpu.unpack import join2, join4, load_bytes


def _convert(source: str, first_output: int, bias: int) -> str:
    """Four bytes of register `source` to four halves, byte - bias, in two output registers."""
    low, high = f"${first_output}", f"${first_output + 1}"
    constant = 0x6400 + bias
    return (
        f"prmt.b32 {low}, {source}, c, 0x4140; prmt.b32 {high}, {source}, c, 0x4342; "
        f"mov.b32 o, 0x{constant:04x}{constant:04x}; "
        f"sub.rn.f16x2 {low}, {low}, o; sub.rn.f16x2 {high}, {high}, o;"
    )


def _asm_fields(bits: int) -> str:
    """The 8 / bits planes of a word of four bytes (the operand after the outputs)."""
    fields = 8 // bits
    word = f"${2 * fields}"
    sign = 0x01010101 * sum(1 << (bits * f + bits - 1) for f in range(fields))
    mask = 0x01010101 * ((1 << bits) - 1)
    lines = ["{ .reg .b32 c, o, t, n; mov.b32 c, 0x64646464;", f"xor.b32 t, {word}, 0x{sign:08x};"]
    for field in range(fields):
        lines.append(f"shr.b32 n, t, {bits * field};" if field else "mov.b32 n, t;")
        lines.append(f"and.b32 n, n, 0x{mask:08x};")
        lines.append(_convert("n", 2 * field, 1 << (bits - 1)))
    return " ".join([*lines, "}"])


def _asm3(half: int) -> str:
    """Four planes of 3-bit codes from two-bit fields ($8) and bits 4 half.. of the low bits ($9)."""
    lines = ["{ .reg .b32 c, o, t, n, l; mov.b32 c, 0x64646464; xor.b32 t, $8, 0xAAAAAAAA;"]
    for field in range(4):
        lines.append(f"shr.b32 n, t, {2 * field - 1};" if field else "shl.b32 n, t, 1;")
        lines.append(f"shr.b32 l, $9, {4 * half + field}; and.b32 n, n, 0x06060606; and.b32 l, l, 0x01010101;")
        lines.append("or.b32 n, n, l;")
        lines.append(_convert("n", 2 * field, 4))
    return " ".join([*lines, "}"])


_ASM8 = tl.constexpr(_asm_fields(8))
_ASM4 = tl.constexpr(_asm_fields(4))
_ASM2 = tl.constexpr(_asm_fields(2))
_ASM3_LOW = tl.constexpr(_asm3(0))
_ASM3_HIGH = tl.constexpr(_asm3(1))


@triton.jit
def halves8(w):
    """fp16 of int8 bytes."""
    return tl.inline_asm_elementwise(_ASM8, "=&r,=&r,r", [w], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def halves4(w):
    """fp16 of the low and the high nibbles."""
    return tl.inline_asm_elementwise(
        _ASM4, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit
def halves2(w):
    """fp16 of the four 2-bit fields."""
    return tl.inline_asm_elementwise(
        _ASM2,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def halves3(high, low, HALF: tl.constexpr):
    """fp16 of four 3-bit fields."""
    CODE: tl.constexpr = _ASM3_LOW if HALF == 0 else _ASM3_HIGH
    return tl.inline_asm_elementwise(
        CODE,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [high, low],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def load_weight_tile_fp16(ptrs, start, BITS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr):
    """fp16 codes [R, F * P] of a block of L codes: `unpack.load_weight_tile`, but unscaled halves."""
    j = start + tl.arange(0, P)
    if BITS == 8:
        return halves8(load_bytes(ptrs, j, L, PADDED))
    elif BITS == 4:
        low, high = halves4(load_bytes(ptrs, j, L // 2, PADDED))
        return join2(low, high)
    elif BITS == 2:
        a, b, c, d = halves2(load_bytes(ptrs, j, L // 4, PADDED))
        return join4(a, b, c, d)
    else:
        E: tl.constexpr = L // 8
        last = load_bytes(ptrs + 2 * E, j, E, PADDED)
        a, b, c, d = halves3(load_bytes(ptrs, j, E, PADDED), last, 0)
        e, f, g, h = halves3(load_bytes(ptrs + E, j, E, PADDED), last, 1)
        return join2(join4(a, b, c, d), join4(e, f, g, h))
