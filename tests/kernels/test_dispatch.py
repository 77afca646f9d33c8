"""The torch operators: same numbers as the reference, visible to torch.compile and torch.export, clear refusals."""

import gc
import threading

import pytest
import torch

from qbert.kernels import dispatch, formats, operators, reference
from qbert.kernels.dispatch import PreparedCache
from qbert.kernels.operands import FLOAT, E4m3Weight, Heads, InputGrid, PackedWeight, ProductWeight
from qbert.kernels.terms import Terms, e4m3_weight, unpacked_weight

E4M3 = torch.float8_e4m3fn
IN_E4M3 = InputGrid(codes_dtype=E4M3)
ASYMMETRIC = InputGrid(asymmetric=True)


def packed_layer(rows=24, columns=96, bits=4, groups=4, input_groups=1):
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    row_group = torch.arange(rows) * groups // rows
    scale = torch.rand(groups, input_groups) * 0.01 + 0.01
    zero = torch.randint(low, high + 1, scale.shape).float()
    return codes, PackedWeight(formats.pack(codes, bits), scale, zero, row_group, bits, columns), torch.randn(rows)


def spread(weight):
    return [reference.expand_groups(t, weight.row_group, weight.rows) for t in (weight.scale, weight.zero)]


def product_weight(weight, bias=None, zero=..., weight_sum=None, count=1):
    """`count` times the weight, as products take it."""
    scale, of_rows = (t[:, 0].contiguous() for t in spread(weight))
    rows = [scale, of_rows if zero is ... else zero, bias, weight_sum]
    return ProductWeight(
        [weight.codes] * count, [weight.bits] * count, *(t if t is None else t.repeat(count) for t in rows)
    )


class PackedModel(torch.nn.Module):
    """Embedding, linear layer, both packed: the smallest model that a compiler must see through."""

    def __init__(self):
        super().__init__()
        _, table, _ = packed_layer(50, 96, 8)
        _, layer, bias = packed_layer(24, 96, 3)
        for name, weight in (("table", table), ("layer", layer)):
            for index, tensor in enumerate(weight[:4]):
                self.register_buffer(f"{name}{index}", tensor)
        self.register_buffer("bias", bias)

    def forward(self, ids):
        table = PackedWeight(*(getattr(self, f"table{i}") for i in range(4)), 8, 96)
        layer = PackedWeight(*(getattr(self, f"layer{i}") for i in range(4)), 3, 96)
        h = dispatch.embedding(ids, table)
        return torch.relu(dispatch.linear(h * 2, layer, self.bias)) + 1


