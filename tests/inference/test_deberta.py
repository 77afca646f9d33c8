"""DeBERTa-v2 and v3, fused: attention by relative position in every configuration, beside the packed model."""

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for

import qbert
from qbert.inference.cpu import optimize_for_inference
from qbert.inference.cpu_deberta import FusedDeberta, positions_of
from qbert.inference.engines import reason_not
from qbert.packing import pack

sys.path.insert(0, str(Path(__file__).parent))
from test_other_encoders import EXACT, RUN, error, hidden, packed_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.* of the weights of DebertaV2.* stay in float")
# Distances of up to 36 tokens pass the linear buckets, the logarithmic ones, and the end of the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "as v3": {
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 8, "max_position_embeddings": 24,
    },
    "no buckets": {"max_relative_positions": 11},
    "an odd number of buckets": {"position_buckets": 7, "max_position_embeddings": 64, "share_att_key": True},
    "from content to position": {"pos_att_type": ["c2p"], "position_buckets": 8, "max_position_embeddings": 64},
    "from position to content": {"pos_att_type": "p2c", "norm_rel_ebd": "layer_norm"},
    "neither": {"pos_att_type": []},
    "absolute positions and types": {
        "relative_attention": False, "position_biased_input": True, "type_vocab_size": 2, "embedding_size": 24,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run as they are; that the compiled ones do the same is another test's promise."""
    monkeypatch.setattr("qbert.inference.chosen.compiled", lambda module: module)


def masked(length: int = 37) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([length, 5, 20, 1])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_configuration_is_the_packed_models_to_float_precision(name: str) -> None:
    packed, batch = packed_encoder("deberta-v2", overrides=VARIANTS[name], **EXACT), masked()
    fast = optimize_for_inference(packed)
    assert isinstance(fast.forward, FusedDeberta)
    if "type_vocab_size" in VARIANTS[name]:
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
        batch["position_ids"] = torch.arange(37).flip(0)[None]
    expected = hidden(packed, batch)
    assert torch.allclose(hidden(fast, batch), expected, rtol=1e-3, atol=1e-4)
    if packed.encoder.relative_attention and packed.config.pos_att_type:
        packed.encoder.rel_embeddings.weight.data.zero_()
        assert error(hidden(packed, batch), expected) > 0.01


@pytest.mark.parametrize("engine", [*RUN, *(e for e in ("bf16", "fp32") if not reason_not(e))])
@pytest.mark.parametrize("name", ["as v3", "no buckets", "from content to position", "from position to content"])
def test_every_engine_adds_what_positions_give(name: str, engine: str) -> None:
    packed, batch = packed_encoder("deberta-v2", overrides=VARIANTS[name], activation_range="asymmetric"), masked()
    fast = optimize_for_inference(packed, engine=engine)
    if engine not in RUN:
        packed = packed_encoder("deberta-v2", overrides=VARIANTS[name], **EXACT)
    expected = hidden(packed, batch)
    assert error(hidden(fast, batch), expected) < (1e-4 if engine == "fp32" else 0.02)


@pytest.mark.parametrize("engine", RUN)
def test_a_sequence_depends_on_neither_batch_nor_padding(engine: str) -> None:
    packed, batch = packed_encoder("deberta-v2", overrides=VARIANTS["as v3"], activation_range="asymmetric"), masked()
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    for skip in (False, True):
        fast = optimize_for_inference(packed, engine=engine, skip_padding=skip)
        got = hidden(fast, batch)
        others = hidden(fast, {**batch, "input_ids": torch.where(keep, ids, 7)})
        assert not skip or (got[~keep] == 0).all()
        for row, length in enumerate(keep.sum(1)):
            alone = hidden(fast, {"input_ids": ids[row : row + 1, :length]})[0]
            assert error(got[row, :length], alone) < 0.02 and error(others[row, :length], alone) < 0.02


def test_a_classifier_skips_padding_and_serves_what_more_is_asked_for() -> None:
    packed = pack(qbert.quantize_model(build("deberta-v2").eval(), qbert.BitsConfig(4, **EXACT)))
    fast, batch = optimize_for_inference(packed), masked()
    assert fast.deberta.forward.layers.skip_padding
    with torch.no_grad():
        assert torch.allclose(fast(**batch).logits, packed(**batch).logits, rtol=1e-3, atol=1e-4)
        more = {"output_hidden_states": True, "output_attentions": True}
        got, expected = fast(**batch, **more), packed(**batch, **more)
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True))
    embeds = torch.randn(1, 4, 48)
    assert torch.equal(hidden(fast, {"inputs_embeds": embeds}), hidden(packed, {"inputs_embeds": embeds}))


def test_a_layer_before_a_convolution_runs_in_its_own_way(caplog: pytest.LogCaptureFixture) -> None:
    packed = packed_encoder("deberta-v2", overrides={"conv_kernel_size": 3, "num_hidden_layers": 3}, **EXACT)
    with caplog.at_level(logging.INFO, logger="qbert.inference.cpu"):
        fast = optimize_for_inference(packed)
    assert "layer 0 of DebertaV2Model is not fused: a convolution stands behind it" in caplog.text
    batch = masked()
    for given in (batch, {"input_ids": batch["input_ids"]}):
        assert torch.allclose(hidden(fast, given), hidden(packed, given), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fused_is_said(caplog: pytest.LogCaptureFixture) -> None:
    packed = packed_encoder("deberta-v2", **EXACT)
    repeated = copy.deepcopy(packed)
    repeated.z_steps = 2
    odd = packed_encoder("deberta-v2", overrides={"position_buckets": 16, "max_relative_positions": 6}, **EXACT)
    batch = inputs_for("deberta-v2")
    for model, reason in ((repeated, "its last layer several times"), (odd, "places of its distances do not rise")):
        with caplog.at_level(logging.INFO, logger="qbert.inference.cpu"):
            fast = optimize_for_inference(model)
        assert reason in caplog.text and not isinstance(fast.forward, FusedDeberta)
        if model is odd:
            assert torch.allclose(hidden(fast, batch), hidden(model, batch), rtol=1e-3, atol=1e-4)


def test_places_are_the_models_own_for_all_distances() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    for name in ("as v3", "no buckets", "an odd number of buckets"):
        encoder = packed_encoder("deberta-v2", overrides=VARIANTS[name], **EXACT).encoder
        places = positions_of(encoder, encoder.layer[0]).places
        length, farthest = 300, len(places) // 2
        x = torch.zeros(1, length, 1)
        own = build_relative_position(x, x, encoder.position_buckets, encoder.max_relative_positions)[0]
        span = encoder.layer[0].attention.self.pos_ebd_size
        order = torch.arange(length)
        got = places[(order[:, None] - order).clamp(-farthest, farthest) + farthest]
        assert torch.equal(got.long(), (own + span).clamp(0, 2 * span - 1))
