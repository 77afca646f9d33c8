"""The Triton kernels on a GPU: exact, again and again, for any number of tokens; whole encoders; CUDA graphs."""

import pytest
import torch

from qbert.kernels import dispatch, formats, operators, reference
from qbert.kernels.operands import FLOAT, Heads, InputGrid, PackedWeight, ProductWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


def random_weight(rows, columns, bits):
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    return codes, formats.pack(codes, bits).to(DEVICE)


@pytest.mark.parametrize("bits", formats.BITS)
@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (3072, 768), (768, 3072), (384, 384), (312, 1200)])
def test_integer_products_are_exact(bits, rows, columns):
    from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
    from qbert.kernels.gpu.tiles import candidates, device_name, rule

    codes, packed = random_weight(rows, columns, bits)
    codes = codes.to(DEVICE)
    for tokens in [*torch.randint(1, 300, (12,)).tolist(), 1, 16, 17, 1024, 4096]:
        xq = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, device=DEVICE)
        expected = xq.double() @ codes.double().T
        one = torch.ones(1, device=DEVICE)
        for tile in {rule(tokens, rows, columns, bits), *candidates(tokens, rows, columns, bits)}:
            y = matmul_a8(xq, one, ProductWeight([packed], [bits], one), out_dtype=torch.int32, tile=tile)
            assert torch.equal(y.double(), expected), (device_name(xq), tokens, tile)


@pytest.mark.parametrize("bits", formats.BITS)
@pytest.mark.parametrize("tokens", [16, 200, 2048])
def test_a_thousand_repeats_give_one_answer(bits, tokens):
    """A result that moves with fixed inputs is a race."""
    _, packed = random_weight(768, 1024, bits)
    x = torch.randn(tokens, 1024, device=DEVICE).half()
    quantized, scale = operators.quantize_rows(x), torch.rand(768, device=DEVICE)
    zero = torch.randint(-8, 8, (768,), device=DEVICE, dtype=torch.int32)
    weight = ProductWeight([packed], [bits], scale, zero)
    of_floats = weight._replace(zero=zero.float())
    first, float_first = operators.matmul_a8(*quantized, weight), operators.matmul_a16(x[:16], of_floats)
    for _ in range(1000):
        assert torch.equal(operators.matmul_a8(*quantized, weight), first)
        assert torch.equal(operators.matmul_a16(x[:16], of_floats), float_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", formats.BITS)
@pytest.mark.parametrize("grid", [InputGrid(), InputGrid(asymmetric=True), FLOAT])
def test_linear_equals_the_cpu(bits, dtype, grid):
    codes, packed = random_weight(384, 384, bits)
    row_group = torch.arange(384) // 3
    scale, zero, bias = torch.rand(128, 1) * 0.01 + 0.01, torch.randint(-3, 3, (128, 1)).float(), torch.randn(384)
    weight = PackedWeight(packed, *(t.to(DEVICE) for t in (scale, zero, row_group)), bits, 384)
    spread = [reference.expand_groups(t, row_group, 384) for t in (scale, zero)]
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for tokens in (1, 33, 500):
        x = torch.randn(2, tokens, 384, device=DEVICE).to(dtype)
        y = dispatch.linear(x, weight, bias.to(DEVICE), grid)
        flat = x.float().cpu().reshape(-1, 384)
        expected = reference.matmul_a16(reference.fake_quantize(flat, grid), codes, *spread, bias).reshape(
            2, tokens, 384
        )
        error = (y.double().cpu() - expected).abs().max() / expected.abs().max()
        assert y.dtype == dtype and float(error) < tolerance


@pytest.mark.parametrize(("tokens", "columns"), [(77, 768), (2051, 768), (8195, 384), (1030, 312)])
def test_row_kernels_equal_the_reference(tokens, columns):
    x, residual = torch.randn(2, tokens, columns).half()
    weight, bias = torch.randn(2, columns)
    given = [t.to(DEVICE) for t in (x, residual, weight, bias)]
    expected = reference.layernorm_quantize(x, residual, weight, bias, 1e-12)[0]
    for asymmetric in (False, True):
        grid = InputGrid(asymmetric=asymmetric)
        y, *quantized = operators.layernorm_quantize(*given, 1e-12, grid)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=2e-3, atol=2e-3)
        wanted = reference.quantize_rows(y.float().cpu(), asymmetric)
        for ours in (quantized, operators.quantize_rows(y, grid)):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, wanted, strict=True))


