"""Students of other shapes: what they compute, and that every way of the library takes them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from encoders import build, inputs_for, outputs

import qbert
from qbert import students
from qbert.encoders.targets import base_model
from qbert.inference.cpu import FusedEncoder
from qbert.students.depth import Choice, DepthTable, applied
from qbert.students.shared import share_layers

BATCHES = [inputs_for("bert", batch=8) for _ in range(3)]


def teacher(**overrides: Any) -> Any:
    return build("bert", num_hidden_layers=4, **overrides).eval()


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return base_model(model)[1](**batch).last_hidden_state


def shapes() -> dict[str, Any]:
    model = teacher()
    return {
        "fewer layers": students.depth(model, [0, 3]),
        "DistilBERT": students.distilbert(students.depth(model, [0, 3]), BATCHES),
        "narrower": students.narrow(students.depth(model, [0, 1, 3]), 32, BATCHES, intermediate=40),
        "from scratch": students.small(model, layers=1, width=24, heads=4, intermediate=40),
    }


@pytest.mark.parametrize("name", ["fewer layers", "DistilBERT", "narrower", "from scratch"])
def test_students_are_saved_loaded_quantized_packed_and_optimized(name: str, tmp_path: Path) -> None:
    student, batch = shapes()[name], inputs_for("bert")
    student.save_pretrained(tmp_path / "float")
    loaded = type(student).from_pretrained(tmp_path / "float").eval()
    torch.testing.assert_close(outputs(loaded, batch), outputs(student, batch))
    packed = qbert.pack(qbert.quantize_model(student, 4))
    packed.save_pretrained(tmp_path / "packed")
    again = qbert.load(tmp_path / "packed").eval()
    assert type(again) is type(student)
    torch.testing.assert_close(outputs(again, batch), outputs(packed, batch))
    fast = qbert.optimize_for_inference(packed)
    assert any(isinstance(vars(module).get("forward"), FusedEncoder) for module in fast.modules())
    torch.testing.assert_close(outputs(fast, batch), outputs(packed, batch), rtol=1e-3, atol=1e-3)


def test_choices_are_scored_as_the_students_that_they_describe() -> None:
    model = teacher()
    table = students.compare_depths(model, BATCHES, 2)
    assert len(table.choices) == 6 + 6 and [c.divergence for c in table.choices] == sorted(
        c.divergence for c in table.choices
    )
    real = torch.cat([outputs(model, batch) for batch in BATCHES]).double().numpy()
    for choice in table.choices:
        student = students.student_with_layers(model, choice.layers)  # a layer that is applied twice is copied
        found = torch.cat([outputs(student, batch) for batch in BATCHES]).double().numpy()
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (real, found))
        assert choice.divergence == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4, abs=1e-9)
        assert choice.agreement == pytest.approx(100 * float((real.argmax(1) == found.argmax(1)).mean()))
    assert len(base_model(model)[1].encoder.layer) == 4
    assert students.depth(model, 2, BATCHES).config.num_hidden_layers == 2


def test_many_choices_are_searched_and_the_table_says_so() -> None:
    torch.manual_seed(0)
    model = build("bert", num_hidden_layers=12, hidden_size=16, intermediate_size=16).eval()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    table = students.compare_depths(model, BATCHES[:1], 6)
    assert len(passes) < 200  # 924 choices and as many sandwiches
    assert "not all of 924 ways" in str(table) and table == DepthTable.from_list(table.to_list(), 924)
    assert {len(choice.layers) for choice in table.choices} == {6, 12}


def test_a_search_as_wide_as_all_choices_finds_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = teacher()
    every = students.compare_depths(model, BATCHES[:1], 2)
    module = importlib.import_module("qbert.students.depth")  # students.depth is the function
    monkeypatch.setattr(module, "_MOST_CHOICES", 0)
    monkeypatch.setattr(module, "_BEAM", 100)
    searched = students.compare_depths(model, BATCHES[:1], 2)
    assert every.ways is None and searched.ways == 6
    found, expected = ({c.layers: c.divergence for c in table.choices} for table in (searched, every))
    assert found == pytest.approx(expected)


def test_a_sandwich_has_the_teachers_depth_and_its_first_and_last_layer_once() -> None:
    layers = {c.layers for c in students.compare_depths(teacher(), BATCHES[:1], 3).choices}
    assert layers == {
        (0, 1, 2),
        (0, 1, 3),
        (0, 2, 3),
        (1, 2, 3),
        (0, 1, 1, 2),
        (0, 1, 1, 3),
        (0, 2, 2, 3),
        (1, 2, 2, 3),
    }


def test_without_classes_choices_are_scored_by_squares() -> None:
    config = build("bert", num_hidden_layers=3).config
    encoder = tf.BertModel(config).eval()
    for model in (encoder, tf.BertForQuestionAnswering(config).eval()):
        table = students.compare_depths(model, BATCHES, 2, sandwiches=False)
        assert all(choice.agreement is None for choice in table.choices)
    best = students.depth(encoder, students.compare_depths(encoder, BATCHES, 2, sandwiches=False).best.layers)
    keep = torch.cat([batch["attention_mask"].flatten() for batch in BATCHES]).bool()
    states = [torch.cat([hidden(m, b).flatten(0, 1) for b in BATCHES])[keep].double() for m in (encoder, best)]
    expected = float((states[0] - states[1]).square().mean())
    assert students.compare_depths(encoder, BATCHES, 2, sandwiches=False).best.divergence == pytest.approx(
        expected, rel=1e-5
    )


def test_the_best_choice_stores_what_it_applies() -> None:
    table = DepthTable((Choice((0, 1, 1, 2), 0.1, 90.0), Choice((0, 2), 0.2, 80.0)))
    assert (
        table.best.layers == (0, 2)
        and table.best_sandwich.layers == (0, 1, 1, 2)
        and "0 1 1 2" in str(table).splitlines()[1]
    )


def test_layers_are_given_back_after_an_error() -> None:
    model = teacher()
    with pytest.raises(RuntimeError), applied(model, [0]):
        raise RuntimeError
    assert len(base_model(model)[1].encoder.layer) == 4


@pytest.mark.parametrize(
    "kind", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"]
)
def test_a_distilbert_has_the_hidden_states_of_the_bert_it_was_made_from(kind: str) -> None:
    config = build("bert").config
    config.num_labels = 2 if kind == "ForQuestionAnswering" else 3
    model = getattr(tf, f"Bert{kind}")(config).eval()
    student = students.distilbert(model)
    assert type(student).__name__ == f"DistilBert{kind}"
    batch = inputs_for("bert")
    torch.testing.assert_close(hidden(student, batch), hidden(model, batch), rtol=1e-4, atol=1e-5)
    if kind in ("ForTokenClassification", "ForQuestionAnswering"):
        theirs, ours = (next(iter(m(**batch).values())) for m in (model, student))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_distilbert_has_the_words_of_the_language_model_it_was_made_from() -> None:
    model = tf.BertForMaskedLM(build("bert").config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    batch = inputs_for("bert")
    student = students.distilbert(model)
    torch.testing.assert_close(outputs(student, batch), outputs(model, batch), rtol=1e-4, atol=1e-5)
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


def test_the_head_of_a_distilbert_starts_as_the_ridge_regression_of_the_teachers_outputs() -> None:
    model = teacher(num_labels=3)
    student = students.distilbert(model, BATCHES)
    states = torch.cat([hidden(model, b)[:, 0] for b in BATCHES]).double().numpy()
    logits = torch.cat([outputs(model, b) for b in BATCHES]).double().numpy()
    x, y = states - states.mean(0), logits - logits.mean(0)
    damping = 1e-3 * np.square(x).sum() / x.shape[1]
    maps = np.linalg.solve(x.T @ x + damping * np.eye(x.shape[1]), x.T @ y)
    expected = x @ maps + logits.mean(0)
    found = torch.cat([outputs(student, b) for b in BATCHES]).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_what_a_narrow_student_starts_from_is_held_in_the_teachers_dtype() -> None:
    module = importlib.import_module("qbert.students.narrow")  # students.narrow is the function
    model, rows = teacher(), dict(BATCHES[0])
    seen = module._Seen(model, rows)
    assert {state.dtype for state in seen.after} == {torch.float32} and seen.state(0).dtype == torch.float64
    assert seen.after[0].shape == (int(rows["attention_mask"].sum()), 48) and len(seen.after) == 1 + 2 * 4


def test_a_narrow_student_is_nearer_to_its_teacher_than_one_at_random() -> None:
    model = teacher()
    errors = []
    for student in (students.narrow(model, 44, BATCHES), students.small(model, width=44)):
        errors.append(sum(float((outputs(student, b) - outputs(model, b)).square().mean()) for b in BATCHES))
    assert errors[0] < errors[1] / 4


def test_hidden_states_of_low_rank_are_projected_without_loss() -> None:
    """Gains of 1, and states in few directions that a projection can hold: outputs stay what they are."""
    model = teacher(num_attention_heads=2, hidden_size=16, intermediate_size=8)
    with torch.no_grad():
        held = torch.linalg.qr(torch.cat([torch.ones(16, 1), torch.randn(16, 9)], 1)).Q[:, 1:]  # 9 directions, mean 0
        for name, parameter in model.bert.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.fill_(1.0)
            elif "LayerNorm.bias" in name:
                parameter.zero_()
            elif "embeddings" in name and parameter.dim() == 2:
                parameter.copy_(parameter @ held @ held.T)
            elif name.endswith("output.dense.weight") or name.endswith("output.dense.bias"):
                parameter.copy_(held @ held.T @ parameter)
            elif re_head(name):
                parameter.view(2, 8, -1)[:, 5:] = 0.0  # heads of 8 that use 5
    student = students.narrow(model, 10, BATCHES, intermediate=8)
    for layer_old, layer_new in zip(model.bert.encoder.layer, student.bert.encoder.layer, strict=True):
        assert layer_new.attention.self.attention_head_size == 5 and layer_old.attention.self.attention_head_size == 8
    ours, theirs = (hidden(m, BATCHES[0]) for m in (student, model))
    keep = BATCHES[0]["attention_mask"].bool()
    gram_ours, gram_theirs = (x[keep] @ x[keep].T for x in (ours, theirs))
    torch.testing.assert_close(gram_ours, gram_theirs, rtol=1e-2, atol=1e-2)


def re_head(name: str) -> bool:
    return any(part in name for part in ("self.query", "self.key", "self.value"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: students.depth(teacher(), 2), "layers=2 is a number"),
        (lambda: students.compare_depths(teacher(), BATCHES, 4), "keep=4 is not possible; the teacher has 4 layers"),
        (lambda: students.compare_depths(teacher(), [], 2), "batches is empty"),
        (lambda: students.narrow(teacher(), 30, BATCHES), "width=30 is not possible.*use 28 or 32"),
        (lambda: students.narrow(teacher(), 48, BATCHES), "width=48 is not possible"),
        (lambda: students.narrow(teacher(), 32, BATCHES, intermediate=97), "intermediate=97 is not possible"),
        (lambda: students.narrow(teacher(), 32, []), "batches is empty"),
        (lambda: students.narrow(build("distilbert"), 32, BATCHES), "is no BERT"),
        (lambda: students.distilbert(build("roberta")), "cannot become a DistilBERT"),
        (lambda: students.distilbert(build("bert", layer_norm_eps=1e-5)), "1e-05; keep its class"),
        (lambda: students.distilbert(teacher(), []), "batches is empty"),
        (
            lambda: students.small(share_layers(teacher(), "all")),
            "changed already .sharing.; call small",
        ),
        (lambda: students.small(teacher(), layers=0), "layers=0 is not possible"),
        (lambda: students.small(teacher(), width=30), "width=30 is not possible with 4 heads"),
    ],
)
def test_impossible_shapes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
