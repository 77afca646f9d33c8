"""Models with several encoders, or with weights that no kind of layer covers: quantized whole, or told in words."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build
from torch import nn

import qbert
from qbert.encoders.targets import base_models, encoder_layers, find_targets
from qbert.layers.kind import TrainableLayer

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def bert() -> tf.BertModel:
    return tf.BertModel(tf.BertConfig(**SMALL))


class BiEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = bert(), bert()
        self.score = nn.Linear(32, 1)


def clip() -> nn.Module:
    towers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**SMALL, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**towers, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def canine() -> nn.Module:
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return tf.CanineModel(tf.CanineConfig(**small))


@pytest.mark.parametrize("make", [BiEncoder, clip, canine])
def test_every_layer_of_every_encoder_is_quantized(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = qbert.quantize_model(model, 4)
    linear = [p for p, m in model.named_modules() if type(m) is nn.Linear and ".layer" in p]
    assert linear and all(isinstance(student.get_submodule(p), TrainableLayer) for p in linear)


@pytest.mark.parametrize(("make", "layers"), [(BiEncoder, 4), (clip, 4), (canine, 4)])
def test_layers_are_counted_over_all_encoders(make: Any, layers: int) -> None:
    model = make()
    assert len(encoder_layers(model)) == layers
    assert {t.layer for t in find_targets(model) if t.layer is not None} == set(range(layers))


def test_names_in_a_bi_encoder_are_full_paths_and_short_patterns_mean_both() -> None:
    model = BiEncoder()
    assert [path for path, _ in base_models(model)] == ["query", "document"]
    student = qbert.quantize_model(model, {"encoder.layer.0": 8, "document.encoder.layer.1": 2, "*": 4})
    bits = {p: m.spec.bits for p, m in student.named_modules() if isinstance(m, TrainableLayer)}
    assert bits["query.encoder.layer.0.output.dense"] == bits["document.encoder.layer.0.output.dense"] == 8
    assert bits["query.encoder.layer.1.output.dense"] == 4 and bits["document.encoder.layer.1.output.dense"] == 2
    assert "score" not in bits and "query.pooler.dense" not in bits


def test_a_bi_encoder_goes_from_spectrum_to_bits_to_a_packed_model() -> None:
    model = BiEncoder().eval()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        rows = {k: batch[k] for k in ("input_ids", "attention_mask")}
        pair: Any = model
        scores = pair.score(pair.query(**rows).pooler_output * pair.document(**rows).pooler_output)
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], batch["labels"].float())

    ids = torch.randint(3, 50, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    spectrum = qbert.hessian_spectrum(model, [batch], runs=2, fraction=1.0, loss_fn=loss, tol=0.1)
    assert len(spectrum.names) == 4
    packed = qbert.pack(qbert.quantize_model(model, qbert.allocate_bits(spectrum, bits=(2, 4))))
    assert {m.layout.bits for m in packed.modules() if hasattr(m, "layout")} == {2, 4}


def test_weights_that_no_kind_covers_are_named_in_one_warning_with_their_share() -> None:
    model = tf.XLNetModel(tf.XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=2, d_inner=64))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qbert.quantize_model(model, 4)
    messages = [str(w.message) for w in told if "stay in float" in str(w.message)]
    assert len(messages) == 1
    assert "layer.0.rel_attn.q (XLNetRelativeAttention)" in messages[0] and "%" in messages[0]


def test_a_model_of_whose_layers_nothing_can_be_quantized_is_refused() -> None:
    config = tf.IBertConfig(**SMALL, max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"none of the weights in the layers of IBertModel .* \(QuantLinear\)"):
        qbert.quantize_model(tf.IBertModel(config), 4)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "electra", "modernbert", "mpnet"])
def test_text_families_are_covered_without_a_word(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qbert.quantize_model(build(family), 4)


def test_convolutions_of_squeezebert_are_quantized() -> None:
    config = tf.SqueezeBertConfig(**SMALL, embedding_size=32, max_position_embeddings=16)
    student = qbert.quantize_model(tf.SqueezeBertModel(config), 4)
    size = qbert.model_size(student)
    assert all("encoder" not in t.name for t in size.left_in_float)


def test_model_size_lists_what_is_left_in_float() -> None:
    size = qbert.model_size(qbert.quantize_model(build("bert"), {"encoder.layer.0": 4}))
    names = {t.name for t in size.left_in_float}
    assert "bert.encoder.layer.1.output.dense.weight" in names and "bert.pooler.dense.weight" in names
    assert "bert.encoder.layer.0.output.dense.weight" not in names
    assert "in float: " in str(size)
