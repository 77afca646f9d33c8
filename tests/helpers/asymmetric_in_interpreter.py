"""Asymmetrically quantized activations in Triton's interpreter: every kernel that makes or takes offsets.

Run by `kernels/test_interpreted.py` in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreted_asm  # noqa: F401  the interpreter cannot run inline assembly by itself
import pytest
import torch
from kernels_in_interpreter import float_parts, linear_problem, make_table, problem

from qbert.kernels import reference
from qbert.kernels.gpu.linear import GpuLinear
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed
from qbert.kernels.gpu.rows.embedding import embed_layernorm
from qbert.kernels.gpu.rows.layernorm_quant import layernorm_quantize
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import Tile
from qbert.kernels.operands import InputGrid, ProductWeight

ASYMMETRIC = InputGrid(asymmetric=True)


def adversarial_rows(columns):
    """Of one value, of one sign, with an end far out, as wide and as fine as fp16 allows, and ordinary ones."""
    x = torch.randn(11, columns)
    x[0], x[1], x[2] = 0, 3.7, -250
    x[3], x[4] = 100 + torch.rand(columns), -1 - torch.rand(columns)
    x[5, 0], x[6, -1] = 1000, -1000
    x[7] = torch.where(torch.arange(columns) % 2 > 0, 65504.0, -65504.0)
    x[8] = torch.arange(columns) % 3 * 2.0**-24
    return x


def assert_quantized(got, x):
    """(codes, scale, row sums) are those of x, bit for bit."""
    for one, other in zip(got, reference.quantize_rows(x.float(), asymmetric=True), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [384, 1, 37, 5000])
def test_row_quantization_is_exact(columns, dtype):
    x = adversarial_rows(columns).to(dtype)
    assert_quantized(quantize_rows(x, ASYMMETRIC), x)
    assert_quantized(quantize_rows(x[:0], ASYMMETRIC), x[:0])
    assert_quantized(quantize_rows(x[:, :0], ASYMMETRIC), x[:, :0])
    wide = torch.full((11, columns + 50), float("nan"), dtype=dtype)[:, :columns]  # nothing beyond it may be read
    assert_quantized(quantize_rows(wide.copy_(x), ASYMMETRIC), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [384, 100])
def test_layernorm_quantize(columns, dtype):
    x = adversarial_rows(columns).to(dtype)
    residual = torch.randn(11, columns).to(dtype)
    residual[0] = 0  # a row of zeros: y is the bias
    for shift in (0.0, 30.0, -30.0):  # all values of a row of one sign: its range does not hold 0, as padding would
        weight, bias = torch.rand(columns), torch.rand(columns) + shift
        for other in (residual, None):
            y, *quantized = layernorm_quantize(x, other, weight, bias, 1e-5, ASYMMETRIC)
            expected = reference.layernorm_quantize(x, other, weight, bias, 1e-5)[0]
            torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
            assert_quantized(quantized, y)
    y, *quantized = layernorm_quantize(x, None, torch.zeros(columns), torch.full((columns,), 7.0), 1e-5, ASYMMETRIC)
    assert bool((y == 7).all()) and quantized[1].tolist() == [[0.0] * 11, [7.0] * 11]
    assert [t.shape for t in layernorm_quantize(x[:0], None, weight, bias, 1e-5, ASYMMETRIC)][2] == (2, 0)


@pytest.mark.parametrize("features", [384, 40])
def test_embeddings_summed_normalized_and_quantized(features):
    made = [make_table(v, features, b, g) for v, b, g in [(50, 4, 5), (20, 8, 20), (2, 3, 1)]]
    ids = [torch.randint(0, t.rows, (7,)) for t, _ in made]
    weight, bias = torch.randn(features), torch.randn(features) + 3
    total = sum(dense[i] for i, (_, dense) in zip(ids, made, strict=True))
    expected = reference.layernorm_quantize(total, None, weight, bias, 1e-12)[0]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-3)):
        pairs = [(i, t) for i, (t, _) in zip(ids, made, strict=True)]
        y, *quantized = embed_layernorm(pairs, weight, bias, 1e-12, dtype, ASYMMETRIC)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        assert_quantized(quantized, y)
    ids[1][2] = 20  # no such row: the token is broken, alone, and visibly
    y, _, scale, _ = embed_layernorm(pairs, weight, bias, 1e-12, grid=ASYMMETRIC)
    assert bool(y[2].isnan().all()) and bool(scale[1, 2].isnan()) and int(scale.isnan().any(0).sum()) == 1


# The large tiles are finished in two halves, the small one is not.
TILES = [Tile(16, 32, 256), Tile(128, 32, 128), Tile(128, 32, 256, split=2)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_kind", ["none", "int32", "float"])
def test_the_product_is_exact_where_everything_is_an_integer(zero_kind, bits, tile):
    tokens, rows, columns = 75, 37, 384
    codes, xq, packed = problem(tokens, rows, columns, bits, adversarial=True)
    zero = torch.zeros(rows) if zero_kind == "none" else torch.randint(-3, 4, (rows,)).float()
    step, offset = torch.randint(1, 3, (tokens,)).float(), torch.randint(-3, 4, (tokens,)).float()
    bias, residual = torch.randint(-99, 99, (rows,)).float(), torch.randint(-9, 9, (tokens, rows)).float()
    row_sum, weight_sum = xq.sum(1, dtype=torch.int32), codes.sum(1).float() - columns * zero
    as_given = {"none": None, "int32": (zero * 2 ** (8 - bits)).int(), "float": zero}[zero_kind]
    y = matmul_a8(
        xq,
        torch.stack([step, offset]),
        ProductWeight([packed], [bits], torch.ones(rows), as_given, bias, weight_sum),
        row_sum=row_sum,
        residual=residual,
        out_dtype=torch.float32,
        tile=tile,
    )
    seen = xq.long() * step.long()[:, None] + offset.long()[:, None]
    expected = seen @ (codes.long() - zero.long()[:, None]).T + bias.long() + residual.long()
    assert int(expected.abs().max()) < 2**24 and torch.equal(y.long(), expected)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_epilogues_equal_the_reference(tile, bits):
    tokens, rows, columns = 70, 37, 256
    codes, xq, packed = problem(tokens, rows, columns, bits)
    scale, step, bias, residual = float_parts(rows, tokens)
    x_scale, zero, row_sum = torch.stack([step, torch.randn(tokens)]), torch.randn(rows), xq.sum(1, dtype=torch.int32)
    weight_sum = reference.dequantize(codes, scale[:, None], zero[:, None]).sum(1)
    given = {"row_sum": row_sum, "tile": tile}
    weight = ProductWeight([packed], [bits], scale, zero, weight_sum=weight_sum)
    with_bias = weight._replace(bias=bias)

    def expected(**options):
        return reference.matmul_a8(xq, x_scale, codes, scale[:, None], zero[:, None], **options)

    close = {"rtol": 2e-6, "atol": 5e-4}
    y = matmul_a8(xq, x_scale, weight, out_dtype=torch.float32, **given)
    torch.testing.assert_close(y.double(), expected(), **close)
    y = matmul_a8(xq, x_scale, with_bias, gelu=True, out_dtype=torch.float32, **given)
    real = expected(bias=bias, activation="gelu")
    torch.testing.assert_close(y.double(), real, **close)
    y = matmul_a8(xq, x_scale, weight, residual=residual.half(), **given)
    torch.testing.assert_close(y.double(), expected(residual=residual.half()), rtol=1e-3, atol=1e-3)
    # A static output after an asymmetric input: codes, and their sums over both halves of a tile.
    out_scale, sums = float(real.abs().max()) / 100, torch.zeros(tokens, dtype=torch.int32)
    y = matmul_a8(xq, x_scale, with_bias, gelu=True, out=InputGrid(out_scale, -90), out_row_sum=sums, **given)
    difference = (y.int() - reference.requantize(real, out_scale, -90).int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 2e-3
    assert torch.equal(sums, y.sum(1, dtype=torch.int32))
    bare = matmul_a8(xq, x_scale, weight._replace(zero=None), out_dtype=torch.int32, tile=tile)
    assert torch.equal(bare.long(), reference.accumulate(xq, codes))


@pytest.mark.parametrize("bits", [(2, 3, 3), (3, 3, 8)])
@pytest.mark.parametrize("zero_kind", ["none", "int32", "float"])
@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_query_key_and_value_of_different_bits(tile, zero_kind, bits):
    tokens, rows, columns = 70, 21, 384
    made = [problem(1, rows, columns, b, adversarial=True) for b in bits]
    codes, xq = torch.cat([codes for codes, _, _ in made]), problem(tokens, 1, columns, 8)[1]
    zero = torch.zeros(3 * rows) if zero_kind == "none" else torch.randint(-3, 4, (3 * rows,)).float()
    step, offset = torch.randint(1, 3, (tokens,)).float(), torch.randint(-3, 4, (tokens,)).float()
    bias = torch.randint(-99, 99, (3 * rows,)).float()
    unit = torch.tensor([2 ** (8 - b) for b in bits]).repeat_interleave(rows)
    as_given = {"none": None, "int32": (zero * unit).int(), "float": zero}[zero_kind]
    sums, packed = codes.sum(1).float() - columns * zero, [packed for _, _, packed in made]
    y = matmul_a8_mixed(
        xq,
        torch.stack([step, offset]),
        ProductWeight(packed, list(bits), torch.ones(3 * rows), as_given, bias, sums),
        row_sum=xq.sum(1, dtype=torch.int32),
        out_dtype=torch.float32,
        tile=tile,
    )
    seen = xq.long() * step.long()[:, None] + offset.long()[:, None]
    expected = seen @ (codes.long() - zero.long()[:, None]).T + bias.long()
    assert int(expected.abs().max()) < 2**24 and torch.equal(y.long(), expected)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("zero_kind", ["integer", "half", "real"])
@pytest.mark.parametrize("input_groups", [1, 2])
def test_a_whole_linear_layer(bits, zero_kind, input_groups):
    weight, bias, expanded = linear_problem(bits, zero_kind, input_groups)
    layer = GpuLinear(weight, bias, ASYMMETRIC)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-3)):
        x = adversarial_rows(256)[torch.tensor([0, 1, 3, 4, 8, 9])].to(dtype)
        seen = reference.fake_quantize(x.float(), ASYMMETRIC)
        expected = reference.matmul_a16(seen, *expanded)
        y = layer.forward(x, weight.codes)
        assert y.dtype == dtype
        largest = expected.abs().amax(1, keepdim=True) + 1
        assert bool(((y.double() - expected).abs() <= tolerance * largest).all())
