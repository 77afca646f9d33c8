"""The GPU encoder path on CPU tensors, where its operators are their slow twins; what needs no GPU of its graphs."""

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from encoders import build, inputs_for
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, BertModel
from transformers.utils import ModelOutput

import qbert
from qbert.inference import gpu as inference_gpu
from qbert.inference.cpu import _run_three_times
from qbert.inference.forward import FastForward
from qbert.inference.gpu import Batch, GpuEncoder, Packing, Rows, fuse_for_gpu
from qbert.inference.graphs import MAX_GRAPH_TOKENS, Bucket, Buffers, GraphCache, bucket_of
from qbert.kernels import operators
from qbert.kernels.operands import FLOAT, E4m3Weight, Heads, Spans
from qbert.layers.linear import PackedLinear
from qbert.packing import pack, unpack

FUSED = ("bert", "roberta", "electra")


def packed_encoder(family: str, calibrated: bool = False, bits: Any = 4, **settings: Any) -> Any:
    model = AutoModel.from_config(build(family).config).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    data = [inputs_for(family, 4, 12) for _ in range(4)] if calibrated else None
    return pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **settings), calibration_data=data))


def hidden(model: Any, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs)[0]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static", "asymmetric, some static"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_layers_give_the_outputs_of_the_packed_model(family: str, ranges: str) -> None:
    mixed: dict[str, Any] = {
        "encoder.layer.0.attention.self.query": 2,
        "encoder.layer.0.attention.self.value": 8,
        "embeddings": 4,
        "*": 3,
    }
    if ranges == "asymmetric, some static":  # these kernels take offsets and write static codes, or the reverse
        mixed |= {"*.output.dense": {"bits": 3, "activation_range": "static"}}
        mixed |= {"encoder.layer.1.attention.self.*": {"bits": 3, "activation_range": "static"}}
    packed = packed_encoder(family, "static" in ranges, mixed, activation_range=ranges.partition(",")[0])
    batch = inputs_for(family, 3, 11)
    if family == "bert":
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    expected = hidden(packed, batch)
    encoder = GpuEncoder(packed)
    assert all(encoder.layers) and encoder.embeddings is not None and encoder.graphs is None
    assert encoder.grids[0].asymmetric == ranges.startswith("asymmetric")
    assert [grid.scale > 0 for grid in encoder.grids] == [ranges == "static", "static" in ranges, False]
    packed.forward = encoder
    keep = batch["attention_mask"].bool()
    got = hidden(packed, batch)
    assert error(got[keep], expected[keep]) < 0.02
    assert bool((got[~keep] == 0).all())


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_a_layer_by_itself_tells_its_kernel_how_its_input_is_quantized(ranges: str) -> None:
    data = [{"input": torch.randn(50, 48)}] if ranges == "static" else None
    config = qbert.BitsConfig(4, activation_range=ranges)
    layer = pack(qbert.quantize_model(nn.Sequential(nn.Linear(48, 24)), config, calibration_data=data))[0]
    x = torch.randn(40, 48) + torch.arange(40)[:, None] / 4
    with torch.no_grad():
        expected, run = layer(x), layer._gpu_linear()
    assert error(run(x), expected) < 1e-5
    run.grid = FLOAT
    assert error(run(x), expected) > 5e-4


