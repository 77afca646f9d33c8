"""The GPU encoder path on CPU tensors, where its operators are their slow twins; what needs no GPU of its graphs."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertModel

import qbert
from qbert.inference import gpu as inference_gpu
from qbert.inference.forward import FastForward
from qbert.inference.gpu import Batch, GpuEncoder, fuse_for_gpu
from qbert.inference.graphs import MAX_GRAPH_TOKENS, Bucket, Buffers, GraphCache, Rows, as_tensor, bucket_of
from qbert.kernels.operands import FLOAT
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
    assert error(run(x, grid=FLOAT), expected) > 5e-4


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
            held = product.floats if operands == "e4m3" else product.whole
            assert (held is not None) == (way == "unpacked" and product.weight.bits[0] <= 4)
            assert product.floats is None or product.whole is None
        packed.forward = encoder
        got[way] = hidden(packed, batch)[batch["attention_mask"].bool()].float()
        del packed.__dict__["forward"]
    assert torch.equal(got["packed"], got["unpacked"]) if operands == "int8" else True
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
    eager = GpuEncoder(packed)
    packed.forward = GpuEncoder(packed, graphs=GraphCache(eager._run, capture=Recorder()), operands="e4m3")
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


def test_tokens_are_gathered_and_scattered_back() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    batch = Batch.of((3, 3), mask, torch.device("cpu"))
    assert batch.kept is not None and batch.kept.tolist() == [0, 2, 7, 8]
    assert as_tensor(batch.starts).tolist() == [0, 2, 2, 4] and batch.longest == 2
    x = torch.randn(3, 3, 2)
    assert torch.equal(batch.scatter(batch.gather(x)), x * mask[..., None])
    whole = Batch.of((3, 3), torch.ones(3, 3), torch.device("cpu"))
    assert (
        whole.kept is None
        and as_tensor(whole.starts).tolist() == [0, 3, 6, 9]
        and torch.equal(whole.gather(x).view_as(x), x)
    )


def test_buckets_hold_their_shapes_and_waste_little() -> None:
    for tokens in [*range(1, 3000), 16384, 16385, 40000]:
        bucket = bucket_of(tokens, 5, 100)
        assert tokens <= bucket.tokens <= max(16, tokens * 9 // 8 + 16)
        assert bucket_of(bucket.tokens, 5, 100) == bucket  # a full bucket stays one
    assert bucket_of(4096, 32, 128) == Bucket(4096, 32, 128)
    assert bucket_of(1, 1, 1) == Bucket(16, 1, 16)
    assert len({bucket_of(t, 8, 128) for t in range(1025, 2049)}) == 8


class Recorder:
    """Stands for capturing: counts captures, and runs the real function on padded buffers as a graph would.

    With `run_once` what was computed at the capture is given again and again, and no operator runs inside.
    """

    def __init__(self, run_once: bool = False) -> None:
        self.run_once = run_once
        self.captured: list[Bucket] = []

    def __call__(self, run: Any, bucket: Bucket, inputs: Any, starts: Any) -> Any:
        if bucket.tokens == 48:
            raise RuntimeError("out of memory\nand more")
        self.captured.append(bucket)

        buffers = Buffers(bucket, inputs, starts)
        buffers.fill(inputs, starts)
        output = run(buffers.inputs, buffers.starts, bucket.longest) if self.run_once else torch.empty(0)

        def replay(inputs: Any, starts: Any) -> torch.Tensor:
            buffers.fill(inputs, starts)
            return output if self.run_once else run(buffers.inputs, buffers.starts, bucket.longest)

        return replay


def test_a_bucket_is_captured_at_its_second_use_and_the_oldest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def run(inputs: Any, starts: torch.Tensor, longest: int) -> torch.Tensor:
        calls.append(len(inputs[0]))
        return inputs[0] * 2.0

    capture = Recorder()
    graphs = GraphCache(run, limit=2, capture=capture)

    def call(tokens: int) -> None:
        x = torch.randn(tokens, 3)
        assert torch.equal(graphs((x,), torch.tensor([0, tokens], dtype=torch.int32), tokens), x * 2)

    for tokens in (10, 12, 100):
        call(tokens)
    assert calls == [10, 16, 100] and len(capture.captured) == 1  # the first use ran eagerly
    call(99)
    call(14)
    assert [b.tokens for b in capture.captured] == [16, 112] and len(graphs) == 2
    call(200)
    call(200)  # 112 was used longest ago
    call(13)
    assert [b.tokens for b in capture.captured] == [16, 112, 208] and calls[-1] == 16
    call(100)
    assert [b.tokens for b in capture.captured] == [16, 112, 208, 112]
    with caplog.at_level(logging.WARNING, logger="qbert.inference.graphs"):
        for _ in range(3):
            call(45)
    assert caplog.text.count("without a CUDA graph: out of memory") == 1 and calls[-3:] == [45, 45, 45]
    before = len(capture.captured)
    for _ in range(2):
        call(MAX_GRAPH_TOKENS + 1)
        call(0)
    assert len(capture.captured) == before


def test_the_encoder_gives_the_same_through_padded_buckets() -> None:
    packed = packed_encoder("bert", calibrated=True)
    eager = GpuEncoder(packed)
    capture = Recorder()
    through = GpuEncoder(packed, graphs=GraphCache(eager._run, capture=capture))
    batch = inputs_for("bert", 3, 11)
    expected = eager(**batch)[0]
    for _ in range(2):
        assert torch.equal(through(**batch)[0], expected)
    assert capture.captured == [Bucket(32, 4, 16)]


def test_a_graph_is_given_only_what_its_buffers_do_not_hold() -> None:
    bucket, written = Bucket(16, 2, 16), []

    def rows(count: int, value: int, key: Any) -> Rows:
        return Rows(count, torch.zeros(0), lambda out: written.append(value) or out.fill_(value), key)

    buffers = Buffers(bucket, (rows(3, 1, "a"),), torch.zeros(2, dtype=torch.int32))
    for count, value, key in [(3, 1, "a"), (3, 1, "a"), (4, 1, "a"), (4, 2, "b"), (4, 3, None), (4, 2, "b")]:
        buffers.fill((rows(count, value, key),), torch.tensor([0, count], dtype=torch.int32))
    assert written == [1, 1, 2, 3, 2] and buffers.inputs[0].tolist() == [2.0] * 4 + [0.0] * 12
    assert buffers.starts.tolist() == [0, 4, 4]  # the sequence that the bucket has too many is empty


class Operators(TorchDispatchMode):
    """Records the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_through_a_graph_makes_one_copy_in_and_one_out() -> None:
    """Token ids of one shape again: nothing else is written, and no result is written to by a later call."""
    packed = packed_encoder("bert", calibrated=True)
    packed.pooler = None
    eager = GpuEncoder(packed)
    through = GpuEncoder(packed, graphs=GraphCache(eager._run, capture=Recorder(run_once=True)))
    ids = torch.randint(5, 100, (2, 16))
    for _ in range(3):
        kept = through(input_ids=ids)[0]
    assert not kept.is_inference() and torch.equal(kept, eager(input_ids=ids)[0])
    with Operators() as seen:
        other = through(input_ids=ids)[0]
    moved = [name for name in seen.names if not name.startswith(("aten.view", "aten.slice", "aten.detach"))]
    assert moved == ["aten.copy_.default", "aten.clone.default"] and other.data_ptr() != kept.data_ptr()
