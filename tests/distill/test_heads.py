"""What the outputs of a head mean decides how they are compared: classes, labels on their own, or values."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from distilling import distiller, rows

import qbert
from qbert.distill import Match, Recipe, Stage
from qbert.results import Record
from qbert.tasks.evaluation import fidelity

MULTI = "multi_label_classification"


def pair(labels: int, kind: str | None) -> tuple[Any, Any]:
    config = tf.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_labels=labels, problem_type=kind,
    )  # fmt: skip
    teacher, student = (tf.BertForSequenceClassification(config).eval() for _ in range(2))
    return teacher, student


def logits_term(teacher: Any, student: Any, match: Match, folder: Path, labels: Any = None) -> Any:
    """(value of the logits term, the two models' outputs) on one batch."""
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(8)]
    if labels is not None:
        data = [{**row, "labels": labels} for row in data]
    recipe = Recipe("kd", "test", (Stage("kd", (match,)),), steps="fixed")
    trainer = distiller(folder, teacher=teacher, student=student, recipe=recipe, data=data, dropout=0.0)
    batch = trainer.data_collator(data)
    loss = trainer.distillation.losses(dict(batch))["loss"]
    batch.pop("labels", None)
    with torch.no_grad():
        outputs = [model(**batch).logits for model in (teacher, student)]
    return loss, *outputs


@pytest.mark.parametrize("loss", [None, "soft_ce"])
@pytest.mark.parametrize("labels", [1, 3])
def test_labels_on_their_own_are_compared_one_by_one(labels: int, loss: str | None, tmp_path: Path) -> None:
    value, teacher, student = logits_term(*pair(labels, MULTI), Match("logits", loss), tmp_path)
    expected = F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    torch.testing.assert_close(value, expected, check_stride=False)


@pytest.mark.parametrize("loss", [None, "soft_ce", "kl"])
@pytest.mark.parametrize("labels", [1, 3])
def test_values_are_compared_by_squares(labels: int, loss: str | None, tmp_path: Path) -> None:
    value, teacher, student = logits_term(*pair(labels, "regression"), Match("logits", loss), tmp_path)
    torch.testing.assert_close(value, F.mse_loss(student, teacher))


def test_the_divergence_of_labels_on_their_own_is_0_at_the_teacher(tmp_path: Path) -> None:
    teacher, student = pair(3, MULTI)
    student.load_state_dict(teacher.state_dict())
    value, *_ = logits_term(teacher, student, Match("logits", "kl"), tmp_path)
    assert abs(float(value)) < 1e-6


def test_a_config_that_does_not_say_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    value, teacher, student = logits_term(*pair(3, None), Match("logits"), tmp_path, labels=[1.0, 0.0, 1.0])
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(student, teacher.sigmoid()))
    value, teacher, student = logits_term(*pair(3, None), Match("logits"), tmp_path, labels=2)
    torch.testing.assert_close(value, F.cross_entropy(student, teacher.softmax(-1)))


def test_options_reach_a_loss_of_the_users_own_for_values(tmp_path: Path) -> None:
    def scaled(student: torch.Tensor, teacher: torch.Tensor, mask: Any, *, factor: float) -> torch.Tensor:
        return factor * (student - teacher).abs().mean()

    match = Match("logits", scaled, options={"factor": 3.0})
    value, teacher, student = logits_term(*pair(1, "regression"), match, tmp_path)
    torch.testing.assert_close(value, 3 * (student - teacher).abs().mean())


def test_heads_of_two_kinds_are_refused(tmp_path: Path) -> None:
    teacher, student = pair(3, MULTI)[0], pair(3, "regression")[1]
    with pytest.raises(ValueError, match="problem_type is 'regression' and the teacher's 'multi_label"):
        logits_term(teacher, student, Match("logits"), tmp_path)


@pytest.mark.parametrize("loss", [None, "kl", "mse"])
def test_spans_are_classes_of_their_own_positions(loss: str | None, tmp_path: Path) -> None:
    config = tf.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    teacher, student = (tf.BertForQuestionAnswering(config).eval() for _ in range(2))
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(4)]
    data[0]["attention_mask"] = [1] * 5 + [0] * 4
    recipe = Recipe("kd", "test", (Stage("kd", (Match("logits", loss),)),), steps="fixed")
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=data)
    batch = trainer.data_collator(data)
    with torch.no_grad():
        value = trainer.distillation.losses(dict(batch))["loss"]
        outputs = [model(**batch) for model in (teacher, student)]
    single = []
    for name in ("start_logits", "end_logits"):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            theirs, ours = (getattr(output, name)[row][mask] for output in outputs)
            chances = theirs.softmax(0)
            entropy = -(chances * chances.log()).sum() if loss == "kl" else 0.0
            single.append((theirs - ours).square() if loss == "mse" else F.cross_entropy(ours, chances) - entropy)
    expected = torch.cat(single).mean() if loss == "mse" else torch.stack(single).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [MULTI, "regression"])
def test_a_quantized_student_learns_such_a_head(kind: str, tmp_path: Path) -> None:
    teacher, _ = pair(3, kind)
    student = qbert.quantize_model(teacher, qbert.BitsConfig(4, groups=8))
    student.classifier.bias.data += 2.0
    before = fidelity(*outputs(teacher, student), kind)
    data = [{**row, "labels": [1.0, 0.0, 1.0]} for row in rows()]
    distiller(tmp_path, teacher=teacher, student=student, data=data, max_steps=30, learning_rate=3e-2).train()
    assert fidelity(*outputs(teacher, student), kind).divergence < before.divergence / 2


def outputs(teacher: Any, student: Any) -> list[torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows(32)])
    with torch.no_grad():
        return [model.eval()(input_ids=ids).logits for model in (teacher, student)]


def test_fidelity_of_labels_on_their_own_is_a_loop_over_them() -> None:
    teacher, student = torch.randn(2, 6, 3, dtype=torch.float64)
    same, divergence = fidelity(teacher, student, MULTI)
    p, q = teacher.sigmoid(), student.sigmoid()
    expected = [[a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() for a, b in zip(*r)] for r in zip(p, q)]  # noqa: B905
    assert divergence == pytest.approx(sum(float(x) for row in expected for x in row) / 6)
    assert same == pytest.approx(100 * sum(bool(((a > 0) == (b > 0)).all()) for a, b in zip(teacher, student)) / 6)  # noqa: B905
    assert fidelity(teacher, teacher, MULTI) == (100.0, 0.0)


@pytest.mark.parametrize("values", [(torch.randn(6), torch.ones(6)), (torch.ones(1), torch.zeros(1))])
def test_fidelity_to_a_constant_output_is_a_number_that_json_can_hold(
    values: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    found = fidelity(*values)
    assert found.agreement == 0
    assert found.divergence == pytest.approx(float((values[0] - values[1]).square().mean()))
    Record(tmp_path / "kept.json", {"task": "stsb"}, resume=True).add("1", found._asdict())


def test_fidelity_of_several_values_is_the_mean_of_each() -> None:
    teacher, student = torch.randn(2, 9, 3, dtype=torch.float64)
    single = [fidelity(teacher[:, i], student[:, i]) for i in range(3)]
    agreement, divergence = fidelity(teacher, student, "regression")
    assert agreement == pytest.approx(sum(s.agreement for s in single) / 3)
    assert divergence == pytest.approx(sum(s.divergence for s in single) / 3)
    assert fidelity(teacher, teacher + 5, "regression").agreement == pytest.approx(100.0)
    with pytest.raises(ValueError, match="problem_type='ranking' is not known"):
        fidelity(teacher, student, "ranking")
