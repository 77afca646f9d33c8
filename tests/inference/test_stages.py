"""Encoders on a CPU some of whose layers do not fit: the others stay fused, and the outputs the packed model's."""

import copy
import logging
from typing import Any

import pytest
import torch
from compiled_twin import assert_compiled_is_uncompiled
from encoders import build, inputs_for
from torch import nn
from transformers import AutoModel
from transformers.models.bert import modeling_bert

import qbert
from qbert.encoders.parts import LayerParts
from qbert.inference import cpu as inference
from qbert.inference.chosen import ChosenLayers
from qbert.inference.cpu import FusedEncoder, optimize_for_inference, run_alone
from qbert.inference.cpu_layers import FusedLayers
from qbert.inference.cpu_model import FusedModel
from qbert.layers.linear import PackedLinear
from qbert.packing import pack

# Names of query, key, value, and of the first and second linear map behind the attention's own.
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense", "output.dense")
LINEARS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin1", "ffn.lin2"),
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v", "intermediate.dense", "output.dense"),
}
FAMILIES = tuple(LINEARS)
# With float activations nothing is rounded, and the fast path must agree with the slow one to float precision.
EXACT = {"activation_bits": None}


def stack(model: Any) -> Any:
    return model.transformer if hasattr(model, "transformer") else model.encoder


