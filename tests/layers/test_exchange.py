"""A weight that takes the place of another one: right, or refused in one sentence, and never another number."""

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build, inputs_for
from torch import nn

import qbert
from qbert.layers.adapters import install


def student(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = qbert.BitsConfig(4, **settings)
    return qbert.quantize_model(build("bert"), config, calibration_data=[inputs_for("bert")]).eval()


@pytest.mark.parametrize("rows", [90, 120])
def test_a_resized_vocabulary_is_refused_where_it_is_used_packed_or_saved(rows: int, tmp_path: Any) -> None:
    model = student()
    model.resize_token_embeddings(rows)
    for use in (
        lambda: model(**inputs_for("bert")),
        lambda: qbert.pack(model),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(
            ValueError, match=f"it has {rows} rows, its grids were made for 100; resize the float model"
        ):
            use()


def test_a_resized_float_model_is_quantized_right() -> None:
    model = build("bert")
    model.resize_token_embeddings(120)
    assert len(qbert.quantize_model(model, 4).bert.embeddings.word_embeddings.quantized_weight()) == 120


def test_grids_follow_a_weight_that_is_put_in_the_place_of_another() -> None:
    layer = student().bert.encoder.layer[0].output.dense
    wider = nn.Parameter(layer.weight.detach() * 50)
    layer.weight = wider
    expected = copy.deepcopy(layer.weight_quantizer)
    expected.find(wider.detach())
    assert torch.equal(layer.quantized_weight(), expected(wider))


def test_a_head_that_is_tied_later_is_quantized_as_its_new_weight() -> None:
    config = build("bert").config
    config.tie_word_embeddings = False
    model = qbert.quantize_model(tf.BertForMaskedLM(config), {"*": 4, "cls.predictions.decoder": 4}).eval()
    head, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    head.weight = table.weight
    step = head.weight_quantizer.scale.max()
    assert (head.quantized_weight() - table.weight).abs().max() <= step


def test_float_weights_without_grids_have_them_found() -> None:
    other, model = build("bert").eval(), student(activation_range="dynamic")
    model.load_state_dict(other.state_dict(), strict=False)
    expected = qbert.quantize_model(other, qbert.BitsConfig(4, activation_range="dynamic"))
    state = expected.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", [lambda model: model, qbert.pack], ids=["trainable", "packed"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scheme": "symmetric"}, {"scheme": "midrise"}),
        ({"activation_range": "dynamic"}, {"activation_range": "asymmetric"}),
        ({"activation_range": "static"}, {"activation_range": "dynamic"}),
        ({"activation_bits": None}, {"activation_bits": 8}),
    ],
)
def test_a_state_dict_of_another_grid_is_refused(one: Any, other: Any, form: Any, strict: bool) -> None:
    state, model = form(student(**one)).state_dict(), form(student(**other))
    with pytest.raises(
        RuntimeError, match=r"the state dict holds values for .* the layer computes with|Unexpected key"
    ):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("form", [lambda model: model, qbert.pack], ids=["trainable", "packed"])
def test_a_state_dict_of_the_same_grid_is_taken(form: Any) -> None:
    model = form(student())
    assert not model.load_state_dict(form(student()).state_dict()).missing_keys
    assert not model.load_state_dict(dict(form(student()).state_dict())).missing_keys


def test_an_adapter_is_not_merged_into_a_quantized_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, user = ModuleType("peft.tuners.tuners_utils"), ModuleType("peft.tuners.lora.layer")
    for module in (theirs, user):
        module.check_adapters_to_merge = lambda module, names=None: ["default"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    user.check_adapters_to_merge = theirs.check_adapters_to_merge  # type: ignore[attr-defined]
    install(theirs)
    layers = {"float": nn.Linear(2, 2), "quantized": student().bert.encoder.layer[0].output.dense}
    wrapped = {name: SimpleNamespace(get_base_layer=lambda layer=layer: layer) for name, layer in layers.items()}
    assert user.check_adapters_to_merge(wrapped["float"]) == ["default"]
    with pytest.raises(ValueError, match="adapter: merged into a quantized QuantLinear"):
        user.check_adapters_to_merge(wrapped["quantized"])
