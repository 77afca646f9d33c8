"""`optimize_for_inference`: the fast path computes what the packed layers do, for every family, mask and request."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_twin import assert_compiled_is_uncompiled
from encoders import FAMILIES, build, inputs_for
from tiny_tasks import tiny_encoder
from torch import nn
from transformers import AutoModel, DebertaConfig

import qbert
from qbert.encoders.parts import LayerParts
from qbert.inference import cpu as inference
from qbert.inference.chosen import ChosenLayers
from qbert.inference.cpu import FusedEncoder, optimize_for_inference
from qbert.inference.cpu_layers import FusedLayers
from qbert.inference.cpu_model import FusedModel
from qbert.inference.engines import INT8, reason_not
from qbert.kernels.cpu.gemm import available_engine, saturates
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.packing import pack

FUSED = ("bert", "roberta", "electra", "distilbert", "mpnet")
# With float activations nothing is rounded, and the fast path must agree with the slow one to float precision.
EXACT = {"activation_bits": None}


def hidden(model: Any, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs)[0]


def encoder(family: str, **settings: Any) -> Any:
    model = AutoModel.from_config(build(family).config).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        if norm.bias is not None:
            nn.init.normal_(norm.bias, 0, 0.3)
    first = "transformer.layer.0" if family == "distilbert" else "encoder.layer.0"
    bits = {first: 3, "*": 4} if family in FUSED else 4
    return pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **settings)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_outputs_of_the_packed_model(family: str) -> None:
    batch = inputs_for(family)
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    exact = encoder(family, **EXACT)
    fast = optimize_for_inference(exact)
    stack = getattr(fast, "transformer" if family == "distilbert" else "encoder", None)
    assert isinstance(getattr(stack, "forward", None), FusedEncoder) == (family in (*FUSED, "albert", "mobilebert"))
    assert isinstance(fast.forward, FusedModel) == (family in (*FUSED, "mobilebert"))
    if family in FUSED:
        assert len(stack.forward._stages) == 1 and isinstance(stack.forward._stages[0], ChosenLayers)
    assert torch.allclose(hidden(fast, batch)[keep], hidden(exact, batch)[keep], rtol=1e-4, atol=1e-5)
    packed = encoder(family)
    expected = hidden(packed, batch)[keep]
    error = (hidden(optimize_for_inference(packed), batch)[keep] - expected).norm() / expected.norm()
    assert error < 0.02
    packed = encoder(family, activation_range="asymmetric")
    expected = hidden(packed, batch)[keep]
    error = (hidden(optimize_for_inference(packed), batch)[keep] - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "midrise"])
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_every_layer_rounds_to_the_same_codes(bits: int, scheme: str, ranges: str) -> None:
    data = [{"input": torch.randn(50, 48)}] if ranges == "static" else None
    config = qbert.BitsConfig(bits, scheme=scheme, activation_range=ranges)
    student = qbert.quantize_model(nn.Sequential(nn.Linear(48, 24)), config, calibration_data=data)
    slow = pack(student)[0]
    assert isinstance(slow, PackedLinear)
    x = torch.randn(200, 48) * torch.logspace(-2, 2, 200)[:, None]
    expected = slow(x)
    slow.prepare()
    got = slow(x)
    # A value in a million lies so close to the border of two codes that float rounding decides which it takes.
    error = (got - expected).abs() / expected.abs().amax(1, keepdim=True).clamp_min(1e-4)
    assert (error.amax(1) <= 1e-5).float().mean() > 0.99 and error.max() < 0.05


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "quick_gelu"])
def test_other_activation_functions_are_fused_compiled_or_not(activation: str) -> None:
    config = build("bert").config
    config.hidden_act = activation
    packed = pack(qbert.quantize_model(AutoModel.from_config(config).eval(), qbert.BitsConfig(4, **EXACT)))
    fast, batch = optimize_for_inference(packed), inputs_for("bert")
    keep = batch["attention_mask"].bool()
    assert isinstance(fast.forward, FusedModel)
    assert torch.allclose(hidden(fast, batch)[keep], hidden(packed, batch)[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric"])
def test_the_compiled_layers_are_their_uncompiled_twin(ranges: str) -> None:
    layers = FusedLayers([LayerParts.of(layer) for layer in encoder("bert", activation_range=ranges).encoder.layer])
    assert_compiled_is_uncompiled(layers)


@pytest.mark.parametrize("family", FUSED)
def test_fused_embeddings_are_the_models_own(family: str) -> None:
    packed = encoder(family, **EXACT)
    fast = optimize_for_inference(packed)
    assert fast.forward._embed is not None
    ids, types = torch.randint(5, 100, (3, 9)), torch.randint(0, 2, (3, 9))
    ids[1, 5:] = 1  # padding, which RoBERTa and MPNet do not count
    requests = [{}, {"token_type_ids": types}] if hasattr(packed.embeddings, "token_type_embeddings") else [{}]
    with torch.no_grad():
        for more in requests:
            names = {"token_type_ids": more["token_type_ids"]} if more else {}
            got, expected = fast.forward._embedded(ids, **names), packed.embeddings(input_ids=ids, **names)
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
            assert torch.allclose(hidden(fast, {"input_ids": ids, **more}), hidden(packed, {"input_ids": ids, **more}),
                                  rtol=1e-4, atol=1e-5)  # fmt: skip
        with pytest.raises(IndexError):
            fast(input_ids=torch.tensor([[3, 100]]))
        with pytest.raises((IndexError, RuntimeError)):
            fast(input_ids=torch.full((1, 513), 7))


def test_word_embeddings_of_several_scales_a_row_are_read_by_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModel.from_config(build("bert").config).eval()
    bits = {"*": 4, "embeddings": {"bits": 4, "input_group_size": 24}}
    packed = pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **EXACT)))
    with caplog.at_level(logging.INFO, logger="qbert.inference.cpu_model"):
        fast = optimize_for_inference(packed)
    assert fast.forward._embed is None and "not packed with one scale a row" in caplog.text
    batch = {"input_ids": torch.randint(5, 100, (2, 9))}
    assert torch.allclose(hidden(fast, batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)


TABLES: dict[str, Any] = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits without zero points": {"bits": 2, "scheme": "midrise"},
    "bits by rows": {"bits": 2, "row_bits": {8: 7, 4: 20}},
    "low rank": {"bits": 4, "rank": 12},
}


@pytest.mark.parametrize("name", TABLES)
def test_word_embeddings_of_every_kind_are_fused(name: str) -> None:
    model = AutoModel.from_config(build("bert").config).eval()
    bits = {"*": 4, "embeddings": 8, "embeddings.word_embeddings": TABLES[name]}
    config = qbert.BitsConfig(bits, **EXACT)
    packed = pack(qbert.quantize_model(model, config, calibration_data=[inputs_for("bert")]))
    fast = optimize_for_inference(packed)
    assert fast.forward._embed is not None
    ids = torch.arange(100).view(4, 25)
    with torch.no_grad():
        got, expected = fast.forward._embedded(ids), packed.embeddings(input_ids=ids)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    batch = {"input_ids": ids}
    assert torch.allclose(hidden(fast, batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_exactness_is_given_up_only_on_request_and_where_it_costs(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = qbert.BitsConfig(bits, activation_range="asymmetric")
    packed = pack(qbert.quantize_model(AutoModel.from_config(build("bert").config).eval(), config))
    engine = available_engine()
    batch = {"input_ids": torch.randint(5, 100, (4, 9))}
    plain = hidden(optimize_for_inference(packed, engine=engine), batch)
    given_up = hidden(optimize_for_inference(packed, exact=False, engine=engine), batch)
    assert torch.equal(given_up, plain) or saturates(available_engine())
    for module in ("linear", "gemm"):
        monkeypatch.setattr(f"qbert.kernels.cpu.{module}.saturates", lambda engine: True)
    exact, fast = (hidden(optimize_for_inference(packed, exact=e, engine=engine), batch) for e in (True, False))
    error = float((fast - exact).norm() / exact.norm())
    assert error == 0 if bits == 4 else 1e-4 < error < 0.03
    assert (exact - plain).norm() / plain.norm() < 0.005
    one = optimize_for_inference(
        pack(qbert.quantize_model(nn.Sequential(nn.Linear(48, 24)), config)), exact=False, engine=engine
    )
    assert not one[0]._fast.at(1).chain.gemm.has_excess


def test_a_copy_of_an_optimized_model_stands_alone() -> None:
    fast, batch = optimize_for_inference(encoder("mpnet")), inputs_for("mpnet")
    twin = copy.deepcopy(fast)
    assert torch.equal(hidden(twin, batch), hidden(fast, batch))
    assert twin.encoder.forward.encoder is twin.encoder and twin.forward.base is twin
    longer = inputs_for("mpnet", length=15)
    assert torch.equal(hidden(twin, longer), hidden(optimize_for_inference(twin), longer))


def masks(length: int) -> dict[str, torch.Tensor]:
    right = torch.ones(5, length, dtype=torch.long)
    for row, used in enumerate((length, 3, length - 2, 1, 7)):
        right[row, used:] = 0
    empty, holes = right.clone(), (torch.arange(5 * length).view(5, length) % 3 > 0).long()
    empty[2] = 0
    return {"right": right, "left": right.flip(1), "holes": holes, "an empty row": empty}


@pytest.mark.parametrize("kind", ["right", "left", "holes", "an empty row"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "sdpa"), ("bert", "eager"), ("distilbert", "sdpa"), ("distilbert", "eager"), ("mpnet", "eager")],
)
@pytest.mark.parametrize("chunk", [8, 10**6])
def test_no_mask_changes_an_output_unless_padding_is_skipped(
    kind: str, family: str, attention: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_CHUNK_TOKENS", "_FULL_CHUNK_TOKENS"):
        monkeypatch.setattr(inference, name, chunk)
    packed = encoder(family, **EXACT)
    packed.set_attn_implementation(attention)
    mask = masks(9)[kind]
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    expected, keep = hidden(packed, batch), mask.bool()
    for skip in (None, False, True):
        fast = optimize_for_inference(packed, skip_padding=skip)
        for model in (fast, unfused_model(fast)):
            got = hidden(model, batch)
            assert torch.allclose(got[keep], expected[keep], rtol=1e-4, atol=1e-5)
            if skip and kind == "right":
                assert (got[~keep] == 0).all()
            else:
                assert torch.allclose(got[~keep], expected[~keep], rtol=1e-4, atol=1e-5)
    alone = hidden(fast, {"input_ids": batch["input_ids"][1:2, :3]})
    assert kind != "right" or torch.allclose(got[1, :3], alone[0], rtol=1e-4, atol=1e-5)


def unfused_model(fast: Any) -> Any:
    """A copy that keeps its fused encoder, which then gets a mask of four dimensions."""
    twin = copy.deepcopy(fast)
    del twin.forward
    return twin


def rows_that_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of every later pass through fused layers."""
    sizes: list[int] = []
    original = FusedEncoder._run

    def counting(self: FusedEncoder, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        sizes.append(x.shape[0] * x.shape[1])
        return original(self, x, mask)

    monkeypatch.setattr(FusedEncoder, "_run", counting)
    return sizes


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("kind", ["right", "left", "an empty row"])
def test_a_classifier_skips_the_padding_that_it_does_not_read(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(qbert.quantize_model(build(family).eval(), qbert.BitsConfig(4, **EXACT)))
    monkeypatch.setattr(inference, "_CHUNK_TOKENS", 1)
    mask, sizes = masks(9)[kind], rows_that_run(monkeypatch)
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    assert torch.allclose(hidden(optimize_for_inference(packed), batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)
    assert sum(sizes) == (mask.sum() if kind == "right" else mask.numel())


@pytest.mark.parametrize("modes", ["mean", "cls", None])
def test_a_sentence_model_skips_padding_only_if_it_pools(modes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling

    packed, sizes = encoder("bert", **EXACT), rows_that_run(monkeypatch)
    monkeypatch.setattr(inference, "_CHUNK_TOKENS", 1)
    model = nn.Sequential(Features(packed))
    if modes is not None:
        model = sentence.SentenceTransformer(modules=[Features(packed), Pooling(48, pooling_mode=modes)])
    mask = masks(9)["right"]
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    name = "token_embeddings" if modes is None else "sentence_embedding"
    with torch.no_grad():
        got, expected = optimize_for_inference(model)(dict(batch))[name], model(dict(batch))[name]
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert sum(sizes) == (mask.numel() if modes is None else mask.sum())


def test_queries_that_colbert_expands_behind_the_mask_are_embedded_alike(tmp_path: Path) -> None:
    sentence = pytest.importorskip("sentence_transformers", minversion="6.0")
    from sentence_transformers.models import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    words = Transformer(str(tiny_encoder(tmp_path)), query_expansion={"strategy": "fixed", "length": 12})
    model = sentence.MultiVectorEncoder(modules=[words, MultiVectorMask()], device="cpu").eval()
    packed = pack(qbert.quantize_model(model, qbert.BitsConfig(4, **EXACT)))
    texts = ["the film was superb .", "Paris"]
    for got, expected in zip(
        optimize_for_inference(packed).encode_query(texts), packed.encode_query(texts), strict=True
    ):
        assert len(got) == 12 and torch.allclose(torch.as_tensor(got), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


class Features(nn.Module):
    """First module of a sentence model: features in, features with the hidden states of the tokens out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask")
        return {**features, "token_embeddings": self.model(**{name: features[name] for name in names})[0]}


def test_no_mask_and_many_sequences_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = encoder("bert", **EXACT)
    fast, sizes = optimize_for_inference(packed), rows_that_run(monkeypatch)
    monkeypatch.setattr(inference, "_FULL_CHUNK_TOKENS", 20)
    torch_threads = torch.get_num_threads()
    batch = {"input_ids": torch.randint(5, 100, (11 * torch_threads, 6))}
    assert torch.allclose(hidden(fast, batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)
    assert len(sizes) > 2 and max(sizes) <= 20 * torch_threads and sum(sizes) == batch["input_ids"].numel()


def test_the_whole_model_is_fused_for_plain_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, batch = encoder("bert", **EXACT), inputs_for("bert")
    fast = optimize_for_inference(packed)
    assert isinstance(fast.forward, FusedModel)
    calls: list[int] = []
    run = fast.forward.run
    monkeypatch.setattr(fast.forward, "run", lambda x, lengths: calls.append(len(x)) or run(x, lengths))
    with torch.no_grad():
        expected, plain = packed(**batch), fast(**batch)
        keep = batch["attention_mask"].bool()
        assert calls == [len(keep)]
        assert torch.allclose(plain[0][keep], expected[0][keep], rtol=1e-4, atol=1e-5)
        assert torch.allclose(plain.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
        others = torch.ones_like(batch["input_ids"])
        more = {"token_type_ids": others, "position_ids": others.cumsum(1)}
        assert torch.allclose(fast(**batch, **more)[0][keep], packed(**batch, **more)[0][keep], rtol=1e-4, atol=1e-5)
        assert len(calls) == 2
        for request in ({"output_hidden_states": True}, {"return_dict": False}, {"encoder_hidden_states": plain[0]}):
            fast(**batch, **request)
        fast(batch["input_ids"], (torch.arange(keep.shape[1]) > 1).long().expand_as(keep))
        with pytest.raises(ValueError, match="exactly one"):
            fast(attention_mask=batch["attention_mask"])
    assert len(calls) == 2
    fast(**batch)  # with gradients on, but no parameter that wants one
    assert len(calls) == 3
    norm = fast.embeddings.LayerNorm.requires_grad_()
    fast(**batch)[0].sum().backward()
    assert len(calls) == 3 and norm.weight.grad is not None


def test_requests_that_the_fast_path_does_not_serve_get_the_slow_one() -> None:
    packed, batch = encoder("bert"), inputs_for("bert")
    packed.set_attn_implementation("eager")
    fast = optimize_for_inference(packed)
    with torch.no_grad():
        got = fast(**batch, output_hidden_states=True, output_attentions=True)
        expected = packed(**batch, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == 3 and len(got.attentions) == 2
    for a, b in zip(got.hidden_states + got.attentions, expected.hidden_states + expected.attentions, strict=True):
        assert torch.equal(a, b)
    embeds = torch.randn(1, 4, 48, requires_grad=True)
    fast(inputs_embeds=embeds)[0].sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().max() > 0
    fast.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast(**batch)


def test_a_head_can_be_trained_on_the_outputs() -> None:
    fast = optimize_for_inference(encoder("bert"))
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    head = nn.Linear(48, 2)
    head(fast(**inputs_for("bert"))[0]).sum().backward()
    assert head.weight.grad is not None


def test_the_optimized_model_is_a_copy_that_can_be_saved_and_moved(tmp_path: Path) -> None:
    packed, batch = encoder("bert"), inputs_for("bert")
    fast = optimize_for_inference(packed)
    assert not isinstance(packed.encoder.forward, FusedEncoder)
    assert optimize_for_inference(packed, inplace=True) is packed and isinstance(packed.encoder.forward, FusedEncoder)
    fast.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    assert loaded.state_dict().keys() == fast.state_dict().keys()
    expected = hidden(fast, batch)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert (hidden(compiled, batch) - hidden(loaded, batch))[batch["attention_mask"].bool()].abs().max() < 1e-5
    fast.to(torch.bfloat16)
    half = hidden(fast, batch)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.3


def test_what_cannot_be_optimized_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"call qbert\.pack first"):
        optimize_for_inference(build("bert"))
    with pytest.raises(ValueError, match="meta"):
        optimize_for_inference(encoder("bert").to("meta"))
    tiny = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    with caplog.at_level(logging.INFO, logger="qbert.inference.cpu"):
        optimize_for_inference(pack(qbert.quantize_model(AutoModel.from_config(DebertaConfig(**tiny)).eval(), 4)))
        some = qbert.quantize_model(AutoModel.from_config(build("bert").config), {"encoder.layer.0": 4})
        optimize_for_inference(pack(some))
    first, second = caplog.messages
    assert first.startswith("DebertaModel is not fused: ") and first.endswith("its layers run one by one")
    assert second == "layer 1 of BertModel is not fused: its linear maps are in float; it runs in its own way"


def test_matrices_that_run_in_float_are_named_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qbert.kernels.cpu"):
        optimize_for_inference(encoder("bert"))
        assert not caplog.records
        optimize_for_inference(encoder("bert", input_group_size=12))
        optimize_for_inference(encoder("albert", activation_bits=None))
    assert "[48, 96] multiplies in float, at four bytes a weight: 8 input groups" in caplog.text
    assert "activations are not quantized" in caplog.text


def test_small_tables_are_read_in_float_with_the_same_values() -> None:
    packed = encoder("bert")
    fast = optimize_for_inference(packed)
    table, slow = fast.embeddings.word_embeddings, packed.embeddings.word_embeddings
    assert isinstance(table, PackedEmbedding) and table._float_table is not None
    ids = torch.randint(0, 100, (3, 4))
    assert torch.equal(table(ids), slow(ids))


@pytest.mark.parametrize("engine", [e for e in INT8 if not reason_not(e)])
@pytest.mark.parametrize("mask", ["right", "holes"])
def test_albert_runs_its_layers_as_often_as_it_does(mask: str, engine: str) -> None:
    config = build("albert").config
    config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num = 4, 2, 2
    model = AutoModel.from_config(config).eval()
    packed = pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_range="asymmetric")))
    seen = masks(9)[mask]
    batch = {"input_ids": torch.randint(5, 100, seen.shape), "attention_mask": seen}
    for skip in (False, True):
        fast = optimize_for_inference(packed, engine=engine, skip_padding=skip)
        assert isinstance(fast.encoder.forward, FusedEncoder) and len(inference.layers_of(fast.encoder)) == 8
        keep = seen.bool()
        got, expected = hidden(fast, batch), hidden(packed, batch)
        assert (got - expected)[keep].norm() < 0.02 * expected[keep].norm()


@pytest.mark.parametrize("engine", ["native", "fp32"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "electra", "mobilebert"])
def test_a_mask_that_fits_no_scores_or_is_no_mask_is_refused_as_by_the_packed_model(family: str, engine: str) -> None:
    if reason_not(engine):
        pytest.skip(reason_not(engine))
    packed = encoder(family, **({} if engine == "native" else EXACT))
    fast = optimize_for_inference(packed, engine=engine)
    ids = torch.randint(5, 90, (3, 9))
    holes = torch.ones(3, 7, dtype=torch.long)
    holes[0, 2] = 0
    shapes = ((2, 1, 9, 9), (3, 1, 9, 7), (3, 3, 9, 9), (3, 1, 5, 9))
    for mask in (holes, torch.ones(3, 1, 9, 9, dtype=torch.long), *map(torch.zeros, shapes)):
        for model in (packed, fast):
            with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
                model(ids, attention_mask=mask)


@pytest.mark.parametrize("engine", ["native", "fp32"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "mobilebert"])
def test_masks_that_broadcast_in_any_dimension_give_the_packed_outputs(family: str, engine: str) -> None:
    if reason_not(engine):
        pytest.skip(reason_not(engine))
    packed = encoder(family, **({} if engine == "native" else EXACT))
    fast = optimize_for_inference(packed, engine=engine)
    ids = torch.randint(5, 90, (3, 9))
    wide = torch.full((3, 1, 1, 64), -1e4)
    wide[..., 0] = 0
    rows = torch.full((8, 1, 9, 9), -1e4)
    rows[:1] = 0
    keys = torch.zeros(1, 1, 1, 9)
    keys[..., 4:] = -torch.inf
    for mask in (wide[..., :1], rows[:1], keys, keys == 0, keys.expand(3, 4, 9, 9)):
        batch = {"input_ids": ids, "attention_mask": mask}
        expected = hidden(packed, batch)
        assert (hidden(fast, batch) - expected).norm() / expected.norm() < (0.02 if engine == "native" else 1e-5)


def test_what_a_mask_adds_without_hiding_is_no_padding() -> None:
    packed = encoder("bert", **EXACT)
    fast = optimize_for_inference(packed, skip_padding=True)
    added = torch.zeros(2, 1, 1, 6)
    added[..., 4:] = 1.5
    batch = {"input_ids": torch.randint(5, 90, (2, 6)), "attention_mask": added}
    assert torch.allclose(hidden(fast, batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)
