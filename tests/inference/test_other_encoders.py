"""Encoders that are not of the BERT kind, fused: ViT, ModernBERT, MobileBERT, DeBERTa-v2 beside their packed selves."""

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from compiled_twin import assert_compiled_is_uncompiled
from encoders import build, inputs_for
from torch import nn
from transformers import AutoModel

import qbert
from qbert.encoders.parts import LayerParts
from qbert.inference.chosen import ChosenLayers
from qbert.inference.cpu import optimize_for_inference
from qbert.inference.cpu_base import FusedWholeModel
from qbert.inference.cpu_deberta import FusedDeberta, positions_of
from qbert.inference.cpu_layers import FusedLayers
from qbert.inference.cpu_model import FusedModel
from qbert.inference.engines import INT8, reason_not
from qbert.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:.* of the weights of (ViT|DebertaV2).* stay in float")
FORWARDS = {
    "vit": FusedWholeModel,
    "modernbert": FusedWholeModel,
    "mobilebert": FusedModel,
    "deberta-v2": FusedDeberta,
}
FAMILIES = tuple(FORWARDS)
EXACT = {"activation_bits": None}
# A full layer, two that see two tokens on each side, and a full one.
WINDOWED = {"num_hidden_layers": 4, "local_attention": 4}
RUN = [engine for engine in INT8 if not reason_not(engine)]


def lively(model: Any) -> Any:
    """The model with weights so large that every piece of a layer shows in what comes out."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "rel_embeddings" in name:
            parameter.data.mul_(100)
        elif parameter.dim() == 2 and "embed" not in name:
            parameter.data.mul_(5)
        elif parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run as they are, which the compiled ones are compared with."""
    monkeypatch.setattr("qbert.inference.chosen.compiled", lambda module: module)


def packed_encoder(family: str, bits: Any = 4, overrides: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    overrides = overrides or (WINDOWED if family == "modernbert" else {})
    model = lively(AutoModel.from_config(build(family, **overrides).config))
    return pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **settings)))


def hidden(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **more)[0]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", RUN)
def test_each_int8_engine_computes_the_packed_model(family: str, engine: str) -> None:
    packed, batch = packed_encoder(family, activation_range="asymmetric"), inputs_for(family, 3, 11)
    fast = optimize_for_inference(packed, engine=engine)
    assert isinstance(fast.forward, FORWARDS[family])
    assert f"fused layers: {engine} (as asked)" in repr(fast)
    assert error(hidden(fast, batch), hidden(packed, batch)) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_layers_are_their_uncompiled_twin(family: str) -> None:
    fast = optimize_for_inference(packed_encoder(family, activation_range="asymmetric"), engine="fbgemm")
    stack = fast.encoder.forward if family == "mobilebert" else fast.forward.layers
    (stage,) = stack._stages
    assert isinstance(stage, ChosenLayers)
    layers = fast.encoder.layer if hasattr(fast, "encoder") else fast.layers
    parts = [part for layer in layers if (part := LayerParts.of_any_kind(layer)) is not None]
    if family == "modernbert":
        parts = [part._replace(rotation=torch.randn(9, 12)) for part in parts]
    if family == "deberta-v2":
        parts = [part._replace(relative=positions_of(fast.encoder, x)) for part, x in zip(parts, layers, strict=True)]
    assert_compiled_is_uncompiled(FusedLayers(parts, engine="fbgemm"))