def in_e4m3(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """x rounded to e4m3 codes of the range -largest..largest, and back."""
    step = largest / 448
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("family", FUSED)
def test_e4m3_operands_are_the_weights_with_inputs_in_eight_bit_floats(family: str, ranges: str) -> None:
    """Against the same weights with inputs that hooks round; a product with 8-bit weights keeps int8 input."""
    bits = {"encoder.layer.0.attention.self.query": 2, "encoder.layer.1.intermediate.dense": 8, "embeddings": 4, "*": 3}
    torch.manual_seed(1)
    packed = packed_encoder(family, ranges == "static", bits, activation_range=ranges)
    torch.manual_seed(1)
    expected_from = packed_encoder(family, False, bits, activation_bits=None)
    ranges_of = dict(packed.named_modules())

    def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = ranges_of[name]
        if layer.input_scale is None:
            largest = x.abs().amax(-1, keepdim=True)
            return (x / largest * 127).round() / 127 * largest if layer.layout.bits == 8 else in_e4m3(x, largest)
        scale, zero = layer.input_scale, layer.input_zero
        if layer.layout.bits == 8:
            return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
        return in_e4m3(x, scale * torch.maximum(128 + zero, 127 - zero))

    for name, layer in expected_from.encoder.named_modules(prefix="encoder"):
        if isinstance(layer, PackedLinear):
            layer.register_forward_pre_hook(lambda _, given, name=name: (rounded(name, given[0]),))
    batch = inputs_for(family, 3, 11)
    keep = batch["attention_mask"].bool()
    expected = hidden(expected_from, batch)[keep]
    encoder = GpuEncoder(packed, operands="e4m3")
    assert [p.grid.codes_dtype == torch.int8 for p in (encoder.layers[0].ffn_in, encoder.layers[1].ffn_in)] == [
        False,
        True,
    ]
    packed.forward = encoder
    assert error(hidden(packed, batch)[keep], expected) < 0.02


@pytest.mark.parametrize("operands", ["int8", "e4m3"])
@pytest.mark.parametrize("ranges", ["dynamic", "static", "asymmetric"])
@pytest.mark.parametrize("bits", [3, {"*.intermediate.dense": 8, "*": 4}, {"*.1.output.dense": 8, "*": 2}])
def test_products_with_unpacked_weights_give_what_packed_ones_give(
    bits: Any, ranges: str, operands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In int8 the very same; between products of eight-bit floats GELU, residual and codes are the row kernels'."""
    packed = packed_encoder("bert", ranges == "static", bits, activation_range=ranges).half()
    batch, got = inputs_for("bert", 3, 11), {}
    for way in ("packed", "unpacked"):
        monkeypatch.setenv("QBERT_WEIGHTS", way)
        encoder = GpuEncoder(packed, operands=operands)
        products = [p for layer in encoder.layers for p in (layer.attention_output, layer.ffn_in, layer.ffn_out)]
        for product in [*products, *(layer.qkv for layer in encoder.layers)]:
            held = product.unpacked
            assert (held is not None) == (way == "unpacked" and product.weight.bits[0] <= 4)
            assert held is None or isinstance(held, E4m3Weight) == (operands == "e4m3")
        packed.forward = encoder
        got[way] = hidden(packed, batch)[batch["attention_mask"].bool()].float()
        del packed.__dict__["forward"]
    if operands == "int8":
        assert torch.equal(got["packed"], got["unpacked"])
    assert error(got["unpacked"], got["packed"]) < 3e-3


def test_operands_that_a_device_does_not_multiply_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="operands='e4m3' is for GPUs"):
        qbert.optimize_for_inference(packed_encoder("bert"), operands="e4m3")
    with pytest.raises(ValueError, match="operands must be 'int8' or 'e4m3', got 'fp8'"):
        fuse_for_gpu(packed_encoder("bert"), "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or later, this one has 8\.6"):
        inference_gpu.check_operands("e4m3", torch.device("cuda"))


def test_any_mask_no_mask_and_other_dtypes() -> None:
    packed = packed_encoder("bert")
    ids = torch.randint(5, 100, (5, 9))
    masks = [None, torch.ones_like(ids), (torch.arange(45).view(5, 9) % 3 > 0).long()]
    masks.append(torch.tensor([[0] * 8 + [1]] * 5))  # padded on the left
    masks.append(torch.cat([torch.zeros(1, 9), torch.ones(4, 9)]).long())  # nothing but padding in a row
    for dtype, tolerance in ((torch.float32, 0.02), (torch.float16, 0.02), (torch.bfloat16, 0.05)):
        packed = packed.to(dtype)
        for mask in masks:
            batch = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
            keep = torch.ones(5, 9).bool() if mask is None else mask.bool()
            packed.__dict__.pop("forward", None)
            expected = hidden(packed, batch)[keep]
            packed.forward = GpuEncoder(packed)
            got = hidden(packed, batch)
            assert got.dtype == dtype and error(got[keep].float(), expected.float()) < tolerance
            assert bool((got[~keep] == 0).all())


def test_layers_and_embeddings_that_do_not_fit_run_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    bits = {"encoder.layer.0": {"bits": 4, "activation_bits": None}, "embeddings": 32, "*": 4}
    packed = packed_encoder("bert", bits=bits)
    batch = inputs_for("bert", 3, 11)
    expected, keep = hidden(packed, batch), batch["attention_mask"].bool()
    with caplog.at_level(logging.INFO, logger="qbert.inference.gpu"):
        encoder = GpuEncoder(packed)
    assert [layer is None for layer in encoder.layers] == [True, False] and encoder.embeddings is None
    assert "layer 0 of BertModel is not fused: some of its inputs are in float" in caplog.text
    assert "the embeddings of BertModel are not fused" in caplog.text
    packed.forward = encoder
    for attention in ("sdpa", "eager"):
        packed.set_attn_implementation(attention)
        assert error(hidden(packed, batch)[keep], expected[keep]) < 0.02


def test_requests_that_the_fast_path_does_not_serve_get_the_slow_one() -> None:
    packed, batch = packed_encoder("bert"), inputs_for("bert")
    packed.set_attn_implementation("eager")
    with torch.no_grad():
        expected = packed(**batch, output_hidden_states=True, output_attentions=True)
        packed.forward = GpuEncoder(packed)
        got = packed(**batch, output_hidden_states=True, output_attentions=True)
        assert len(got.hidden_states) == 3 and torch.equal(got[0], expected[0])
        assert torch.equal(got.attentions[1], expected.attentions[1])
        assert isinstance(packed(**batch, return_dict=False), tuple)
        embeds = packed(inputs_embeds=torch.randn(1, 4, 48))[0]
    assert embeds.shape == (1, 4, 48)
    with pytest.raises(ValueError, match="600 tokens, but the model knows 512 positions"):
        hidden(packed, {"input_ids": torch.ones(1, 600, dtype=torch.long)})
    packed.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        packed(**batch)


def test_a_head_on_top_and_a_copy_work() -> None:
    model = build("bert").eval()
    packed = pack(qbert.quantize_model(model, 4))
    batch = inputs_for("bert")
    with torch.no_grad():
        expected = packed(**batch).logits
        packed.bert.forward = GpuEncoder(packed.bert)
        assert error(packed(**batch).logits, expected) < 0.05
        twin = copy.deepcopy(packed)
        assert twin.bert.forward.base is twin.bert and torch.equal(twin(**batch).logits, packed(**batch).logits)


def optimized(monkeypatch: pytest.MonkeyPatch, packed: Any) -> Any:
    """What `optimize_for_inference` makes of `packed` on a GPU, on the kernels' twins."""
    monkeypatch.setattr(inference_gpu, "implementation", lambda device: "triton")
    fuse_for_gpu(packed)
    assert isinstance(packed.forward, GpuEncoder)
    return packed


def test_an_optimized_model_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = optimized(monkeypatch, packed_encoder("bert"))
    for model in (packed, nn.Sequential(packed)):
        with pytest.raises(TypeError, match=r"cannot be pickled.*optimize_for_inference"):
            pickle.dumps(model)


def test_a_copy_prepares_its_own_layers_and_graphs() -> None:
    packed, batch = packed_encoder("bert"), inputs_for("bert")
    packed.forward = GpuEncoder(packed, capture=Recorder(), operands="e4m3")
    expected, twin = hidden(packed, batch), copy.deepcopy(packed)
    assert set(vars(twin.forward)) == {"base", "operands", "skip_padding"} and twin.forward.base is twin
    hidden(twin, batch)
    made, first = twin.forward, packed.forward
    assert made.operands == "e4m3" and made.graphs is None and made._norm is not first._norm
    assert not {id(layer) for layer in made.layers} & {id(layer) for layer in first.layers}
    assert torch.equal(hidden(packed, batch), expected)


def test_unpacking_and_dequantizing_take_the_fast_forward_out(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_encoder("bert")
    plain = {"unpacked": unpack(packed), "dequantized": copy.deepcopy(packed).dequantize()}
    fast, batch = optimized(monkeypatch, packed), inputs_for("bert")
    got = {"unpacked": unpack(fast), "dequantized": copy.deepcopy(fast).dequantize()}
    for how, model in got.items():
        assert not any(isinstance(m.__dict__.get("forward"), FastForward) for m in model.modules())
        assert torch.equal(hidden(model, batch), hidden(plain[how], batch))
    assert isinstance(fast.forward, GpuEncoder)


def test_an_export_finds_the_forward_it_stands_for() -> None:
    packed = packed_encoder("bert")
    assert GpuEncoder(packed).__code__ is BertModel.forward.__code__


def test_why_nothing_is_fused_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, logger="qbert.inference.gpu"):
        fuse_for_gpu(packed_encoder("bert"))
        monkeypatch.setattr(inference_gpu, "implementation", lambda device: "triton")
        fuse_for_gpu(packed_encoder("mobilebert"))
        relu = AutoModel.from_config(build("bert", hidden_act="relu").config)
        fuse_for_gpu(pack(qbert.quantize_model(relu, 4)))
        fuse_for_gpu(packed_encoder("bert", input_group_size=24))
        good = packed_encoder("bert")
        fuse_for_gpu(good)
    assert isinstance(good.forward, GpuEncoder)
    for reason in (
        "do not run on cpu",
        "a MobileBertLayer is fused on CPUs only",
        "not the exact GELU",
        "input groups",
    ):
        assert reason in caplog.text


class ShiftedModel(BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output


def test_what_only_looks_like_transformers_own_is_not_replaced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_gpu, "implementation", lambda device: "triton")
    batch = inputs_for("bert")
    keep = batch["attention_mask"].bool()
    model, encoder, embeddings = (packed_encoder("bert") for _ in range(3))
    model.__class__ = ShiftedModel
    own = encoder.encoder.forward
    encoder.encoder.forward = lambda x, **kwargs: own(x.neg(), **kwargs)
    table = embeddings.embeddings
    table.forward = lambda **kwargs: type(table).forward(table, **kwargs).flip(1)
    for packed, reason in (
        (model, f"ShiftedModel is not fused: ShiftedModel of {__name__} is not a class of transformers"),
        (encoder, "BertModel is not fused: the forward of its BertEncoder was replaced"),
        (embeddings, "the embeddings of BertModel are not fused: the forward of its BertEmbeddings was replaced"),
    ):
        expected = hidden(packed, batch)
        with caplog.at_level(logging.INFO, logger="qbert.inference.gpu"):
            fuse_for_gpu(packed)
        assert reason in caplog.text
        assert isinstance(packed.forward, GpuEncoder) == (packed is embeddings)
        assert error(hidden(packed, batch)[keep], expected[keep]) < 0.02


def test_padding_that_may_be_read_is_what_the_packed_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As query expansion reads it: outputs at masked positions are those of the packed model, not zeros."""
    monkeypatch.setattr(inference_gpu, "implementation", lambda device: "triton")
    packed, batch = packed_encoder("bert"), inputs_for("bert")
    assert not batch["attention_mask"].bool().all()
    expected = hidden(packed, batch)
    fuse_for_gpu(packed, skip_padding=False)
    assert isinstance(packed.forward, GpuEncoder)
    torch.testing.assert_close(hidden(packed, batch), expected, rtol=1e-4, atol=1e-4)
    whole = {"input_ids": batch["input_ids"]}
    assert hidden(packed, whole).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.bfloat16])
def test_a_packing_is_where_a_mask_is_not_zero(dtype: torch.dtype) -> None:
    """Beside torch's own functions; its layout is the same in the memory of a graph."""
    for mask in (torch.rand(5, 9) > 0.4, torch.arange(9).expand(5, 9) > 6, torch.arange(45).view(5, 9) == 20):
        packing = Packing.of(mask.to(dtype))
        assert packing is not None
        kept, lengths = mask.flatten().nonzero().squeeze(1), mask.sum(1)
        starts = [0, *lengths.cumsum(0).tolist()]
        assert packing.kept.tolist() == kept.tolist() and packing.longest == int(lengths.max())
        assert packing.starts.tolist() == starts
        bucket = bucket_of(len(kept), 5, packing.longest)
        buffers, count = Buffers(bucket, (kept,)), len(kept)
        buffers.layout.copy_(packing.laid_out(bucket, 9))
        assert torch.equal(buffers.kept[:count], kept) and torch.equal(buffers.places[:count], kept % 9)
        assert buffers.starts.dtype == torch.int32
        assert buffers.starts.tolist() == starts + [count] * (bucket.sequences - 5)
    assert Packing.of(torch.ones(5, 9, dtype=dtype)) is None


def test_tokens_are_gathered_and_scattered_back() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    batch = Batch.of((3, 3), Packing.of(mask), torch.device("cpu"))
    assert batch.kept is not None and batch.kept.tolist() == [0, 2, 7, 8]
    assert batch.spans.starts.tolist() == [0, 2, 2, 4] and batch.spans[1:] == (2, False)
    x = torch.randn(3, 3, 2)
    assert torch.equal(batch.scatter(batch.gather(x)), x * mask[..., None])
    ids, _, places = batch.inputs(Rows((3, 3), (mask * 5, None), None))
    assert ids.tolist() == [5] * 4 and places.tolist() == [0, 2, 1, 2]
    whole = Batch.of((3, 3), None, torch.device("cpu"))
    assert whole.kept is None and whole.spans.starts.tolist() == [0, 3, 6, 9]
    assert torch.equal(whole.gather(x).view_as(x), x)


def test_buckets_hold_their_shapes_and_waste_little() -> None:
    for tokens in [*range(1, 3000), 16384, 16385, 40000]:
        bucket = bucket_of(tokens, 5, 100)
        assert tokens <= bucket.tokens <= max(16, tokens * 9 // 8 + 16)
        assert bucket_of(bucket.tokens, 5, 100) == bucket  # a full bucket stays one
    assert bucket_of(4096, 32, 128) == Bucket(4096, 32, 128)
    assert bucket_of(1, 1, 1) == Bucket(16, 1, 16)
    assert len({bucket_of(t, 8, 128) for t in range(1025, 2049)}) == 8


class Recorder:
    """Stands for capturing: counts captures, and runs the real function on the buffers as a graph would.

    With `run_once` what the first replay computes is given again and again, and no operator runs in the others.
    """

    def __init__(self, run_once: bool = False) -> None:
        self.run_once = run_once
        self.captured: list[Bucket] = []

    def __call__(self, run: Any, bucket: Bucket, buffers: Buffers) -> Any:
        if bucket.tokens == 48:
            raise RuntimeError("out of memory\nand more")
        self.captured.append(bucket)
        spans, done = Spans(buffers.starts, bucket.longest, bucket.uniform), []
        output = torch.empty_like(run(buffers.inputs, spans))

        def replay() -> None:
            if not done or not self.run_once:
                done.append(output.copy_(run(buffers.inputs, spans)))

        return replay, output


def test_a_bucket_is_captured_at_its_second_use_and_the_oldest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    capture = Recorder()
    graphs = GraphCache(lambda inputs, spans: inputs[0] * 2.0, limit=2, capture=capture)

    def call(tokens: int) -> bool:
        x = torch.randn(tokens, 3)
        with graphs.lock:
            graph = graphs.find(bucket_of(tokens, 1, tokens), 0, lambda: (x,))
            if graph is not None:
                graph.buffers.data[0][:tokens] = x
                graph.replay()
                assert torch.equal(graph.output[:tokens], x * 2)
                graphs.shortcuts[tokens] = graph
        return graph is not None

    assert [call(tokens) for tokens in (10, 12, 100)] == [False, True, False] and len(capture.captured) == 1
    assert call(99) and call(14)
    assert (
        [b.tokens for b in capture.captured] == [16, 112] and len(graphs) == 2 and set(graphs.shortcuts) == {12, 14, 99}
    )
    assert not call(200) and call(200)  # 112 was used longest ago
    assert set(graphs.shortcuts) == {200}
    assert call(13)
    assert [b.tokens for b in capture.captured] == [16, 112, 208]
    assert call(100)
    assert [b.tokens for b in capture.captured] == [16, 112, 208, 112]
    graphs.used(graphs.shortcuts[100])
    with caplog.at_level(logging.WARNING, logger="qbert.inference.graphs"):
        assert not any(call(45) for _ in range(3))
    assert caplog.text.count("without a CUDA graph: out of memory") == 1
    before = len(capture.captured)
    for _ in range(2):
        assert not call(MAX_GRAPH_TOKENS + 1)
    assert len(capture.captured) == before


def test_the_encoder_gives_the_same_through_padded_buckets() -> None:
    packed = packed_encoder("bert", calibrated=True)
    eager = GpuEncoder(packed)
    capture = Recorder()
    through = GpuEncoder(packed, capture=capture)
    batch = inputs_for("bert", 3, 11)
    expected = eager(**batch)[0]
    for _ in range(2):
        assert torch.equal(through(**batch)[0], expected)
    assert capture.captured == [Bucket(32, 4, 16)]


@pytest.mark.parametrize("family", FUSED)
def test_batches_of_all_kinds_share_the_buffers_of_a_graph(family: str) -> None:
    """In random order, with and without padding, types and positions: what one leaves behind is no other's."""
    packed = packed_encoder(family, calibrated=True)
    eager, capture = GpuEncoder(packed), Recorder()
    through, draw = GpuEncoder(packed, capture=capture), torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=draw)

    for _ in range(40):
        shape = [(2, 16), (2, 15), (1, 30), (2, 20)][int(integers(4, 1))]
        batch: dict[str, torch.Tensor] = {"input_ids": integers(90, *shape) + 2}
        if integers(3, 1):
            lengths = integers(3, shape[0], 1) + shape[1] - 2
            mask = torch.arange(shape[1]) < lengths
            batch["attention_mask"] = mask.long() if integers(2, 1) else mask.flip(1)
            batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 1)
        if family == "bert" and integers(2, 1):
            batch["token_type_ids"] = integers(2, *(shape if integers(2, 1) else (1, shape[1])))
        if not integers(4, 1):
            batch["position_ids"] = integers(30, *(shape if integers(2, 1) else (1, shape[1])))
        if not integers(4, 1):
            batch["input_ids"] = batch["input_ids"].int()
        assert torch.equal(through(**batch)[0], eager(**batch)[0]), batch
    assert 2 <= len(capture.captured) <= 4


