"""Storage layout "planar-256": how 2-, 3-, 4- and 8-bit weight codes lie in bytes. This file is the definition.

A weight matrix W [O, I] is stored as codes q [O, I], signed b-bit two's complement integers; its real values are
``scale * (q - zero)``. Every row is packed by itself, so a row is a run of bytes that can be gathered alone (embedding
tables) and a matrix is a plain ``uint8 [O, row_bytes]`` tensor.

A row is cut into blocks of 256 codes. What is left over, I mod 256 codes, is one shorter last block of the same
layout, zero-padded only up to the next whole number of bytes (at most 7 codes: a multiple of 1, 2, 8, 4 codes for 8,
4, 3, 2 bits). So I = 384 is one block of 256 and one of 128, and takes exactly 384 * b / 8 bytes.

In a block of L codes each byte holds codes that are far apart, a fixed stride L/2, L/4 or L/8, never neighbours: the
codes of one field are then consecutive in memory ("planes"), and a kernel turns four bytes into four int8 operands
with one shift and one mask, without moving any byte.

    8 bits, L bytes        byte j            |          q[j]                 |
    4 bits, L/2 bytes      byte j            |   q[j + L/2]  |     q[j]      |
    2 bits, L/4 bytes      byte j            |q[j+3L/4]|q[j+2L/4]|q[j+L/4]|q[j]|
                                           bit 7                           bit 0
    3 bits, 3 E bytes with E = L/8: the two high bits of all codes, then the low bits
            2-bit plane    byte j            |h[j+3E]|h[j+2E]|h[j+E]|h[j]|            h = q >> 1
                           byte E + j        |h[j+7E]|h[j+6E]|h[j+5E]|h[j+4E]|
            1-bit plane    byte 2E + j       |l[j+7E]| ... |l[j+E]|l[j]|              l = q & 1

No code straddles a byte boundary other than between the two planes of the 3-bit form, which takes exactly 3 bits a
code (packing ten 3-bit codes into 32 bits, the common way, takes 3.2).

A matrix of which two in every four neighbouring codes of a row are zero ("2:4") is stored as the two others, in their
order, which are a row of I/2 codes in the layout above, and behind them, in the same row, which two of the four they
are: one of six pairs, a 3-bit code (number of the pair - 4) for each four, I/4 codes in the layout above. That is
b/2 + 3/4 bits a weight, 2.25 for 3 bits.

    packed = pack(codes, bits=3)                  # uint8 [O, 3 * I / 8]
    codes = unpack(packed, bits=3, in_features=I)  # int8 [O, I]
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
BLOCK = 256
_PAIR_BITS, _PAIR_SHIFT = 3, 4  # of the number of a pair of four codes, 0 to 5, as a signed code

# Codes in the smallest whole number of bytes: the unit to which the last block is padded.
_GRANULE = {2: 4, 3: 8, 4: 2, 8: 1}


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a signed `bits`-bit integer, e.g. (-8, 7) for 4 bits.

    Raises ValueError unless `bits` is 2, 3, 4 or 8.
    """
    _check_bits(bits)
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def packed_row_nbytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row of `in_features` codes.

    Raises ValueError for a bit width other than 2, 3, 4, 8 or a negative `in_features`.
    """
    _check_bits(bits)
    if in_features < 0:
        raise ValueError(f"in_features must not be negative, got {in_features}.")
    return _padded(in_features, bits) * bits // 8


def packed_nbytes(out_features: int, in_features: int, bits: int) -> int:
    """Bytes of a packed [out_features, in_features] matrix; scales and zeros are not counted.

    Raises ValueError for a bit width other than 2, 3, 4, 8 or a negative size.
    """
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}.")
    return out_features * packed_row_nbytes(in_features, bits)


def pack(codes: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    """Packs signed integer codes [O, I] (any integer dtype) into the planar layout: uint8 [O, row_bytes].

    `block` is 256 in every stored file; kernels that want shorter blocks repack with another multiple of 8.
    Raises TypeError for a floating-point tensor, ValueError for another shape, another bit width, or a code outside
    the range of `bits` bits.
    """
    low, high = code_range(bits)
    _check_block(block)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be an integer tensor, got {codes.dtype}; round and cast it first.")
    if codes.dim() != 2:
        raise ValueError(f"codes must have two dimensions [out, in], got shape {tuple(codes.shape)}.")
    if codes.numel():
        smallest, largest = (int(v) for v in torch.aminmax(codes))
        if smallest < low or largest > high:
            raise ValueError(
                f"codes must lie in [{low}, {high}] for {bits} bits, got values in [{smallest}, {largest}]."
            )
    rows, columns = codes.shape
    fields = codes.to(torch.int8).view(torch.uint8)
    padding = _padded(columns, bits) - columns
    if padding:
        fields = torch.nn.functional.pad(fields, (0, padding))
    whole = fields.shape[1] // block * block
    parts = []
    if whole:
        parts.append(_pack_blocks(fields[:, :whole].unflatten(1, (whole // block, block)), bits))
    if whole < fields.shape[1]:
        parts.append(_pack_blocks(fields[:, whole:].unsqueeze(1), bits))
    return torch.cat(parts, dim=1) if parts else fields.new_empty((rows, 0))


def unpack(packed: Tensor, bits: int, in_features: int, block: int = BLOCK) -> Tensor:
    """Inverse of `pack`: uint8 [O, row_bytes] to int8 codes [O, in_features].

    Raises TypeError for a dtype other than uint8, ValueError for a row length that does not belong to `in_features`
    codes of `bits` bits, or for padding that is not zero (the tensor is then not of this layout, or damaged).
    """
    check_packed(packed, bits, in_features)
    _check_block(block)
    rows = packed.shape[0]
    padded = _padded(in_features, bits)
    whole = padded // block * block
    whole_bytes = whole * bits // 8
    # torch.jit.trace cannot record a view in another dtype; the conversion wraps around, and so gives the same.
    signed = packed.to(torch.int8) if torch.jit.is_tracing() else packed.view(torch.int8)
    parts = []
    if whole:
        blocks = signed[:, :whole_bytes].unflatten(1, (whole // block, block * bits // 8))
        parts.append(_unpack_blocks(blocks, bits))
    if whole < padded:
        parts.append(_unpack_blocks(signed[:, whole_bytes:].unsqueeze(1), bits))
    codes = torch.cat(parts, dim=1) if parts else signed.new_empty((rows, 0))
    if padded != in_features:
        if bool((codes[:, in_features:] != 0).any()):
            raise ValueError(
                f"packed has non-zero padding after column {in_features}: it is damaged, or was packed with another "
                f"number of columns or bits than {in_features} and {bits}."
            )
        codes = codes[:, :in_features].contiguous()
    return codes


def half_row_nbytes(in_features: int, bits: int) -> int:
    """Bytes of one row of `in_features` codes of which two in four are stored. Raises ValueError as `pack_half`."""
    _check_fours(in_features)
    return packed_row_nbytes(in_features // 2, bits) + packed_row_nbytes(in_features // 4, _PAIR_BITS)


def pack_half(codes: Tensor, used: Tensor, bits: int) -> Tensor:
    """Packs two of every four signed integer codes [O, I] of a row: uint8 [O, half_row_nbytes].

    `used` bool [O, I] says which codes must be stored, at most two in four; where they are fewer, others fill up.
    Raises ValueError for more, or for an I that is no multiple of four; and what `pack` raises.
    """
    _check_fours(codes.shape[-1])
    fours = used.unflatten(1, (-1, 4))
    if bool((fours.sum(-1) > 2).any()):
        raise ValueError(
            "used marks more than two of four neighbouring codes, so that half of them cannot be left out."
        )
    kept = (~fours).to(torch.int8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values  # [O, I/4, 2]
    first, second = kept.unbind(-1)
    number = 2 * first + second - 1 - (first == 2).long()  # (0,1) .. (2,3) as 0 .. 5
    stored = codes.unflatten(1, (-1, 4)).gather(-1, kept).flatten(1)
    return torch.cat([pack(stored, bits), pack(number - _PAIR_SHIFT, _PAIR_BITS)], 1)


def unpack_half(packed: Tensor, bits: int, zero: Tensor) -> Tensor:
    """Inverse of `pack_half`: int8 codes [O, I]; those that are not stored are `zero` int8 [O, I].

    Raises ValueError or TypeError for a tensor that is not of this layout, or damaged.
    """
    columns = zero.shape[1]
    if packed.dim() != 2 or packed.shape[1] != half_row_nbytes(columns, bits):
        wanted = half_row_nbytes(columns, bits)
        raise ValueError(
            f"packed must have shape [out, {wanted}] for {columns} columns of {bits} bits, two in four of them stored, "
            f"got {tuple(packed.shape)}."
        )
    split = packed_row_nbytes(columns // 2, bits)
    stored = unpack(packed[:, :split].contiguous(), bits, columns // 2)
    number = unpack(packed[:, split:].contiguous(), _PAIR_BITS, columns // 4).long() + _PAIR_SHIFT
    pairs = torch.combinations(torch.arange(4, device=packed.device), 2)  # [6, 2]
    if bool((number >= len(pairs)).any()):
        raise ValueError("packed names a pair of four codes that does not exist: it is damaged, or of another layout.")
    return zero.unflatten(1, (-1, 4)).scatter(-1, pairs[number], stored.unflatten(1, (-1, 2))).flatten(1)


def _check_fours(in_features: int) -> None:
    if in_features % 4:
        raise ValueError(f"in_features must be a multiple of 4 to store two in four, got {in_features}.")


def check_packed(packed: Tensor, bits: int, in_features: int) -> None:
    """Refuses a tensor that cannot be `pack(codes [O, in_features], bits)`, by dtype and shape.

    Raises TypeError or ValueError.
    """
    row_bytes = packed_row_nbytes(in_features, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}.")
    if packed.dim() != 2 or packed.shape[1] != row_bytes:
        raise ValueError(
            f"packed must have shape [out, {row_bytes}] for {in_features} columns of {bits} bits, "
            f"got {tuple(packed.shape)}."
        )


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits!r}.")


def _check_block(block: int) -> None:
    if block <= 0 or block % 8:
        raise ValueError(f"block must be a positive multiple of 8, got {block}.")


def _padded(in_features: int, bits: int) -> int:
    granule = _GRANULE[bits]
    return -(-in_features // granule) * granule


def _pack_blocks(fields: Tensor, bits: int) -> Tensor:
    """uint8 codes [O, B, L], of which only the low `bits` bits count, to bytes [O, B * L * bits / 8]."""
    rows, blocks, length = fields.shape
    if bits == 8:
        return fields.flatten(1)
    if bits == 3:
        planes = fields.reshape(rows, blocks, 8, length // 8)
        high = _merge((planes >> 1).reshape(rows, blocks, 2, 4, length // 8), width=2)  # [O, B, 2, E]
        low = _merge(planes, width=1)  # [O, B, E]
        return torch.cat([high.flatten(2), low], dim=2).flatten(1)
    return _merge(fields.unflatten(2, (8 // bits, length * bits // 8)), width=bits).flatten(1)


def _merge(fields: Tensor, width: int) -> Tensor:
    """Packs the low `width` bits of [..., F, E] into bytes [..., E], field f at bit f * width."""
    mask = (1 << width) - 1
    merged = fields[..., 0, :] & mask
    for field in range(1, fields.shape[-2]):
        merged = merged | ((fields[..., field, :] & mask) << (field * width))
    return merged


def _unpack_blocks(packed: Tensor, bits: int) -> Tensor:
    """int8-viewed bytes [O, B, L * bits / 8] to codes [O, B * L]."""
    rows, blocks, nbytes = packed.shape
    if bits == 8:
        return packed.flatten(1).clone()
    if bits == 3:
        stride = nbytes // 3
        high = packed[..., : 2 * stride].reshape(rows, blocks, 2, 1, stride)
        low = packed[..., 2 * stride :].reshape(rows, blocks, 1, stride)
        # Both fields are brought to the top of the byte, so that one arithmetic shift extends the sign.
        two = torch.cat([high << (6 - 2 * f) for f in range(4)], dim=3).reshape(rows, blocks, 8, stride) & -64
        one = torch.cat([(low << (7 - i)) for i in range(8)], dim=2) & -128
        return ((two >> 5) | ((one >> 7) & 1)).flatten(1)
    fields = [(packed << (8 - bits - f * bits)) >> (8 - bits) for f in range(8 // bits)]
    return torch.stack(fields, dim=2).flatten(1)
