"""Fused forwards: where they may replace a module's own, what they may never hide, and how they are taken out."""

import copy
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from torch import nn
from transformers import AutoModel, BertModel
from transformers.models.bert import modeling_bert

import qbert
from qbert.inference import cpu as inference
from qbert.inference.cpu import FusedEncoder, optimize_for_inference
from qbert.inference.cpu_model import FusedModel
from qbert.inference.forward import FastForward, remove_fast_forwards
from qbert.kernels.cpu import gemm
from qbert.layers.linear import QuantLinear
from qbert.packing import pack, unpack

FUSED = ("bert", "roberta", "electra", "distilbert", "mpnet")


def encoder(family: str, model: Any = None, **settings: Any) -> Any:
    model = AutoModel.from_config(build(family).config) if model is None else model
    return pack(qbert.quantize_model(model.eval(), qbert.BitsConfig(4, **settings)))


class DefaultDtype(AbstractContextManager[None]):
    """torch's default dtype, for the length of a block."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of the tokens that are not padding."""
    with torch.no_grad():
        return model(**batch)[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", FUSED)
def test_autocast_leaves_the_int8_layers_alone(family: str) -> None:
    fast, batch = optimize_for_inference(encoder(family)), inputs_for(family)
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    for inputs in (batch, left):
        expected = hidden(fast, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got = hidden(fast, inputs)
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_unpacking_takes_the_fast_forwards_out() -> None:
    packed, batch = encoder("bert"), inputs_for("bert")
    fast = optimize_for_inference(packed)
    students = [unpack(fast), unpack(packed)]
    for student in students:
        assert not any(isinstance(m.__dict__.get("forward"), FastForward) for m in student.modules())
        with torch.no_grad():
            for layer in student.modules():
                if isinstance(layer, QuantLinear):
                    layer.weight.mul_(1.5)
    assert torch.equal(*(hidden(s, batch) for s in students))
    assert isinstance(fast.forward, FusedModel)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_what_was_frozen_for_inference_is_trained_again(family: str) -> None:
    packed = encoder(family)
    packed.embeddings.LayerNorm.weight.requires_grad_(False)
    fast = optimize_for_inference(optimize_for_inference(packed))
    pairs = [(unpack(fast), unpack(packed)), (copy.deepcopy(fast).dequantize(), copy.deepcopy(packed).dequantize())]
    for got, wanted in pairs:
        trained = {name for name, parameter in got.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in wanted.named_parameters() if parameter.requires_grad}
        assert "embeddings.LayerNorm.bias" in trained and "embeddings.LayerNorm.weight" not in trained


def test_dequantizing_takes_the_fast_forwards_out() -> None:
    packed, batch = encoder("bert"), inputs_for("bert")
    plain, fast = copy.deepcopy(packed).dequantize(), optimize_for_inference(packed).dequantize()
    assert torch.equal(hidden(fast, batch), hidden(plain, batch))


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_other_weights_cannot_be_loaded_beside_the_prepared_ones(family: str) -> None:
    packed, other = encoder(family), encoder(family)
    fast = copy.deepcopy(optimize_for_inference(packed))
    for model in (fast, fast.encoder):
        with pytest.raises(RuntimeError, match=r"load_state_dict.*optimize_for_inference"):
            model.load_state_dict((other if model is fast else other.encoder).state_dict())
    packed.load_state_dict(other.state_dict())
    batch = inputs_for(family)
    assert torch.equal(hidden(optimize_for_inference(packed), batch), hidden(optimize_for_inference(other), batch))


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_an_optimized_model_is_not_pickled(family: str) -> None:
    fast = optimize_for_inference(encoder(family))
    hidden(fast, inputs_for(family))
    with pytest.raises(TypeError, match=r"cannot be pickled.*optimize_for_inference"):
        pickle.dumps(fast)


def test_an_optimized_model_is_exported_with_its_own_forward() -> None:
    packed, batch = encoder("bert"), inputs_for("bert")
    exported = torch.export.export(optimize_for_inference(packed), (), batch).module()
    assert torch.allclose(hidden(exported, batch), hidden(packed, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_a_trace_holds_for_other_batches(family: str) -> None:
    packed, batch = encoder(family), inputs_for(family)
    inputs, other = (batch["input_ids"], batch["attention_mask"]), inputs_for(family, 3, 5)
    other["attention_mask"][0, 2:] = 0
    expected = hidden(packed, other)
    for model in (packed, optimize_for_inference(packed)):
        traced = torch.jit.trace(model, inputs, strict=False, check_trace=False)
        got = traced(other["input_ids"], other["attention_mask"])["last_hidden_state"]
        assert torch.allclose(got[other["attention_mask"].bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mpnet", "modernbert"])
def test_what_is_made_in_inference_mode_can_be_used_outside(family: str) -> None:
    student, batch = qbert.quantize_model(build(family).eval(), 4), inputs_for(family)
    with torch.inference_mode():
        packed = pack(student)
        made = [packed, optimize_for_inference(packed), unpack(packed)]
        expected = packed(**batch).logits.clone()
    for model in made:
        assert torch.allclose(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert packed.to(torch.bfloat16)(**batch).logits.dtype == torch.bfloat16
    made[2].train()(**batch, labels=torch.tensor([0, 1])).loss.backward()


def test_threads_share_an_optimized_model() -> None:
    fast = optimize_for_inference(encoder("mpnet"))
    batches = [inputs_for("mpnet", 1 + i % 3, 2 + i) for i in range(12)]
    alone = copy.deepcopy(fast)
    expected = [hidden(alone, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda batch: hidden(fast, batch), batches))
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True))


class BertLayer(modeling_bert.BertLayer):
    """Called like transformers' own, but it computes something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 2


class LouderAttention(modeling_bert.BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixed, *others = super().forward(*args, **kwargs)
        return mixed * 50, *others


class ShiftedModel(BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output


def _own_layer(model: Any) -> None:
    model.encoder.layer[1].__class__ = BertLayer


def _own_attention(model: Any) -> None:
    model.encoder.layer[0].attention.self.__class__ = LouderAttention


def _own_model(model: Any) -> None:
    model.__class__ = ShiftedModel


def _own_function(model: Any) -> None:
    output = model.encoder.layer[1].output
    output.forward = lambda x, residual: residual


def _own_norm(model: Any) -> None:
    norm = model.encoder.layer[0].output.LayerNorm
    model.encoder.layer[0].output.LayerNorm = nn.RMSNorm(norm.normalized_shape)
    nn.init.normal_(model.encoder.layer[0].output.LayerNorm.weight)


def _own_embeddings(model: Any) -> None:
    embeddings = model.embeddings
    own = type(embeddings).forward
    embeddings.forward = lambda **kwargs: own(embeddings, **kwargs).flip(1)


@pytest.mark.parametrize("alter", [_own_layer, _own_attention, _own_model, _own_function, _own_norm, _own_embeddings])
def test_what_only_looks_like_transformers_own_is_not_fused(
    alter: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = AutoModel.from_config(build("bert").config), inputs_for("bert")
    before = hidden(encoder("bert", copy.deepcopy(model), activation_bits=None), batch)
    alter(model)
    packed = encoder("bert", model, activation_bits=None)
    expected = hidden(packed, batch)
    assert (expected - before).norm() > 0.01 * before.norm()
    with caplog.at_level(logging.INFO):
        fast = optimize_for_inference(packed)
    assert torch.allclose(hidden(fast, batch), expected, rtol=1e-4, atol=1e-5)
    assert any(words in caplog.text for words in ("not a class of transformers", "was replaced", "are not LayerNorm"))


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_call_without_no_grad_is_fast_too(family: str) -> None:
    packed, batch = pack(qbert.quantize_model(build(family).eval(), 4)), inputs_for(family)
    fast = optimize_for_inference(packed)
    assert any(p.requires_grad for p in packed.base_model.parameters())
    assert torch.equal(fast(**batch).logits, optimize_for_inference(packed)(**batch).logits)
    with torch.no_grad():
        expected = fast(**batch).logits
    got = fast(**batch).logits
    assert torch.equal(got, expected)
    got.sum().backward()
    assert fast.classifier.weight.grad is not None
    assert not any(p.requires_grad for p in fast.base_model.parameters())


@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "modernbert"])
def test_torchs_default_dtype_and_device_do_not_matter(family: str) -> None:
    packed, batch = encoder(family), inputs_for(family)
    expected = hidden(optimize_for_inference(packed), batch)
    known = (gemm.available_engine, gemm.saturates)
    engine = gemm.available_engine()
    limits = gemm.saturates(engine)
    try:
        for setting in (torch.device("meta"), DefaultDtype(torch.bfloat16)):
            for function in known:
                function.cache_clear()
            with setting:
                fast = optimize_for_inference(packed)
                assert (gemm.available_engine(), gemm.saturates(engine)) == (engine, limits)
                assert torch.equal(hidden(fast, batch), expected)
    finally:
        for function in known:
            function.cache_clear()


@pytest.mark.parametrize("family", FUSED)
def test_an_empty_batch_gives_an_empty_output(family: str) -> None:
    fast = optimize_for_inference(encoder(family))
    ids = torch.zeros(0, 9, dtype=torch.long)
    for mask in (None, torch.ones_like(ids)):
        assert fast(input_ids=ids, attention_mask=mask)[0].shape == (0, 9, 48)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_return_dict_is_understood_as_by_the_model_itself(family: str) -> None:
    packed, batch = encoder(family), inputs_for(family)
    packed.config.return_dict = False
    fast = optimize_for_inference(packed)
    for request in ({}, {"return_dict": None}, {"return_dict": True}, {"return_dict": False}):
        with torch.no_grad():
            assert type(fast(**batch, **request)) is type(packed(**batch, **request))


def test_a_position_bias_that_another_thread_replaces_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimize_for_inference(encoder("mpnet"))
    long, short = inputs_for("mpnet", length=12), inputs_for("mpnet", length=3)
    expected = hidden(copy.deepcopy(fast), long)
    forward = fast.encoder.forward
    assert isinstance(forward, FusedEncoder)
    compute = fast.encoder.compute_position_bias
    shorter = compute(torch.zeros(1, 3, 48)).detach()

    class Interrupted(FusedEncoder):
        """Every write is followed by that of a thread with a shorter sentence."""

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, shorter if name == "_position_bias" else value)

    forward.__class__ = Interrupted
    assert torch.equal(hidden(fast, long), expected) and hidden(fast, short).isfinite().all()


CHANGED = {
    "bert": ("encoder.layer.1.output.LayerNorm.weight", "encoder.layer.0.intermediate.dense.bias"),
    "roberta": ("embeddings.LayerNorm.bias", "encoder.layer.1.attention.self.value.bias"),
    "mpnet": ("encoder.relative_attention_bias.weight", "encoder.layer.0.attention.LayerNorm.bias"),
    "deberta-v2": ("encoder.rel_embeddings.weight", "encoder.layer.1.attention.self.pos_key_proj.bias"),
    "modernbert": ("layers.1.mlp_norm.weight",),
}


@pytest.mark.filterwarnings("ignore:.* of the weights of DebertaV2.* stay in float")
@pytest.mark.parametrize("family", CHANGED)
def test_a_change_of_what_was_copied_is_told_and_mended_by_a_second_call(family: str) -> None:
    bits = {"*": 4, "encoder.relative_attention_bias": 32} if family == "mpnet" else 4
    packed = pack(qbert.quantize_model(AutoModel.from_config(build(family).config).eval(), bits))
    batch = inputs_for(family, 16)
    for name in CHANGED[family]:
        fast = optimize_for_inference(packed)
        with torch.no_grad():
            before = fast(**batch)[0]
            fast.get_parameter(name).mul_(3).add_(1)
            with pytest.raises(RuntimeError, match=f"{name.split('.', 1)[1]} was changed after qbert"):
                fast(**batch)
            twin = copy.deepcopy(packed)
            twin.get_parameter(name).mul_(3).add_(1)
            got, expected = optimize_for_inference(fast, inplace=True)(**batch)[0], twin(**batch)[0]
            keep = batch["attention_mask"].bool()
            assert (got - expected)[keep].norm() < 0.03 * expected[keep].norm()
            assert not torch.equal(got[keep], before[keep])


def test_a_bias_trained_on_the_slow_path_is_not_forgotten_on_the_fast_one() -> None:
    fast, batch = optimize_for_inference(encoder("bert")), inputs_for("bert")
    bias = fast.encoder.layer[0].output.dense.bias.requires_grad_()
    fast(**batch)[0].sum().backward()
    torch.optim.SGD([bias], lr=0.1).step()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer\.0\.output\.dense\.bias was changed"):
        fast(**batch)


def test_single_linear_maps_tell_a_changed_bias_too() -> None:
    fast = optimize_for_inference(pack(qbert.quantize_model(nn.Sequential(nn.Linear(48, 24)), 8)))
    fast[0].bias.data = torch.ones(24)
    with pytest.raises(RuntimeError, match=r"linear map 48 to 24\.bias was changed"):
        fast(torch.randn(2, 48))


def test_an_optimization_in_place_that_is_refused_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = build("bert", hidden_act="silu", num_hidden_layers=1)
    for model, settings in (
        (pack(qbert.quantize_model(other, 4)).train(), {"engine": "native"}),
        (encoder("bert"), {"engine": "fp32", "warm_up": [(1, 5)]}),
        (optimize_for_inference(encoder("bert"), engine="fp32"), {"engine": "fp32", "warm_up": [(1, 5)]}),
    ):
        before = [(m, dict(m.__dict__), list(m._load_state_dict_pre_hooks.values())) for m in model.modules()]
        wanted = [p.requires_grad for p in model.parameters()]
        with monkeypatch.context() as broken:
            broken.setattr(inference, "_run_three_times", lambda *_: 1 / 0)
            with pytest.raises((ValueError, ZeroDivisionError)):
                optimize_for_inference(model, inplace=True, **settings)
        for module, attributes, hooks in before:
            kept = {name: value for name, value in module.__dict__.items() if name != "_refuses_to_load"}
            assert kept.keys() == attributes.keys() - {"_refuses_to_load"}
            assert all(value is attributes[name] or value == attributes[name] for name, value in kept.items())
            assert len(module._load_state_dict_pre_hooks) == len(hooks)
        assert [p.requires_grad for p in model.parameters()] == wanted


def test_optimizing_in_place_again_adds_no_hooks() -> None:
    model = encoder("bert")
    for _ in range(3):
        optimize_for_inference(model, inplace=True, engine="fp32")
    linear = model.encoder.layer[0].output.dense
    assert len(linear._load_state_dict_pre_hooks) == 1
    with pytest.raises(RuntimeError, match="load_state_dict"):
        copy.deepcopy(model).load_state_dict(model.state_dict())
    plain = copy.deepcopy(model)
    remove_fast_forwards(plain)
    plain.load_state_dict(model.state_dict())
    assert not plain.encoder.layer[0].output.dense._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": (1, 16)}, r"warm_up: \(1, 16\) is not a list of shapes; give .*\[\(1, 16\)\]"),
        ({"warm_up": 3}, r"warm_up: 3 is not a list of shapes"),
        ({"warm_up": [(1, True)]}, r"warm_up: \(1, True\) is not a batch and a length"),
        ({"warm_up": [(1, 16, 2)]}, r"warm_up: \(1, 16, 2\) is not a batch and a length"),
        ({"skip_padding": "no"}, r"skip_padding='no' is not one of True, False, None"),
        ({"exact": "no"}, r"exact='no' is not one of True, False"),
        ({"exact": None}, r"exact=None is not one of True, False"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused_before_any_work(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "deepcopy", lambda model: 1 / 0)
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(encoder("bert"), **settings)


def test_warming_up_needs_token_ids_and_keeps_within_the_vocabulary() -> None:
    images = pack(qbert.quantize_model(build("vit").eval(), 4))
    with pytest.raises(ValueError, match="warm_up: ViTModel reads pixel_values, not token ids"):
        optimize_for_inference(images, warm_up=[(1, 5)])
    last = pack(qbert.quantize_model(build("bert", pad_token_id=99), 4))
    assert optimize_for_inference(last, engine="fp32", warm_up=iter([(1, 5)])) is not None


def test_what_a_config_asks_for_is_looked_at_again_where_it_changed() -> None:
    fast, batch = optimize_for_inference(encoder("bert")), inputs_for("bert")
    plain = fast(**batch)
    assert isinstance(fast.forward, FusedModel) and list(plain.keys()) == ["last_hidden_state", "pooler_output"]
    assert plain.to_tuple() == type(plain)(last_hidden_state=plain[0], pooler_output=plain[1]).to_tuple()
    twin = copy.deepcopy(fast)
    fast.config.output_hidden_states = True
    assert len(fast(**batch).hidden_states) == 3 and len(twin(**batch)) == 2
    fast.config.output_hidden_states = False
    assert len(fast(**batch)) == 2
    fast.config.return_dict = False
    assert isinstance(fast(**batch), tuple)
