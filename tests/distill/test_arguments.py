"""Each of Trainer's own arguments works with a distillation, or is refused by name before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller, rows
from encoders import build
from transformers import Trainer, TrainingArguments

import qbert
from qbert.distill import Match, Recipe, Stage, recipes

PLAIN = Recipe("plain", "test", (Stage("plain", (Match("logits"),)),), steps="fixed")


def nothing(*_: Any, **__: Any) -> None:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"options": {"compute_loss_func": nothing}}, "compute_loss_func"),
        ({"options": {"model_init": nothing}}, "model_init"),
        ({"options": {"model": torch.nn.Linear(1, 1)}}, "model cannot"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1"),
        ({"fp16": True}, "fp16=True"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"optim": "lomo"}, "optim="),
        ({"lr_scheduler_type": "cosine", "recipe": recipes.tinybert()}, "lr_scheduler_type='cosine'"),
        ({"options": {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}}, "optimizers"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}.*distillation: "):
        distiller(tmp_path, **given)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows(16))


@pytest.mark.parametrize(
    "given",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"bf16": True},
        {"neftune_noise_alpha": 5.0, "recipe": PLAIN},
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant_with_warmup"},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"options": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}},
        {"data": Stream()},
        {"auto_find_batch_size": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 48},
        {"max_grad_norm": 0.0},
        {"save_only_model": True, "save_steps": 1},
        {"include_num_input_tokens_seen": "all"},
        {"remove_unused_columns": False},
    ],
    ids=lambda case: str(case).split(" object at")[0],
)
def test_what_can_work_trains_the_student(given: dict[str, Any], tmp_path: Path) -> None:
    trainer = distiller(tmp_path, **{"max_steps": 1, **given})
    before = trainer.student.classifier.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1
    assert not torch.equal(trainer.student.classifier.weight, before)
    assert torch.isfinite(trainer.student.classifier.weight).all()


def test_an_optimizer_of_ones_own_is_used(tmp_path: Path) -> None:
    student = build("bert")
    optimizer = torch.optim.SGD([student.classifier.bias], lr=0.5)
    trainer = distiller(tmp_path, student=student, recipe=PLAIN, options={"optimizers": (optimizer, None)}, max_steps=1)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer.train()
    changed = [n for n, p in student.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["classifier.bias"]


def test_metrics_see_the_students_outputs(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = distiller(tmp_path, options={"compute_metrics": accuracy, "eval_dataset": rows(20)})
    found = trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in rows(20)])
    with torch.no_grad():
        guesses = trainer.student.eval()(input_ids=ids).logits.argmax(-1).tolist()
    right = [g == row["labels"] for g, row in zip(guesses, rows(20), strict=True)]
    assert found["eval_accuracy"] == pytest.approx(sum(right) / 20)


def test_the_noise_of_neftune_is_the_students_alone(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, recipe=PLAIN, neftune_noise_alpha=5.0, max_steps=1)
    trainer.train()
    assert not trainer.student.bert.embeddings.word_embeddings._forward_hooks
    assert not trainer.teacher.bert.embeddings.word_embeddings._forward_hooks


@pytest.mark.parametrize("label", [-1, -100])
@pytest.mark.parametrize("recipe", [recipes.qbert_kd(), recipes.tinybert(projection=False), recipes.qat()])
def test_unlabelled_rows_train_recipes_without_labels(recipe: Recipe, label: int, tmp_path: Path) -> None:
    unlabelled = [{**row, "labels": label} for row in rows(8)]
    if recipe.name != "qat":
        distiller(tmp_path, recipe=recipe, data=unlabelled, check_teacher=True, max_steps=2).train()
        return
    with pytest.raises(ValueError, match="the recipe learns from labels, but"):
        distiller(tmp_path, recipe=recipe, data=unlabelled, max_steps=2).train()


def test_labels_that_the_student_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 7, but the student tells 2 labels apart"):
        distiller(tmp_path, recipe=recipes.qat(), data=[{**rows(1)[0], "labels": 7}])


def test_packed_models_are_sent_to_unpack(tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=16)))
    with pytest.raises(ValueError, match=r"qbert\.unpack"):
        Trainer(packed, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match=r"qbert\.unpack"):
        distiller(tmp_path, student=packed)
