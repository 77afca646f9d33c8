"""A teacher's outputs on disk: the same training, and no row with another's output."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import distiller, rows, tokenizer
from encoders import build
from transformers import DataCollatorWithPadding

from qbert import students
from qbert.distill import TeacherOutputs, recipes
from qbert.distill.outputs import teacher_digest

COLLATE = DataCollatorWithPadding(tokenizer())


def teacher(seed: int = 2) -> Any:
    torch.manual_seed(seed)
    return build("bert").eval()


def outputs(folder: Path, data: Any, model: Any = None) -> TeacherOutputs:
    model = teacher() if model is None else model
    return TeacherOutputs.of(model, data, folder, collate=COLLATE, batch_size=8, progress=False)


def trained(folder: Path, kept: TeacherOutputs | None, data: Any) -> Any:
    student = students.cnn(teacher(), filters=4, dense=8)
    options = {"teacher_outputs": kept} if kept is not None else {}
    trainer = distiller(
        folder, teacher=teacher(), student=student, recipe=recipes.bilstm(), data=data, max_steps=4, options=options
    )
    trainer.train()
    return student


def test_a_training_on_kept_outputs_is_the_training_with_the_teacher(tmp_path: Path) -> None:
    data = rows(24)
    kept = outputs(tmp_path / "outputs", data[::-1])  # the order of the rows says nothing
    first, second = trained(tmp_path / "a", kept, data), trained(tmp_path / "b", None, data)
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4, msg=name)  # float16 moves AdamW's first steps


def test_the_teacher_does_not_run_where_its_outputs_are_kept(tmp_path: Path) -> None:
    data, model = rows(16), teacher()
    kept = outputs(tmp_path, data, model)
    trainer = distiller(
        tmp_path / "run",
        teacher=model,
        student=students.cnn(model, filters=4),
        recipe=recipes.low_resource(targets="pseudo"),
        data=data,
        max_steps=2,
        options={"teacher_outputs": kept, "eval_dataset": data},
    )
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and not calls


def test_only_missing_rows_are_computed_and_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    data, model = rows(20), teacher()
    outputs(tmp_path, data[:12], model)
    seen: list[int] = []
    model.register_forward_hook(lambda _, __, output: seen.append(len(output.logits)))
    again = outputs(tmp_path, [*data, *data], model)
    assert sum(seen) == 8 and len(again) == 20
    with torch.no_grad():
        expected = model(**COLLATE([{k: v for k, v in data[15].items() if k != "labels"}])).logits[0]
    np.testing.assert_allclose(again.beside(data)[15]["teacher_logits"], expected.numpy(), rtol=2e-3, atol=1e-4)


def test_labels_do_not_matter_and_tokens_do(tmp_path: Path) -> None:
    data = rows(4)
    kept = outputs(tmp_path, data)
    kept.beside([{**row, "labels": -100} for row in data])
    other = [*data, {**data[1], "input_ids": data[1]["input_ids"][::-1]}]
    with pytest.raises(ValueError, match="has no output for row 4 of train_dataset"):
        kept.beside(other)


def test_outputs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    data = rows(4)
    kept = outputs(tmp_path, data)
    with pytest.raises(ValueError, match="holds the outputs of another teacher"):
        outputs(tmp_path, data, teacher(3))
    with pytest.raises(ValueError, match="holds the outputs of another teacher"):
        kept.check(teacher(3))
    altered = teacher()
    altered.classifier.bias.data[0] += 1e-3
    assert teacher_digest(altered) != teacher_digest(teacher()) == kept.teacher


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    data = rows(4)
    outputs(tmp_path / "a", data)
    file = next((tmp_path / "a").glob("rows-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=file.name):
        outputs(tmp_path / "a", data)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        outputs(tmp_path / "b", data)


def test_recipes_that_need_more_than_logits_refuse_them(tmp_path: Path) -> None:
    data = rows(4)
    kept = outputs(tmp_path / "outputs", data)
    with pytest.raises(ValueError, match="no stage of recipe 'ternarybert' matches logits alone"):
        distiller(tmp_path, recipe=recipes.ternarybert(), data=data, options={"teacher_outputs": kept})


def test_a_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a stream has no rows to find again"):
        outputs(tmp_path, iter(rows(4)))


def test_what_is_not_one_vector_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only one vector a row"):
        outputs(tmp_path, rows(4), _TokenTeacher())


class _TokenTeacher(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 3)

    def forward(self, input_ids: torch.Tensor) -> Any:
        from transformers.modeling_outputs import TokenClassifierOutput

        return TokenClassifierOutput(logits=self.table(input_ids))
