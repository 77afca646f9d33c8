"""The training loop: it learns, resumes, stops on trouble, and refuses what cannot work."""

import csv
import os
import signal
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from distilling import distiller, rows, tokenizer
from encoders import build, same_state
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import qbert
from qbert.distill import Distiller, Match, Recipe, Stage, recipes
from qbert.distill.checkpoint import last_good_checkpoint
from qbert.distill.checks import check_teacher_is_trained, check_tokenizers


def weights(trainer: Distiller) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.distillation.state_dict().items()}


def logged(trainer: Distiller, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_student_approaches_the_teacher_and_the_curves_are_saved(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, num_train_epochs=8, learning_rate=3e-3)
    trainer.train()
    for name in ("loss", "loss_hidden", "loss_scores", "loss_logits"):
        values = logged(trainer, name)
        assert sum(values[-8:]) < sum(values[:8]), name
    with (tmp_path / "curves.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert {"loss", "loss_hidden", "loss_scores", "loss_logits", "learning_rate"} <= names
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert not trainer.student.training


def test_labels_are_not_needed(tmp_path: Path) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in rows()]
    distiller(tmp_path, data=unlabelled, max_steps=2).train()
    with pytest.raises(ValueError, match="needs labels, but the batch has none"):
        distiller(tmp_path, data=unlabelled, recipe=recipes.qat(), max_steps=2)


def test_learned_steps_move_and_are_frozen_at_the_end(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = trainer.student.bert.encoder.layer[0].output.dense
            seen.append(layer.weight_quantizer.scale.detach().clone())

    trainer = distiller(tmp_path, max_steps=10, callbacks=[Watch()])
    trainer.train()
    assert not torch.equal(seen[0], seen[4])
    assert torch.equal(seen[8], seen[9])  # the last tenth


@pytest.mark.parametrize("recipe", [recipes.qbert_kd(), recipes.tinybert(), recipes.ternarybert()])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe: Recipe, tmp_path: Path) -> None:
    whole = distiller(tmp_path / "whole", recipe=recipe, max_steps=13)
    whole.train()
    distiller(tmp_path / "cut", recipe=recipe, max_steps=13, save_steps=5, callbacks=[StopAt(7)]).train()
    resumed = distiller(tmp_path / "cut", recipe=recipe, max_steps=13, save_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 13
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0, msg=name)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def gradual() -> Recipe:
    match = (Match("logits"), Match("hidden"))
    stages = (Stage("8", match, bits=8), Stage("4", match, bits=4, teacher="previous"), Stage("2", match, bits=2))
    return Recipe("gradual", "test", stages)


def test_bits_go_down_stage_by_stage_with_the_last_student_as_teacher(tmp_path: Path) -> None:
    bits: list[int] = []
    own_teacher: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = trainer.student.bert.encoder.layer[0].output.dense
            bits.append(layer.spec.bits)
            own_teacher.append(trainer.distillation.teacher is trainer.teacher)

    trainer = distiller(tmp_path, recipe=gradual(), max_steps=6, callbacks=[Watch()])
    trainer.train()
    assert bits == [8, 8, 4, 4, 2, 2] and own_teacher == [True, True, False, False, True, True]
    assert trainer.student.bert.embeddings.word_embeddings.weight_quantizer.bits == 4
    layer = trainer.student.bert.encoder.layer[0].output.dense
    assert torch.unique(layer.weight_quantizer.codes(layer.weight)).numel() <= 4


def test_gradual_stages_resume_too(tmp_path: Path) -> None:
    whole = distiller(tmp_path / "whole", recipe=gradual(), max_steps=9)
    whole.train()
    distiller(tmp_path / "cut", recipe=gradual(), max_steps=9, save_steps=1, callbacks=[StopAt(5)]).train()
    resumed = distiller(tmp_path / "cut", recipe=gradual(), max_steps=9, save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0, msg=name)


class Poison(TrainerCallback):
    """Makes one weight of the student NaN after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kwargs["model"].student.classifier.weight.data[0, 0] = float("nan")


def test_nan_stops_naming_term_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, max_steps=20, save_steps=2, callbacks=[Poison(5)])
    with pytest.raises(FloatingPointError, match=r"'logits' became nan at step 6; .*checkpoint-4"):
        trainer.train()
    resumed = distiller(tmp_path, max_steps=8, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.isfinite(p).all() for p in resumed.student.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, max_steps=3)
    weight = trainer.student.classifier.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradient became (nan|inf) at step 1"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.student.parameters())


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    trainer = distiller(tmp_path)
    trainer.student.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"classifier\.weight is not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not list((tmp_path / "model").iterdir())


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    class Press(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    trainer = distiller(tmp_path, max_steps=8, gradient_accumulation_steps=2, callbacks=[Press()])
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3; the last good checkpoint is .*checkpoint-3"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = distiller(tmp_path, max_steps=8, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = distiller(tmp_path, max_steps=8, save_steps=2)
    save = trainer._save_optimizer_and_scheduler

    def fail(folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            Path(folder, "optimizer.pt").write_bytes(b"cut off")
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.*No space left.*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("name", ["distillation.safetensors", "optimizer.pt", "trainer_state.json"])
def test_cut_off_checkpoints_are_passed_over(name: str, tmp_path: Path) -> None:
    distiller(tmp_path, max_steps=4, save_steps=2).train()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    file = tmp_path / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        distiller(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_resuming_another_student_is_refused(tmp_path: Path) -> None:
    distiller(tmp_path, max_steps=2, save_steps=2).train()
    other = distiller(tmp_path, student=qbert.quantize_model(build("bert"), qbert.BitsConfig(3, groups=8)))
    with pytest.raises(ValueError, match="is of another student"):
        other.train(resume_from_checkpoint=True)


def test_several_processes_train_one_student_on_rows_and_on_a_stream(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    helpers = Path(__file__).parents[1] / "helpers"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(helpers)!r})\n"
        "from pathlib import Path\nimport torch\nfrom distilling import distiller, rows\n"
        "torch.set_num_threads(1)\n"
        "class Stream(torch.utils.data.IterableDataset):\n"
        "    def __iter__(self):\n"
        "        for length in (4, 9, 6, 3):\n"
        "            yield from rows(8, length)\n"
        f"s = distiller(Path({str(tmp_path)!r}), data=Stream(), max_steps=2, ddp_backend='gloo')\n"
        "assert s.train().global_step == 2\n"
        f"t = distiller(Path({str(tmp_path)!r}), dropout=0.0, max_steps=4, save_steps=4, ddp_backend='gloo')\n"
        "t.train()\n"
        "w = torch.cat([p.detach().flatten() for p in t.distillation.parameters()])\n"
        "g = t.accelerator.gather(w[None]) if t.args.world_size > 1 else w[None]\n"
        "assert all(torch.equal(g[0], x) for x in g)\n"
        # Not printed: two processes that write to one pipe break each other's lines.
        f"(Path({str(tmp_path)!r}) / f'rank-{{t.args.process_index}}').write_text(str(t.args.world_size))\n"
        "t.accelerator.wait_for_everyone()\n"
        # A rank that leaves while the other still holds the connection aborts it, so both close the group first.
        "t.accelerator.end_training()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_narrower_and_shallower_student_learns_through_projections(tmp_path: Path) -> None:
    teacher = build("bert", num_hidden_layers=4)
    student = build("bert", hidden_size=24, intermediate_size=48)
    distiller(tmp_path, teacher=teacher, student=student, recipe=recipes.tinybert(), max_steps=13).train()
    with pytest.raises(ValueError, match=r"term 'hidden': .* give the match projection='linear'"):
        distiller(tmp_path, teacher=teacher, student=student, recipe=recipes.qbert_kd())


@pytest.mark.parametrize(
    ("recipe", "family"),
    [(recipes.distilbert(), "distilbert"), (recipes.pkd(), "bert"), (recipes.qbert_kd(), "albert")],
)
def test_recipes_train_other_students(recipe: Recipe, family: str, tmp_path: Path) -> None:
    student = build(family)
    trainer = distiller(tmp_path, student=student, recipe=recipe, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer).items())


class WordBag(nn.Module):
    """A student of another kind: no hidden states, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(100, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return type("Output", (), {"logits": self.head(self.table(input_ids))})()


def test_a_student_that_is_no_transformer_learns_from_logits(tmp_path: Path) -> None:
    recipe = Recipe("logits", "test", (Stage("logits", (Match("logits", "mse"),)),), steps="fixed")
    trainer = distiller(tmp_path, student=WordBag(), recipe=recipe, max_steps=3)
    trainer.train()
    with pytest.raises(ValueError, match="returns no hidden states"):
        distiller(tmp_path, student=WordBag(), recipe=Recipe("h", "test", (Stage("h", (Match("hidden"),)),)))


def heads(auto: str, **config: Any) -> tuple[Any, Any]:
    import transformers as tf

    values = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
        **config,
    }
    make = getattr(tf, auto)
    teacher, student = (make.from_config(tf.BertConfig(**values)) for _ in range(2))
    return teacher.eval(), qbert.quantize_model(student, qbert.BitsConfig(4, groups=16))


@pytest.mark.parametrize(
    ("auto", "config", "labels"),
    [
        ("AutoModelForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}, 0.5),
        ("AutoModelForTokenClassification", {"num_labels": 5}, [-100, 1, 2, 3, -100, 4, 0, 0, -100]),
        ("AutoModelForQuestionAnswering", {}, None),
    ],
)
def test_every_kind_of_head(auto: str, config: dict[str, Any], labels: Any, tmp_path: Path) -> None:
    teacher, student = heads(auto, **config)
    data = rows()
    for row in data:
        if labels is None:
            del row["labels"]
            row.update(start_positions=2, end_positions=4)
        else:
            row["labels"] = labels
    for recipe in (recipes.qbert_kd(), recipes.qat()):
        trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=data, max_steps=3)
        trainer.train()
        assert all(value >= 0 for value in logged(trainer, "loss"))


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = build("bert")
    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    swapped = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    cases = [
        (teacher, teacher, "the same object"),
        (build("bert", num_labels=3), build("bert"), "2 labels and the teacher 3"),
        (build("bert", **names), build("bert", **swapped), r"labels are \['no', 'yes'\]"),
        (build("bert", vocab_size=120), build("bert"), "vocabulary of 100 tokens and the teacher one of 120"),
    ]
    for teacher, student, message in cases:
        with pytest.raises(ValueError, match=message):
            distiller(tmp_path, teacher=teacher, student=student)
    missing = Recipe("m", "test", (Stage("m", (Match("hidden", layers=[(0, 9)]),)),))
    with pytest.raises(ValueError, match="term 'hidden': the teacher has no layer 9 to match; it has 3"):
        distiller(tmp_path, recipe=missing)
    with pytest.raises(TypeError, match="expected a Recipe"):
        distiller(tmp_path, recipe="qbert_kd")  # type: ignore[arg-type]


def test_vocabularies_of_the_same_size_are_compared_word_by_word() -> None:
    ours = tokenizer()
    check_tokenizers(ours, tokenizer())
    other = PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, pad_token="w0")
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="token 'new' is 100 for the teacher and None for the student"):
        check_tokenizers(other, ours)