@pytest.mark.parametrize("bits", formats.BITS)
def test_linear_equals_the_reference(bits):
    codes, weight, bias = packed_layer(bits=bits)
    x = torch.randn(2, 7, 96)
    y = dispatch.linear(x, weight, bias)
    expected = reference.linear_a8(x.reshape(14, 96), codes, *spread(weight), bias).reshape(2, 7, 24)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-3)
    y = dispatch.linear(x, weight, bias, FLOAT)
    expected = reference.matmul_a16(x.reshape(14, 96), codes, *spread(weight), bias).reshape(2, 7, 24)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_any_other_device_gets_plain_torch_with_the_same_numbers(monkeypatch):
    codes, weight, bias = packed_layer(input_groups=2)
    x = torch.randn(5, 96)
    expected = {}
    grids = [InputGrid(), FLOAT, InputGrid(0.03, 5), ASYMMETRIC]
    for grid in grids:
        expected[grid] = dispatch.linear(x, weight, bias, grid)
    ids = torch.randint(0, 24, (3, 2))
    rows = dispatch.embedding(ids, weight)
    monkeypatch.setattr(dispatch, "implementation", lambda device: "dense")
    for grid in grids:
        torch.testing.assert_close(dispatch.linear(x, weight, bias, grid), expected[grid], rtol=1e-4, atol=1e-4)
    assert torch.equal(dispatch.embedding(ids, weight), rows)
    assert torch.equal(rows.reshape(6, 96), reference.dequantize(codes, *spread(weight))[ids.reshape(-1)])


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
    """Every operator with every kind of argument, as its Python function is called."""
    _, weight, bias = packed_layer(24, 96, 4)
    x = torch.randn(5, 96)
    quantized, affine = reference.quantize_rows(x), reference.quantize_rows(x, asymmetric=True)
    query, key, value = torch.randn(7, 3, 2, 16).unbind(1)
    heads = Heads(query, key, value, torch.tensor([0, 3, 7], dtype=torch.int32), 4, 0.25)
    uniform = heads._replace(cu_seqlens=torch.tensor([0, 7], dtype=torch.int32), longest=7, uniform=True)
    ids = [torch.tensor([1, 2]), torch.tensor([23, 0], dtype=torch.int32)]
    tables = [weight, PackedWeight(weight.codes, weight.scale[:1], weight.zero[:1], None, 4, 96)]
    norm = (torch.ones(96), torch.ones(96), 1e-5)
    static, static_e4m3, sums = InputGrid(0.02, 9), InputGrid(0.1, codes_dtype=E4M3), torch.zeros(7, dtype=torch.int32)
    one, with_sums = product_weight(weight, bias), product_weight(weight, bias, weight_sum=bias)
    calls = [(dispatch.linear, (x, weight, bias, grid)) for grid in (InputGrid(), FLOAT, ASYMMETRIC)]
    calls += [(dispatch.embedding, (torch.tensor([1, 2]), weight))]
    grids = (InputGrid(), static, ASYMMETRIC, IN_E4M3)
    calls += [(operators.quantize_rows, (x, grid)) for grid in grids]
    calls += [(operators.layernorm_quantize, (x, x, *norm, grid)) for grid in grids]
    calls += [(operators.embed_layernorm, (ids, tables, *norm, grid, torch.float32)) for grid in grids]
    return [
        *calls,
        (operators.matmul_a8, (*quantized, one, None, None, FLOAT, True, torch.float32)),
        (operators.matmul_a8, (*quantized, one, None, None, InputGrid(0.5))),
        (operators.matmul_a8, (*quantized, one, None, sums[:5], InputGrid(0.5, -7))),
        (operators.matmul_a8, (*affine, with_sums)),
        (operators.matmul_a8_mixed, (*quantized, product_weight(weight, count=3))),
        (operators.matmul_a8_mixed, (*affine, product_weight(weight, weight_sum=bias, count=3))),
        (operators.matmul_a16, (x.half(), product_weight(weight))),
        (operators.attention, (heads,)),
        (operators.attention, (heads, InputGrid(0.1))),
        (operators.attention, (heads, InputGrid(0.1, 5), sums)),
        (operators.attention, (heads, static_e4m3)),
        (operators.attention, (uniform,)),
    ]


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators of this library that run inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "qbert":
            self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("index", range(28))
def test_operators_keep_what_torch_expects_of_operators(index):
    """Schema, fake tensors and tracing, by torch's own checker."""
    function, arguments = operator_calls()[index]
    with Recorded() as recorded:
        function(*arguments)
    [(operator, flat)] = recorded.calls
    assert operator._schema.name.removesuffix("_summed") == f"qbert::{function.__name__}"
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, flat, test_utils=tests)


def test_a_call_takes_arguments_by_position_and_by_name():
    _, weight, bias = packed_layer()
    x = torch.randn(3, 96)
    expected = dispatch.linear(x, weight, bias, ASYMMETRIC)
    assert torch.equal(dispatch.linear(x, grid=ASYMMETRIC, bias=bias, weight=weight), expected)
    with pytest.raises(TypeError, match=r"linear\(\) misses the argument 'weight'"):
        dispatch.linear(x, bias=bias)
    with pytest.raises(TypeError, match=r"linear\(\) takes x, weight, bias, grid, got also bits"):
        dispatch.linear(x, weight, bits=4)


def test_e4m3_products_on_a_cpu_are_the_reference():
    codes, weight, bias = packed_layer(24, 96, 4)
    x = torch.randn(5, 96)
    for grid in (IN_E4M3, InputGrid(0.01, codes_dtype=E4M3)):
        quantized = operators.quantize_rows(x, grid)
        assert quantized[0].dtype == E4M3
        assert float((quantized[0].float() * quantized[1][:, None] - x).norm() / x.norm()) < 0.04
        y = operators.matmul_a8(*quantized, product_weight(weight, bias), out_dtype=torch.float32)
        expected = reference.matmul_a8(*quantized[:2], codes, *spread(weight), bias)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        three = operators.matmul_a8_mixed(*quantized, product_weight(weight, count=3))
        one = operators.matmul_a8(*quantized, product_weight(weight))
        assert torch.equal(three, one.repeat(1, 3))


