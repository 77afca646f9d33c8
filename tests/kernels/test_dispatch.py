"""The torch operators: same numbers as the reference, visible to torch.compile and torch.export, clear refusals."""

import gc
import threading

import pytest
import torch

from qbert.kernels import dispatch, formats, operators, reference
from qbert.kernels.dispatch import PreparedCache
from qbert.kernels.terms import Terms

E4M3 = torch.float8_e4m3fn


def packed_layer(rows=24, columns=96, bits=4, groups=4, input_groups=1):
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    row_group = torch.arange(rows) * groups // rows
    scale = torch.rand(groups, input_groups) * 0.01 + 0.01
    zero = torch.randint(low, high + 1, scale.shape).float()
    return codes, (formats.pack(codes, bits), scale, zero, row_group, torch.randn(rows))


def spread(parts):
    return [reference.expand_groups(t, parts[3], parts[0].shape[0]) for t in parts[1:3]]


class PackedModel(torch.nn.Module):
    """Embedding, linear layer, both packed: the smallest model that a compiler must see through."""

    def __init__(self):
        super().__init__()
        _, table = packed_layer(50, 96, 8)
        _, layer = packed_layer(24, 96, 3)
        for name, parts in (("table", table), ("layer", layer)):
            for index, tensor in enumerate(parts):
                self.register_buffer(f"{name}{index}", tensor)

    def forward(self, ids):
        table = [getattr(self, f"table{i}") for i in range(4)]
        layer = [getattr(self, f"layer{i}") for i in range(5)]
        h = dispatch.embedding(ids, *table, bits=8, features=96)
        return torch.relu(dispatch.linear(h * 2, *layer, bits=3)) + 1


@pytest.mark.parametrize("bits", formats.BITS)
def test_linear_equals_the_reference(bits):
    codes, parts = packed_layer(bits=bits)
    x = torch.randn(2, 7, 96)
    y = dispatch.linear(x, *parts, bits=bits)
    expected = reference.linear_a8(x.reshape(14, 96), codes, *spread(parts), parts[4]).reshape(2, 7, 24)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-3)
    y = dispatch.linear(x, *parts, bits=bits, activation_bits=None)
    expected = reference.matmul_a16(x.reshape(14, 96), codes, *spread(parts), parts[4]).reshape(2, 7, 24)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_any_other_device_gets_plain_torch_with_the_same_numbers(monkeypatch):
    codes, parts = packed_layer(input_groups=2)
    x = torch.randn(5, 96)
    expected = {}
    settings = [{}, {"activation_bits": None}, {"activation_scale": 0.03, "activation_zero": 5}, {"asymmetric": True}]
    for options in settings:
        expected[str(options)] = dispatch.linear(x, *parts, bits=4, **options)
    ids = torch.randint(0, 24, (3, 2))
    rows = dispatch.embedding(ids, *parts[:4], bits=4, features=96)
    monkeypatch.setattr(dispatch, "implementation", lambda device: "dense")
    for options in settings:
        y = dispatch.linear(x, *parts, bits=4, **options)
        torch.testing.assert_close(y, expected[str(options)], rtol=1e-4, atol=1e-4)
    assert torch.equal(dispatch.embedding(ids, *parts[:4], bits=4, features=96), rows)
    assert torch.equal(rows.reshape(6, 96), reference.dequantize(codes, *spread(parts))[ids.reshape(-1)])


def test_compiles_in_one_graph_and_exports():
    model = PackedModel().eval()
    ids = torch.randint(0, 50, (3, 9))
    expected = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids), expected)
        torch.testing.assert_close(compiled(ids[:2]), expected[:2])
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({1: tokens},))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"qbert.linear.default", "qbert.embedding.default"} <= names
    assert torch.equal(exported.module()(ids), expected)
    torch.testing.assert_close(exported.module()(ids[:, :4]), expected[:, :4])


