"""The CPU path against the reference: exact integer sums, every kind of zero, every CPU."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.kernels import formats, reference
from qbert.kernels.cpu import CpuLinear, embedding, gemm
from qbert.kernels.cpu.chains import compiled
from qbert.kernels.operands import PackedWeight

ENGINES = [e for e in ("fbgemm", "onednn") if e in torch.backends.quantized.supported_engines]

ZEROS = {
    "symmetric": lambda g, low, high: torch.zeros(g, 1),
    "integer": lambda g, low, high: torch.randint(low, high + 1, (g, 1)).float(),
    "half": lambda g, low, high: torch.full((g, 1), -0.5),
    "real": lambda g, low, high: torch.randn(g, 1),
    "far": lambda g, low, high: torch.full((g, 1), 3000.0),
}


def grid_input(tokens, columns):
    """Activations that lie on their own int8 grid, so that rounding is the same whoever divides."""
    codes = torch.randint(-127, 128, (tokens, columns)).float()
    codes[:, 0] = 127
    return codes * 2.0 ** torch.randint(-8, 8, (tokens, 1))


def layer(rows, columns, bits, zero="integer", groups=1, input_groups=1, seed=0):
    torch.manual_seed(seed)
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    row_group = torch.arange(rows) * groups // rows
    scale = (torch.rand(groups, 1) * 0.01 + 0.01).expand(groups, input_groups).contiguous()
    zeros = ZEROS[zero](groups, low, high).expand(groups, input_groups).contiguous()
    return codes, scale, zeros, row_group, torch.randn(rows)


def reference_linear(x, codes, scale, zero, row_group, bias):
    rows = codes.shape[0]
    spread = (reference.expand_groups(t, row_group, rows) for t in (scale, zero))
    return reference.linear_a8(x, codes, *spread, bias)


def asymmetric_linear(x, codes, scale, zero, row_group, bias):
    """Each token on its own grid of 256 values, from its smallest to its largest, in float64."""
    x = x.double()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = torch.where(high > low, (high - low) / 255, 1.0)
    spread = (reference.expand_groups(t, row_group, codes.shape[0]) for t in (scale, zero))
    return reference.matmul_a16(torch.round((x - low) / step) * step + low, codes, *spread, bias)


def asymmetric_input(tokens, columns):
    """Activations on grids of 256 steps, every token on another side of zero."""
    codes = torch.randint(0, 256, (tokens, columns)).float()
    codes[:, 0], codes[:, -1] = 0, 255
    return (codes - torch.randint(-300, 300, (tokens, 1))) * 2.0 ** torch.randint(-8, 8, (tokens, 1))


def assert_same(y, x, expected, parts):
    """Equal up to float32 rounding of the epilogue, relative to the terms that it adds up."""
    assert y.shape == expected.shape
    _, scale, zero, _, bias = parts
    size = expected.abs().amax(-1, keepdim=True) + bias.abs().max()
    if bool((zero != zero.round()).any()):  # scale * zero * row sum is then subtracted in float32
        size = size + (scale * zero).abs().max() * x.reshape(-1, x.shape[-1]).abs().sum(1, keepdim=True)
    assert float(((y.double() - expected).abs() / size).max()) < 2e-6


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    bits=st.sampled_from(formats.BITS),
    zero=st.sampled_from(["symmetric", "integer", "half", "real"]),
    groups=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_equals_reference_for_any_shape(tokens, rows, columns, bits, zero, groups, seed):
    parts = layer(rows, columns, bits, zero, min(groups, rows), seed=seed)
    x = grid_input(tokens, columns)
    assert_same(CpuLinear.prepare(*parts, bits).forward(x), x, reference_linear(x, *parts), parts)


@pytest.mark.parametrize("zero", list(ZEROS))
@pytest.mark.parametrize("bits", formats.BITS)
def test_equals_reference_on_encoder_shapes(bits, zero):
    parts = layer(384, 768, bits, zero, groups=128)
    x = grid_input(33, 768)
    y = CpuLinear.prepare(*parts, bits).forward(x)
    if zero == "far":  # sums of 3000 * 127 * 768 are beyond the 24 bits of float32
        expected = reference_linear(x, *parts)
        assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5
    else:
        assert_same(y, x, reference_linear(x, *parts), parts)


def test_real_activations_differ_only_where_a_rounding_tie_is_decided_otherwise():
    parts = layer(384, 384, 8)
    x = torch.randn(256, 384)
    y, expected = CpuLinear.prepare(*parts, 8).forward(x), reference_linear(x, *parts)
    error = (y - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(error.max()) < 5e-3  # one code of 384 off by one
    assert float((error > 2e-6).float().mean()) < 0.05


def test_a_token_does_not_depend_on_the_others_in_the_batch():
    parts = layer(64, 384, 4)
    prepared = CpuLinear.prepare(*parts, 4)
    x = torch.randn(9, 384)
    alone = torch.cat([prepared.forward(row[None]) for row in x])
    outlier = torch.cat([x, 1e4 * torch.randn(1, 384)])
    torch.testing.assert_close(prepared.forward(outlier)[:9], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mkl", [torch.backends.mkl.is_available(), False])
@pytest.mark.parametrize("engine", ENGINES)
def test_saturating_pairs_are_split_and_added_back(engine, mkl, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (40, 101), dtype=torch.int8)
    codes[0], codes[1], codes[2, ::2] = 127, -128, 127
    safe, excess = gemm.split_excess(codes)
    assert torch.equal(safe.int() + excess.int(), codes.int())
    pairs = torch.nn.functional.pad(safe.int(), (0, 1)).reshape(40, -1, 2)
    assert int(pairs.clamp_min(0).sum(2).max()) <= 128 and int(pairs.clamp_max(0).sum(2).min()) >= -128
    x = torch.randint(-127, 128, (17, 101)).float()
    x[0], x[1] = 127, -127
    product = gemm.Int8Gemm(codes, torch.ones(40), torch.zeros(40, dtype=torch.int32), engine=engine, split_excess=True)
    assert product.has_excess
    expected = x.double() @ codes.double().T
    assert torch.equal(product(x, 1.0).double(), expected)
    assert torch.equal(product(x, 1.0, rounded=True).double(), expected)
    assert torch.equal(product(x / 2, 0.5).double(), expected / 2)
    assert torch.equal(product(x.reshape(1, 17, 101), 1.0)[0].double(), expected)
    many = torch.randint(-127, 128, (300, 101)).float()
    assert torch.equal(product(many, 1.0).double(), many.double() @ codes.double().T)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 70),
    columns=st.integers(2, 400),
    bits=st.sampled_from(formats.BITS),
    zero=st.sampled_from(["symmetric", "integer", "half", "real"]),
    groups=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_asymmetric_activations_equal_the_reference(tokens, rows, columns, bits, zero, groups, seed):
    parts = layer(rows, columns, bits, zero, min(groups, rows), seed=seed)
    x = asymmetric_input(tokens, columns)
    y = CpuLinear.prepare(*parts, bits, asymmetric=True).forward(x)
    assert_asymmetric(y, x, parts)


def assert_asymmetric(y, x, parts):
    expected = asymmetric_linear(x, *parts)
    weight = reference.dequantize(parts[0], *(reference.expand_groups(t, parts[3], len(y.T)) for t in parts[1:3]))
    # What is added up: span times codes, and the smallest value times the sums of the weights.
    spread, sums = x.amax(1, keepdim=True) - x.amin(1, keepdim=True), weight.abs().sum(1)
    zeros = (parts[1] * parts[2]).abs().max() * x.shape[1]
    size = (spread + x.abs().amax(1, keepdim=True)) * (sums + zeros) + parts[4].abs()
    assert float(((y.double() - expected).abs() / size).max()) < 2e-6


def test_asymmetric_rows_of_one_value_and_without_int8(monkeypatch):
    parts = layer(48, 128, 8, "real", groups=4)
    x = asymmetric_input(9, 128)
    x[3], x[4] = 0, 7.5
    y = CpuLinear.prepare(*parts, 8, asymmetric=True).forward(x)
    assert_asymmetric(y, x, parts)
    assert torch.equal(y[3], parts[4])
    monkeypatch.setattr("qbert.kernels.cpu.linear.available_engine", lambda: "none")
    in_float = CpuLinear.prepare(*parts, 8, asymmetric=True)
    assert in_float.reason
    assert_asymmetric(in_float.forward(x), x, parts)
    with pytest.raises(ValueError, match="asymmetric is for 8-bit activations"):
        CpuLinear.prepare(*parts, 8, asymmetric=True, activation_scale=0.1)


WITHOUT_VNNI = """
import torch
from qbert.kernels.cpu import gemm
for engine in {engines}:
    assert gemm.saturates(engine), engine