def test_long_sequences_of_one_length_are_told_apart_where_they_fill_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that attention over them may be another; outputs are those of the packed model either way."""
    seen: list[tuple[int, bool]] = []
    attend = operators.attention

    def noted(heads: Heads, *rest: Any) -> torch.Tensor:
        seen.append((heads.longest, heads.uniform))
        return attend(heads, *rest)

    monkeypatch.setattr(operators, "attention", noted)
    packed, capture = packed_encoder("bert", calibrated=True), Recorder()
    through = GpuEncoder(packed, capture=capture)
    half = torch.arange(256) < 200
    for shape, mask, bucket in (
        ((1, 256), None, Bucket(256, 1, 256, True)),
        ((2, 256), None, Bucket(512, 2, 256, True)),
        ((1, 257), None, Bucket(288, 1, 512)),
        ((1, 256), half[None], Bucket(208, 1, 256)),
        ((2, 128), None, Bucket(256, 2, 128)),
    ):
        batch = {"input_ids": torch.randint(5, 100, shape)} | ({} if mask is None else {"attention_mask": mask})
        keep = torch.ones(shape).bool() if mask is None else mask
        expected, longest = hidden(packed, batch)[keep], int(keep.sum(1).max())
        for spans in ((longest, bucket.uniform), (bucket.longest, bucket.uniform)):  # eagerly, and then captured
            seen.clear()
            assert error(through(**batch)[0][keep], expected) < 0.02
            assert set(seen) == {spans}
        assert capture.captured[-1] == bucket


def test_shapes_that_are_warmed_up_have_their_graphs() -> None:
    packed, capture = packed_encoder("bert"), Recorder()
    packed.forward = GpuEncoder(packed, capture=capture)
    for shape in ((2, 16), (1, 256)):
        _run_three_times(packed, *shape)
    assert capture.captured == [Bucket(32, 2, 16), Bucket(256, 1, 256, True)]
    for shape in ((2, 16), (1, 256)):
        hidden(packed, {"input_ids": torch.randint(5, 100, shape)})
    assert len(capture.captured) == 2


def test_embeddings_that_are_not_fused_go_through_graphs_too() -> None:
    packed = packed_encoder("bert", bits={"embeddings": 32, "*": 4})
    eager, through = GpuEncoder(packed), GpuEncoder(packed, capture=Recorder())
    whole = {"input_ids": torch.randint(5, 100, (4, 16))}
    for batch in (whole, inputs_for("bert", 3, 11)):
        for _ in range(3):
            assert torch.equal(through(**batch)[0], eager(**batch)[0])
    assert through.embeddings is None and through.graphs is not None and len(through.graphs) == 2


def test_threads_take_turns_at_the_buffers_of_a_graph() -> None:
    packed = packed_encoder("bert", calibrated=True)
    eager, through = GpuEncoder(packed), GpuEncoder(packed, capture=Recorder())
    batches = [{"input_ids": torch.randint(5, 100, (2, 16))} for _ in range(8)]
    expected = [eager(**batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda batch: through(**batch)[0], batches))
            assert all(map(torch.equal, got, expected))


class Operators(TorchDispatchMode):
    """Records the names of all operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        if name not in ("view", "slice", "detach", "flatten", "resolve_conj", "resolve_neg", "lift_fresh", "to"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


_IDS, _LEFT_OUT = torch.randint(5, 100, (2, 16)), torch.arange(32).view(2, 16) < 29


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["copy_", "clone"]),
        ({"attention_mask": torch.ones(2, 16)}, ["ne", "copy_", "clone"]),
        ({"attention_mask": torch.ones(2, 16, dtype=torch.int64)}, ["copy_", "clone"]),
        ({"token_type_ids": torch.zeros(1, 16, dtype=torch.int64)}, ["copy_", "copy_", "clone"]),
        ({"attention_mask": _LEFT_OUT}, ["zeros", "copy_", "index_select", "new_zeros", "index_copy_"]),
    ],
    ids=["no mask", "a mask in float", "a mask", "types", "padding"],
)
def test_around_its_graph_a_call_copies_in_and_out_alone(family: str, more: Any, expected: list[str]) -> None:
    """Each operator but "zeros", which is on the host, is a launch; no result is written to by a later call."""
    if family == "roberta":  # whose positions are counted
        gathered = "index_select" if "index_select" in expected else "copy_"
        expected = [*expected, "ne", "cumsum", "mul_", "add_", gathered]
    packed = packed_encoder(family, calibrated=True)
    packed.pooler = None
    eager, through = GpuEncoder(packed), GpuEncoder(packed, capture=Recorder(run_once=True))
    for _ in range(4):
        kept = through(input_ids=_IDS, **more)[0]
    assert not kept.is_inference() and torch.equal(kept, eager(input_ids=_IDS, **more)[0])
    with Operators() as seen:
        other = through(input_ids=_IDS, **more)[0]
    assert sorted(seen.names) == sorted(expected) and other.data_ptr() != kept.data_ptr()