def operator_calls():
    _, parts = packed_layer(24, 96, 4)
    x = torch.randn(5, 96)
    xq, x_scale, row_sum = reference.quantize_rows(x)
    scale, zero = (t[:, 0].contiguous() for t in spread(parts))
    fused = torch.randn(7, 3, 2, 16)
    query, key, value = fused.unbind(1)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    ops = torch.ops.qbert
    group = parts[3].int()
    ids = [torch.tensor([1, 2]), torch.tensor([23, 0], dtype=torch.int32)]
    tables = (ids, [parts[0]] * 2, [parts[1]] * 2, [parts[2]] * 2, [group] * 2, [4, 4])
    a8 = (xq, x_scale, row_sum, parts[0], scale, zero, parts[4])
    affine, norm = reference.quantize_rows(x, asymmetric=True), (torch.ones(96), torch.ones(96), 1e-5)
    three = (*affine, [parts[0]] * 3, [4] * 3, scale.repeat(3), zero.repeat(3), None, scale.repeat(3))
    return [
        (ops.linear, (x, *parts, 4, 8, 0.0, 0), {}),
        (ops.embedding, (torch.tensor([1, 2]), *parts[:4], 4, 96, torch.float32), {}),
        (ops.quantize_rows, (x,), {}),
        (ops.matmul_a8, a8, {"bits": 4, "gelu": True, "out_dtype": torch.float32}),
        (ops.matmul_a8, a8, {"bits": 4, "out_dtype": torch.int8, "out_scale": 0.5}),
        (
            ops.matmul_a8_summed,
            (torch.zeros(5, dtype=torch.int32), *a8),
            {"bits": 4, "out_dtype": torch.int8, "out_scale": 0.5, "out_zero": -7},
        ),
        (ops.matmul_a8_mixed, (*a8[:3], [parts[0]] * 3, [4] * 3, scale.repeat(3), zero.repeat(3)), {}),
        (ops.matmul_a16, (x.half(), parts[0], scale, zero), {"bits": 4}),
        (ops.layernorm_quantize, (x, x, torch.ones(96), torch.ones(96), 1e-5), {}),
        (ops.attention, (query, key, value, starts, 4, 0.25), {}),
        (ops.attention, (query, key, value, starts, 4, 0.25, 0.1), {}),
        (ops.attention_summed, (torch.zeros(7, dtype=torch.int32), query, key, value, starts, 4, 0.25, 0.1, 5), {}),
        (ops.quantize_rows, (x, 0.02, 9), {}),
        (ops.layernorm_quantize, (x, x, torch.ones(96), torch.ones(96), 1e-5, 0.02, 9), {}),
        (ops.embed_layernorm, (*tables, torch.ones(96), torch.ones(96), 1e-5), {"out_dtype": torch.float32}),
        (ops.linear, (x, *parts, 4, 8, 0.0, 0, True), {}),
        (ops.quantize_rows, (x, 0.0, 0, True), {}),
        (ops.matmul_a8, (*affine, *a8[3:], None, scale), {"bits": 4}),
        (ops.matmul_a8_mixed, three, {}),
        (ops.layernorm_quantize, (x, x, *norm, 0.0, 0, True), {}),
        (ops.embed_layernorm, (*tables, *norm), {"asymmetric": True}),
        (ops.quantize_rows, (x, 0.0, 0, False, E4M3), {}),
        (ops.attention, (query, key, value, starts, 4, 0.25, 0.1), {"codes_dtype": E4M3}),
    ]


@pytest.mark.parametrize("index", range(23))
def test_operators_keep_what_torch_expects_of_operators(index):
    """Schema, fake tensors and tracing, by torch's own checker."""
    operator, arguments, options = operator_calls()[index]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator.default, arguments, options, test_utils=tests)


def test_e4m3_products_on_a_cpu_are_the_reference():
    codes, parts = packed_layer(24, 96, 4)
    x = torch.randn(5, 96)
    scale, zero = (t[:, 0].contiguous() for t in spread(parts))
    for quantized in (operators.quantize_rows(x, codes_dtype=E4M3), operators.quantize_rows(x, 0.01, codes_dtype=E4M3)):
        assert quantized[0].dtype == E4M3
        assert float((quantized[0].float() * quantized[1][:, None] - x).norm() / x.norm()) < 0.04
        y = operators.matmul_a8(*quantized, parts[0], scale, zero, parts[4], bits=4, out_dtype=torch.float32)
        expected = reference.matmul_a8(*quantized[:2], codes, *spread(parts), parts[4])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        three = operators.matmul_a8_mixed(*quantized, [parts[0]] * 3, [4] * 3, scale.repeat(3), zero.repeat(3))
        one = operators.matmul_a8(*quantized, parts[0], scale, zero, bits=4)
        assert torch.equal(three, one.repeat(1, 3))


