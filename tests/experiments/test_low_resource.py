"""The study of few labels as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest
from scripts import run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    write_task(folder / "data", "sst2", {"train.jsonl.gz": sentiment_rows(80), "dev.jsonl.gz": sentiment_rows(20)})
    return folder


def run(world: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_here(
        "study/low_resource.py",
        *("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data")),
        *(
            "--rows",
            "48",
            "--steps",
            "2",
            "--batch-size",
            "8",
            "--teacher-steps",
            "2",
            "--output-dir",
            str(world / "out"),
        ),
        *more,
        QBERT_CACHE=str(world / "cache"),
    )


def test_every_student_learns_both_ways_and_a_second_run_finds_all_done(world: Path) -> None:
    more = ("--labels", "16", "32", "--seeds", "0", "1", "--copies", "20")
    done = run(world, *more)
    assert done.returncode == 0, done.stderr
    record = json.loads((world / "out" / "low_resource.json").read_text())
    assert {len(rows) for key, rows in record["rows"].items() if "teacher " not in key[:8]} == {2}
    assert len(record["rows"]) == 2 + 2 * 3 * 2 + 3
    page = (world / "out" / "low_resource.md").read_text()
    assert "| labels | teacher | student | its labels alone | the teacher on all rows |" in page
    assert page.count("±") == 15 and "MB with 8-bit weights and tables: BiLSTM" in page
    again = run(world, *more, "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads((world / "out" / "low_resource.json").read_text()) == record
    assert "seed" not in again.stdout.split("#")[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--labels", "500"), "--labels 500 are more than the 80 rows"),
        (("--labels", "16", "--steps", "3", "--resume"), "was made with another"),
    ],
)
def test_what_cannot_work_is_refused(world: Path, more: tuple[str, ...], message: str) -> None:
    refused = run(world, *more)
    assert refused.returncode == 2 and message in refused.stderr