class Slow:
    """A mask whose way to the host takes time; notes what had run when it was asked for."""

    asked: ClassVar[list[int]] = []
    runs: ClassVar[list[Any]] = []

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask, self.before = mask.clone(), len(self.runs)

    takes_time = staticmethod(lambda mask: True)

    def arrived(self) -> torch.Tensor:
        self.asked.append(len(self.runs) - self.before)
        return self.mask


def test_a_mask_like_the_last_one_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last of its shape hid nothing, a graph is replayed meanwhile, in vain if this one hides something."""
    monkeypatch.setattr(inference_gpu, "Arriving", Slow)
    monkeypatch.setattr(Slow, "asked", [])
    monkeypatch.setattr(Slow, "runs", [])
    packed = packed_encoder("bert", calibrated=True)
    eager, through = GpuEncoder(packed), GpuEncoder(packed, capture=Recorder())
    run, ones = through._run, torch.ones(2, 16, dtype=torch.int64)
    monkeypatch.setattr(through.graphs, "run", lambda *given: Slow.runs.append(1) or run(*given))
    for mask, ahead in (
        (ones, []),  # eagerly
        (ones, [2]),  # captured, which runs once, and replayed
        (ones, [1]),
        (_LEFT_OUT.long(), [1]),  # in vain
        (_LEFT_OUT.long(), []),
        (ones, []),
        (ones, [1]),
        (ones[:1], []),
    ):
        Slow.asked.clear()
        batch = {"input_ids": _IDS[: len(mask)], "attention_mask": mask}
        assert torch.equal(through(**batch)[0], eager(**batch)[0]) and Slow.asked == ahead
    assert eager._unpadded == through._unpadded == {(2, 16), (1, 16)}


def test_a_model_that_moved_leaves_its_graphs() -> None:
    """They read the memory where its norms were, and give its old dtype."""
    packed = packed_encoder("bert", calibrated=True)
    packed.forward = GpuEncoder(packed, capture=Recorder(run_once=True))
    batch = {"input_ids": torch.randint(5, 100, (2, 16))}
    for dtype in (torch.float32, torch.float16, torch.float32):
        packed = packed.to(dtype)
        expected = GpuEncoder(packed)(**batch)[0]
        for _ in range(3):
            assert torch.equal(hidden(packed, batch), expected) and expected.dtype == dtype
    assert len(packed.forward.graphs) == 1


def test_a_parameter_that_changed_is_noticed_by_a_later_call() -> None:
    batch = inputs_for("bert")
    for name in ("encoder.layer.1.intermediate.dense.bias", "embeddings.LayerNorm.weight"):
        packed = packed_encoder("bert")
        packed.forward = GpuEncoder(packed, capture=Recorder())
        for _ in range(3):
            hidden(packed, batch)
        with torch.no_grad():
            packed.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match=f"{name} was changed after qbert.optimize_for_inference"):
            for _ in range(32):
                hidden(packed, batch)


def test_what_was_plain_before_is_asked_again_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, batch = packed_encoder("bert"), inputs_for("bert")
    packed.set_attn_implementation("eager")
    packed.forward = GpuEncoder(packed, capture=Recorder())
    called = []
    packed.register_forward_hook(lambda *_: called.append(1))
    for _ in range(3):
        assert packed(**batch, return_dict=True, output_attentions=None).hidden_states is None
    for name in ("output_hidden_states", "output_attentions"):
        monkeypatch.setattr(packed.config, name, True)
        got = packed(**batch)
        assert len(got.hidden_states if "hidden" in name else got.attentions) >= 2
        monkeypatch.setattr(packed.config, name, False)
        assert len(packed(**batch)) == 2 and len(packed(**batch, output_hidden_states=True)) == 3
    other = copy.deepcopy(packed.config)
    other.return_dict = False
    monkeypatch.setattr(packed, "config", other)
    assert isinstance(packed(**batch), tuple) and isinstance(packed(**batch, return_dict=True), ModelOutput)
    assert len(called) == 11
    packed.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        packed(**batch)


def test_an_output_is_the_one_that_its_class_makes() -> None:
    packed, batch = packed_encoder("bert"), inputs_for("bert")
    got = GpuEncoder(packed)(**batch)
    wanted = type(got)(last_hidden_state=got[0], pooler_output=got[1])
    assert list(got.keys()) == list(wanted.keys()) and got.to_tuple() == wanted.to_tuple()
    assert repr(got) == repr(wanted) and got.attentions is None
    assert [id(t) for t in tree_leaves(got)] == [id(t) for t in tree_leaves(wanted)]
    assert torch.equal(pickle.loads(pickle.dumps(got)).pooler_output, got[1])
    packed.pooler = None
    assert list(GpuEncoder(packed)(**batch).keys()) == ["last_hidden_state"]


def test_positions_are_counted_as_the_embeddings_count_them() -> None:
    packed = packed_encoder("roberta")
    ids = torch.tensor([[0, 7, 1, 5, 1], [1, 1, 0, 9, 2]])
    embeddings = GpuEncoder(packed).embeddings
    assert embeddings is not None
    wanted = packed.embeddings.create_position_ids_from_input_ids(ids, packed.embeddings.padding_idx)
    got = embeddings.own_positions(ids, None)
    assert got is not None and torch.equal(got, wanted)


def test_numbers_of_rows_that_are_no_integers_are_refused_as_by_the_model() -> None:
    packed = packed_encoder("bert")
    packed.forward = GpuEncoder(packed, capture=Recorder())
    batch = {"input_ids": torch.randint(5, 100, (2, 16))}
    for _ in range(3):
        hidden(packed, batch)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        with pytest.raises((RuntimeError, TypeError, IndexError)):
            hidden(packed, batch | {name: torch.ones(2, 16)})