def test_what_e4m3_codes_do_not_have_is_refused():
    x, wide, narrow = torch.randn(5, 96), packed_layer(24, 96, 8)[1], packed_layer(24, 96, 4)[1]
    quantized = operators.quantize_rows(x, IN_E4M3)
    with pytest.raises(ValueError, match="weights of 2 to 4 bits, got 8"):
        operators.matmul_a8(*quantized, product_weight(wide))
    with pytest.raises(ValueError, match="e4m3 codes are symmetric"):
        operators.quantize_rows(x, IN_E4M3._replace(asymmetric=True))
    with pytest.raises(ValueError, match="at most 9362 columns, got 9363"):
        operators.quantize_rows(torch.zeros(1, 9363), IN_E4M3)
    with pytest.raises(TypeError, match="codes_dtype must be int8 or float8_e4m3fn"):
        operators.quantize_rows(x, InputGrid(codes_dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"zero, with e4m3 activations, must be float32, got int32"):
        operators.matmul_a8(*quantized, product_weight(narrow, zero=torch.ones(24, dtype=torch.int32)))


@pytest.mark.parametrize("grid", [IN_E4M3, InputGrid(0.01, codes_dtype=E4M3), ASYMMETRIC, InputGrid(0.02, -30)])
def test_rows_are_quantized_behind_gelu(grid):
    x = 3 * torch.randn(5, 96).half()
    expected = reference.quantize(torch.nn.functional.gelu(x.double()).float(), grid)
    for one, other in zip(operators.quantize_rows(x, grid, gelu=True), expected, strict=True):
        assert torch.equal(one.float(), other.float())


def floats_of(weight, bias, grid=IN_E4M3):
    return e4m3_weight([weight], Terms.prepare(weight, bias, grid), grid, torch.float16)


@pytest.mark.parametrize(("bits", "zero"), [(4, 0.0), (4, -0.5), (4, 7.0), (3, 3.0), (2, 0.5)])
@pytest.mark.parametrize("grid", [IN_E4M3, InputGrid(0.01, codes_dtype=E4M3)])
def test_weights_of_few_bits_are_exact_in_e4m3(bits, zero, grid):
    _, weight, bias = packed_layer(32, 96, bits)
    weight = weight._replace(zero=torch.full_like(weight.scale, zero))
    codes, x_scale, sums = operators.quantize_rows(torch.randn(5, 96), grid)
    y = operators.matmul_e4m3(codes, None if grid.scale else x_scale, floats_of(weight, bias, grid))
    packed = product_weight(weight, bias, torch.full((32,), zero))
    expected = operators.matmul_a8(codes, x_scale, sums, packed, out_dtype=torch.float32)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "zero"), [(4, 0.0), (4, -0.5), (3, 3.0), (2, 0.5), (4, 100.0)])
def test_weights_unpacked_to_int8_give_the_same_integers(bits, zero, asymmetric):
    _, weight, bias = packed_layer(24, 96, bits)
    weight = weight._replace(zero=torch.full_like(weight.scale, zero))
    terms = Terms.prepare(weight, bias, InputGrid(asymmetric=asymmetric))
    quantized = operators.quantize_rows(torch.randn(5, 96), InputGrid(asymmetric=asymmetric))
    whole = unpacked_weight([weight], terms)
    assert whole.bits == [8] and whole.zero is None
    expected = operators.matmul_a8(*quantized, terms.of([weight.codes], [bits]), out_dtype=torch.float32)
    assert torch.equal(operators.matmul_a8(*quantized, whole, out_dtype=torch.float32), expected)


def test_weights_that_int8_cannot_hold_are_left_packed():
    for zero in (0.3, 121.0, 60.5):
        weight = packed_layer(24, 96, 4)[1]
        weight = weight._replace(zero=torch.full_like(weight.scale, zero))
        assert unpacked_weight([weight], Terms.prepare(weight)) is None


def test_weights_that_e4m3_would_change_are_left_packed():
    _, weight, bias = packed_layer(32, 96, 4)
    for zero in (0.3, 11.5):
        assert floats_of(weight._replace(zero=torch.full_like(weight.scale, zero)), bias) is None
    assert floats_of(packed_layer(32, 96, 8)[1], bias) is None


