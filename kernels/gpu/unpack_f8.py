"""Packed bytes to e4m3 tiles inside a Triton kernel: 2-, 3- and 4-bit codes are exact in eight-bit floats.

The bytes 0 to 16 of e4m3 are evenly spaced numbers, byte n standing for n / 512 (its subnormals and first octave), and
bit 7 is the sign. So a code q becomes the byte |q|, with bit 7 set where q is negative: the tile holds q / 512, and the
epilogue multiplies by 512. From two's complement, with m = -1 in the bytes of negative codes and b the bits below the
sign: |q| = (b XOR m) + 1, which a mask and one addition of four bytes at once do; no byte carries into the next.
8-bit codes need eight bits below the sign and have no such form: they stay with the int8 product (`matmul_a8`).

Layout and columns of a tile are those of `unpack`. Every inline-assembly path has a plain twin (ASM=False).
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from qbert.kernels.gpu.unpack import join2, join4, load_bytes

BITS = (2, 3, 4)


def _field(source: str, out: int, sign_shift: int, right: int, width: int) -> str:
    """PTX: four codes of `width` + 1 bits, signs `sign_shift` below bit 7, lowest bits at `right`, to register $out."""
    mask = f"0x{(1 << width) - 1:02X}" + f"{(1 << width) - 1:02X}" * 3
    sign = f"shl.b32 m, {source}, {sign_shift}; prmt.b32 m, m, m, 0xBA98;" if sign_shift else ""
    sign = sign or f"prmt.b32 m, {source}, {source}, 0xBA98;"
    low = f"shr.b32 t, {source}, {right};" if right else f"mov.b32 t, {source};"
    # 0x28 is (a XOR b) AND c.
    return f"{sign} {low} lop3.b32 t, t, m, {mask}, 0x28; and.b32 m, m, 0x81818181; add.u32 ${out}, t, m;"


_ASM4 = tl.constexpr("{ .reg .b32 t, m; " + _field("$2", 0, 4, 0, 3) + " " + _field("$2", 1, 0, 4, 3) + " }")


def _asm2() -> str:
    """Magnitudes in place first: 1 0 (-2) stays, 1 1 (-1) becomes 0 1; then each field's two bits and its sign."""
    # 0x70 is a AND NOT b where c is set, a elsewhere: only the upper bits of the fields change.
    lines = ["{ .reg .b32 s, y, t; shl.b32 s, $4, 1; lop3.b32 y, $4, s, 0xAAAAAAAA, 0x70;"]
    for field in range(4):
        lines.append(f"shr.b32 t, y, {2 * field}; and.b32 t, t, 0x03030303;" if field else "and.b32 t, y, 0x03030303;")
        lines.append(f"shl.b32 s, $4, {6 - 2 * field};" if field < 3 else "mov.b32 s, $4;")
        # 0xEA is (a AND b) OR c.
        lines.append(f"lop3.b32 ${field}, s, 0x80808080, t, 0xEA;")
    return " ".join([*lines, "}"])


_ASM2 = tl.constexpr(_asm2())


def _asm3(half: int) -> str:
    """Four planes: sign and middle bit from the word $4, lowest from bit 4 * half + f of every byte of $5."""
    lines = ["{ .reg .b32 t, u, m;"]
    for field in range(4):
        lines.append(f"shl.b32 m, $4, {6 - 2 * field};" if field < 3 else "mov.b32 m, $4;")
        lines.append("prmt.b32 m, m, m, 0xBA98;")
        shift = 2 * field - 1
        lines.append(f"shr.b32 t, $4, {shift};" if shift > 0 else "shl.b32 t, $4, 1;")
        low = 4 * half + field
        lines.append(f"shr.b32 u, $5, {low};" if low else "mov.b32 u, $5;")
        # 0xE4 selects t where the mask is set and u elsewhere; 0x28 is (a XOR b) AND c.
        lines.append("lop3.b32 t, t, u, 0x02020202, 0xE4; lop3.b32 t, t, m, 0x03030303, 0x28;")
        lines.append(f"and.b32 m, m, 0x81818181; add.u32 ${field}, t, m;")
    return " ".join([*lines, "}"])


_ASM3_LOW = tl.constexpr(_asm3(0))
_ASM3_HIGH = tl.constexpr(_asm3(1))


@triton.jit
def to_e4m3_byte(code):
    """Bytes of q / 512 in e4m3 of int8 codes q, -8..7."""
    return tl.where(code < 0, (-code) | -128, code).to(tl.int8)


@triton.jit
def planes4(w, ASM: tl.constexpr):
    """Low and high nibbles of bytes w."""
    if ASM:
        low, high = tl.inline_asm_elementwise(_ASM4, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = to_e4m3_byte((w << 4) >> 4)
        high = to_e4m3_byte(w >> 4)
    return low, high


@triton.jit
def planes2(w, ASM: tl.constexpr):
    """The four 2-bit fields of bytes w."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM2, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        a = to_e4m3_byte((w << 6) >> 6)
        b = to_e4m3_byte((w << 4) >> 6)
        c = to_e4m3_byte((w << 2) >> 6)
        d = to_e4m3_byte(w >> 6)
    return a, b, c, d


@triton.jit
def planes3(high, low, HALF: tl.constexpr, ASM: tl.constexpr):
    """Four 3-bit fields: two bits from bytes `high`, the third from bits 4 HALF.. of bytes `low`."""
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
        a = to_e4m3_byte((((high << 6) >> 5) & -2) | (low & 1))
        b = to_e4m3_byte((((high << 4) >> 5) & -2) | ((low >> 1) & 1))
        c = to_e4m3_byte((((high << 2) >> 5) & -2) | ((low >> 2) & 1))
        d = to_e4m3_byte(((high >> 5) & -2) | ((low >> 3) & 1))
    return a, b, c, d


@triton.jit
def load_weight_tile_f8(
    ptrs, start, BITS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr
):
    """e4m3 tile [R, F * P] of codes / 512, of a block of L codes; `ptrs` [R, 1] point at the block of each row."""
    j = start + tl.arange(0, P)
    if BITS == 4:
        low, high = planes4(load_bytes(ptrs, j, L // 2, PADDED), ASM)
        w = join2(low, high)
    elif BITS == 2:
        a, b, c, d = planes2(load_bytes(ptrs, j, L // 4, PADDED), ASM)
        w = join4(a, b, c, d)
    else:
        E: tl.constexpr = L // 8
        last = load_bytes(ptrs + 2 * E, j, E, PADDED)
        a, b, c, d = planes3(load_bytes(ptrs, j, E, PADDED), last, 0, ASM)
        e, f, g, h = planes3(load_bytes(ptrs + E, j, E, PADDED), last, 1, ASM)
        w = join2(join4(a, b, c, d), join4(e, f, g, h))
    return w.to(tl.float8e4nv, bitcast=True)