def test_a_teacher_at_chance_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the teacher is at chance on 64 rows"):
        distiller(tmp_path, max_steps=1, check_teacher=True).train()

    class Knowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> Any:
            right = (input_ids[:, 0] > 52).long()
            return type("Output", (), {"logits": nn.functional.one_hot(right, 2).float()})()

    batch = {k: torch.tensor([r[k] for r in rows()]) for k in ("input_ids", "labels")}
    assert check_teacher_is_trained(Knowing(), [batch])


def test_the_estimate_changes_nothing(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, num_train_epochs=2)
    before, state = weights(trainer), torch.get_rng_state()
    estimate = trainer.estimate()
    assert estimate["steps"] == 16 and estimate["seconds"] == pytest.approx(16 * estimate["seconds_per_step"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in weights(trainer).items())


def test_a_teacher_can_teach_twice(tmp_path: Path) -> None:
    teacher = build("bert")
    for _ in range(2):
        student = qbert.quantize_model(teacher, qbert.BitsConfig(4, groups=16))
        distiller(tmp_path, teacher=teacher, student=student, max_steps=1).train()
    frozen = qbert.quantize_model(teacher, qbert.BitsConfig(4, groups=16)).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the student can be trained"):
        distiller(tmp_path, teacher=teacher, student=frozen)


@pytest.mark.parametrize("how", ["average", "learned"])
def test_static_activation_ranges_are_trained_and_then_kept(how: Any, tmp_path: Path) -> None:
    recipe = Recipe("a", "test", (Stage("a", (Match("hidden"),)),), activations=how, freeze_at=0.8, step_rate=1e-2)
    batch = {k: torch.tensor([row[k] for row in rows(8)]) for k in ("input_ids", "attention_mask")}
    student = qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=16), calibration_data=[batch])
    quantizer = student.bert.encoder.layer[0].output.dense.activation_quantizer
    start = float(quantizer.scale)
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(float(quantizer.scale.detach()))

    distiller(tmp_path, student=student, recipe=recipe, max_steps=10, callbacks=[Watch()]).train()
    assert seen[4] != start and seen[7] == seen[9] == float(quantizer.scale)
    assert not any(name.endswith("activation_quantizer.scale") for name, _ in student.named_parameters())
    packed = qbert.pack(student)
    with torch.no_grad():
        torch.testing.assert_close(packed(**batch).logits, student(**batch).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="finds them at run time"):
        distiller(tmp_path, recipe=recipe)


