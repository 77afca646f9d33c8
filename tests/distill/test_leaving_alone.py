"""What is not to be trained is afterwards as it was: teacher, modes, random state, and everything after `estimate`."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import distiller, rows
from encoders import build

import qbert
from qbert.distill import Match, Recipe, Stage, recipes


def random_state() -> list[Any]:
    return [random.getstate(), *np.random.get_state()[1].tolist(), *torch.get_rng_state().tolist()]  # type: ignore[index]


def state(model: Any) -> dict[str, Any]:
    return {
        "weights": {n: v.clone() for n, v in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "modes": [module.training for module in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.pop("weights").items():
        torch.testing.assert_close(after["weights"][name], value, rtol=0, atol=0, msg=name)
    assert before == {k: v for k, v in after.items() if k != "weights"}


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_as_it_was(training: bool, tmp_path: Path) -> None:
    teacher = build("bert").train(training)
    teacher.bert.encoder.layer[0].train(not training)
    before = state(teacher)
    trainer = distiller(tmp_path, teacher=teacher, max_steps=2, check_teacher=True)
    assert_same(dict(before), state(teacher))
    trainer.estimate()
    trainer.train()
    assert_same(before, state(teacher))


def test_the_random_state_is_as_it_was(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), qbert.BitsConfig(3, groups=16))
    recipe = Recipe("p", "test", (Stage("p", (Match("hidden", projection="linear"),)),))
    trainer = distiller(tmp_path, student=student, teacher=build("bert"), recipe=recipe, max_steps=2)
    for work in (trainer.estimate, trainer.train):
        before = random_state()
        work()
        assert random_state() == before, work
    before = random_state()
    qbert.distill.Distiller(trainer.teacher, student, recipe, trainer.args, rows(4))
    assert random_state() == before


def test_projections_come_from_the_seed(tmp_path: Path) -> None:
    recipe = Recipe("p", "test", (Stage("p", (Match("hidden", projection="shared"),)),))
    found = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        trainer = distiller(tmp_path, teacher=build("bert", hidden_size=96), recipe=recipe, seed=seed)
        found.append(next(iter(trainer.distillation.heads.parameters())).detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("recipe", [recipes.qbert_kd(), recipes.qat()])
def test_the_estimate_leaves_the_student_alone(recipe: Recipe, tmp_path: Path) -> None:
    batch = {k: torch.tensor([row[k] for row in rows(8)]) for k in ("input_ids", "attention_mask")}
    student = qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=16), calibration_data=[batch])
    following = Recipe("f", "test", (*recipe.stages,), activations="average", dropout=recipe.dropout)
    student.train().bert.embeddings.eval()
    student.classifier.weight.grad = torch.ones_like(student.classifier.weight)
    before = state(student)
    trainer = distiller(tmp_path, student=student, recipe=following, num_train_epochs=1)
    before["gradients"] = [p.requires_grad for p in student.parameters()]
    assert trainer.estimate()["steps"] == 8
    assert_same(before, state(student))
    assert torch.equal(student.classifier.weight.grad, torch.ones_like(student.classifier.weight))
    assert float(trainer.distillation.heads.auto_count.sum()) == 0


def test_trained_parameters_that_the_teacher_shares_are_refused(tmp_path: Path) -> None:
    teacher, student = build("bert"), build("bert")
    student.bert.embeddings = teacher.bert.embeddings
    recipe = Recipe("l", "test", (Stage("l", (Match("logits"),)),))
    with pytest.raises(ValueError, match=r"share the parameter bert\.embeddings\.word_embeddings\.weight"):
        distiller(tmp_path, teacher=teacher, student=student, recipe=recipe)
    student.bert.embeddings.requires_grad_(False)
    before = state(teacher.eval())
    distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, max_steps=2).train()
    assert_same(before, state(teacher))
