"""The students' script: what it refuses, its plans, and that it ends in the table it promises."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from encoders import build
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import BertConfig, RobertaConfig


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "magic"], "--student magic is not known; use one of adabert"),
        (["--student", "pkd", "pkd"], "--student pkd pkd names one twice"),
        (["--seeds", "3", "3"], "--seeds 3 3 names one twice"),
        (["--epochs", "-1"], "--epochs -1 is not possible"),
        (["--learning-rate", "7"], "--learning-rate 7 is not possible"),
        (["--no-fine-tune"], "--no-fine-tune needs --model"),
        (["--layers", "2", "--keep", "0", "1", "2"], "--layers 2 and --keep with 3 contradict"),
        (["--text", "nowhere.txt"], "--text nowhere.txt is no file"),
        (["--device", "gpu9"], "--device gpu9 is not usable here"),
        (["--task", "nothing", "--data-dir", "."], "nothing"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, experiments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compress.py", *arguments, "--output-dir", str(tmp_path)])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        importlib.import_module("compress").main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "--keep", "0", "9"], "--keep 9 is not possible; the teacher has 6 layers"),
        (["layers", "--layers", "9"], "--layers 9 is not possible; the teacher has 6 layers"),
        (["sandwich", "--layers", "1"], "--student sandwich stores 2 layers or more"),
        (["layers", "tinybert", "--no-fine-tune"], "--student tinybert also learns from the encoder before"),
        (["layers", "distilbert"], "--student distilbert needs a BERT, and the teacher is a roberta"),
        (["tinybert"], "--student tinybert needs a BERT, and the teacher is a roberta"),
        (["cnn", "--task", "names"], "--student cnn gives one output a row, and names is of tokens"),
    ],
)
def test_students_that_a_teacher_cannot_have_are_refused_before_it_is_tuned(
    arguments: list[str], message: str, tmp_path: Path, experiments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RobertaConfig if "roberta" in message else BertConfig
    config(num_hidden_layers=6).save_pretrained(tmp_path / "encoder")
    names = [{"tokens": ["rome", "is"], "ner_tags": ["B-LOC", "O"]}] * 4
    write_task(tmp_path / "data", "names", {"train.jsonl": names, "dev.jsonl": names})
    run = ["compress.py", "--model", str(tmp_path / "encoder"), "--output-dir", str(tmp_path / "out")]
    run += ["--data-dir", str(tmp_path / "data")] if "--task" in arguments else []
    monkeypatch.setattr("sys.argv", [*run, "--student", *arguments])
    script = importlib.import_module("compress")
    monkeypatch.setattr(script, "Bench", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        script.main()


def test_word_vectors_are_no_wider_than_the_teachers_table(experiments: None) -> None:
    bench = importlib.import_module("compress_bench").Bench
    shared = bench.__new__(bench)
    shared.teacher = build("electra", embedding_size=16)
    assert shared.word_size == 16


def test_every_student_has_a_plan_a_source_and_a_title_of_its_own(experiments: None) -> None:
    plans = importlib.import_module("compress_plans").PLANS
    wanted = {"distilbert", "tinybert", "minilm", "pkd", "bilstm", "cnn", "small", "layers"}
    wanted |= {"adabert", "pruned", "lowrank", "albert", "subformer", "sandwich", "mobilebert"}
    assert wanted <= set(plans)
    every = [*plans.values(), *(other for plan in plans.values() for other in plan.ablations.values())]
    assert len({plan.title for plan in every}) == len(every) and all(plan.source for plan in every)


def test_plans_of_one_shape_share_their_control(experiments: None) -> None:
    chosen = importlib.import_module("compress").plans_of(["pkd", "minilm", "layers", "bilstm"], False, True)
    assert [name for name in chosen if name.endswith("/labels")] == ["fewer layers/labels", "BiLSTM/labels"]


def test_a_student_from_end_to_end(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(64)
    write_task(tmp_path / "data", "mood", {"train.jsonl": rows, "dev.jsonl": rows[:40]})
    shared = ["--model", str(tmp_path / "encoder"), "--task", "mood", "--data-dir", str(tmp_path / "data")]
    shared += ["--train-limit", "32", "--eval-limit", "24", "--teacher-epochs", "1", "--epochs", "1"]
    shared += ["--output-dir", str(tmp_path / "out")]

    def run(*arguments: str) -> Any:
        return run_here("compress.py", *shared, *arguments, QBERT_CACHE=str(tmp_path / "cache"))

    done = run("--student", "pkd")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"PKD", "fewer layers, hard labels"} < set(results["rows"]) and len(results["rows"]) == 3
    row = results["rows"]["PKD"][0]
    assert {"score", "agreement", "divergence", "parameters", "ms 1x16", "fused ms 32x64"} <= set(row)
    forms = row["stored"]
    assert forms["W2 E4"]["bytes"] < forms["W4 E4"]["bytes"] < forms["W8 E8"]["bytes"] < row["float bytes"]
    assert all({"score", "divergence", "agreement"} <= set(form) for form in forms.values())
    assert "1 of 2 layers, before any training" in done.stdout and f"{row['score']:.2f}" in done.stdout
    page = (tmp_path / "out" / "students.md").read_text()
    assert "| PKD |" in page and "| PKD | W2 E4 |" in page and "bits, tables" in page and "layers applied" in page
    again = run("--student", "pkd", "layers", "--no-controls", "--resume")
    assert again.returncode == 0 and "PKD, seed 0" not in again.stdout and "layers dropped" in again.stdout
    assert "before any training\n" not in again.stdout
    foreign = run("--student", "pkd", "--resume", "--batch-size", "8")
    assert foreign.returncode == 2 and "was made with another steps" in foreign.stderr
    table = run_here("compress_table.py", str(tmp_path / "out" / "results.json"), "--report", str(tmp_path / "page.md"))
    assert table.returncode == 0 and "| PKD |" in (tmp_path / "page.md").read_text()


def test_only_a_training_of_the_same_settings_is_taken_up_again(
    tmp_path: Path, experiments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(32)
    write_task(tmp_path / "data", "mood", {"train.jsonl": rows, "dev.jsonl": rows[:8]})
    shared = ["--model", str(tmp_path / "encoder"), "--task", "mood", "--data-dir", str(tmp_path / "data")]
    shared += ["--teacher-epochs", "1", "--epochs", "1", "--no-controls", "--output-dir", str(tmp_path / "out")]
    shared += ["--student", "tinybert"]
    bench = importlib.import_module("compress_bench").Bench
    run_phase, seen = bench._run_phase, []

    def interrupted(self: Any, folder: Path, plan: Any, phase: Any, *rest: Any) -> None:
        seen.append(folder / "student.safetensors")
        if phase.name == "task":
            raise KeyboardInterrupt
        assert not seen[-1].exists()
        run_phase(self, folder, plan, phase, *rest)

    monkeypatch.setattr(bench, "_run_phase", interrupted)

    def run(*arguments: str) -> Any:
        return run_here("compress.py", *shared, *arguments, QBERT_CACHE=str(tmp_path / "cache"))

    for rate in ("1e-5", "1e-3"):  # the second run starts afresh, and its phase finds nothing of the first
        assert run("--learning-rate", rate).returncode == 130 and seen[-2].is_file()
    trained = seen[-2].read_bytes()
    record = tmp_path / "out" / "results.json"
    assert list(json.loads(record.read_text())["depths"]) == ["1"]  # kept before the training
    foreign = run("--learning-rate", "1e-2", "--resume")
    assert foreign.returncode == 2 and "was made with another learning rate" in foreign.stderr
    record.unlink()
    foreign = run("--learning-rate", "1e-2", "--resume")
    assert foreign.returncode == 2 and "tinybert-0 was made with another learning rate" in foreign.stderr
    (tmp_path / "out" / "tinybert-0" / "asked.json").unlink()
    record.unlink()
    foreign = run("--learning-rate", "1e-3", "--resume")
    assert foreign.returncode == 2 and "tinybert-0 does not say its settings" in foreign.stderr
    assert seen[-2].read_bytes() == trained


def test_starting_points_are_measured_before_any_training(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(64)
    write_task(tmp_path / "data", "mood", {"train.jsonl": rows, "dev.jsonl": rows[:40]})
    arguments = ["--model", str(tmp_path / "encoder"), "--task", "mood", "--data-dir", str(tmp_path / "data")]
    arguments += ["--train-limit", "32", "--teacher-epochs", "1", "--output-dir", str(tmp_path / "out")]
    done = run_here("study/student_starts.py", *arguments, QBERT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "out" / "student_starts.md").read_text()
    assert re.search(r"\| teacher \| 2 \| 32 \| .* \| 100\.0 % \| 0\.0000 \|", page)
    assert page.count("| narrower |") == 2 and "| fewer layers " in page and "layers applied" in page
