"""Steps to equal divergence from both starts: what the script writes, and that it takes finished trainings over."""

import json
from pathlib import Path

from scripts import run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task


def test_every_training_is_kept_and_taken_over(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = sentiment_rows(32)
    write_task(tmp_path / "data", "sst2", {"train.jsonl": rows, "dev.jsonl": rows[:8]})
    shared = ["--model", str(tmp_path / "encoder"), "--task", "sst2", "--data-dir", str(tmp_path / "data")]
    shared += ["--teacher-epochs", "1", "--bits", "2", "--batch-size", "8", "--output-dir", str(tmp_path / "out")]
    shared += ["--seeds", "0", "--eval-limit", "8", "--resume"]
    first = run_here("qat_steps.py", *shared, "--steps", "2", "4", QBERT_CACHE=str(tmp_path / "cache"))
    assert first.returncode == 0, first.stderr
    kept = json.loads((tmp_path / "out" / "steps.json").read_text())["rows"]
    assert set(kept) == {f"{start}, {n}" for start in ("nearest", "compensated") for n in (0, 2, 4)}
    again = run_here("qat_steps.py", *shared, "--steps", "2", "4", QBERT_CACHE=str(tmp_path / "cache"))
    assert again.returncode == 0 and "KD-QAT, seed" not in again.stdout
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["rows"] == kept
    assert "| compensated: divergence |" in (tmp_path / "out" / "steps.md").read_text()