def test_what_products_of_eight_bit_floats_do_not_take_is_refused():
    codes, x_scale, _ = operators.quantize_rows(torch.randn(5, 96), IN_E4M3)
    whole = floats_of(*packed_layer(32, 96, 4)[1:])
    with pytest.raises(TypeError, match="xq must be float8_e4m3fn, got int8"):
        operators.matmul_e4m3(codes.to(torch.int8), x_scale, whole)
    with pytest.raises(TypeError, match=r"out_dtype must be float16 or bfloat16, got torch\.float32"):
        operators.matmul_e4m3(codes, x_scale, whole, torch.float32)
    with pytest.raises(TypeError, match="bias must be bfloat16, got float16"):
        operators.matmul_e4m3(codes, x_scale, whole, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x_scale must have shape \[5\], got \[1\]"):
        operators.matmul_e4m3(codes, x_scale[:1], whole)
    odd = E4m3Weight(whole.codes[:24], whole.scale[:24])
    with pytest.raises(ValueError, match=r"multiples of 16 rows and columns, got 24 \(out\)"):
        operators.matmul_e4m3(codes, x_scale, odd)


def test_single_kernels_on_a_cpu_are_the_reference():
    codes, weight, bias = packed_layer(24, 96, 4)
    x, residual = torch.randn(5, 96), torch.randn(5, 24)
    quantized = operators.quantize_rows(x)
    fixed = (spread(weight)[1][:, 0] * 16).int()
    options = {"gelu": True, "out_dtype": torch.float32}
    y = operators.matmul_a8(*quantized, product_weight(weight, bias), residual, **options)
    epilogue = {"activation": "gelu", "residual": residual}
    expected = reference.matmul_a8(*quantized[:2], codes, *spread(weight), bias, **epilogue)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(operators.matmul_a8(*quantized, product_weight(weight, bias, fixed), residual, **options), y)
    three = operators.matmul_a8_mixed(*quantized, product_weight(weight, bias, count=3))
    one = operators.matmul_a8(*quantized, product_weight(weight, bias))
    assert torch.equal(three, one.repeat(1, 3))
    assert torch.equal(operators.matmul_a8_mixed(*quantized, product_weight(weight, bias, fixed, count=3)), three)
    affine = operators.quantize_rows(x, ASYMMETRIC)
    weight_sum = reference.dequantize(codes, *spread(weight)).sum(dim=1)
    y = operators.matmul_a8(*affine, product_weight(weight, bias, fixed, weight_sum), residual, **options)
    expected = reference.matmul_a8(*affine[:2], codes, *spread(weight), bias, **epilogue)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    three = operators.matmul_a8_mixed(*affine, product_weight(weight, bias, weight_sum=weight_sum, count=3))
    one = operators.matmul_a8(*affine, product_weight(weight, bias, weight_sum=weight_sum))
    assert torch.equal(three, one.repeat(1, 3))
    h, codes_h, *_ = operators.layernorm_quantize(x, None, torch.ones(96), torch.zeros(96), 1e-5, InputGrid(0.05))
    assert torch.equal(codes_h, reference.requantize(h, 0.05))


@pytest.mark.parametrize("last", [None, -0.5, 0.3])
def test_joined_terms_are_those_of_the_single_layers(last):
    """Zeros of the first layer are halves, of the next integers; those of the last decide whether all are exact."""
    x, bits, terms, weights, singles = torch.randn(5, 96), [2, 4, 8], [], [], []
    affine = operators.quantize_rows(x, ASYMMETRIC)
    for width, zero in zip(bits, (-0.5, 3.0, last), strict=True):
        _, weight, bias = packed_layer(24, 96, width)
        weight = weight._replace(zero=torch.full_like(weight.scale, 0.0 if zero is None else zero))
        part = Terms.prepare(weight, None if width == 4 else bias, ASYMMETRIC)
        terms.append(part)
        weights.append(weight.codes)
        singles.append(operators.matmul_a8(*affine, part.of([weight.codes], [width]), out_dtype=torch.float32))
    joined = Terms.join(terms)
    assert joined.zero.dtype == (torch.int32 if last is None else torch.float32)
    got = operators.matmul_a8_mixed(*affine, joined.of(weights, bits), out_dtype=torch.float32)
    torch.testing.assert_close(got, torch.cat(singles, dim=1), rtol=1e-6, atol=1e-6)


def test_a_layer_is_prepared_once_and_again_when_it_is_written_to():
    _, weight, bias = packed_layer()
    x = torch.randn(3, 96)
    dispatch._cache.drop_dead()
    before = len(dispatch._cache)
    first = dispatch.linear(x, weight, bias)
    assert torch.equal(dispatch.linear(x, weight, bias), first)
    assert len(dispatch._cache) == before + 1
    weight.scale.mul_(2)
    changed = dispatch.linear(x, weight, bias)
    torch.testing.assert_close(changed - bias, 2 * (first - bias))
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
    _, weight, _ = packed_layer()
    dispatch.linear(torch.randn(3, 96), weight)
    size = len(dispatch._cache)
    del weight, _
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


def test_bad_layers_are_refused_by_name():
    _, weight, bias = packed_layer()
    x, on_meta = torch.randn(3, 96), weight._replace(codes=weight.codes.to("meta"))
    for error, match, arguments in (
        (TypeError, "x must be float32 or float16 or bfloat16, got float64", (x.double(), weight)),
        (ValueError, r"x must have shape \[..., 96\], the weight's columns, got \[3, 94\]", (x[:, :94], weight)),
        (ValueError, r"packed must have shape \[out, 47\]", (x[:, :94], weight._replace(columns=94))),
        (ValueError, "one device", (x, on_meta)),
        (ValueError, "bits must be", (x, weight._replace(bits=5))),
        (ValueError, r"bias must have shape \[24\]", (x, weight, bias[:3])),
        (ValueError, "row_group is needed", (x, weight._replace(row_group=None))),
        (TypeError, "row_group must be int32 or int64", (x, weight._replace(row_group=weight.row_group.float()))),
        (
            ValueError,
            "an input has 8 bits, or 0 where it is left in float, got 4",
            (x, weight, bias, InputGrid(bits=4)),
        ),
        (ValueError, "got asymmetric=True with 0 bits", (x, weight, bias, FLOAT._replace(asymmetric=True))),
        (ValueError, "leave out the static scale", (x, weight, bias, InputGrid(0.1, asymmetric=True))),
    ):
        with pytest.raises(error, match=match):
            dispatch.linear(*arguments)
    with pytest.raises(TypeError, match="ids must be"):
        dispatch.embedding(x, weight)
    with pytest.raises(IndexError, match=r"0\.\.23"):
        dispatch.embedding(torch.tensor([24]), weight)


def test_bad_products_are_refused_by_name():
    _, packed, _ = packed_layer()
    x, ones = torch.randn(3, 96), torch.ones(24)
    xq, x_scale, row_sum = quantized = reference.quantize_rows(x)
    offsets, residual = reference.quantize_rows(x, asymmetric=True)[1], torch.empty(3, 24).to("meta")
    weight, three = ProductWeight([packed.codes], [4], ones), ProductWeight([packed.codes] * 3, [4] * 3, ones.repeat(3))
    for error, match, arguments in (
        (TypeError, "xq must be int8", (x, x_scale, None, weight)),
        (ValueError, "row_sum must be given", (xq, x_scale, None, weight._replace(zero=ones))),
        (ValueError, r"x_scale must have shape \[1\], \[3\] or \[2, 3\]", (xq, x_scale[:2], row_sum, weight)),
        (ValueError, "must hold one weight, got 3 and 3", (*quantized, three)),
        (TypeError, "bias must be float32, got float16", (*quantized, weight._replace(bias=ones.half()))),
        (ValueError, r"go together, got \[2, 3\] and no weight_sum", (xq, offsets, row_sum, weight)),
        (ValueError, r"weight_sum must have shape", (xq, offsets, row_sum, weight._replace(weight_sum=ones[:5]))),
        (
            ValueError,
            "one device, got xq on cpu, residual on meta",
            (*quantized, weight, residual),
        ),
        (ValueError, "for an output in float; give the grid", (*quantized, weight, None, row_sum)),
        (ValueError, "with a static scale only", (*quantized, weight, None, None, InputGrid())),
        (TypeError, "out_dtype must be .* got torch.int8", (*quantized, weight, None, None, FLOAT, False, torch.int8)),
    ):
        with pytest.raises(error, match=match):
            operators.matmul_a8(*arguments)
    for error, match, arguments in (
        (ValueError, "three weights, got 2 and 3", three._replace(codes=three.codes[:2])),
        (TypeError, "scale must be float32, got float64", three._replace(scale=three.scale.double())),
        (ValueError, r"go together, got \[3\] and weight_sum", three._replace(weight_sum=three.scale)),
        (ValueError, r"codes\[2\] has 5 rows", three._replace(codes=[*three.codes[:2], three.codes[2][:5]])),
    ):
        with pytest.raises(error, match=match):
            operators.matmul_a8_mixed(*quantized, arguments)
    with pytest.raises(TypeError, match="zero must be float32, got int32"):
        operators.matmul_a16(x.half(), weight._replace(zero=ones.int()))


def test_bad_rows_tables_and_sequences_are_refused_by_name():
    _, packed, _ = packed_layer()
    x, norm = torch.randn(3, 96), (torch.ones(96), torch.ones(96), 1e-5)
    with pytest.raises(TypeError, match="residual must be float32 or float16 or bfloat16, got float64"):
        operators.layernorm_quantize(x, x.double(), *norm)
    with pytest.raises(ValueError, match=r"static zero must lie in -128\.\.127, got 200"):
        operators.quantize_rows(x, InputGrid(0.1, 200))
    with pytest.raises(ValueError, match="codes are written with 8 bits, got a grid of 0 bits"):
        operators.quantize_rows(x, FLOAT)
    for operator, arguments in ((operators.quantize_rows, (x,)), (operators.layernorm_quantize, (x, None, *norm))):
        with pytest.raises(ValueError, match=r"asymmetric ranges are found per token; .* got 0\.1"):
            operator(*arguments, InputGrid(0.1, asymmetric=True))
    with pytest.raises(ValueError, match=r"one to three, got 4 and 4"):
        operators.embed_layernorm([torch.tensor([1])] * 4, [packed] * 4, *norm)
    with pytest.raises(ValueError, match="a table has 96 features, its LayerNorm 95"):
        operators.embed_layernorm([torch.tensor([1])], [packed], torch.ones(95), torch.ones(95), 1e-5)
    query = torch.randn(4, 2, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="unit stride"):
        operators.attention(Heads(*[query.transpose(1, 2)] * 3, starts, 4, 1.0))
    with pytest.raises(TypeError, match="key must be float32"):
        operators.attention(Heads(query, query.half(), query, starts, 4, 1.0))
    with pytest.raises(ValueError, match="cu_seqlens must hold at least the 0"):
        operators.attention(Heads(query, query, query, starts[:0], 4, 1.0))
    with pytest.raises(ValueError, match="uniform sequences fill all tokens, but 1 of 3 are not 4 tokens"):
        operators.attention(Heads(query, query, query, starts, 3, 1.0, uniform=True))


def test_empty_batches_and_unusual_strides():
    _, weight, bias = packed_layer()
    assert dispatch.linear(torch.zeros(0, 96), weight, bias).shape == (0, 24)
    assert dispatch.linear(torch.zeros(2, 0, 96), weight, bias).shape == (2, 0, 24)
    assert dispatch.embedding(torch.zeros(0, dtype=torch.int64), weight).shape == (0, 96)
    none, sums = torch.zeros(0, 96), torch.zeros(0, dtype=torch.int32)
    quantized = operators.quantize_rows(none)
    assert operators.quantize_rows(none, ASYMMETRIC)[1].shape == (2, 0)
    norm = (torch.ones(96), torch.ones(96), 1e-5)
    assert operators.matmul_a8(*quantized, product_weight(weight)).shape == (0, 24)
    assert operators.matmul_a8(*quantized, product_weight(weight), None, sums, InputGrid(0.1)).shape == (0, 24)
    assert operators.matmul_a8_mixed(*quantized, product_weight(weight, count=3)).shape == (0, 72)
    assert operators.matmul_a16(none.half(), product_weight(weight)).shape == (0, 24)
    assert [t.shape[0] for t in operators.layernorm_quantize(none, none, *norm)] == [0] * 4
    tokens = torch.zeros(0, 2, 16)
    heads = Heads(tokens, tokens, tokens, torch.zeros(3, dtype=torch.int32), 0, 1.0)
    assert operators.attention(heads, InputGrid(0.1)).shape == (0, 2, 16)
    assert operators.embed_layernorm([torch.zeros(0, dtype=torch.int64)], [weight], *norm)[0].shape == (0, 96)
    no_rows = PackedWeight(weight.codes[:0], torch.ones(1, 1), torch.ones(1, 1), None, 4, 96)
    assert dispatch.linear(torch.ones(2, 96), no_rows).shape == (2, 0) and no_rows.unpacked().shape == (0, 96)
    x = torch.randn(96, 5)
    assert torch.equal(dispatch.linear(x.T, weight, bias), dispatch.linear(x.T.contiguous(), weight, bias))
    one = dispatch.linear(x[:, 0], weight, bias)
    torch.testing.assert_close(one, dispatch.linear(x.T[:1], weight, bias)[0])
