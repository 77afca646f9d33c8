"""The packed layout: exact inverse, exact size, and the bytes that the documentation draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.kernels import formats

BITS = st.sampled_from(formats.BITS)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    low, high = formats.code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)


@settings(deadline=None, max_examples=200)
@given(bits=BITS, rows=st.integers(0, 9), columns=st.integers(0, 800), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack_for_any_size(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    packed = formats.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.numel() == formats.packed_nbytes(rows, columns, bits)
    assert torch.equal(formats.unpack(packed, bits, columns), codes)


@settings(deadline=None, max_examples=50)
@given(bits=BITS, columns=st.integers(1, 700), block=st.sampled_from([8, 64, 128, 256]), seed=st.integers(0, 99))
def test_other_block_lengths_invert_too(bits, columns, block, seed):
    codes = random_codes(3, columns, bits, seed)
    assert torch.equal(formats.unpack(formats.pack(codes, bits, block), bits, columns, block), codes)


@given(bits=BITS, columns=st.integers(1, 5000))
def test_a_row_wastes_less_than_three_bytes(bits, columns):
    exact_bits = bits * columns
    assert 0 <= formats.packed_row_nbytes(columns, bits) * 8 - exact_bits < 24
    if columns % 8 == 0:
        assert formats.packed_row_nbytes(columns, bits) * 8 == exact_bits


@pytest.mark.parametrize("columns", [312, 384, 768, 1024, 1536, 3072])
@pytest.mark.parametrize("bits", formats.BITS)
def test_encoder_widths_take_exactly_their_bits(bits, columns):
    assert formats.packed_nbytes(7, columns, bits) == 7 * columns * bits // 8


@pytest.mark.parametrize("columns", [256, 512, 384, 312, 40])
@pytest.mark.parametrize("bits", formats.BITS)
def test_bytes_are_laid_out_as_documented(bits, columns):
    codes = random_codes(2, columns, bits)
    packed = formats.pack(codes, bits)
    for row in range(2):
        expected = []
        for start in range(0, columns, 256):
            q = [int(v) for v in codes[row, start : start + 256]]
            length = len(q)
            if bits == 8:
                expected += [v & 255 for v in q]
            elif bits == 3:
                e = length // 8
                high, low = [(v >> 1) & 3 for v in q], [v & 1 for v in q]
                expected += [
                    sum(high[(4 * h + f) * e + j] << 2 * f for f in range(4)) for h in (0, 1) for j in range(e)
                ]
                expected += [sum(low[i * e + j] << i for i in range(8)) for j in range(e)]
            else:
                fields, mask = 8 // bits, (1 << bits) - 1
                e = length // fields
                expected += [sum((q[f * e + j] & mask) << bits * f for f in range(fields)) for j in range(e)]
        assert packed[row].tolist() == expected


def test_rows_are_packed_independently():
    codes = random_codes(20, 312, 3)
    rows = torch.tensor([4, 4, 19])
    assert torch.equal(formats.unpack(formats.pack(codes, 3)[rows], 3, 312), codes[rows])


@pytest.mark.parametrize("bits", formats.BITS)
def test_any_integer_dtype_and_stride_is_packed_alike(bits):
    codes = random_codes(300, 24, bits)
    expected = formats.pack(codes.T.contiguous(), bits)
    assert torch.equal(formats.pack(codes.T, bits), expected)
    assert torch.equal(formats.pack(codes.T.long(), bits), expected)


@pytest.mark.parametrize(("bits", "bad"), [(2, 2), (2, -3), (3, 4), (4, -9), (4, 8), (8, 128), (8, -129)])
def test_a_code_out_of_range_is_refused(bits, bad):
    codes = torch.zeros(3, 16, dtype=torch.int32)
    codes[1, 5] = bad
    with pytest.raises(ValueError, match=f"for {bits} bits"):
        formats.pack(codes, bits)


def test_other_bad_input_is_refused():
    codes = random_codes(4, 30, 4)
    packed = formats.pack(codes, 4)
    with pytest.raises(TypeError, match="integer"):
        formats.pack(codes.float(), 4)
    with pytest.raises(ValueError, match="two dimensions"):
        formats.pack(codes[0], 4)
    with pytest.raises(ValueError, match="bits must be 2, 3, 4 or 8"):
        formats.pack(codes, 5)
    with pytest.raises(ValueError, match=r"must have shape \[out, 15\]"):
        formats.unpack(packed[:, :-1], 4, 30)
    with pytest.raises(ValueError, match="must have shape"):
        formats.unpack(packed, 4, 33)
    with pytest.raises(TypeError, match="uint8"):
        formats.unpack(packed.to(torch.int32), 4, 30)


@pytest.mark.parametrize(("bits", "columns"), [(2, 13), (3, 13), (4, 13)])
def test_damaged_padding_is_refused(bits, columns):
    packed = formats.pack(random_codes(2, columns, bits), bits)
    packed[1, -1] |= 0xC0
    with pytest.raises(ValueError, match="padding"):
        formats.unpack(packed, bits, columns)
