"""Packed bytes to int8, fp16 or e4m3 tiles inside a Triton kernel: a few instructions for four weights.

The planar layout (`qbert.kernels.formats`) keeps the codes of one bit field consecutive, so a 32-bit word of four bytes
becomes four values of one plane without moving a byte. The planes of a block are joined along the columns by a change
of layout that costs no instruction (Triton >= 3.4).

    block of L codes, F fields of E = L / F codes; a tile takes P codes of every field, from code `start` of it on:
    tile column c = f * P + j   <->   weight column f * E + start + j        (`tile_columns`)

int8: codes are left at the TOP of their byte, one shift and one mask for four weights: what comes out is q * 2^(8 - b),
which sign-extends for free; the epilogue divides by 2^(8 - b).

fp16: codes are written into the mantissa of 1024. The half 0x6400 is 1024, and its last mantissa bit counts 1:
0x6400 | n is 1024 + n for any byte n. So a plane of four codes, made unsigned by flipping the sign bit, needs two byte
permutes and two packed subtractions for four exact halves (the trick of Kim et al., arXiv 2211.10017, section 3.2, for
bytes). Out come the codes themselves, not their multiples.

e4m3: the bytes 0 to 16 of e4m3 are evenly spaced numbers, byte n standing for n / 512 (its subnormals and first
octave), and bit 7 is the sign. So a code q of 2 to 4 bits becomes the byte |q|, with bit 7 set where q is negative: the
tile holds q / 512, and the epilogue multiplies by 512. From two's complement, with m = -1 in the bytes of negative
codes and b the bits below the sign: |q| = (b XOR m) + 1, which a mask and one addition of four bytes at once do; no
byte carries into the next. 8-bit codes need eight bits below the sign and have no such form: they stay with int8.

Every inline-assembly path to int8 and e4m3 has a plain twin (ASM=False) that computes the same.
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
    """Waits, where ASM (`tiles.asm_kind`) asks for it, until the warpgroup products of this step are done."""
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


def _convert(source: str, first_output: int, bias: int) -> str:
    """Four bytes of register `source` to four halves, byte - bias, in two output registers."""
    low, high = f"${first_output}", f"${first_output + 1}"
    constant = 0x6400 + bias
    return (
        f"prmt.b32 {low}, {source}, c, 0x4140; prmt.b32 {high}, {source}, c, 0x4342; "
        f"mov.b32 o, 0x{constant:04x}{constant:04x}; "
        f"sub.rn.f16x2 {low}, {low}, o; sub.rn.f16x2 {high}, {high}, o;"
    )


def _asm_fp16(bits: int) -> str:
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


def _asm3_fp16(half: int) -> str:
    """Four planes of 3-bit codes from two-bit fields ($8) and bits 4 half.. of the low bits ($9)."""
    lines = ["{ .reg .b32 c, o, t, n, l; mov.b32 c, 0x64646464; xor.b32 t, $8, 0xAAAAAAAA;"]
    for field in range(4):
        lines.append(f"shr.b32 n, t, {2 * field - 1};" if field else "shl.b32 n, t, 1;")
        lines.append(f"shr.b32 l, $9, {4 * half + field}; and.b32 n, n, 0x06060606; and.b32 l, l, 0x01010101;")
        lines.append("or.b32 n, n, l;")
        lines.append(_convert("n", 2 * field, 4))
    return " ".join([*lines, "}"])


_ASM8_FP16 = tl.constexpr(_asm_fp16(8))
_ASM4_FP16 = tl.constexpr(_asm_fp16(4))
_ASM2_FP16 = tl.constexpr(_asm_fp16(2))
_ASM3_FP16_LOW = tl.constexpr(_asm3_fp16(0))
_ASM3_FP16_HIGH = tl.constexpr(_asm3_fp16(1))


@triton.jit
def halves8(w):
    """fp16 of int8 bytes."""
    return tl.inline_asm_elementwise(_ASM8_FP16, "=&r,=&r,r", [w], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def halves4(w):
    """fp16 of the low and the high nibbles."""
    return tl.inline_asm_elementwise(
        _ASM4_FP16, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit
def halves2(w):
    """fp16 of the four 2-bit fields."""
    return tl.inline_asm_elementwise(
        _ASM2_FP16,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def halves3(high, low, HALF: tl.constexpr):
    """fp16 of four 3-bit fields."""
    CODE: tl.constexpr = _ASM3_FP16_LOW if HALF == 0 else _ASM3_FP16_HIGH
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
    """fp16 codes [R, F * P] of a block of L codes: `load_weight_tile`, but unscaled halves."""
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


def _field(source: str, out: int, sign_shift: int, right: int, width: int) -> str:
    """PTX: four codes of `width` + 1 bits, signs `sign_shift` below bit 7, lowest bits at `right`, to register $out."""
    mask = f"0x{(1 << width) - 1:02X}" + f"{(1 << width) - 1:02X}" * 3
    sign = f"shl.b32 m, {source}, {sign_shift}; prmt.b32 m, m, m, 0xBA98;" if sign_shift else ""
    sign = sign or f"prmt.b32 m, {source}, {source}, 0xBA98;"
    low = f"shr.b32 t, {source}, {right};" if right else f"mov.b32 t, {source};"
    # 0x28 is (a XOR b) AND c.
    return f"{sign} {low} lop3.b32 t, t, m, {mask}, 0x28; and.b32 m, m, 0x81818181; add.u32 ${out}, t, m;"


_ASM4_E4M3 = tl.constexpr("{ .reg .b32 t, m; " + _field("$2", 0, 4, 0, 3) + " " + _field("$2", 1, 0, 4, 3) + " }")


def _asm2_e4m3() -> str:
    """Magnitudes in place first: 1 0 (-2) stays, 1 1 (-1) becomes 0 1; then each field's two bits and its sign."""
    # 0x70 is a AND NOT b where c is set, a elsewhere: only the upper bits of the fields change.
    lines = ["{ .reg .b32 s, y, t; shl.b32 s, $4, 1; lop3.b32 y, $4, s, 0xAAAAAAAA, 0x70;"]
    for field in range(4):
        lines.append(f"shr.b32 t, y, {2 * field}; and.b32 t, t, 0x03030303;" if field else "and.b32 t, y, 0x03030303;")
        lines.append(f"shl.b32 s, $4, {6 - 2 * field};" if field < 3 else "mov.b32 s, $4;")
        # 0xEA is (a AND b) OR c.
        lines.append(f"lop3.b32 ${field}, s, 0x80808080, t, 0xEA;")
    return " ".join([*lines, "}"])


