"""BiLSTM and CNN students learn through the one Distiller: in float, quantized, resumed, and in several processes."""

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from distilling import distiller, rows
from encoders import build
from tiny_tasks import tiny_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import qbert
from qbert import students
from qbert.distill import recipes
from qbert.tasks.streams import TextStream

SMALL: dict[str, Any] = {
    "bilstm": lambda teacher, **settings: students.bilstm(teacher, hidden=8, dense=16, **settings),
    "cnn": lambda teacher, **settings: students.cnn(teacher, filters=8, dense=16, **settings),
}
RECIPES = {
    "logits": recipes.bilstm(),
    "logits and labels": recipes.bilstm(labels=0.5),
    "soft": recipes.low_resource(),
    "pseudo-labels": recipes.low_resource(targets="pseudo", labels=0.0),
}


def teacher() -> Any:
    torch.manual_seed(2)
    model = build("bert").eval()
    model.classifier.weight.data *= 30  # outputs that can be told from noise
    return model


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_lowers_its_loss(family: str, recipe: str, tmp_path: Path) -> None:
    student = SMALL[family](teacher(), dropout=0.0)
    table = student.words.weight.clone()
    data = [{**row, "labels": -100} if i % 2 else row for i, row in enumerate(rows())]  # half of them without a label
    trainer = distiller(
        tmp_path,
        teacher=teacher(),
        student=student,
        recipe=RECIPES[recipe],
        data=data,
        max_steps=40,
        learning_rate=1e-2,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert torch.equal(student.words.weight, table)  # frozen


@pytest.mark.parametrize("family", SMALL)
def test_quantized_students_train_pack_and_come_back(family: str, tmp_path: Path) -> None:
    student = qbert.quantize_model(SMALL[family](teacher()), qbert.BitsConfig(4, groups=8))
    trainer = distiller(tmp_path / "run", teacher=teacher(), student=student, recipe=recipes.bilstm(), max_steps=4)
    before = student.encoder[-1].weight.clone()
    trainer.train()
    assert not torch.equal(student.encoder[-1].weight, before)
    inputs = trainer.data_collator([{k: v for k, v in row.items() if k != "labels"} for row in rows(4)])
    packed = qbert.pack(student)
    packed.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = student.eval()(**inputs).logits
        torch.testing.assert_close(packed(**inputs).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(qbert.load(tmp_path / "packed")(**inputs).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", SMALL)
def test_a_resumed_training_ends_in_the_same_weights(family: str, tmp_path: Path) -> None:
    def trained(folder: str, resume: bool = False, **arguments: Any) -> Any:
        student = SMALL[family](teacher(), seed=3)
        trainer = distiller(tmp_path / folder, teacher=teacher(), student=student, recipe=recipes.bilstm(), **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return student

    whole = trained("whole", max_steps=6, save_steps=3)
    resumed = trained("resumed", resume=True, max_steps=6)
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_two_processes_train_one_student_of_each_kind(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    helpers = Path(__file__).parents[1] / "helpers"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(helpers)!r})\n"
        "from pathlib import Path\nimport torch\nfrom distilling import distiller, rows, tokenizer\n"
        "from encoders import build\nfrom transformers import DataCollatorWithPadding, TrainingArguments\n"
        "from qbert import students\nfrom qbert.distill import TeacherOutputs, recipes\n"
        "torch.set_num_threads(1)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "TrainingArguments(str(folder), use_cpu=True, ddp_backend='gloo').device\n"  # the processes join
        "torch.manual_seed(2)\nteacher = build('bert').eval()\n"
        "collate = DataCollatorWithPadding(tokenizer())\n"
        "kept = TeacherOutputs.of(teacher, rows(), folder / 'outputs', collate=collate, progress=False)\n"
        "calls = []\nteacher.register_forward_hook(lambda *_: calls.append(1))\n"
        "for make in (students.bilstm, students.cnn):\n"
        "    t = distiller(folder / make.__name__, teacher=teacher, student=make(teacher, dense=8, dropout=0.0),\n"
        "                  recipe=recipes.bilstm(), max_steps=3, ddp_backend='gloo',\n"
        "                  options={'teacher_outputs': kept})\n"
        "    t.train()\n"
        "    w = torch.cat([p.detach().flatten() for p in t.distillation.parameters()])\n"
        "    g = t.accelerator.gather(w[None]) if t.args.world_size > 1 else w[None]\n"
        "    assert all(torch.equal(g[0], x) for x in g)\n"
        "assert not calls and len(kept) == 64\n"
        "if t.args.process_index == 0:\n"
        "    torch.save(w, folder / f'weights-{t.args.world_size}')\n"
        "t.accelerator.wait_for_everyone()\n"
        "t.accelerator.end_training()\n"
        # Threads of gloo may outlive the interpreter, which then ends in std::terminate; that is not asked about here.
        "import os; os._exit(0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights-2").is_file()
    assert len(list((tmp_path / "outputs").glob("rows-*"))) == 2  # each computed its half


def test_a_general_stage_streams_text_and_resumes(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = ("film", "meal", "hotel", "superb", "dull", "the", "was", "and", "kind")
    lines = [" ".join(words[(i * k) % 9] for k in range(1, 4 + i % 9)) for i in range(90)]
    (tmp_path / "text.txt").write_text("\n".join(lines))

    def trained(name: str, **arguments: Any) -> Any:
        models = [AutoModelForSequenceClassification.from_pretrained(folder) for _ in range(2)]
        models[1].bert.encoder.layer[0].output.dense.weight.data.copy_(torch.eye(32, 64))
        resume = arguments.pop("resume", None)
        trainer = distiller(
            tmp_path / name,
            teacher=models[0].eval(),
            student=models[1],
            recipe=recipes.tinybert(general=True, projection=False),
            data=TextStream([tmp_path / "text.txt"], tokenizer, least_words=1, batch_size=8),
            data_collator=DataCollatorWithPadding(tokenizer),
            **arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole", max_steps=6, save_steps=3)
    assert not torch.equal(whole.student.bert.encoder.layer[0].output.dense.weight, torch.eye(32, 64))
    resumed = trained("resumed", max_steps=6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for ours, theirs in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_impossible_settings_of_recipes_are_refused() -> None:
    calls: list[Any] = [
        (lambda: recipes.bilstm(labels=-1), "labels=-1 is not a weight"),
        (lambda: recipes.low_resource(labels=-1), "labels=-1 is not a weight"),
        (lambda: recipes.low_resource(targets="hard"), "targets='hard' is not possible"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
