"""Every Triton kernel in Triton's interpreter, on a CPU, against integer references: exactly equal where exact.

Run by `kernels/test_interpreted.py` in a process of its own, with TRITON_INTERPRET=1: the interpreter must be chosen
before a kernel is imported.
"""

import copy
import sys

import interpreted_asm  # noqa: F401  the interpreter cannot run inline assembly by itself
import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from qbert.kernels import dispatch, formats, operators, reference
from qbert.kernels.gpu import attention_ways, tiles
from qbert.kernels.gpu.attention import attention
from qbert.kernels.gpu.gelu import gelu
from qbert.kernels.gpu.linear import GpuLinear
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed
from qbert.kernels.gpu.products.matmul_a16 import matmul_a16
from qbert.kernels.gpu.rows import layernorm_quant
from qbert.kernels.gpu.rows.division import quotient
from qbert.kernels.gpu.rows.embedding import embed_layernorm, embedding
from qbert.kernels.gpu.rows.layernorm_quant import layernorm_quantize
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import Tile
from qbert.kernels.operands import FLOAT, Heads, InputGrid, PackedWeight, ProductWeight

E4M3 = torch.float8_e4m3fn


def problem(tokens, rows, columns, bits, adversarial=False):
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    xq = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    if adversarial:  # extreme codes of one sign, alone and alternating, against extreme activations
        codes[0::4], codes[1::4], codes[2::4] = low, high, -1
        xq[0::3], xq[1::3] = -128, 127
        xq[2::3, ::2], xq[2::3, 1::2] = -128, 127
    return codes, xq, formats.pack(codes, bits)


def linear_problem(bits, zero_kind, input_groups):
    """A layer [24, 256] in four row groups, packed; its bias; its codes, grid by row, and bias."""
    rows, columns, groups = 24, 256, 4
    codes, _, packed = problem(1, rows, columns, bits)
    row_group = torch.arange(rows) * groups // rows
    scale = torch.rand(groups, input_groups) * 0.01 + 0.01
    zero = {
        "integer": torch.randint(-4, 4, scale.shape).float(),
        "half": torch.full_like(scale, -0.5),
        "real": torch.randn(scale.shape),
    }[zero_kind]
    bias = torch.randn(rows)
    spread = [reference.expand_groups(t, row_group, rows) for t in (scale, zero)]
    return PackedWeight(packed, scale, zero, row_group, bits, columns), bias, (codes, *spread, bias)


SHAPES = [  # tokens, rows, columns
    (37, 70, 256),
    (5, 64, 768),
    (20, 33, 384),  # one block of 256, a last one of 128
    (17, 40, 312),  # a last block of 56: no power of two
    (3, 16, 40),  # nothing but a last block
    (1, 1, 3),
]