def test_what_e4m3_codes_do_not_have_is_refused():
    x, parts = torch.randn(5, 96), packed_layer(24, 96, 8)[1]
    scale, zero = (t[:, 0].contiguous() for t in spread(parts))
    xq, x_scale, row_sum = operators.quantize_rows(x, codes_dtype=E4M3)
    with pytest.raises(ValueError, match="weights of 2 to 4 bits, got 8"):
        operators.matmul_a8(xq, x_scale, row_sum, parts[0], scale, zero, bits=8)
    with pytest.raises(ValueError, match="e4m3 codes are symmetric"):
        operators.quantize_rows(x, asymmetric=True, codes_dtype=E4M3)
    with pytest.raises(ValueError, match="at most 9362 columns, got 9363"):
        operators.quantize_rows(torch.zeros(1, 9363), codes_dtype=E4M3)
    with pytest.raises(TypeError, match="codes_dtype must be int8 or float8_e4m3fn"):
        operators.quantize_rows(x, codes_dtype=torch.uint8)
    packed = packed_layer(24, 96, 4)[1][0]
    with pytest.raises(TypeError, match=r"zero, with e4m3 activations, must be float32, got int32"):
        operators.matmul_a8(xq, x_scale, row_sum, packed, scale, zero.int(), bits=4)


def test_single_kernels_on_a_cpu_are_the_reference():
    codes, parts = packed_layer(24, 96, 4)
    x = torch.randn(5, 96)
    scale, zero = (t[:, 0].contiguous() for t in spread(parts))
    xq, x_scale, row_sum = operators.quantize_rows(x)
    residual = torch.randn(5, 24)
    options = {"bits": 4, "gelu": True, "out_dtype": torch.float32}
    y = operators.matmul_a8(xq, x_scale, row_sum, parts[0], scale, zero, parts[4], residual, **options)
    expected = reference.matmul_a8(xq, x_scale, codes, *spread(parts), parts[4], activation="gelu", residual=residual)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    fixed = (zero * 16).int()
    again = operators.matmul_a8(xq, x_scale, row_sum, parts[0], scale, fixed, parts[4], residual, **options)
    assert torch.equal(again, y)
    three = operators.matmul_a8_mixed(
        xq, x_scale, row_sum, [parts[0]] * 3, [4] * 3, scale.repeat(3), zero.repeat(3), parts[4].repeat(3)
    )
    one = operators.matmul_a8(xq, x_scale, row_sum, parts[0], scale, zero, parts[4], bits=4)
    assert torch.equal(three, one.repeat(1, 3))
    again = operators.matmul_a8_mixed(
        xq, x_scale, row_sum, [parts[0]] * 3, [4] * 3, scale.repeat(3), fixed.repeat(3), parts[4].repeat(3)
    )
    assert torch.equal(again, three)
    affine = operators.quantize_rows(x, asymmetric=True)
    weight_sum = reference.dequantize(codes, *spread(parts)).sum(dim=1)
    options |= {"weight_sum": weight_sum}
    y = operators.matmul_a8(*affine, parts[0], scale, fixed, parts[4], residual, **options)
    expected = reference.matmul_a8(*affine[:2], codes, *spread(parts), parts[4], activation="gelu", residual=residual)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    three = operators.matmul_a8_mixed(
        *affine, [parts[0]] * 3, [4] * 3, scale.repeat(3), zero.repeat(3), parts[4].repeat(3), weight_sum.repeat(3)
    )
    one = operators.matmul_a8(*affine, parts[0], scale, zero, parts[4], weight_sum=weight_sum, bits=4)
    assert torch.equal(three, one.repeat(1, 3))
    h, codes_h, *_ = operators.layernorm_quantize(x, None, torch.ones(96), torch.zeros(96), 1e-5, 0.05)
    assert torch.equal(codes_h, reference.requantize(h, 0.05))


