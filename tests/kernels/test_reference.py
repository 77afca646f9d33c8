"""The reference functions against independent formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.kernels import formats, reference
from qbert.kernels.operands import InputGrid
from qbert.quantizers.activations import ActivationQuantizer


def problem(tokens, rows, columns, bits, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) * 0.01 + 0.01
    zero = torch.randn(rows, groups, generator=generator) * 2
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    return x, codes, scale, zero, bias


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 6),
    rows=st.integers(1, 6),
    width=st.integers(1, 20),
    groups=st.sampled_from([1, 2, 3]),
    bits=st.sampled_from(formats.BITS),
    seed=st.integers(0, 1000),
)
def test_integer_form_equals_the_product_of_dequantized_matrices(tokens, rows, width, groups, bits, seed):
    x, codes, scale, zero, bias = problem(tokens, rows, width * groups, bits, groups, seed)
    xq, x_scale, row_sum = reference.quantize_rows(x)
    weight = torch.stack(
        [(codes[:, i].double() - zero[:, i // width]) * scale[:, i // width] for i in range(width * groups)], dim=1
    )
    torch.testing.assert_close(reference.dequantize(codes, scale.double(), zero.double()), weight)
    expected = (xq.double() * x_scale.double()[:, None]) @ weight.T + bias
    torch.testing.assert_close(reference.matmul_a8(xq, x_scale, codes, scale, zero, bias), expected)
    torch.testing.assert_close(reference.matmul_a16(x, codes, scale, zero, bias), x.double() @ weight.T + bias.double())
    assert torch.equal(row_sum.long(), xq.long().sum(1))


def test_row_quantization_is_within_half_a_step_and_reaches_the_ends():
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    codes, scale, _ = reference.quantize_rows(x)
    assert int(codes.abs().max()) == 127 and int(codes.min()) >= -127
    assert bool(((x - codes * scale[:, None]).abs() <= 0.5001 * scale[:, None]).all())
    assert scale[7] == 0 and not codes[7].any()


def adversarial_rows(width=64):
    """Rows whose range does not hold 0, is one point, has an end far out, or is as wide or as fine as fp16 allows."""
    x = torch.randn(12, width) * torch.logspace(-4, 4, 12)[:, None]
    x[0], x[1], x[2] = 0, 3.7, -250
    x[3] = 100 + torch.rand(width)
    x[4] = -1 - torch.rand(width)
    x[5, 0], x[6, -1] = 1000, -1000
    x[7] = torch.where(torch.arange(width) % 2 > 0, 65504.0, -65504.0)
    x[8] = torch.arange(width) % 3 * 2.0**-24
    return x


@pytest.mark.parametrize("width", [1, 64])
def test_asymmetric_rows_are_within_half_a_step_and_are_those_of_the_quantizer(width):
    x = adversarial_rows(width)
    codes, (step, offset), row_sum = reference.quantize_rows(x, asymmetric=True)
    assert torch.equal(row_sum.long(), codes.long().sum(1)) and bool((codes.amin(1) == -128).all())
    constant = x.amin(1) == x.amax(1)
    assert bool((codes.amax(1) == torch.where(constant, -128, 127)).all()) and bool((step[constant] == 0).all())
    assert torch.equal(offset[constant], x[constant, 0])
    seen = reference.fake_quantize(x, InputGrid(asymmetric=True))
    assert bool(((x - seen).abs() <= 0.5001 * step[:, None] + 1e-6 * x.abs()).all())
    theirs = ActivationQuantizer(8, "asymmetric")(x)
    # The same codes, so no more than rounding between them; but for steps below 1e-8, the quantizer's smallest.
    assert bool(((seen - theirs).abs() <= 1e-8 + 3e-7 * x.abs().amax(1, keepdim=True)).all())
    assert reference.quantize_rows(x[:, :0], asymmetric=True)[1].tolist() == [[0.0] * 12] * 2


@pytest.mark.parametrize("groups", [1, 4])
def test_the_asymmetric_product_is_that_of_dequantized_matrices(groups):
    _, codes, scale, zero, bias = problem(12, 8, 64, 4, groups)
    x = adversarial_rows()
    expected = reference.matmul_a16(
        reference.fake_quantize(x.double(), InputGrid(asymmetric=True)), codes, scale, zero, bias
    )
    grid = reference.quantize_rows(x, asymmetric=True)[:2]
    got = reference.matmul_a8(*grid, codes, scale, zero, bias)
    assert bool(((got - expected).abs() <= 1e-6 * expected.abs().amax(1, keepdim=True)).all())


def test_epilogues():
    x, codes, scale, zero, bias = problem(5, 8, 16, 4)
    xq, x_scale, _ = reference.quantize_rows(x)
    plain = reference.matmul_a8(xq, x_scale, codes, scale, zero, bias)
    with_gelu = reference.matmul_a8(xq, x_scale, codes, scale, zero, bias, activation="gelu")
    torch.testing.assert_close(with_gelu, torch.nn.functional.gelu(plain))
    residual = torch.randn(5, 8)
    torch.testing.assert_close(
        reference.matmul_a8(xq, x_scale, codes, scale, zero, bias, residual=residual), plain + residual
    )
    with pytest.raises(ValueError, match="activation must be"):
        reference.matmul_a8(xq, x_scale, codes, scale, zero, activation="relu")


def test_requantize_rounds_half_to_even_and_clamps():
    y = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0])
    assert reference.requantize(y, 1.0).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert reference.requantize(y, 1.0, zero=-3).tolist() == [-3, -1, -1, -3, -5, 127, -128]


def test_groups_spread_over_rows():
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = reference.expand_groups(table, torch.tensor([1, 0, 1]), 3)
    assert spread.tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    assert reference.expand_groups(table[:1], None, 3).tolist() == [[1.0, 2.0]] * 3
    with pytest.raises(ValueError, match="row_group is needed"):
        reference.expand_groups(table, None, 3)
    with pytest.raises(ValueError, match="group numbers"):
        reference.expand_groups(table, torch.tensor([0, 2, 1]), 3)
    with pytest.raises(ValueError, match="do not divide"):
        reference.dequantize(torch.zeros(3, 7, dtype=torch.int8), spread, spread)


def test_layernorm_embedding_and_attention_against_torch():
    x, residual = torch.randn(6, 32).double(), torch.randn(6, 32).double()
    weight, bias = torch.randn(32).double(), torch.randn(32).double()
    y, codes, scale, _ = reference.layernorm_quantize(x, residual, weight, bias, 1e-12)
    hidden = x + residual
    normal = (hidden - hidden.mean(1, keepdim=True)) / hidden.var(1, unbiased=False, keepdim=True).sqrt()
    torch.testing.assert_close(y, normal * weight + bias)
    assert bool(((y - codes * scale[:, None]).abs() <= 0.5001 * scale[:, None]).all())

    _, table, table_scale, table_zero, _ = problem(1, 11, 32, 4, groups=2)
    ids = torch.tensor([[3, 3, 10], [0, 1, 2]])
    expected = torch.nn.functional.embedding(ids, reference.dequantize(table, table_scale, table_zero))
    assert torch.equal(reference.embedding(ids, table, table_scale, table_zero), expected)

    query, key, value = (torch.randn(9, 2, 8).double() for _ in range(3))
    got = reference.attention(query, key, value, torch.tensor([0, 4, 9]), scale=8**-0.5)
    for start, end in ((0, 4), (4, 9)):
        one = torch.nn.functional.scaled_dot_product_attention(
            *(t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        )
        torch.testing.assert_close(got[start:end], one[0].transpose(0, 1))