@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_product_is_exact(shape, bits, asm):
    codes, xq, packed = problem(*shape, bits, adversarial=True)
    expected = reference.accumulate(xq, codes)
    for tile in (Tile(16, 64, 256), Tile(32, 32, 128)):
        weight = ProductWeight([packed], [bits], torch.ones(1))
        y = matmul_a8(xq, torch.ones(1), weight, out_dtype=torch.int32, tile=tile, asm=asm)
        assert torch.equal(y.long(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_split_columns_give_the_same_and_leave_the_counters_at_zero(bits):
    codes, xq, packed = problem(21, 50, 768 + 128, bits)
    zero = torch.randint(-50, 50, (50,), dtype=torch.int32)
    expected = reference.accumulate(xq, codes) * 2 ** (8 - bits) - zero * xq.sum(1, keepdim=True)
    for split in (1, 2, 3):
        for _ in range(2):
            y = matmul_a8(
                xq,
                torch.ones(1),
                ProductWeight([packed], [bits], torch.ones(1), zero),
                row_sum=xq.sum(1, dtype=torch.int32),
                out_dtype=torch.int32,
                tile=Tile(16, 32, 256, split=split),
            )
            assert torch.equal(y.long(), expected >> (8 - bits))


def float_parts(rows, tokens):
    return torch.rand(rows) * 0.01 + 0.01, torch.rand(tokens) * 0.1, torch.randn(rows), torch.randn(tokens, rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_kind", ["none", "int32", "float"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 256), Tile(128, 32, 256, split=2)], ids=["small", "large, split"])
def test_epilogues_equal_the_reference(bits, zero_kind, tile):
    tokens, rows, columns = 19 if tile.bm == 16 else 75, 37, 512
    codes, xq, packed = problem(tokens, rows, columns, bits)
    scale, x_scale, bias, residual = float_parts(rows, tokens)
    zero = {
        "none": torch.zeros(rows),
        "int32": torch.randint(-9, 9, (rows,)) / (2.0 if bits < 8 else 1.0),
        "float": torch.randn(rows),
    }[zero_kind]
    as_given = {"none": None, "int32": (zero * 2 ** (8 - bits)).int(), "float": zero}[zero_kind]
    row_sum = xq.sum(1, dtype=torch.int32)

    def run(x_scale=x_scale, bias=None, **options):
        weight = ProductWeight([packed], [bits], scale, as_given, bias)
        return matmul_a8(xq, x_scale, weight, row_sum=row_sum, tile=tile, **options)

    def expected(x_scale=x_scale, **options):
        return reference.matmul_a8(xq, x_scale, codes, scale[:, None], zero[:, None], **options)

    close = {"rtol": 2e-6, "atol": 2e-4}
    assert_close = torch.testing.assert_close
    assert_close(run(out_dtype=torch.float32).double(), expected(), **close)
    assert_close(run(x_scale[:1], out_dtype=torch.float32).double(), expected(x_scale[:1].expand(tokens)), **close)
    assert_close(
        run(bias=bias, gelu=True, out_dtype=torch.float32).double(), expected(bias=bias, activation="gelu"), **close
    )
    assert_close(
        run(bias=bias, residual=residual, out_dtype=torch.float32).double(),
        expected(bias=bias, residual=residual),
        **close,
    )
    half = residual.half()
    assert_close(run(bias=bias, residual=half).double(), expected(bias=bias, residual=half), rtol=1e-3, atol=1e-3)


@triton.jit
def gelu_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, gelu(tl.load(x_ptr + at)))


def test_gelu_is_exact_to_the_rounding_of_float32():
    """Where erf counts on the way from -1 to 1, near 0, far out, and for what is no number."""
    x = torch.cat([torch.linspace(-8, 8, 1 << 18), torch.logspace(-40, 38, 1 << 12), -torch.logspace(-40, 38, 1 << 12)])
    x = torch.cat([x, x.new_tensor([float("inf"), -float("inf"), float("nan"), 0.0])])
    x = torch.cat([x, x.new_zeros(-len(x) % (1 << 15))])
    y = torch.full_like(x, float("nan"))
    gelu_kernel[(len(x) >> 15,)](x, y, BLOCK=1 << 15)
    wanted, finite = torch.nn.functional.gelu(x.double()), x.isfinite()
    # The last bit of the result, and half of the error of erf, of which 1.7e-7 are left to a GPU's exponential.
    allowed = wanted.abs() * 2.0**-23 + x.abs().double().clamp(max=6) * 0.5 * 1.3e-7 + 2.0**-148
    assert bool(((y - wanted).abs() <= allowed)[finite].all())
    torch.testing.assert_close(y[~finite].double(), wanted[~finite], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("gelu", "zero", "tile"), [(False, 0, Tile(16, 32, 256)), (True, -100, Tile(128, 32, 256, split=2))]
)
def test_requantized_output_and_its_row_sums(bits, gelu, zero, tile):
    tokens, rows, columns = 75, 70, 512
    codes, xq, packed = problem(tokens, rows, columns, bits)
    scale, x_scale, bias, _ = float_parts(rows, tokens)
    real = reference.matmul_a8(
        xq, x_scale, codes, scale[:, None], torch.zeros(rows, 1), bias, activation="gelu" if gelu else "none"
    )
    out_scale = float(real.abs().max()) / 100
    sums = torch.zeros(tokens, dtype=torch.int32)
    y = matmul_a8(
        xq,
        x_scale,
        ProductWeight([packed], [bits], scale, bias=bias),
        gelu=gelu,
        out=InputGrid(out_scale, zero),
        out_row_sum=sums,
        tile=tile,
    )
    expected = reference.requantize(real, out_scale, zero)
    assert int((y.int() - expected.int()).abs().max()) <= 1  # a tie may fall either way
    assert float((y != expected).float().mean()) < 1e-3
    assert torch.equal(sums, y.sum(1, dtype=torch.int32))
    weight = ProductWeight([packed], [bits], scale)
    saturated = matmul_a8(xq, x_scale * 1e6, weight, out=InputGrid(out_scale), tile=Tile(16, 32, 256))
    assert int(saturated.min()) == -128 and int(saturated.max()) == 127


@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [512, 384, 312, 3])
def test_fp16_product(columns, bits, asm):
    codes, _, packed = problem(9, 40, columns, bits)
    x = torch.full((9, columns + 300), float("nan"), dtype=torch.float16)[:, :columns]  # nothing beyond it may be read
    x.copy_(torch.randn(9, columns))
    scale, zero, bias = torch.rand(40) * 0.01 + 0.01, torch.randn(40), torch.randn(40)
    expected = reference.matmul_a16(x, codes, scale[:, None], zero[:, None], bias)
    for split in (1, 2):
        weight = ProductWeight([packed], [bits], scale, zero, bias)
        y = matmul_a16(x, weight, tile=Tile(16, 32, 128, split=split), asm=asm)
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    unit = torch.eye(columns, dtype=torch.float16)[:40]  # every code comes out as itself: exact
    y = matmul_a16(unit, ProductWeight([packed], [bits], torch.ones(40)), tile=Tile(16, 32, 256), asm=asm)
    assert torch.equal(y.T.double(), codes[:, : y.shape[0]].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [384, 1, 5000])
def test_row_quantization_is_exact(columns, dtype):
    x = (torch.randn(7, columns) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[3] = 0
    got = quantize_rows(x)
    expected = reference.quantize_rows(x.float())
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    codes, scale, row_sum = quantize_rows(x, InputGrid(0.03, 11))
    assert torch.equal(codes, reference.requantize(x.float(), 0.03, 11)) and bool((scale == 0.03).all())
    assert torch.equal(row_sum, codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("static", [(0.0, 0), (0.03, 0), (0.03, -41)])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("columns", [384, 768, 100])
def test_layernorm_quantize(columns, with_residual, static):
    x, weight, bias = torch.randn(6, columns), torch.randn(columns), torch.randn(columns)
    residual = torch.randn(6, columns) if with_residual else None
    expected = reference.layernorm_quantize(x, residual, weight, bias, 1e-12)[0]
    y, codes, scale, row_sum = layernorm_quantize(x, residual, weight, bias, 1e-12, InputGrid(*static))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    wanted, wanted_scale, _ = reference.quantize_rows(y)
    if static[0]:
        wanted, wanted_scale = reference.requantize(y, *static), torch.full((6,), static[0])
    assert torch.equal(codes, wanted) and torch.equal(scale, wanted_scale)
    assert torch.equal(row_sum, codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize(("columns", "warps", "rows"), [(768, 1, 4), (312, 1, 1), (1200, 2, 4), (3, 1, 2)])
def test_layernorm_of_several_rows_a_program_and_rows_in_chunks(columns, warps, rows):
    x, residual = torch.randn(2, 5, columns).half()
    x[3], residual[3] = 1.0, 0.0  # becomes the bias
    weight, bias = torch.randn(2, columns).half()
    expected = reference.layernorm_quantize(x, residual, weight, bias, 1e-5)[0]
    tile = Tile(rows, columns, 0, warps=warps)
    for grid in (InputGrid(), InputGrid(asymmetric=True), InputGrid(0.02, -7), InputGrid(codes_dtype=E4M3)):
        y, *quantized = layernorm_quantize(x, residual, weight, bias, 1e-5, grid, tile=tile)
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
        for got, wanted in zip(quantized, reference.quantize(y, grid), strict=True):
            assert torch.equal(got, wanted)


@triton.jit
def quotient_kernel(a_ptr, b_ptr, q_ptr, LONG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(b_ptr + at)
    tl.store(q_ptr + at, quotient(tl.load(a_ptr + at), b, tl.div_rn(1.0, b), LONG))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quotients_are_correctly_rounded(dtype):
    """Those that lie exactly between two codes too, and divisors next to powers of two, where reciprocals are worst."""
    near = torch.tensor([1.0, 2.0**-40, 2.0**30])[:, None] * (1 + torch.arange(-3, 4) * 2.0**-23)
    scales = torch.cat([near.flatten(), torch.rand(4075) + 1e-3])
    scales[-500:] = torch.randint(1, 8, (500,)) / 64  # of few bits, whose halves are exact
    halves = scales * (torch.randint(-128, 128, (4096,)) + 0.5)
    for a in (torch.randn(4096), halves, scales * 127):
        a, q = a.clamp(-6e4, 6e4).to(dtype).float(), torch.empty(4096)
        quotient_kernel[(4,)](a, scales, q, LONG=dtype == torch.float32, BLOCK=1024)
        assert torch.equal(q, a / scales)


def test_tiny_rows_are_quantized_exactly():
    x = torch.randn(6, 96) * torch.tensor([1.0, 1e-30, 1e-37, 1e-40, 1e-44, 1e30])[:, None]
    for grid in (InputGrid(), InputGrid(asymmetric=True), InputGrid(1e-39, 3), InputGrid(codes_dtype=E4M3)):
        for got, wanted in zip(quantize_rows(x, grid), reference.quantize(x, grid), strict=True):
            assert torch.equal(got, wanted)
    far = torch.tensor([[float("inf"), 3e38, -float("inf"), -3e38, 0.0]])
    assert quantize_rows(far, InputGrid(1e-3, 5))[0].tolist() == [[127, 127, -128, -128, 5]]


def make_table(vocabulary, features, bits, groups, input_groups=1):
    codes, _, packed = problem(1, vocabulary, features, bits)
    row_group = (
        None if groups in (1, vocabulary) else torch.arange(vocabulary, dtype=torch.int32) * groups // vocabulary
    )
    scale, zero = torch.rand(groups, input_groups) * 0.1, torch.randn(groups, input_groups)
    full = [reference.expand_groups(t, row_group, vocabulary) for t in (scale, zero)]
    return PackedWeight(packed, scale, zero, row_group, bits, features), reference.dequantize(codes, *full)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("features", "input_groups"), [(384, 3), (312, 1), (256, 2)])
@pytest.mark.parametrize("groups", [1, 4, 23])
def test_embedding_rows_are_exact(bits, features, input_groups, groups):
    table, dense = make_table(23, features, bits, groups, input_groups)
    ids = torch.tensor([0, 22, 7, 7])
    assert torch.equal(embedding(ids, table), dense[ids])
    assert torch.equal(embedding(ids.int(), table, torch.float16), dense[ids].half())
    outside = embedding(torch.tensor([23, -1, 5]), table)  # never a wrong number
    assert bool(outside[:2].isnan().all()) and torch.equal(outside[2], dense[5])


@pytest.mark.parametrize("tables", [1, 2, 3])
def test_embeddings_summed_normalized_and_quantized(tables):
    made = [make_table(v, 384, b, g) for v, b, g in [(50, 4, 5), (20, 8, 20), (2, 3, 1)][:tables]]
    ids = [torch.randint(0, t.rows, (11,)) for t, _ in made]
    weight, bias = torch.randn(384), torch.randn(384)
    total = sum(dense[i] for i, (_, dense) in zip(ids, made, strict=True))
    expected = reference.layernorm_quantize(total, None, weight, bias, 1e-12)[0]
    pairs = [(i, t) for i, (t, _) in zip(ids, made, strict=True)]
    y, codes, scale, row_sum = embed_layernorm(pairs, weight, bias, 1e-12, torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip((codes, scale, row_sum), reference.quantize_rows(y), strict=True):
        assert torch.equal(got, wanted)
    y, codes, scale, row_sum = embed_layernorm(pairs, weight, bias, 1e-12, torch.float16, InputGrid(0.03, -9))
    assert torch.equal(codes, reference.requantize(y.float(), 0.03, -9)) and bool((scale == 0.03).all())
    assert torch.equal(row_sum, codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("head_dim", [32, 64, 24])
@pytest.mark.parametrize("lengths", [[5], [1, 70, 33], [128, 0, 3]])
def test_attention_over_sequences_of_different_lengths(lengths, head_dim):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    fused = torch.randn(sum(lengths), 3, 2, head_dim).half()
    query, key, value = fused.unbind(1)
    expected = reference.attention(query, key, value, starts, head_dim**-0.5)
    heads = Heads(query, key, value, starts, max(lengths), head_dim**-0.5)
    got = attention(heads)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
    sums = torch.zeros(sum(lengths), dtype=torch.int32)
    codes = attention(heads, InputGrid(0.02, -60), sums)
    assert int((codes.int() - reference.requantize(expected, 0.02, -60).int()).abs().max()) <= 1
    assert torch.equal(sums, codes.sum((1, 2), dtype=torch.int32))


def test_empty_batches():
    _, _, packed = problem(1, 8, 256, 4)
    none = torch.zeros(0, 256)
    weight = ProductWeight([packed], [4], torch.ones(8))
    assert matmul_a8(none.to(torch.int8), torch.ones(0), weight).shape == (0, 8)
    assert matmul_a16(none.half(), weight).shape == (0, 8)
    assert [t.shape[0] for t in quantize_rows(none)] == [0, 0, 0]
    assert layernorm_quantize(none, None, torch.ones(256), torch.ones(256), 1e-5)[1].shape == (0, 256)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("zero_kind", ["integer", "half", "real"])
@pytest.mark.parametrize("activation", ["dynamic", "static", "none"])
@pytest.mark.parametrize("input_groups", [1, 2])
def test_a_whole_linear_layer(bits, zero_kind, activation, input_groups):
    weight, bias, expanded = linear_problem(bits, zero_kind, input_groups)
    x = torch.randn(3, 5, 256)
    grid = {"dynamic": InputGrid(), "static": InputGrid(0.03125, -7), "none": FLOAT}[activation]
    layer = GpuLinear(weight, bias, grid)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-3)):
        flat = x.to(dtype).float().reshape(15, 256)
        expected = reference.matmul_a16(reference.fake_quantize(flat, grid), *expanded).reshape(3, 5, 24)
        y = layer.forward(x.to(dtype), weight.codes)
        assert y.dtype == dtype
        assert float((y.double() - expected).abs().max()) < tolerance * float(expected.abs().max() + 1)


@pytest.mark.parametrize("bits", [(2, 3, 2), (8, 4, 3), (4, 4, 4)])
@pytest.mark.parametrize("zero_kind", ["none", "int32", "float"])
@pytest.mark.parametrize("columns", [384, 256])
def test_query_key_and_value_of_different_bits(bits, zero_kind, columns):
    tokens, rows = 75 if columns == 256 else 21, 40
    made = [problem(1, rows, columns, b) for b in bits]
    codes = torch.cat([codes for codes, _, _ in made])
    xq = problem(tokens, 1, columns, 8)[1]
    scale, x_scale, bias, _ = float_parts(3 * rows, tokens)
    zero = {
        "none": torch.zeros(3 * rows),
        "int32": torch.randint(-9, 9, (3 * rows,)) / (2.0 if max(bits) < 8 else 1.0),
        "float": torch.randn(3 * rows),
    }[zero_kind]
    unit = torch.tensor([2 ** (8 - b) for b in bits]).repeat_interleave(rows)
    as_given = {"none": None, "int32": (zero * unit).int(), "float": zero}[zero_kind]
    y = matmul_a8_mixed(
        xq,
        x_scale,
        ProductWeight([packed for _, _, packed in made], list(bits), scale, as_given, bias),
        row_sum=xq.sum(1, dtype=torch.int32),
        out_dtype=torch.float32,
        tile=Tile(128 if columns == 256 else 16, 32, 256),
    )
    expected = reference.matmul_a8(xq, x_scale, codes, scale[:, None], zero[:, None], bias)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-4)


def strided(tensor):
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def test_strided_arguments_give_the_same(monkeypatch):
    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    rows, columns, tokens = 24, 48, 3
    _, xq, packed = problem(tokens, rows, columns, 4)
    scale, x_scale, bias, residual = float_parts(rows, tokens)
    zero, row_sum, x = torch.randn(rows), xq.sum(1, dtype=torch.int32), torch.randn(tokens, columns).half()
    norm, ids = torch.rand(columns), torch.tensor([1, 23, 5])
    fused = torch.randn(tokens, 3, 2, 16).half().unbind(1)
    starts = torch.tensor([0, tokens], dtype=torch.int32)

    def results(of):
        def some(*tensors):
            return [t if t is None else of(t) for t in tensors]

        def weight(count=1, bias=bias, sums=None):
            vectors = (None if t is None else of(t.repeat(count)) for t in (scale, zero, bias, sums))
            return ProductWeight([of(packed)] * count, [4] * count, *vectors)

        yield operators.quantize_rows(of(x))
        yield operators.quantize_rows(of(x), InputGrid(asymmetric=True))
        affine = torch.stack([x_scale, x_scale + 1])
        yield operators.matmul_a8(*some(xq, affine, row_sum), weight(sums=scale))
        yield operators.matmul_a8(*some(xq, x_scale, row_sum), weight(), of(residual))
        yield operators.matmul_a8_mixed(*some(xq, x_scale, row_sum), weight(3))
        yield operators.matmul_a8_mixed(*some(xq, affine, row_sum), weight(3, sums=scale))
        yield operators.matmul_a16(of(x), weight())
        yield operators.layernorm_quantize(*some(x, x, norm, norm), 1e-5)
        stored = PackedWeight(*some(packed, scale[:, None], zero[:, None], None), 4, columns)
        yield operators.embed_layernorm([of(ids)], [stored], of(norm), of(norm), 1e-5)
        yield operators.attention(Heads(*fused, of(starts), tokens, 0.25))
        yield dispatch.linear(of(x), stored, of(bias))
        yield dispatch.linear(of(x), stored, of(bias), FLOAT)
        yield dispatch.embedding(of(ids), stored)

    for one, other in zip(results(lambda t: t), results(strided), strict=True):
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (one, other)), strict=True):
            assert torch.equal(a, b)


def test_layernorm_takes_the_rows_and_warps_that_were_measured(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    x, weight, bias = torch.randn(6, 96).half(), torch.randn(96).half(), torch.randn(96).half()
    used = []
    run = layernorm_quant.layernorm_quantize_kernel.run

    def launch(*arguments, **options):
        used.append((options["ROWS"], options["num_warps"]))
        return run(*arguments, **options)

    monkeypatch.setattr(layernorm_quant.layernorm_quantize_kernel, "run", launch)
    expected = layernorm_quantize(x, None, weight, bias, 1e-12)
    ways = layernorm_quant.layernorm_candidates(4096, 96)
    for way in ways:
        tiles.measure("layernorm_rows", 6, 96, 96, 8, "interpreter", lambda t, way=way: float(t != way), ways)
        for got, wanted in zip(layernorm_quantize(x, None, weight, bias, 1e-12), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1)
    assert used == [(1, 4), *((way.bm, way.warps) for way in ways)] and len(set(used)) == 6


class Flash:
    """Stands for torch.nn.attention.varlen, whose kernel needs a GPU."""

    @staticmethod
    def varlen_attn(query, key, value, starts, same_starts, longest, same_longest, *, scale):
        assert starts is same_starts and longest == same_longest == 40
        return reference.attention(query, key, value, starts, scale).to(query.dtype)


def test_attention_takes_the_way_that_is_forced_or_was_measured(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.setattr(attention_ways, "has_flash", lambda: True)
    starts = torch.tensor([0, 5, 45], dtype=torch.int32)
    given = Heads(*torch.randn(45, 3, 4, 32).half().unbind(1), starts, 40, 0.2)
    used = []
    monkeypatch.setattr(attention_ways, "attention", lambda *a, tile: used.append(tile) or attention(*a, tile=tile))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", Flash)

    def attend(**options):
        sums = torch.zeros(45, dtype=torch.int32)
        codes = attention_ways.attend(given, InputGrid(0.02, 3), sums, **options)
        return codes, sums

    ours, sums = attend()
    assert used == [None] and torch.equal(sums, ours.flatten(1).sum(1, dtype=torch.int32))
    monkeypatch.setenv("QBERT_ATTENTION", "flash")
    codes, sums = attend()
    assert used == [None] and int((codes.int() - ours.int()).abs().max()) <= 1
    assert torch.equal(sums, codes.flatten(1).sum(1, dtype=torch.int32))
    monkeypatch.delenv("QBERT_ATTENTION")
    for way in attention_ways.WAYS:
        shape, ways = ("attention", 45, 4, 32, 64, "interpreter"), attention_ways.WAYS
        best = tiles.measure(*shape, lambda tile, way=way: float(tile != way), ways)
        assert best == way and int((attend()[0].int() - ours.int()).abs().max()) <= 1
    assert used[1:] == attention_ways.WAYS[:-1]
    monkeypatch.setenv("QBERT_ATTENTION", "triton")
    assert torch.equal(attend()[0], ours) and used[-1] is None
    monkeypatch.setenv("QBERT_ATTENTION", "fast")
    with pytest.raises(ValueError, match="QBERT_ATTENTION must be 'triton', 'flash', 'sdpa' or not set, got 'fast'"):
        attend()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 4, 32), (1, 40, 2, 64)])