def masks(length: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([length, 3, length - 2, 1])
    right = (torch.arange(length) < lengths[:, None]).long()
    empty, holes = right.clone(), (torch.arange(4 * length).view(4, length) % 3 > 0).long()
    empty[2] = 0
    return {"right": right, "left": right.flip(1), "holes": holes, "an empty row": empty}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["right", "left", "holes", "an empty row"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("modernbert", "sdpa"), ("modernbert", "eager"), ("mobilebert", "sdpa"), ("deberta-v2", "eager")],
)
def test_no_mask_changes_an_output_unless_padding_is_skipped(family: str, attention: str, kind: str) -> None:
    packed = packed_encoder(family, **EXACT)
    packed.set_attn_implementation(attention)
    mask = masks(9)[kind]
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    expected, keep = hidden(packed, batch), mask.bool()
    for skip in (False, True):
        got = hidden(optimize_for_inference(packed, skip_padding=skip), batch)
        assert torch.allclose(got[keep], expected[keep], rtol=1e-3, atol=1e-4)
        if skip and kind == "right":
            assert (got[~keep] == 0).all()
        else:
            assert torch.allclose(got[~keep], expected[~keep], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", RUN)
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_windows_and_rotation_are_the_packed_models_with_every_engine(engine: str, kind: str) -> None:
    packed = packed_encoder("modernbert", activation_range="asymmetric")
    lengths = torch.tensor([37, 5, 20, 1])
    mask = (torch.arange(37) < lengths[:, None]).long()
    if kind == "holes":
        mask = (torch.arange(4 * 37).view(4, 37) % 3 > 0).long()
    ids = torch.randint(5, 100, mask.shape)
    keep, expected = mask.bool(), hidden(packed, {"input_ids": ids, "attention_mask": mask})
    for skip in (False, True):
        fast = optimize_for_inference(packed, engine=engine, skip_padding=skip)
        got = hidden(fast, {"input_ids": ids, "attention_mask": mask})
        assert error(got[keep], expected[keep]) < 0.02
        for row, length in enumerate(lengths if kind == "right" else ()):
            alone = hidden(fast, {"input_ids": ids[row : row + 1, :length]})[0]
            assert error(got[row, :length], alone) < 0.02


AUTO_CLASSES = [name for name in dir(transformers) if name.startswith("AutoModelFor")]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_gets_what_the_packed_model_gives_it(family: str) -> None:
    config = build(family).config
    batch = inputs_for(family, 2, 8)
    tried = set()
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) not in auto._model_mapping or auto._model_mapping[type(config)].__name__ in tried:
            continue
        model = lively(auto.from_config(config))
        tried.add(type(model).__name__)
        given = dict(batch)
        if name == "AutoModelForMultipleChoice":
            given = {key: value.unsqueeze(1).repeat(1, 2, 1) for key, value in batch.items()}
        if name == "AutoModelForMaskedImageModeling":
            given["bool_masked_pos"] = torch.rand(2, 4) > 0.5
        bits = {"embeddings": 32, "*": 4}  # MobileBERT's head for words multiplies by the table itself
        packed = pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **EXACT)))
        fast = optimize_for_inference(packed)
        with torch.no_grad():
            got, expected = fast(**given), packed(**given)
        assert got.keys() == expected.keys()
        for key in got:
            assert torch.allclose(got[key], expected[key], rtol=1e-3, atol=1e-3), (name, key)
    assert len(tried) >= {"vit": 2, "modernbert": 5, "mobilebert": 6, "deberta-v2": 5}[family]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_float_runs_between_fused_ones(family: str, caplog: pytest.LogCaptureFixture) -> None:
    stem = "encoder.layer" if family in ("mobilebert", "deberta-v2") else "layers"
    overrides = WINDOWED if family == "modernbert" else {}
    whole = 4 if family == "modernbert" else 2
    bits = {f"{stem}.{i}": 32 if i == 1 else 4 for i in range(whole)} | {"*": 4}
    packed = packed_encoder(family, bits, overrides, **EXACT)
    for attention in ("sdpa", "eager") if family != "deberta-v2" else ("eager",):
        packed.set_attn_implementation(attention)
        with caplog.at_level(logging.INFO, logger="qbert.inference.cpu"):
            fast = optimize_for_inference(packed)
        reason = "is not fused: its linear maps are in float; it runs in its own way"
        assert caplog.messages[-1].startswith("layer 1 of ") and caplog.messages[-1].endswith(reason)
        batch = inputs_for(family)
        got, expected = hidden(fast, batch), hidden(packed, batch)
        keep = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
        assert torch.allclose(got[keep], expected[keep], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_bottleneck_attention": True},
        {"key_query_shared_bottleneck": False, "intra_bottleneck_size": 48},
        {"use_bottleneck": False, "num_feedforward_networks": 1},
        {"normalization_type": "layer_norm"},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranges", [{"activation_bits": None}, {"activation_range": "asymmetric"}])
def test_every_kind_of_mobilebert_is_fused(settings: dict[str, Any], ranges: dict[str, Any]) -> None:
    packed, batch = packed_encoder("mobilebert", 4, settings, **ranges), inputs_for("mobilebert")
    native = "native" in RUN and ranges != EXACT
    fast = optimize_for_inference(packed, engine="native" if native else "auto")
    assert isinstance(fast.forward, FusedModel)
    assert error(hidden(fast, batch), hidden(packed, batch)) < 0.02


@pytest.mark.usefixtures("uncompiled")
def test_what_a_whole_fused_model_does_not_serve_gets_its_own_forward() -> None:
    packed, batch = packed_encoder("modernbert", **EXACT), inputs_for("modernbert")
    fast = optimize_for_inference(packed)
    with torch.no_grad():
        got, expected = (model(**batch, output_hidden_states=True) for model in (fast, packed))
        assert len(got.hidden_states) == len(expected.hidden_states) == 5
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))
        places = torch.arange(9).flip(0)[None]
        assert torch.equal(fast(**batch, position_ids=places)[0], packed(**batch, position_ids=places)[0])
        with pytest.raises(ValueError, match="exactly one"):
            fast(attention_mask=batch["attention_mask"])
    image = optimize_for_inference(packed_encoder("vit", **EXACT))
    with pytest.raises(ValueError, match="doesn't match model"):
        image(torch.randn(1, 3, 48, 48))
    larger = {"pixel_values": torch.randn(1, 3, 48, 48), "interpolate_pos_encoding": True}
    assert torch.allclose(hidden(image, larger), hidden(packed_encoder("vit", **EXACT), larger), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", ["vit", "deberta-v2"])
def test_a_copy_of_a_whole_fused_model_stands_alone(family: str) -> None:
    fast, batch = optimize_for_inference(packed_encoder(family)), inputs_for(family)
    twin = copy.deepcopy(fast)
    assert twin.forward.base is twin
    assert twin.forward.layers.encoder is (twin if family == "vit" else twin.encoder)
    assert torch.equal(hidden(twin, batch), hidden(fast, batch))


def test_a_rotation_that_depends_on_the_length_is_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    config = build("modernbert").config
    config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    packed = pack(qbert.quantize_model(AutoModel.from_config(config).eval(), qbert.BitsConfig(4, **EXACT)))
    with caplog.at_level(logging.INFO, logger="qbert.inference.cpu"):
        fast = optimize_for_inference(packed)
    assert "its rotation of the kind dynamic depends on the length" in caplog.text
    assert not isinstance(fast.forward, FusedWholeModel)


@pytest.mark.usefixtures("uncompiled")
def test_the_students_bottlenecks_are_fused_with_what_is_folded_left_out() -> None:
    from qbert.students.mobilebert import fold_no_norms, mobilebert

    teacher = lively(AutoModel.from_config(build("bert").config))
    student = fold_no_norms(lively(mobilebert(teacher, inner=24)))
    packed = pack(qbert.quantize_model(student, qbert.BitsConfig(4, **EXACT)))
    fast, batch = optimize_for_inference(packed), inputs_for("bert")
    assert isinstance(fast.forward, FusedModel)
    assert torch.allclose(hidden(fast, batch), hidden(packed, batch), rtol=1e-3, atol=1e-4)
    layers = FusedLayers([part for x in packed.encoder.layer if (part := LayerParts.of_any_kind(x)) is not None])
    assert isinstance(layers.layers[0].down_norm, nn.Identity)
