"""MobileBERT: a student of the teacher's outer width, transferred one layer at a time, its NoNorms folded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller
from encoders import build, inputs_for, outputs, same_state
from torch import nn
from transformers import TrainerCallback

import qbert
from qbert.distill import Match, Recipe, Stage, recipes
from qbert.students.mobilebert import fold_no_norms, mobilebert


def teacher_of() -> Any:
    torch.manual_seed(0)
    return build("bert").eval()


def test_the_student_has_the_teachers_width_tables_and_head() -> None:
    teacher = teacher_of()
    student = mobilebert(teacher, inner=12, stacks=3)
    batch = inputs_for("bert")
    with torch.no_grad():
        states = student(**batch, output_hidden_states=True).hidden_states
        wanted = teacher(**batch, output_hidden_states=True).hidden_states
    assert [s.shape for s in states] == [w.shape for w in wanted]
    tables = student.mobilebert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight
    assert torch.equal(*tables) and torch.equal(student.classifier.weight, teacher.classifier.weight)
    layers = [sum(p.numel() for p in m.parameters()) for m in (student.mobilebert.encoder, teacher.bert.encoder)]
    assert layers[0] < layers[1]
    assert same_state(student, mobilebert(teacher, inner=12, stacks=3))


def test_its_embeddings_begin_near_the_teachers() -> None:
    teacher = teacher_of()
    with torch.no_grad():
        teacher.bert.embeddings.LayerNorm.weight.normal_(1.0, 0.2)
        teacher.bert.embeddings.LayerNorm.bias.normal_(0.0, 0.2)
        ids = inputs_for("bert", 8)["input_ids"]
        ours = mobilebert(teacher, inner=24).mobilebert.embeddings(ids)
        theirs = teacher.bert.embeddings(ids)
    assert float((ours - theirs).square().mean()) < 0.1 * float(theirs.square().mean())


def test_one_layer_moves_at_a_time_and_those_below_slower(tmp_path: Path) -> None:
    teacher = teacher_of()
    student = mobilebert(teacher, inner=24)
    run = distiller(
        tmp_path, teacher=teacher, student=student, recipe=recipes.mobilebert(2, transfer=0.8), max_steps=10
    )
    layers = student.mobilebert.encoder.layer
    moved: list[list[float]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = [layer.attention.self.query.weight.detach().clone() for layer in layers]
            self.head = student.classifier.weight.detach().clone()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pairs = zip(layers, self.before, strict=True)
            found = [float((m.attention.self.query.weight - b).abs().max()) for m, b in pairs]
            moved.append([*found, float((student.classifier.weight - self.head).abs().max())])

    run.add_callback(Watch())
    run.train()
    assert all(first > 0 and second == 0 and head == 0 for first, second, head in moved[:4])
    assert all(0 < first < 0.5 * second and head == 0 for first, second, head in moved[5:7])
    assert moved[8][0] > 0 and moved[8][2] > 0


def test_rates_hold_for_the_longest_pattern_and_survive_a_resumed_run(tmp_path: Path) -> None:
    stages = (
        Stage("a", (Match("logits"),), rates={"encoder": 0.0, "encoder.layer.1": 1.0}, schedule="constant"),
        Stage("b", (Match("logits"),), rates={"*": 0.0, "classifier": 1.0}, schedule="constant"),
    )
    recipe = Recipe("two", "here", stages, steps="fixed", dropout=False)
    ends = []
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        teacher = teacher_of()
        student = build("bert").eval()
        student.load_state_dict(teacher.state_dict())
        nn.init.normal_(student.classifier.weight)
        start = {k: v.clone() for k, v in student.state_dict().items()}
        options: Any = {"teacher": teacher, "recipe": recipe, "max_steps": 4, "save_steps": 1, "seed": 5}
        distiller(folder, student=student, **options).train()
        if folder.name == "cut":
            student.load_state_dict(start)
            distiller(folder, student=student, **options).train(str(folder / "checkpoint-3"))
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in start)
    assert torch.equal(
        ends[0]["bert.encoder.layer.0.output.dense.weight"], start["bert.encoder.layer.0.output.dense.weight"]
    )
    assert not torch.equal(
        ends[0]["bert.encoder.layer.1.output.dense.weight"], start["bert.encoder.layer.1.output.dense.weight"]
    )


def test_folded_norms_change_no_output_and_the_student_takes_the_whole_way(tmp_path: Path) -> None:
    student = mobilebert(teacher_of(), inner=24)
    for module in student.modules():
        if type(module).__name__ == "NoNorm":
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    batch = inputs_for("bert")
    folded = fold_no_norms(student)
    torch.testing.assert_close(outputs(folded, batch), outputs(student, batch), rtol=1e-4, atol=1e-5)
    norm = folded.mobilebert.encoder.layer[0].bottleneck.input.LayerNorm
    assert bool((norm.weight == 1).all()) and not norm.bias.any()
    packed = qbert.pack(qbert.quantize_model(folded, 4))
    for name, saved in (("float", folded), ("packed", packed)):
        saved.save_pretrained(tmp_path / name)
        loaded = type(student).from_pretrained(tmp_path / name).eval()
        assert torch.equal(outputs(loaded, batch), outputs(saved, batch))
    fast = qbert.optimize_for_inference(packed)
    torch.testing.assert_close(outputs(fast, batch), outputs(packed, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mobilebert(teacher_of(), inner=22), "inner=22 is not possible; use a multiple of the teacher's 4"),
        (lambda: mobilebert(teacher_of(), stacks=0, inner=24), "stacks=0"),
        (lambda: mobilebert(build("roberta")), "a RobertaForSequenceClassification cannot become"),
        (lambda: fold_no_norms(teacher_of()), "no NoNorm after a linear map"),
        (lambda: fold_no_norms(qbert.quantize_model(mobilebert(teacher_of(), inner=24), 4)), "before quantize_model"),
        (lambda: Stage("a", (Match("logits"),), rates={"*": -1.0}), "must not be negative"),
        (lambda: recipes.mobilebert(0), "no such transfer"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_of_parts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    teacher = teacher_of()
    recipe = Recipe("one", "here", (Stage("a", (Match("logits"),), rates={"encoder.layer.7": 0.1}),), steps="fixed")
    with pytest.raises(ValueError, match=r"rates of 'encoder\.layer\.7'"):
        distiller(tmp_path, teacher=teacher, student=build("bert"), recipe=recipe, max_steps=1).train()