def test_torchs_attention_over_sequences_of_one_length_is_the_reference(shape, dtype):
    count, length, heads, width = shape
    starts = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    fused = torch.randn(count * length, 3, heads, width).to(dtype).unbind(1)
    given = Heads(*fused, starts, length, width**-0.5, uniform=True)
    y = attention_ways._sdpa(given, FLOAT, None)
    expected = reference.attention(*given[:4], given.scale)
    assert y.is_contiguous() and y.dtype == dtype
    close = 2e-3 if dtype == torch.float16 else 2e-2
    torch.testing.assert_close(y.double(), expected.double(), rtol=close, atol=close)
    sums, grid = torch.zeros(count * length, dtype=torch.int32), InputGrid(0.02, 3)
    codes = attention_ways._sdpa(given, grid, sums)
    assert torch.equal(codes.flatten(1), reference.quantize(y.flatten(1), grid)[0])
    steps = codes.int() - reference.requantize(expected, grid.scale, grid.zero).int()
    assert int(steps.abs().max()) <= 1
    assert torch.equal(sums, codes.flatten(1).sum(1, dtype=torch.int32))
    assert torch.equal(attention_ways._sdpa(given, grid, None), codes)


def test_sequences_of_one_length_take_torchs_attention_by_rule_by_force_or_by_measurement(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    used = []
    for way in ("_sdpa", "_flash", "attention"):
        monkeypatch.setattr(attention_ways, way, lambda heads, *_, way=way, **tile: used.append((way, *tile.values())))
    starts = torch.tensor([0, 20, 40], dtype=torch.int32)
    given = Heads(*torch.randn(40, 3, 4, 32).half().unbind(1), starts, 20, 0.2)
    uniform, ours = given._replace(uniform=True), ("attention", None)

    def ways():
        used.clear()
        for heads in (given, uniform, uniform._replace(query=given.query[:0])):
            attention_ways.attend(heads, InputGrid(0.02))
        assert used.pop() == ("attention",)  # no tokens
        return used

    assert ways() == [ours, ours]
    monkeypatch.setattr(attention_ways, "_pays", lambda heads: True)
    assert ways() == [ours, ("_sdpa",)]
    for forced, expected in (("sdpa", [ours, ("_sdpa",)]), ("triton", [ours, ours])):
        monkeypatch.setenv("QBERT_ATTENTION", forced)
        assert ways() == expected
    monkeypatch.delenv("QBERT_ATTENTION")
    shape, tile = (40, 4, 32, 32, "interpreter"), attention_ways.WAYS[0]
    tiles.measure("attention", *shape, lambda _: 1.0, [attention_ways.FLASH])
    assert ways() == [("_flash",), ("_sdpa",)]
    for measured, expected in ((attention_ways.SDPA, ("_sdpa",)), (tile, ("attention", tile))):
        tiles.measure("attention_uniform", *shape, lambda _: 1.0, [measured])
        assert ways() == [("_flash",), expected]


def test_the_rule_for_torchs_attention(monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class Query:
        is_cuda, device = True, "cuda:0"

        def __init__(self, tokens):
            self.tokens = tokens

        def __len__(self):
            return self.tokens

    def pays(tokens, longest):
        return attention_ways._pays(Heads(Query(tokens), None, None, None, longest, 0.1, True))

    assert pays(49152, 384) and pays(2048, 256)
    assert not pays(49152, 128) and not pays(1024, 512)
    capability = (8, 0)
    assert not pays(49152, 384)


def test_what_is_measured_for_sequences_of_one_length_is_kept_apart(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_ways, "has_flash", lambda: False)
    for name in ("randn", "arange", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, device, made=made, **options: made(*a, **options))
    launched = []
    monkeypatch.setattr(attention_ways, "_sdpa", lambda *_: launched.append("sdpa"))
    monkeypatch.setattr(attention_ways, "attention", lambda *_, tile: launched.append(tile))
    monkeypatch.setattr(attention_ways, "do_bench_cudagraph", lambda run: run() or float(launched[-1] != "sdpa"))
    shape = {"sequences": 2, "longest": 20, "heads": 4, "head_dim": 32}
    assert attention_ways.measure_attention(**shape) == attention_ways.default_tile(20, 32)
    assert "sdpa" not in launched
    assert attention_ways.measure_attention(**shape, uniform=True) == attention_ways.SDPA
    heads = Heads(torch.empty(40, 4, 32), None, None, None, 20, 0.1)
    assert attention_ways._way(heads) == attention_ways.default_tile(20, 32)
    assert attention_ways._way(heads._replace(uniform=True)) == attention_ways.SDPA


@pytest.mark.parametrize("grid", [InputGrid(), InputGrid(asymmetric=True), InputGrid(0.02, 3), FLOAT])
def test_a_prepared_linear_is_the_operator_without_it(grid, monkeypatch):
    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    weight, bias, _ = linear_problem(4, "integer", 1)
    x, called, operator = torch.randn(5, 256), [], dispatch.linear
    monkeypatch.setattr(dispatch, "linear", lambda *given: called.append(1) or operator(*given))
    run = dispatch.PreparedLinear(weight, bias, grid)
    assert torch.equal(run(x), operator(x, weight, bias, grid)) and not called
    bias.add_(1)
    assert torch.equal(run(x), operator(x, weight, bias, grid))
    twin = copy.deepcopy(run)
    twin.bias.add_(1)
    assert torch.equal(twin(x[None]), operator(x[None], weight, bias + 1, grid))
    assert torch.equal(run(x), operator(x, weight, bias, grid)) and not called
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x)).shape == (5, 24) and called
    with pytest.raises(TypeError, match="x must be float32"):
        run(x.double())
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 256\]"):
        run(x[:, :7])
