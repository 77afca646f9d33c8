"""e4m3 activations in Triton's interpreter: every kernel that makes or takes them.

Run by `kernels/test_interpreted.py` in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreted_asm  # noqa: F401  the interpreter cannot run inline assembly by itself
import pytest
import torch
from kernels_in_interpreter import SHAPES, float_parts, make_table, problem

from qbert.kernels import formats, reference
from qbert.kernels.gpu.attention import attention
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed
from qbert.kernels.gpu.rows.embedding import embed_layernorm
from qbert.kernels.gpu.rows.layernorm_quant import layernorm_quantize
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import Tile
from qbert.kernels.gpu.tune import KERNELS, encoder_launch
from qbert.kernels.operands import Heads, InputGrid, ProductWeight

E4M3 = torch.float8_e4m3fn
IN_E4M3 = InputGrid(codes_dtype=E4M3)


def equal(one, other):
    """Whether two tensors, of e4m3 codes or anything else, have the same dtype and numbers (0 is -0)."""
    return one.dtype == other.dtype and torch.equal(one.double(), other.double())


def numbers():
    """All finite e4m3 numbers, in order of their bytes."""
    every = torch.arange(256).to(torch.uint8).view(E4M3)
    return every[every.float().isfinite()]


def e4m3_problem(tokens, rows, columns, bits):
    codes, _, packed = problem(tokens, rows, columns, bits, adversarial=True)
    every = numbers()
    return codes, every[torch.randint(0, len(every), (tokens, columns))], packed


def ones(count):
    return torch.ones(count)


@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_is_exact_in_e4m3(bits, asm):
    """A unit matrix of activations reads the unpacked weights back, whatever lies beside them in a byte."""
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (64, 256), dtype=torch.int8)
    packed = formats.pack(codes, bits)
    unit = torch.eye(256).to(E4M3)
    for tile in (Tile(32, 64, 256), Tile(32, 32, 128)):
        weight = ProductWeight([packed], [bits], ones(64))
        y = matmul_a8(unit, ones(1), weight, out_dtype=torch.float32, tile=tile, asm=asm)
        assert torch.equal(y, codes.T.float())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_small_integers_are_exact(shape, bits):
    """Activations of -8..8 have sums that float32 holds exactly, in any order."""
    tokens, rows, columns = shape
    codes, _, packed = problem(*shape, bits, adversarial=True)
    x = torch.randint(-8, 9, (tokens, columns)).float()
    for tile in (Tile(16, 64, 256), Tile(32, 32, 128)):
        for asm in (True, False):
            given = {"out_dtype": torch.float32, "tile": tile, "asm": asm}
            y = matmul_a8(x.to(E4M3), ones(1), ProductWeight([packed], [bits], ones(rows)), **given)
            assert torch.equal(y, x @ codes.float().T)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_kind", ["none", "float"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 256), Tile(128, 32, 256, split=2)], ids=["small", "large, split"])
def test_epilogues_equal_the_reference(tile, zero_kind, bits):
    """To 1e-6 of the sum of magnitudes: what float32 sums of up to 512 products may lose."""
    tokens, rows, columns = 19 if tile.bm == 16 else 75, 37, 512
    codes, xq, packed = e4m3_problem(tokens, rows, columns, bits)
    scale, x_scale, bias, residual = float_parts(rows, tokens)
    x_scale = x_scale / 100
    zero = None if zero_kind == "none" else torch.randn(rows)
    given = {"row_sum": reference.e4m3_sum(xq), "tile": tile, "out_dtype": torch.float32}
    weight = ProductWeight([packed], [bits], scale, zero)
    with_bias = weight._replace(bias=bias)
    no_zero = torch.zeros(rows) if zero is None else zero
    grid = (xq, x_scale, codes, scale[:, None], no_zero[:, None])
    magnitudes = (xq.float().abs().to(E4M3), x_scale, codes.abs(), scale[:, None], -no_zero.abs()[:, None])
    size = reference.matmul_a8(*magnitudes)

    def check(y, expected):
        assert bool(((y.double() - expected).abs() <= 1e-6 * (size + expected.abs() + 1)).all())

    check(matmul_a8(xq, x_scale, weight, **given), reference.matmul_a8(*grid))
    y = matmul_a8(xq, torch.ones(1), weight, **given)
    check(y * x_scale[:, None], reference.matmul_a8(*grid))
    y = matmul_a8(xq, x_scale, with_bias, gelu=True, **given)
    check(y, reference.matmul_a8(*grid, bias, activation="gelu"))
    y = matmul_a8(xq, x_scale, with_bias, residual=residual, **given)
    check(y, reference.matmul_a8(*grid, bias, residual=residual))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tile", [Tile(16, 32, 256), Tile(128, 32, 256, split=2)], ids=["small", "large, split"])
def test_requantized_output_and_its_row_sums(tile, bits):
    tokens, rows, columns = 75, 70, 512
    codes, xq, packed = e4m3_problem(tokens, rows, columns, bits)
    scale, x_scale, bias, _ = float_parts(rows, tokens)
    x_scale = x_scale / 100
    expected = reference.matmul_a8(xq, x_scale, codes, scale[:, None], torch.zeros(rows, 1), bias, activation="gelu")
    out_scale = float(expected.abs().max()) / 300  # some saturate
    sums = torch.zeros(tokens, dtype=torch.int32)
    weight, out = ProductWeight([packed], [bits], scale, bias=bias), InputGrid(out_scale, codes_dtype=E4M3)
    y = matmul_a8(xq, x_scale, weight, gelu=True, out=out, out_row_sum=sums, tile=tile)
    wanted = reference.e4m3(expected / out_scale)
    steps = (y.view(torch.int8).int() - wanted.view(torch.int8).int()).abs()
    near_zero = y.float().abs() + wanted.float().abs() < 2 / 512  # where 0 has two bytes
    assert int(steps[~near_zero].max()) <= 1 and float((steps[~near_zero] > 0).float().mean()) < 2e-3
    assert torch.equal(sums, reference.e4m3_sum(y))


@pytest.mark.parametrize("bits", [(2, 3, 3), (4, 4, 4), (4, 2, 3)])
@pytest.mark.parametrize("zero_kind", ["none", "float"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 256), Tile(128, 32, 128)], ids=["small", "large"])
def test_query_key_and_value_of_different_bits(tile, zero_kind, bits):
    tokens, rows, columns = 70, 21, 384
    made = [problem(1, rows, columns, b, adversarial=True) for b in bits]
    codes, x = torch.cat([codes for codes, _, _ in made]), torch.randint(-8, 9, (tokens, columns)).float()
    zero = torch.zeros(3 * rows) if zero_kind == "none" else torch.randint(-3, 4, (3 * rows,)).float()
    bias = torch.randint(-99, 99, (3 * rows,)).float()
    as_given = None if zero_kind == "none" else zero
    y = matmul_a8_mixed(
        x.to(E4M3),
        torch.full((tokens,), 2.0),
        ProductWeight([packed for _, _, packed in made], list(bits), ones(3 * rows), as_given, bias),
        row_sum=reference.e4m3_sum(x.to(E4M3)),
        out_dtype=torch.float32,
        tile=tile,
    )
    assert torch.equal(y, 2 * x @ (codes.float() - zero[:, None]).T + bias)


def adversarial_rows(columns):
    """Zeros, one value, an end far out, the ends of fp16, halves between two numbers, and ordinary rows."""
    x = torch.randn(9, columns)
    x[0], x[1], x[2, 0] = 0, 3.7, 1000
    x[3] = torch.where(torch.arange(columns) % 2 > 0, 65504.0, -65504.0)
    x[4] = torch.arange(columns) % 3 * 2.0**-24
    x[5] = torch.arange(columns) % 900 / 2 - 225
    x[5, 0] = 448
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [384, 1, 37, 5000])
def test_row_quantization_is_exact(columns, dtype):
    x = adversarial_rows(columns).to(dtype)
    for one, other in zip(quantize_rows(x, IN_E4M3), reference.quantize_rows_e4m3(x.float()), strict=True):
        assert equal(one, other)
    codes, scale, row_sum = quantize_rows(x, InputGrid(0.01, codes_dtype=E4M3))
    wanted = reference.e4m3(x.float() / 0.01)
    assert equal(codes, wanted) and equal(row_sum, reference.e4m3_sum(wanted)) and bool((scale == 0.01).all())


def steps_apart(one, other):
    """How many e4m3 numbers lie between those of two tensors, at most."""
    every = numbers().float().unique()  # in order; 0 and -0 are one
    places = [torch.bucketize(t.float(), every) for t in (one, other)]
    return int((places[0] - places[1]).abs().max())


@pytest.mark.parametrize(("tokens", "columns"), [(9, 384), (9, 37), (1030, 1024)])
@pytest.mark.parametrize("grid", [IN_E4M3, InputGrid(0.01, codes_dtype=E4M3), InputGrid(0.02, -30)])
def test_rows_are_quantized_behind_gelu(tokens, columns, grid):
    x = adversarial_rows(columns).clamp(-30, 30).half()
    x = x.repeat(-(-tokens // len(x)), 1)[:tokens]
    codes, scale, row_sum = quantize_rows(x, grid, gelu=True)
    wanted, wanted_scale, _ = reference.quantize(torch.nn.functional.gelu(x.double()).float(), grid)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    apart = steps_apart(codes, wanted) if grid.codes_dtype == E4M3 else int((codes.int() - wanted.int()).abs().max())
    assert apart <= 1 and float((codes.float() != wanted.float()).float().mean()) < 5e-3
    assert equal(row_sum, reference.code_sum(codes))


@pytest.mark.parametrize("columns", [384, 100])
def test_layernorm_quantize(columns):
    x, residual = adversarial_rows(columns).half(), torch.randn(9, columns).half()
    weight, bias = torch.rand(columns), torch.rand(columns)
    y, *quantized = layernorm_quantize(x, residual, weight, bias, 1e-5, IN_E4M3)
    expected = reference.layernorm_quantize(x, residual, weight, bias, 1e-5)[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    for one, other in zip(quantized, reference.quantize_rows_e4m3(y.float()), strict=True):
        assert equal(one, other)
    codes = layernorm_quantize(x, residual, weight, bias, 1e-5, InputGrid(0.005, codes_dtype=E4M3))[1]
    assert equal(codes, reference.e4m3(y.float() / 0.005))


def test_embeddings_summed_normalized_and_quantized():
    made = [make_table(v, 384, b, g) for v, b, g in [(50, 4, 5), (20, 8, 20)]]
    ids = [torch.randint(0, t.rows, (7,)) for t, _ in made]
    pairs = [(i, t) for i, (t, _) in zip(ids, made, strict=True)]
    y, *quantized = embed_layernorm(pairs, torch.randn(384), torch.randn(384), 1e-12, grid=IN_E4M3)
    for one, other in zip(quantized, reference.quantize_rows_e4m3(y.float()), strict=True):
        assert equal(one, other)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (32, 48)])
def test_what_tuning_launches_runs(kernel, rows, columns):
    packed = problem(1, rows, columns, 4)[2]
    y = encoder_launch(kernel, 5, rows, columns, 4, "cpu")(packed, Tile(16, 32, 256))
    assert y.shape == (5, 3 * rows if "mixed" in kernel else rows)
    assert (y.dtype == torch.float16) == (rows < columns or "mixed" in kernel or kernel == "matmul_a16")


def test_attention_in_e4m3():
    starts = torch.tensor([0, 5, 45], dtype=torch.int32)
    query, key, value = torch.randn(45, 3, 4, 32).half().unbind(1)
    expected = reference.attention(query, key, value, starts, 0.2)
    sums = torch.zeros(45, dtype=torch.int32)
    got = attention(Heads(query, key, value, starts, 40, 0.2), InputGrid(0.01, codes_dtype=E4M3), sums)
    assert got.dtype == E4M3 and torch.equal(sums, reference.e4m3_sum(got))
    # Half a step of e4m3 (1/16), and what fp16 products lose.
    assert bool(((got.double() * 0.01 - expected).abs() <= expected.abs() / 15 + 2e-3).all())