def encoder(family: str, in_float: str | None = None, **settings: Any) -> Any:
    """Three packed layers; those matrices of the second whose names start with `in_float` are in float."""
    config = build(family).config
    config.num_hidden_layers = 3
    model = AutoModel.from_config(config).eval()
    for module in model.modules():  # weights so large that every product matters, beside the residual too
        if isinstance(module, nn.Linear | nn.LayerNorm):
            nn.init.normal_(module.weight, float(isinstance(module, nn.LayerNorm)), 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
    layer = "transformer.layer.1" if family == "distilbert" else "encoder.layer.1"
    bits = {} if in_float is None else {f"{layer}.{in_float}".rstrip("."): 32}
    data = [inputs_for(family, 4, 12) for _ in range(4)] if settings.get("activation_range") == "static" else None
    return pack(qbert.quantize_model(model, qbert.BitsConfig(bits | {"*": 4}, **settings), calibration_data=data))


def with_other_ranges(family: str) -> Any:
    """Static ranges, in the second layer smaller for the key than for the query, and moved for the value."""
    packed = encoder(family, activation_range="static")
    key, value = (stack(packed).layer[1].get_submodule(name) for name in LINEARS[family][1:3])
    key.input_scale.mul_(0.2)
    value.input_scale.mul_(0.4)
    value.input_zero.add_(40)
    return packed


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of the tokens that are not padding."""
    with torch.no_grad():
        output = model(**batch)[0]
    return output[batch["attention_mask"].bool()] if "attention_mask" in batch else output


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def stages(fast: Any) -> list[int | None]:
    """Index of each layer in its own way, ``None`` for each program of fused ones."""
    forward = stack(fast).forward
    assert isinstance(fast.forward, FusedModel) and isinstance(forward, FusedEncoder)
    assert all(isinstance(s, int | ChosenLayers) for s in forward._stages)
    return [s if isinstance(s, int) else None for s in forward._stages]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_float_leaves_the_others_fused(family: str, caplog: pytest.LogCaptureFixture) -> None:
    batch = inputs_for(family, 3, 11)
    for settings in (EXACT, {}, {"activation_range": "asymmetric"}):
        packed = encoder(family, "", **settings)
        with caplog.at_level(logging.INFO, logger="qbert.inference"):
            fast = optimize_for_inference(packed)
        assert stages(fast) == [None, 1, None]
        assert f"layer 1 of {type(fast).__name__} is not fused: its linear maps are in float" in caplog.text
        expected, got = hidden(packed, batch), hidden(fast, batch)
        assert close(got, expected) if settings is EXACT else error(got, expected) < 0.02
    assert "layer 0" not in caplog.text and "layer 2" not in caplog.text


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_in_float_is_a_float_product_of_a_fused_layer(
    family: str, index: int, caplog: pytest.LogCaptureFixture
) -> None:
    batch, name = inputs_for(family, 3, 11), LINEARS[family][index]
    for settings in (EXACT, {"activation_range": "asymmetric"}):
        packed = encoder(family, name, **settings)
        assert type(stack(packed).layer[1].get_submodule(name)) is nn.Linear
        with caplog.at_level(logging.INFO, logger="qbert.inference"):
            fast = optimize_for_inference(packed)
        assert stages(fast) == [None]
        assert (
            f"layer 1 of {type(fast).__name__} is fused, but not in four int8 products: {name} in float" in caplog.text
        )
        expected, got = hidden(packed, batch), hidden(fast, batch)
        assert close(got, expected) if settings is EXACT else error(got, expected) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_of_other_ranges_are_three_products(family: str, caplog: pytest.LogCaptureFixture) -> None:
    packed, batch = with_other_ranges(family), inputs_for(family, 3, 11)
    with caplog.at_level(logging.INFO, logger="qbert.inference"):
        fast = optimize_for_inference(packed)
    assert stages(fast) == [None]
    reason = "is fused, but not in four int8 products: query, key and value quantize their input differently"
    assert f"layer 1 of {type(fast).__name__} {reason}" in caplog.text
    expected = hidden(packed, batch)
    assert error(hidden(fast, batch), expected) < 0.02
    for name in LINEARS[family][1:3]:  # as if all had the range of the query
        part, query = (stack(packed).layer[1].get_submodule(n) for n in (name, LINEARS[family][0]))
        part.input_scale.copy_(query.input_scale)
        part.input_zero.copy_(query.input_zero)
    assert error(hidden(packed, batch), expected) > 0.05


def test_input_groups_are_fused_too(caplog: pytest.LogCaptureFixture) -> None:
    packed, batch = encoder("bert", input_group_size=12), inputs_for("bert")
    with caplog.at_level(logging.INFO, logger="qbert.inference"):
        fast = optimize_for_inference(packed)
    assert stages(fast) == [None] and "query, key or value has input groups" in caplog.text
    assert error(hidden(fast, batch), hidden(packed, batch)) < 0.02


@pytest.mark.parametrize("kind", ["float query", "float output", "ranges"])
def test_compiled_layers_are_their_uncompiled_twin(kind: str) -> None:
    names = {"float query": _BERT[0], "float output": _BERT[4]}
    packed = encoder("bert", names[kind]) if kind in names else with_other_ranges("bert")
    layers = FusedLayers([LayerParts.of(layer) for layer in packed.encoder.layer])
    assert_compiled_is_uncompiled(layers)


@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "sdpa"), ("roberta", "eager"), ("distilbert", "sdpa"), ("distilbert", "eager"), ("mpnet", "eager")],
)
@pytest.mark.parametrize("chunk", [8, 10**6])
def test_no_mask_changes_an_output(
    kind: str, family: str, attention: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_FULL_CHUNK_TOKENS", chunk)
    packed = encoder(family, "", **EXACT)
    packed.set_attn_implementation(attention)
    fast = optimize_for_inference(packed)
    mask = (torch.arange(9) < torch.tensor([9, 3, 7, 1, 5])[:, None]).long()
    if kind == "left":
        mask = mask.flip(1)
    elif kind == "holes":
        mask = (torch.arange(45).view(5, 9) % 3 > 0).long()
    elif kind == "empty":
        mask[3] = 0
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    with torch.no_grad():
        assert close(fast(**batch)[0], packed(**batch)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["layer", "matrix", "ranges"])
def test_hidden_states_and_attentions_are_those_of_the_packed_model(family: str, kind: str) -> None:
    if kind == "ranges":
        packed = with_other_ranges(family)
    else:
        packed = encoder(family, "" if kind == "layer" else LINEARS[family][0])
    packed.set_attn_implementation("eager")
    fast, batch = optimize_for_inference(packed), inputs_for(family)
    with torch.no_grad():
        got, expected = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (fast, packed))
        alone = fast(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == len(alone.hidden_states) == 4 and len(got.attentions) == 3
    for a, b in zip(got.hidden_states + got.attentions, expected.hidden_states + expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone[0], expected[0])


class OwnLayer(modeling_bert.BertLayer):
    """Not a class of transformers, but called like one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 2


def _own_class(layer: Any) -> None:
    layer.__class__ = OwnLayer


def _own_norm(layer: Any) -> None:
    layer.output.LayerNorm = nn.RMSNorm(48)
    nn.init.normal_(layer.output.LayerNorm.weight)


def _own_linear(layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer.output.dense.__class__ = Doubled


def _own_function(layer: Any) -> None:
    layer.output.dense.forward = lambda x: x[..., :48]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("alter", [_own_class, _own_norm, _own_linear, _own_function])
def test_an_altered_layer_runs_in_its_own_way(alter: Any, at: int, caplog: pytest.LogCaptureFixture) -> None:
    packed, batch = encoder("bert", "output.dense", **EXACT), inputs_for("bert", 3, 11)
    packed.encoder.layer.insert(at, packed.encoder.layer.pop(1))
    before = hidden(packed, batch)
    alter(packed.encoder.layer[at])
    expected = hidden(packed, batch)
    assert error(before, expected) > 0.01
    with caplog.at_level(logging.INFO, logger="qbert.inference"):
        fast = optimize_for_inference(packed)
    assert stages(fast) == [[0, None], [None, 1, None], [None, 2]][at]
    assert f"layer {at} of BertModel is not fused: " in caplog.text and "it runs in its own way" in caplog.text
    assert close(hidden(fast, batch), expected)
    for layer in fast.encoder.layer:  # its packed matrices run one by one, those of the others as chains
        own = layer is fast.encoder.layer[at]
        assert all((m._fast is not None) == own for m in layer.modules() if isinstance(m, PackedLinear))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_alone_is_what_the_encoder_makes_of_it(family: str) -> None:
    packed, x = encoder(family, ""), torch.randn(2, 7, 48)
    keep = torch.rand(2, 1, 1, 7) > 0.3
    keep[..., 0] = True
    added = torch.where(keep, 0.0, -torch.inf)
    whole = copy.deepcopy(stack(packed))
    whole.layer = whole.layer[1:2]
    with torch.no_grad():
        expected = whole(x, added)[0]
        assert close(run_alone(stack(packed), 1, x, keep), expected)
        assert close(run_alone(stack(packed), 1, x, added), expected)
        half = run_alone(stack(packed.to(torch.bfloat16)), 1, x, added)
    assert half.dtype == torch.float32 and error(half, expected) < 0.05
    assert len(stack(packed).layer) == 3


def test_a_copy_or_a_move_of_a_mixed_model_computes_the_same() -> None:
    fast, batch = optimize_for_inference(encoder("mpnet", "")), inputs_for("mpnet")
    expected = hidden(fast, batch)
    twin = copy.deepcopy(fast)
    assert torch.equal(hidden(twin, batch), expected) and twin.encoder.forward.encoder is twin.encoder
    half = hidden(twin.to(torch.bfloat16), batch)
    assert half.dtype == torch.bfloat16 and error(half.float(), expected) < 0.05
    assert torch.equal(hidden(fast, batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(hidden(fast, batch), expected) < 0.02


def test_a_wanted_gradient_of_a_layer_in_float_is_had() -> None:
    fast = optimize_for_inference(encoder("bert", ""))
    weight = fast.encoder.layer[1].output.dense.weight.requires_grad_()
    for batch in (inputs_for("bert"), {"inputs_embeds": torch.randn(1, 4, 48)}):
        weight.grad = None
        fast(**batch)[0].square().sum().backward()
        assert weight.grad is not None and weight.grad.abs().max() > 0


def test_where_no_layer_fits_none_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qbert.inference"):
        model = qbert.quantize_model(AutoModel.from_config(build("bert").config).eval(), {"embeddings": 4, "*": 32})
        fast = optimize_for_inference(pack(model))
    assert not isinstance(fast.encoder.forward, FusedEncoder)
    assert "BertModel is not fused: its linear maps are in float; its layers run one by one" in caplog.text
    caplog.clear()
    packed = encoder("bert", "")
    packed.config._attn_implementation = "flex_attention"
    with caplog.at_level(logging.INFO, logger="qbert.inference"):
        fast = optimize_for_inference(packed)
    assert not isinstance(fast.encoder.forward, FusedEncoder) and "takes no mask of its own" in caplog.text