@pytest.mark.parametrize("last", [None, -0.5, 0.3])
def test_joined_terms_are_those_of_the_single_layers(last):
    """Zeros of the first layer are halves, of the next integers; those of the last decide whether all are exact."""
    x, bits, terms, weights, singles = torch.randn(5, 96), [2, 4, 8], [], [], []
    affine = operators.quantize_rows(x, asymmetric=True)
    for width, zero in zip(bits, (-0.5, 3.0, last), strict=True):
        _, (packed, scale, _, row_group, bias) = packed_layer(24, 96, width)
        zeros = torch.full_like(scale, 0.0 if zero is None else zero)
        part = Terms.prepare(packed, 96, scale, zeros, row_group, None if width == 4 else bias, width, asymmetric=True)
        terms.append(part)
        weights.append(packed)
        options = {"weight_sum": part.weight_sum, "bits": width, "out_dtype": torch.float32}
        singles.append(operators.matmul_a8(*affine, packed, part.scale, part.zero, part.bias, **options))
    joined = Terms.join(terms)
    assert joined.zero.dtype == (torch.int32 if last is None else torch.float32)
    arguments = (weights, bits, joined.scale, joined.zero, joined.bias, joined.weight_sum)
    got = operators.matmul_a8_mixed(*affine, *arguments, out_dtype=torch.float32)
    torch.testing.assert_close(got, torch.cat(singles, dim=1), rtol=1e-6, atol=1e-6)


def test_a_layer_is_prepared_once_and_again_when_it_is_written_to():
    _, parts = packed_layer()
    x = torch.randn(3, 96)
    dispatch._cache.drop_dead()
    before = len(dispatch._cache)
    first = dispatch.linear(x, *parts, bits=4)
    assert torch.equal(dispatch.linear(x, *parts, bits=4), first)
    assert len(dispatch._cache) == before + 1
    parts[1].mul_(2)
    changed = dispatch.linear(x, *parts, bits=4)
    torch.testing.assert_close(changed - parts[4], 2 * (first - parts[4]))
    assert len(dispatch._cache) == before + 1


def test_what_was_prepared_dies_with_its_tensors():
    cache = PreparedCache()
    tensors = (torch.ones(3), None, torch.ones(2))
    built = []
    for _ in range(3):
        cache.get(tensors, "a", lambda: built.append(1))
    cache.get(tensors, "b", lambda: built.append(1))
    assert len(built) == 2 and len(cache) == 2
    view = tensors[0][1:]
    cache.get((view,), "a", lambda: built.append(1))
    assert len(built) == 3
    del tensors, view
    gc.collect()
    cache.drop_dead()
    assert len(cache) == 0
    _, parts = packed_layer()
    dispatch.linear(torch.randn(3, 96), *parts, bits=4)
    size = len(dispatch._cache)
    del parts
    gc.collect()
    dispatch._cache.drop_dead()
    assert len(dispatch._cache) < size  # the prepared layer does not keep its own tensors alive


def test_threads_prepare_once_and_share():
    cache, tensors = PreparedCache(), (torch.ones(3),)
    built, values = [], []

    def ask():
        values.append(cache.get(tensors, "a", build))

    def build():
        built.append(other := threading.Thread(target=ask))
        if len(built) == 1:
            other.start()
            other.join(timeout=0.2)  # it has to wait for this one, or it would build a second value
        return object()

    ask()
    built[0].join()
    assert len(built) == 1 and values[0] is values[1] and len(values) == 2