def test_one_row_is_enough_and_none_is_refused(tmp_path: Path) -> None:
    distiller(tmp_path, data=rows(1), max_steps=1).train()
    with pytest.raises(ValueError, match="train_dataset is empty"):
        distiller(tmp_path, data=[])


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without a number."""

    def __iter__(self) -> Any:
        return iter(rows(16))


def test_rows_may_come_as_a_stream(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, data=Stream(), max_steps=2, check_teacher=True)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("dtype", "quantized"), [(torch.bfloat16, True), (torch.float16, False)])
def test_a_student_in_half_precision_is_trained_in_float32(dtype: torch.dtype, quantized: bool, tmp_path: Path) -> None:
    """Steps of a thousandth of a weight's last bit are lost in half precision, or become NaN."""

    def student() -> Any:
        torch.manual_seed(1)
        model = build("bert").to(dtype)
        return qbert.quantize_model(model, qbert.BitsConfig(3, groups=16)) if quantized else model

    before = student().float().state_dict()
    whole = distiller(tmp_path / "whole", student=student(), learning_rate=2e-5, max_steps=4, save_steps=2)
    whole.train()
    after = whole.student.state_dict()
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert float((after[name] != before[name]).float().mean()) > 0.95
    resumed = distiller(tmp_path / "whole", student=student(), learning_rate=2e-5, max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_state(resumed.student, whole.student)
    whole.save_student(tmp_path / "saved")
    load = qbert.load if quantized else type(whole.student).from_pretrained
    assert same_state(load(tmp_path / "saved"), whole.student)


def test_a_teacher_in_half_precision_stays_so(tmp_path: Path) -> None:
    teacher = build("bert").to(torch.bfloat16).eval()
    trainer = distiller(tmp_path, teacher=teacher, student=build("bert").to(torch.bfloat16), max_steps=2)
    trainer.train()
    assert {value.dtype for value in teacher.parameters()} == {torch.bfloat16}