_ASM2_E4M3 = tl.constexpr(_asm2_e4m3())


def _asm3_e4m3(half: int) -> str:
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


_ASM3_E4M3_LOW = tl.constexpr(_asm3_e4m3(0))
_ASM3_E4M3_HIGH = tl.constexpr(_asm3_e4m3(1))


@triton.jit
def to_e4m3_byte(code):
    """Bytes of q / 512 in e4m3 of int8 codes q, -8..7."""
    return tl.where(code < 0, (-code) | -128, code).to(tl.int8)


@triton.jit
def planes4_e4m3(w, ASM: tl.constexpr):
    """Low and high nibbles of bytes w."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            _ASM4_E4M3, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = to_e4m3_byte((w << 4) >> 4)
        high = to_e4m3_byte(w >> 4)
    return low, high


@triton.jit
def planes2_e4m3(w, ASM: tl.constexpr):
    """The four 2-bit fields of bytes w."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM2_E4M3, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        a = to_e4m3_byte((w << 6) >> 6)
        b = to_e4m3_byte((w << 4) >> 6)
        c = to_e4m3_byte((w << 2) >> 6)
        d = to_e4m3_byte(w >> 6)
    return a, b, c, d


@triton.jit
def planes3_e4m3(high, low, HALF: tl.constexpr, ASM: tl.constexpr):
    """Four 3-bit fields: two bits from bytes `high`, the third from bits 4 HALF.. of bytes `low`."""
    if ASM:
        CODE: tl.constexpr = _ASM3_E4M3_LOW if HALF == 0 else _ASM3_E4M3_HIGH
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
        low, high = planes4_e4m3(load_bytes(ptrs, j, L // 2, PADDED), ASM)
        w = join2(low, high)
    elif BITS == 2:
        a, b, c, d = planes2_e4m3(load_bytes(ptrs, j, L // 4, PADDED), ASM)
        w = join4(a, b, c, d)
    else:
        E: tl.constexpr = L // 8
        last = load_bytes(ptrs + 2 * E, j, E, PADDED)
        a, b, c, d = planes3_e4m3(load_bytes(ptrs, j, E, PADDED), last, 0, ASM)
        e, f, g, h = planes3_e4m3(load_bytes(ptrs + E, j, E, PADDED), last, 1, ASM)
        w = join2(join4(a, b, c, d), join4(e, f, g, h))
    return w.to(tl.float8e4nv, bitcast=True)