def test_bad_input_is_refused_by_name():
    _, parts = packed_layer()
    packed, scale, zero, row_group, bias = parts
    x = torch.randn(3, 96)
    meta = [t.to("meta") for t in parts]
    with pytest.raises(TypeError, match="x must be float32 or float16 or bfloat16, got float64"):
        dispatch.linear(x.double(), *parts, bits=4)
    with pytest.raises(ValueError, match=r"packed must have shape \[out, 47\]"):
        dispatch.linear(x[:, :94], *parts, bits=4)
    with pytest.raises(ValueError, match="one device"):
        dispatch.linear(x, meta[0], *parts[1:], bits=4)
    with pytest.raises(ValueError, match="bits must be"):
        dispatch.linear(x, *parts, bits=5)
    with pytest.raises(ValueError, match=r"bias must have shape \[24\]"):
        dispatch.linear(x, packed, scale, zero, row_group, bias[:3], bits=4)
    with pytest.raises(ValueError, match="row_group is needed"):
        dispatch.linear(x, packed, scale, zero, None, bias, bits=4)
    with pytest.raises(ValueError, match="activation_bits must be 8 or None, got 4"):
        dispatch.linear(x, *parts, bits=4, activation_bits=4)
    with pytest.raises(TypeError, match="ids must be"):
        dispatch.embedding(x, *parts[:4], bits=4, features=96)
    with pytest.raises(IndexError, match=r"0\.\.23"):
        dispatch.embedding(torch.tensor([24]), *parts[:4], bits=4, features=96)
    xq, x_scale, row_sum = reference.quantize_rows(x)
    row_scale = torch.ones(24)
    with pytest.raises(TypeError, match="xq must be int8"):
        operators.matmul_a8(x, x_scale, None, packed, row_scale, bits=4)
    with pytest.raises(ValueError, match="row_sum must be given"):
        operators.matmul_a8(xq, x_scale, None, packed, row_scale, row_scale, bits=4)
    with pytest.raises(ValueError, match="out_scale must be positive"):
        operators.matmul_a8(xq, x_scale, row_sum, packed, row_scale, bits=4, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x_scale must have shape \[1\], \[3\] or \[2, 3\]"):
        operators.matmul_a8(xq, x_scale[:2], row_sum, packed, row_scale, bits=4)
    with pytest.raises(ValueError, match="three weights, got 2 and 3"):
        operators.matmul_a8_mixed(xq, x_scale, row_sum, [packed] * 2, [4] * 3, row_scale.repeat(3))
    with pytest.raises(TypeError, match="scale must be float32, got float64"):
        operators.matmul_a8_mixed(xq, x_scale, row_sum, [packed] * 3, [4] * 3, row_scale.double().repeat(3))
    with pytest.raises(TypeError, match="zero must be float32, got int32"):
        operators.matmul_a16(x.half(), packed, row_scale, row_scale.int(), bits=4)
    with pytest.raises(TypeError, match="bias must be float32, got float16"):
        operators.matmul_a8(xq, x_scale, row_sum, packed, row_scale, None, row_scale.half(), bits=4)
    with pytest.raises(TypeError, match="residual must be float32 or float16 or bfloat16, got float64"):
        operators.layernorm_quantize(x, x.double(), torch.ones(96), torch.ones(96), 1e-5)
    with pytest.raises(ValueError, match="one device, got xq on cpu, residual on meta"):
        operators.matmul_a8(xq, x_scale, row_sum, packed, row_scale, None, None, torch.empty(3, 24).to("meta"), bits=4)
    with pytest.raises(TypeError, match="row_group must be int32 or int64"):
        dispatch.linear(x, packed, scale, zero, row_group.float(), bits=4)
    with pytest.raises(ValueError, match=r"static zero must lie in -128\.\.127, got 200"):
        operators.quantize_rows(x, 0.1, 200)
    offsets = reference.quantize_rows(x, asymmetric=True)[1]
    with pytest.raises(ValueError, match=r"go together, got \[2, 3\] and no weight_sum"):
        operators.matmul_a8(xq, offsets, row_sum, packed, row_scale, bits=4)
    with pytest.raises(ValueError, match=r"go together, got \[3\] and weight_sum"):
        operators.matmul_a8_mixed(
            xq, x_scale, row_sum, [packed] * 3, [4] * 3, row_scale.repeat(3), weight_sum=row_scale.repeat(3)
        )
    with pytest.raises(ValueError, match=r"weight_sum must have shape \[24\]"):
        operators.matmul_a8(xq, offsets, row_sum, packed, row_scale, weight_sum=row_scale[:5], bits=4)
    for operator, arguments in (
        (operators.quantize_rows, (x,)),
        (operators.layernorm_quantize, (x, None, *x[:2], 1.0)),
    ):
        with pytest.raises(ValueError, match=r"asymmetric ranges are found per token; .* got 0\.1"):
            operator(*arguments, 0.1, 0, True)
    with pytest.raises(ValueError, match="asymmetric=True without activation_bits"):
        dispatch.linear(x, *parts, bits=4, activation_bits=None, asymmetric=True)
    with pytest.raises(ValueError, match="leave out the static scale"):
        dispatch.linear(x, *parts, bits=4, activation_scale=0.1, asymmetric=True)
    with pytest.raises(ValueError, match="not int8; set out_scale"):
        operators.matmul_a8(xq, x_scale, row_sum, packed, row_scale, out_row_sum=row_sum, bits=4)
    with pytest.raises(ValueError, match=r"one to three tables, got \[4\]"):
        four = ([torch.tensor([1])] * 4, [packed] * 4, [scale] * 4, [zero] * 4, [row_group] * 4, [4] * 4)
        operators.embed_layernorm(*four, torch.ones(96), torch.ones(96), 1e-5)
    query = torch.randn(4, 2, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="unit stride"):
        operators.attention(query.transpose(1, 2), query.transpose(1, 2), query.transpose(1, 2), starts, 4, 1.0)
    with pytest.raises(TypeError, match="key must be float32"):
        operators.attention(query, query.half(), query, starts, 4, 1.0)
    with pytest.raises(ValueError, match="cu_seqlens must hold at least the 0"):
        operators.attention(query, query, query, starts[:0], 4, 1.0)


def test_empty_batches_and_unusual_strides():
    _, parts = packed_layer()
    assert dispatch.linear(torch.zeros(0, 96), *parts, bits=4).shape == (0, 24)
    assert dispatch.linear(torch.zeros(2, 0, 96), *parts, bits=4).shape == (2, 0, 24)
    assert dispatch.embedding(torch.zeros(0, dtype=torch.int64), *parts[:4], bits=4, features=96).shape == (0, 96)
    none = torch.zeros(0, 96)
    xq, x_scale, row_sum = operators.quantize_rows(none)
    assert operators.quantize_rows(none, asymmetric=True)[1].shape == (2, 0)
    scale = torch.ones(24)
    sums = torch.zeros(0, dtype=torch.int32)
    requantized = {"bits": 4, "out_dtype": torch.int8, "out_scale": 0.1}
    a8 = (xq, x_scale, row_sum, parts[0], scale, scale)
    assert operators.matmul_a8(*a8, bits=4).shape == (0, 24)
    assert operators.matmul_a8(*a8, out_row_sum=sums, **requantized).shape == (0, 24)
    assert operators.matmul_a8_mixed(*a8[:3], [parts[0]] * 3, [4] * 3, scale.repeat(3)).shape == (0, 72)
    assert operators.matmul_a16(none.half(), parts[0], scale, bits=4).shape == (0, 24)
    assert [t.shape[0] for t in operators.layernorm_quantize(none, none, scale.repeat(4), scale.repeat(4), 1e-5)] == [
        0
    ] * 4
    tokens = torch.zeros(0, 2, 16)
    assert operators.attention(tokens, tokens, tokens, torch.zeros(3, dtype=torch.int32), 0, 1.0, 0.1).shape == (
        0,
        2,
        16,
    )
    ids = torch.zeros(0, dtype=torch.int64)
    table = ([ids], [parts[0]], [parts[1]], [parts[2]], [parts[3].int()], [4])
    assert operators.embed_layernorm(*table, scale.repeat(4), scale.repeat(4), 1e-5)[0].shape == (0, 96)
    no_rows = dispatch.linear(torch.ones(2, 96), parts[0][:0], torch.ones(1, 1), torch.ones(1, 1), bits=4)
    assert no_rows.shape == (2, 0) and formats.unpack(parts[0][:0], 4, 96).shape == (0, 96)
    x = torch.randn(96, 5)
    assert torch.equal(dispatch.linear(x.T, *parts, bits=4), dispatch.linear(x.T.contiguous(), *parts, bits=4))
    torch.testing.assert_close(dispatch.linear(x[:, 0], *parts, bits=4), dispatch.linear(x.T[:1], *parts, bits=4)[0])