import test_cpu as t
for bits in (2, 3, 4, 8):
    for zero in t.ZEROS:
        if zero != "far":
            parts = t.layer(96, 384, bits, zero, groups=12)
            parts[0][0], parts[0][1] = t.formats.code_range(bits)
            x = t.grid_input(20, 384)
            x[0], x[1], x[2] = 127, -127, 0
            t.assert_same(t.CpuLinear.prepare(*parts, bits).forward(x), x, t.reference_linear(x, *parts), parts)
            x = t.asymmetric_input(20, 384)
            x[0] = 255 * (x[0] > x[0].mean())
            t.assert_asymmetric(t.CpuLinear.prepare(*parts, bits, asymmetric=True).forward(x), x, parts)
            for kind in (dict(), dict(asymmetric=True), dict(activation_scale=1.0)):
                t.assert_rounded_again(parts, bits, kind)
print("exact")
"""


def assert_rounded_again(parts, bits, kind):
    """Without exactness a layer is, to float rounding, the exact layer of weights that were rounded again."""
    x = torch.randint(-127, 128, (20, 384)).float()
    x[0], x[1] = 127, -127
    exact, fast = CpuLinear.prepare(*parts, bits, **kind), CpuLinear.prepare(*parts, bits, exact=False, **kind)
    assert not fast.chain.gemm.has_excess
    got, wanted = fast.forward(x), exact.forward(x)
    if not exact.chain.gemm.has_excess:
        assert torch.equal(got, wanted)
        return
    size = (wanted - parts[4]).norm()
    assert 1e-4 < (got - wanted).norm() / size < 0.02
    # The sum over tokens of opposite sign cancels in an exact product with any weights: no sum has saturated.
    if "asymmetric" not in kind:
        assert float((fast.forward(x) + fast.forward(-x) - 2 * parts[4]).norm() / size) < 1e-5


@given(rows=st.integers(1, 8), columns=st.integers(1, 60), wide=st.booleans(), seed=st.integers(0, 10_000))
def test_rows_rounded_again_cannot_saturate(rows, columns, wide, seed):
    torch.manual_seed(seed)
    size = 255 if wide else 128
    codes = torch.randint(-size, size, (rows, columns)).div(torch.randint(1, 6, (rows, 1)), rounding_mode="trunc")
    fitted, factor = gemm.fit_pairs(codes)
    safe, excess = gemm.split_excess(fitted)
    assert torch.equal(safe, fitted) and not excess.any()
    assert ((fitted.float() - codes * factor[:, None]).abs() <= 0.5 + 1e-4).all()
    untouched = ~gemm.split_excess(codes)[1].any(1)
    assert torch.equal(untouched | (codes == -128).any(1), (factor == 1) | (codes == -128).any(1))
    assert factor.min() >= (0.24 if wide else 0.49)


@pytest.mark.skipif("fbgemm" not in ENGINES, reason="this torch has no fbgemm to restrict")
def test_exact_on_a_cpu_without_vnni():
    """The same checks in a process whose matrix products may use AVX2 only, which saturates."""
    environment = os.environ | {
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()]),
    }
    script = WITHOUT_VNNI.format(engines=tuple(ENGINES))
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "exact", run.stderr[-2000:]


@pytest.mark.parametrize("zero", ["symmetric", "integer", "half"])
def test_onednn_gives_the_same_where_fbgemm_is_missing(zero, monkeypatch):
    if "onednn" not in ENGINES:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr("qbert.kernels.cpu.linear.available_engine", lambda: "onednn")
    monkeypatch.setattr("qbert.kernels.cpu.gemm.available_engine", lambda: "onednn")
    for bits in formats.BITS:
        parts = layer(48, 128, bits, zero, groups=4)
        prepared = CpuLinear.prepare(*parts, bits)
        assert "onednn" in repr(prepared)
        x = grid_input(9, 128)
        assert_same(prepared.forward(x), x, reference_linear(x, *parts), parts)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_int8_operators_falls_back_to_float_and_says_so(bits, monkeypatch):
    monkeypatch.setattr("qbert.kernels.cpu.linear.available_engine", lambda: "none")
    parts = layer(48, 128, bits)
    prepared = CpuLinear.prepare(*parts, bits)
    assert "no int8" in prepared.reason and "float" in repr(prepared)
    x = grid_input(9, 128)
    assert_same(prepared.forward(x), x, reference_linear(x, *parts), parts)


def test_input_groups_and_float_activations_run_in_float():
    codes, scale, zero, row_group, bias = parts = layer(48, 128, 4, groups=4, input_groups=2)
    prepared = CpuLinear.prepare(codes, scale, zero, row_group, bias, 4)
    assert prepared.reason == "2 input groups"
    x = grid_input(9, 128)
    assert_same(prepared.forward(x), x, reference_linear(x, *parts), parts)
    prepared = CpuLinear.prepare(codes, scale, zero, row_group, bias, 4, activation_bits=None)
    assert "not quantized" in prepared.reason
    spread = (reference.expand_groups(t, row_group, 48) for t in (scale, zero))
    assert_same(prepared.forward(x), x, reference.matmul_a16(x, codes, *spread, bias), parts)


@pytest.mark.parametrize("zero", ["integer", "real"])
@pytest.mark.parametrize("activation_zero", [0, -37, 100])
@pytest.mark.parametrize("engine", ["fbgemm", "none"])
def test_static_activation_scale(activation_zero, zero, engine, monkeypatch):
    if engine == "none":
        monkeypatch.setattr("qbert.kernels.cpu.linear.available_engine", lambda: "none")
    parts = layer(48, 128, 8, zero, groups=4)
    step = 0.03125
    x = torch.randint(-300, 300, (9, 128)) * step
    x_hat = (reference.requantize(x, step, activation_zero).double() - activation_zero) * step
    spread = (reference.expand_groups(t, parts[3], 48) for t in parts[1:3])
    expected = reference.matmul_a16(x_hat, parts[0], *spread, parts[4])
    prepared = CpuLinear.prepare(*parts, 8, activation_scale=step, activation_zero=activation_zero)
    assert_same(prepared.forward(x), x, expected, parts)


def test_zero_rows_empty_batches_and_other_shapes():
    parts = layer(48, 128, 8, "real", groups=4)
    prepared = CpuLinear.prepare(*parts, 8)
    assert torch.equal(prepared.forward(torch.zeros(3, 128)), parts[4].expand(3, 48))
    assert prepared.forward(torch.zeros(0, 128)).shape == (0, 48)
    x = grid_input(12, 128)
    flat = prepared.forward(x)
    assert torch.equal(prepared.forward(x.reshape(3, 4, 128)).reshape(12, 48), flat)
    assert torch.equal(prepared.forward(x[0]), prepared.forward(x[:1])[0])
    assert torch.equal(prepared.forward(x.T.contiguous().T), flat)
    for dtype in (torch.float16, torch.bfloat16):
        low = torch.randn(4, 128).to(dtype)
        assert torch.equal(prepared.forward(low), prepared.forward(low.float()).to(dtype))
    without_bias = CpuLinear.prepare(*parts[:4], None, 8)
    torch.testing.assert_close(without_bias.forward(x) + parts[4], flat)
    assert copy.deepcopy(prepared).forward(x).equal(flat)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_is_broken_alone(value, asymmetric):
    prepared = CpuLinear.prepare(*layer(48, 128, 4), 4, asymmetric=asymmetric)
    x = torch.randn(4, 128)
    clean = prepared.forward(x)
    x[2, 5] = value
    y = prepared.forward(x)
    assert not torch.isfinite(y[2]).any()
    torch.testing.assert_close(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("zero", ["integer", "real"])
@pytest.mark.parametrize("engine", ["fbgemm", "fbgemm, saturating", "onednn", "none"])
def test_with_a_static_scale_nan_stays_nan_and_infinity_takes_the_last_code(zero, engine, monkeypatch):
    for module in ("linear", "gemm"):
        monkeypatch.setattr(f"qbert.kernels.cpu.{module}.available_engine", lambda: engine.partition(",")[0])
        monkeypatch.setattr(f"qbert.kernels.cpu.{module}.saturates", lambda _: "saturating" in engine)
    for bits in (2, 8):
        prepared = CpuLinear.prepare(*layer(48, 128, bits, zero, groups=4), bits, activation_scale=0.03)
        x = torch.randn(4, 128).clamp(-3, 3)
        x[1, 5], x[2, 127], x[3, 7] = -50.0, float("nan"), 50.0
        y = prepared.forward(x)
        assert y[2].isnan().all() and torch.isfinite(y[[0, 1, 3]]).all()
        x[1, 5], x[3, 7] = -float("inf"), float("inf")
        torch.testing.assert_close(prepared.forward(x), y, rtol=0, atol=0, equal_nan=True)


def test_bad_input_is_refused():
    codes, scale, zero, row_group, bias = layer(48, 128, 4, groups=4)
    prepared = CpuLinear.prepare(codes, scale, zero, row_group, bias, 4)
    with pytest.raises(TypeError, match="float64"):
        prepared.forward(torch.zeros(2, 128, dtype=torch.float64))
    with pytest.raises(ValueError, match="128 columns"):
        prepared.forward(torch.zeros(2, 127))
    with pytest.raises(ValueError, match="gradient"):
        prepared.forward(torch.zeros(2, 128, requires_grad=True))
    with pytest.raises(ValueError, match="CPU"):
        prepared.forward(torch.zeros(2, 128, device="meta"))
    with pytest.raises(ValueError, match="for 2 bits"):
        CpuLinear.prepare(codes, scale, zero, row_group, bias, 2)
    with pytest.raises(TypeError, match="int8"):
        CpuLinear.prepare(codes.long(), scale, zero, row_group, bias, 4)
    with pytest.raises(ValueError, match="bias must have shape"):
        CpuLinear.prepare(codes, scale, zero, row_group, bias[:-1], 4)
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="activation_scale must be a positive number"):
            CpuLinear.prepare(*layer(8, 16, 4), bits=4, activation_scale=scale)
    with pytest.raises(ValueError, match="activation_bits"):
        CpuLinear.prepare(codes, scale, zero, row_group, bias, 4, activation_bits=4)


@settings(deadline=None, max_examples=40)
@given(
    vocabulary=st.integers(1, 60),
    columns=st.integers(1, 40),
    bits=st.sampled_from(formats.BITS),
    input_groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_embedding_gathers_and_dequantizes(vocabulary, columns, bits, input_groups, seed):
    columns *= input_groups
    codes, scale, zero, row_group, _ = layer(vocabulary, columns, bits, "real", min(5, vocabulary), input_groups, seed)
    ids = torch.randint(0, vocabulary, (3, 4))
    spread = [reference.expand_groups(t, row_group, vocabulary) for t in (scale, zero)]
    expected = reference.embedding(ids, codes, *spread)
    packed = formats.pack(codes, bits)
    assert torch.equal(embedding(ids, PackedWeight(packed, scale, zero, row_group, bits, columns)), expected)
    assert torch.equal(embedding(ids.int(), PackedWeight(packed, *spread, None, bits, columns)), expected)
    empty = embedding(ids[:0], PackedWeight(packed, scale, zero, row_group, bits, columns))
    assert empty.shape == (0, 4, columns)


def test_embedding_refuses_bad_ids():
    codes, scale, zero, row_group, _ = layer(10, 16, 4)
    packed = formats.pack(codes, 4)
    with pytest.raises(IndexError, match=r"0\.\.9"):
        embedding(torch.tensor([10]), PackedWeight(packed, scale, zero, row_group, 4, 16))
    with pytest.raises(IndexError, match="-1"):
        embedding(torch.tensor([-1]), PackedWeight(packed, scale, zero, row_group, 4, 16))
    with pytest.raises(TypeError, match="int32 or int64"):
        embedding(torch.tensor([1.0]), PackedWeight(packed, scale, zero, row_group, 4, 16))


@pytest.mark.parametrize("zero", ["integer", "real"])
@pytest.mark.parametrize("kind", [{}, {"asymmetric": True}, {"activation_scale": 0.02}, {"activation_bits": None}])
def test_the_compiled_chain_is_its_uncompiled_twin(kind, zero, monkeypatch, caplog):
    prepared = CpuLinear.prepare(*layer(48, 128, 8, zero, groups=4), 8, **kind)
    if hasattr(prepared.chain, "gemm"):  # with values that saturate taken apart, whatever this CPU does
        codes, one = torch.randint(-128, 128, (48, 128), dtype=torch.int8), torch.ones(48)
        prepared.chain.gemm = gemm.Int8Gemm(codes, one, torch.zeros(48, dtype=torch.int32), split_excess=True)
        prepared.chain.rounds_first = True
    for x in (torch.randn(1, 128), torch.randn(7, 128), torch.randn(2, 3, 128), torch.zeros(2, 128)):
        for _ in range(3):  # the first calls of a TorchScript program are run differently from later ones
            assert torch.equal(prepared.forward(x), prepared.chain(x))
    assert isinstance(prepared._run, torch.ScriptMethod)
    monkeypatch.setattr(torch.jit, "script", lambda module: (_ for _ in ()).throw(RuntimeError("no compiler today")))
    with caplog.at_level("INFO", logger="qbert.kernels.cpu.chains"):
        assert compiled(prepared.chain) is prepared.chain
    assert "no compiler today" in caplog.text