def test_attention_and_embedding_equal_the_reference():
    starts = torch.tensor([0, 5, 133, 133, 140, 652], dtype=torch.int32)
    fused = torch.randn(652, 3, 12, 64).half()
    query, key, value = fused.unbind(1)
    got = operators.attention(Heads(*(t.to(DEVICE) for t in (query, key, value, starts)), 512, 0.125))
    wanted = reference.attention(query, key, value, starts, 0.125)
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=5e-3, atol=5e-3)
    codes, packed = random_weight(100, 384, 4)
    scale, zero = torch.rand(100, 1), torch.randn(100, 1)
    ids = torch.randint(0, 100, (3, 9))
    table = PackedWeight(packed, scale.to(DEVICE), zero.to(DEVICE), None, 4, 384)
    rows = dispatch.embedding(ids.to(DEVICE), table)
    torch.testing.assert_close(rows.cpu(), reference.embedding(ids, codes, scale, zero))


def test_layers_run_inside_a_cuda_graph():
    _, packed = random_weight(768, 768, 4)
    scale = torch.rand(768, 1, device=DEVICE)
    weight = PackedWeight(packed, scale, torch.zeros_like(scale), None, 4, 768)
    x = torch.randn(16, 768, device=DEVICE).half()
    dispatch.linear(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.linear(x, weight)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, dispatch.linear(x, weight))


def test_tiles_are_measured_and_used():
    from qbert.kernels.gpu import tiles, tune

    best = tune.tune("matmul_a8", tokens=256, rows=768, columns=768, bits=4)
    assert best == tiles.choose_tile("matmul_a8", 200, 768, 768, 4, torch.cuda.get_device_name())


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_whole_encoders_eagerly_and_through_graphs(ranges):
    import transformers as tf

    import qbert
    from qbert.inference.gpu import GpuEncoder

    config = tf.BertConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=3, vocab_size=500
    )
    model = tf.BertModel(config).eval()
    draw = torch.Generator().manual_seed(0)

    def batch(size, length):
        mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=draw)
        return {"input_ids": torch.randint(5, 500, mask.shape, generator=draw), "attention_mask": mask.long()}

    bits = {"encoder.layer.0.attention.self.query": 2, "encoder.layer.1": 3, "embeddings": 4, "*": 8}
    data = [batch(4, 32)] if ranges == "static" else None
    config = qbert.BitsConfig(bits, activation_range=ranges)
    packed = qbert.pack(qbert.quantize_model(model, config, calibration_data=data))
    fast = qbert.optimize_for_inference(packed.to(DEVICE))
    slow = GpuEncoder(packed.to("cpu"))  # the kernels' slow twins
    assert fast.forward.graphs is not None
    for size, length in [(3, 40), (3, 40), (3, 40), (2, 37), (1, 1), (17, 300), (17, 300)]:
        given = batch(size, length)
        keep = given["attention_mask"].bool()
        expected = slow(**given)[0][keep]
        got = fast(**{k: v.to(DEVICE) for k, v in given.items()})[0]
        assert float((got[keep.to(DEVICE)].cpu() - expected).norm() / expected.norm()) < 0.02
        assert bool((got[~keep.to(DEVICE)] == 0).all())
    assert len(fast.forward.graphs) >= 2
    whole = {k: torch.ones_like(v) if "mask" in k else v for k, v in batch(8, 256).items()}
    for one in (whole, whole | batch(8, 256)):  # the second has padding where the last mask of its shape had none
        keep, expected = one["attention_mask"].bool(), slow(**one)[0]
        for mask_at in (DEVICE, DEVICE, DEVICE, "cpu"):
            got = fast(one["input_ids"].to(DEVICE), one["attention_mask"].to(mask_at))[0].cpu()
            assert float((got[keep] - expected[keep]).norm() / expected[keep].norm()) < 0.02
            assert bool((got[~keep] == 0).all())
    given = {k: v.to(DEVICE) for k, v in batch(17, 300).items()}
    first = fast(**given)[0]
    for _ in range(100):
        assert torch.equal(fast(**given)[0], first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            assert torch.equal(fast(**given)[0], first)
    half = qbert.optimize_for_inference(packed.to(DEVICE, torch.float16))
    error = (half(**given)[0].float() - first).norm() / first.norm()
    assert float(error) < 0.02


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_kernels_that_start_early_change_no_bit(ranges, monkeypatch):
    """Eagerly, captured and replayed, back to back: a kernel that did not wait would read what is not there yet."""
    import copy

    import transformers as tf

    import qbert

    config = tf.BertConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=2, vocab_size=500
    )
    model = tf.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(5, 500, (4, 100))
    data = [{"input_ids": ids}] if ranges == "static" else None
    config = qbert.BitsConfig(4, activation_range=ranges, range_method="minmax")
    packed = qbert.pack(qbert.quantize_model(model, config, calibration_data=data)).to(DEVICE, torch.float16)
    results = []
    for switch in ("0", "1"):
        monkeypatch.setenv("QBERT_PDL", switch)
        fast = qbert.optimize_for_inference(copy.deepcopy(packed))
        results += [fast(input_ids=ids[:1].to(DEVICE))[0] for _ in range(100)]
    assert all(torch.equal(y, results[0]) for y in results)
