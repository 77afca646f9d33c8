"""The session for a lent GPU, tried without one: every part runs to its end, on CPU tensors and without a launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_both_calls_of_a_session_run_to_their_end(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {
        "QBERT_GPU_SESSION": "dry",
        "OUT": str(tmp_path / "out"),
        "CALL": "1,2",
        "SECONDS_LEFT": "600",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "QBERT_CARRIED": str(tmp_path / "carried"),
    }
    command = ["bash", str(ROOT / "experiments" / "bench" / "gpu_session.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (tmp_path / "out" / "session.log").read_text(encoding="utf-8")
    assert run.returncode == 0 and "== [" in log and "] done" in log, run.stdout[-4000:] + run.stderr[-1000:]
    lines = log.splitlines()
    # The sanitizer comes with CUDA.
    ended = [line for line in lines if "ended with" in line and "sanitizer" not in line]
    assert not ended and "FAIL" not in log and "EXCEPTION" not in log, "\n".join(ended) + log[-4000:]
    assert (
        sum(line.startswith("EXACTNESS: ") and "not: " not in line for line in lines[: lines.index("-- summary")]) == 3
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["kind"] for row in rows} == {"machine", "peak", "encoder", "around", "profile", "product", "tile"}
    encoders = [row for row in rows if row["kind"] == "encoder"]
    assert {"fp16 compiled", "fp8 compiled", "W8A8", "W4A8", "W2A8", "W4 e4m3"} <= set(encoders[0]["ms"])
    page = [
        sys.executable,
        str(ROOT / "experiments" / "bench" / "gpu_page.py"),
        str(tmp_path / "out" / "results.jsonl"),
        str(tmp_path / "out" / "session.log"),
    ]
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "experiments")))
    shown = subprocess.run(page, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True)
    assert shown.returncode == 0 and "| BERT-base 32x128, " in shown.stdout, shown.stderr[-2000:]
    assert "- BERT-base 32x128: W8A8 " in shown.stdout  # the host's time
    assert "| row kernels, float16 | 135 | 0 |" in shown.stdout  # in three rounds of checks
