"""Recorded features equal what transformers computes itself, for every family that has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from distilling import distiller, rows
from encoders import build, inputs_for

import qbert
from qbert.distill import recipes
from qbert.distill.features import Recorder, dot_scores
from qbert.students.shared import narrow_table

SCORE_FAMILIES = ("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "vit")


def record(model: Any, features: set[str], inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, list[Any]]:
    with torch.no_grad(), Recorder(model, features, **options) as recorder:
        output = model(**inputs, **recorder.arguments)
        return {name: recorder.features(name, output) for name in features}


@pytest.mark.parametrize("family", [*SCORE_FAMILIES, "bert with fewer heads"])
def test_scores_give_the_attention_probabilities_of_the_model(family: str) -> None:
    name = family.split()[0]
    model, inputs = build(name).eval(), inputs_for(name)
    if name != family:
        model = qbert.prune(model, heads=[0.25, 0.0])
    if name == "mpnet":
        torch.nn.init.normal_(model.mpnet.encoder.relative_attention_bias.weight)
    scores = record(model, {"scores"}, inputs)["scores"]  # with the fast attention
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(**inputs, output_attentions=True).attentions
    assert len(scores) == len(probabilities) == 2
    mask = inputs.get("attention_mask")
    for raw, expected in zip(scores, probabilities, strict=True):
        if mask is not None:
            raw = raw.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        torch.testing.assert_close(raw.softmax(-1), expected, atol=1e-6, rtol=1e-5)


def test_shared_layers_are_recorded_by_call() -> None:
    model = build("albert", num_hidden_layers=5).eval()
    features = record(model, {"scores", "hidden"}, inputs_for("albert"))
    assert len(features["scores"]) == 5 and len(features["hidden"]) == 6
    assert not torch.equal(features["scores"][0], features["scores"][1])


def test_attention_of_a_table_is_no_layer() -> None:
    student = narrow_table(build("bert"), 12, heads=2)
    features = record(student, {"scores", "hidden"}, inputs_for("bert"))
    assert len(features["scores"]) == 2 and len(features["hidden"]) == 3


def test_quantized_students_give_the_same_features() -> None:
    model = qbert.quantize_model(build("bert").eval(), 4)
    features = record(model, {"scores", "relations.value", "cls", "embeddings", "logits"}, inputs_for("bert"))
    assert [len(features[n]) for n in ("scores", "relations.value", "cls", "embeddings", "logits")] == [2, 2, 3, 1, 1]
    assert features["cls"][0].shape == (2, 48)


def test_relations_take_their_own_number_of_heads() -> None:
    model = build("bert").eval()
    relations = record(model, {"relations.key"}, inputs_for("bert"), relation_heads=8)["relations.key"]
    assert relations[0].shape == (2, 8, 9, 9)
    with pytest.raises(ValueError, match="7 heads do not divide a width of 48"):
        record(model, {"relations.key"}, inputs_for("bert"), relation_heads=7)


def test_any_module_by_path_with_or_without_the_prefix() -> None:
    model, inputs = build("bert").eval(), inputs_for("bert")
    names = {"module:encoder.layer.1.intermediate", "module:bert.encoder.layer.1.intermediate"}
    features = record(model, names, inputs)
    short, full = (features[name][0] for name in sorted(names, key=len))
    assert torch.equal(short, full) and short.shape == (2, 9, 96)


def test_no_hook_is_left_behind() -> None:
    model = build("bert").eval()
    record(model, {"scores", "module:pooler"}, inputs_for("bert"))
    assert not any(module._forward_hooks for module in model.bert.encoder.layer[0].attention.modules())


@pytest.mark.parametrize(
    ("family", "feature", "message"),
    [
        ("deberta-v2", "scores", "does not compute its scores from separate query and key"),
        ("modernbert", "scores", "does not compute its scores from separate query and key"),
        ("bert", "module:encoder.layer.7", "has no module of that name"),
        ("bert", "attentions", "'attentions' is not known"),
    ],
)
def test_features_a_model_cannot_give_are_refused(family: str, feature: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(build(family), {feature})


@pytest.mark.parametrize(
    ("family", "options"),
    [("RoFormer", {"embedding_size": 48}), ("Esm", {"position_embedding_type": "rotary", "mask_token_id": 4})],
)
def test_rotated_queries_and_keys_have_relations_but_no_scores(family: str, options: dict[str, Any]) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(tf, f"{family}Config")(**sizes, num_hidden_layers=2, pad_token_id=0, **options)
    model = getattr(tf, f"{family}ForSequenceClassification")(config).eval()
    with pytest.raises(ValueError, match=r"rotate them.*match 'relations.query' and 'relations.key'"):
        Recorder(model, {"scores"})
    assert len(record(model, {"relations.query"}, inputs_for("bert"))["relations.query"]) == 2


@pytest.mark.parametrize("feature", ["scores", "relations.value", "hidden"])
def test_features_of_some_layers_are_those_of_all(feature: str) -> None:
    model, inputs = build("bert", num_hidden_layers=4).eval(), inputs_for("bert")
    with torch.no_grad(), Recorder(model, {feature}) as recorder:
        output = model(**inputs, **recorder.arguments)
    every, some = recorder.features(feature, output), recorder.features(feature, output, [3, 1])
    assert len(some) == 2 and torch.equal(some[0], every[3]) and torch.equal(some[1], every[1])


def test_a_step_computes_the_relations_of_matched_layers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build("bert", num_hidden_layers=4).eval()
    trainer = distiller(tmp_path, teacher=teacher, student=build("bert"), recipe=recipes.minilm())
    made: list[int] = []

    def counted(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
        made.append(heads)
        return dot_scores(query, key, heads)

    monkeypatch.setattr("qbert.distill.features.dot_scores", counted)
    trainer.distillation.losses(dict(trainer.data_collator(rows(4))))
    assert len(made) == 6  # of queries, keys and values, in one layer of each model
