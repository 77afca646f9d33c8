"""Recipes for smaller students: their terms against float64 arithmetic, and a tiny training of each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import distiller, rows
from encoders import build
from tiny_tasks import sentiment_rows, tiny_encoder
from transformers import AutoModel, AutoTokenizer

from qbert import students
from qbert.distill import Recipe, recipes
from qbert.encoders.targets import base_model
from qbert.tasks.candidates import MaskedWords
from qbert.tasks.masking import MaskWords, language_model, text_rows


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def test_the_relations_of_minilm_are_those_of_one_layer_over_any_number_of_heads(tmp_path: Path) -> None:
    teacher = build("bert", num_hidden_layers=3, hidden_size=36).eval()
    student = build("bert", hidden_size=48, num_attention_heads=4).eval()
    data = rows(6)
    data[0]["attention_mask"] = [1] * 5 + [0] * 4
    recipe = recipes.minilm(teacher_layer=1, relation_heads=6)
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=data)
    batch = dict(trainer.data_collator(data))
    with torch.no_grad():
        found = dict(zip(recipe.terms, trainer.distillation.losses(batch)["terms"], strict=True))
        mask = numbers(batch["attention_mask"]) > 0
        inputs = [
            base_model(m)[1](batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
            for m in (student, teacher)
        ]
    for part in ("query", "key", "value"):
        relations = []
        for model, states, layer in ((student, inputs[0], 1), (teacher, inputs[1], 1)):
            linear = getattr(base_model(model)[1].encoder.layer[layer].attention.self, part)
            x = numbers(states[layer]) @ numbers(linear.weight).T + numbers(linear.bias)
            x = x.reshape(*x.shape[:2], 6, -1).transpose(0, 2, 1, 3)
            scores = x @ x.transpose(0, 1, 3, 2) / np.sqrt(x.shape[-1])
            relations.append(softmax(np.where(mask[:, None, None, :], scores, -np.inf)))
        ours, theirs = relations
        ratio = np.log(theirs / ours, out=np.zeros_like(ours), where=(ours > 0) & (theirs > 0))
        expected = (theirs * ratio).sum(-1).mean(1)[mask].mean()
        assert float(found[f"relations_{part}"]) == pytest.approx(expected, rel=1e-4)


def test_the_triple_loss_of_distilbert(tmp_path: Path) -> None:
    teacher, student = build("bert").eval(), build("bert", num_hidden_layers=1).eval()
    data, recipe = rows(6), recipes.distilbert()
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=data)
    batch = dict(trainer.data_collator(data))
    with torch.no_grad():
        total = float(trainer.distillation.losses(dict(batch))["loss"])
        labels = batch.pop("labels").numpy()
        theirs, ours = (model(**batch, output_hidden_states=True) for model in (teacher, student))
    z, t = numbers(ours.logits), numbers(theirs.logits)
    soft = -4 * (softmax(t / 2) * np.log(softmax(z / 2))).sum(1).mean()
    hard = -np.log(softmax(z))[np.arange(6), labels].mean()
    a, b = numbers(ours.hidden_states[-1]), numbers(theirs.hidden_states[-1])
    cosine = 1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()
    assert total == pytest.approx(5 * soft + 2 * hard + cosine, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ["hidden", "scores", "logits"]),
        ({"general": True}, ["hidden", "scores"]),
        ({"without": ("hidden",)}, ["embeddings", "scores", "logits"]),
        ({"without": ("hidden", "embeddings", "scores")}, ["logits"]),
        ({"without": ("prediction",), "layers": "top"}, ["hidden", "scores"]),
    ],
)
def test_terms_of_tinybert_can_be_left_out(settings: dict[str, Any], terms: list[str]) -> None:
    assert recipes.tinybert(**settings).terms == terms


def changed(student: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("name", ["distilbert", "tinybert", "minilm", "pkd", "logits", "from scratch"])
def test_every_student_trains(name: str, tmp_path: Path) -> None:
    teacher, data = build("bert", num_hidden_layers=4).eval(), rows(16)
    batches = [{key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "attention_mask")}]
    shallow = students.depth(teacher, [0, 3])
    student, recipe = {
        "distilbert": (students.distilbert(shallow, batches), recipes.distilbert()),
        "tinybert": (students.narrow(shallow, 32, batches), recipes.tinybert()),
        "minilm": (students.narrow(shallow, 32, batches), recipes.minilm(relation_heads=8, prediction=0.5)),
        "pkd": (shallow, recipes.pkd()),
        "logits": (shallow, recipes.logits()),
        "from scratch": (students.small(teacher, layers=1), recipes.logits(temperature=2.0)),
    }[name]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=data, max_steps=5)
    trainer.train()
    assert changed(student, before) and len([log for log in trainer.state.log_history if "loss" in log]) == 5


def test_a_pretraining_stage_trains_the_encoder_of_the_classifier_it_shares(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    teacher = language_model(encoder, MaskedWords(encoder))
    data = text_rows([row["sentence"] for row in sentiment_rows(32)], tokenizer)
    student = students.distilbert(students.depth(teacher, [1]))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    trainer = distiller(
        tmp_path / "out",
        teacher=teacher,
        student=student,
        recipe=recipes.distilbert(),
        data=data,
        data_collator=MaskWords(tokenizer, data),
        max_steps=2,
        train_sampling_strategy="group_by_length",
    )
    trainer.train()
    assert changed(student, before)
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.minilm(relation_heads=0), "relation_heads=0"),
        (lambda: recipes.minilm(prediction=1.0), r"prediction=1\.0"),
        (lambda: recipes.tinybert(without=("attention",)), "without='attention'"),
        (lambda: recipes.tinybert(general=True, without=("hidden", "embeddings", "scores")), "leaves nothing to learn"),
    ],
)
def test_impossible_recipes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_widths_and_heads_that_cannot_be_matched_are_refused(tmp_path: Path) -> None:
    teacher, student = build("bert").eval(), build("bert", num_hidden_layers=1, hidden_size=32).eval()
    wrong: list[tuple[Recipe, str]] = [
        (recipes.minilm(relation_heads=5), "5 heads do not divide a width of"),
        (recipes.minilm(relation_heads=4, teacher_layer=7), "the teacher has no layer 7"),
        (recipes.tinybert(projection=False), "give the match projection='linear'"),
        (recipes.tinybert(layers=[(0, 9)]), "the teacher has no layer 9"),
    ]
    for recipe, message in wrong:
        with pytest.raises(ValueError, match=message):
            distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=rows(4))
    other = build("bert", vocab_size=90).eval()
    with pytest.raises(ValueError, match="vocabulary of 90 tokens and the teacher one of 100"):
        distiller(tmp_path, teacher=teacher, student=other, recipe=recipes.logits(), data=rows(4))
