"""compress.py under a budget: the plan, simpler choices of equal size, and what is kept after an interrupt."""

import json
from pathlib import Path

import pytest
from scripts import run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

import qbert


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a tiny task and a cache of its own."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    rows = {"train.jsonl.gz": sentiment_rows(160), "dev.jsonl.gz": sentiment_rows(40)}
    write_task(folder / "data", "sst2", rows)
    return folder


def arguments_for(world: Path, *more: str) -> list[str]:
    return [
        *("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data")),
        *("--output-dir", str(world / "out"), "--calibration-rows", "160", "--draws", "2", "--teacher-epochs", "1"),
        *more,
    ]


def test_the_plan_stands_beside_its_rivals_and_is_not_made_again(world: Path) -> None:
    pytest.importorskip("accelerate")
    asked = arguments_for(world, "--size-mb", "0.03", "--recipe", "qbert_kd", "--steps", "2", "--seeds", "0", "1")
    first = run_here("compress.py", *asked, QBERT_CACHE=str(world / "cache"))
    assert first.returncode == 0, first.stderr
    content = json.loads((world / "out" / "budget.json").read_text())
    names = [name.split(" (")[0].split(",")[0] for name in content["rows"]]
    assert {"plan", "uniform bits", "paper's ranking", "chance"} <= set(names)
    trained = next(rows for name, rows in content["rows"].items() if name.endswith("then qbert_kd"))
    assert [row["seed"] for row in trained] == [0, 1]
    assert all(row["megabytes"] <= 0.03 for rows in content["rows"].values() for row in rows)
    assert "median of 2 random choices (0.03 MB)" in (world / "out" / "budget.md").read_text()
    (place,) = (path.parent for path in (world / "out").rglob("plan.json"))
    assert (place / "front.png").is_file() and qbert.Pipeline.load(place / "plan.json").steps[-1].kind == "pack"
    again = run_here("compress.py", *asked, "--resume", "--draws", "3", QBERT_CACHE=str(world / "cache"))
    assert again.returncode == 0, again.stderr
    rows = json.loads((world / "out" / "budget.json").read_text())["rows"]
    assert rows.pop("chance, draw 2 (0.03 MB)") and rows == content["rows"]  # what is new is added, and no more


def test_records_of_several_tasks_become_one_page_and_picture(world: Path) -> None:
    row = {"score": 80.0, "retention": 98.0, "agreement": 97.0, "divergence": 0.01, "predicted": 0.008}
    row |= {"megabytes": 10.1, "ms": 4.0, "times": 6.5, "group": "plan", "size": 10.2, "seed": 0}
    content = {
        "task": "sst2", "metric": "accuracy", "data": "data", "made by": "here", "asked": {"rows": 512}, "plans": {},
        "float": {"score": 81.6, "retention": 100.0, "megabytes": 90.9, "rows": 872},
        "rows": {"plan (size_mb 10.2): bits alone": [row], "chance, draw 0 (10.2 MB)": [row | {"group": "chance"}]},
    }  # fmt: skip
    paths = []
    for task in ("sst2", "stsb"):
        paths.append(world / f"{task}.json")
        paths[-1].write_text(json.dumps(content | {"task": task}))
    done = run_here("compress_page.py", *map(str, paths), "--report", str(world / "page.md"))
    assert done.returncode == 0, done.stderr
    page = (world / "page.md").read_text()
    assert page.index("## sst2") < page.index("## stsb") and "| plan | 98.0 % | 6.5 |" in page
    assert (world / "page.png").stat().st_size > 5000
    foreign = run_here("compress_page.py", str(world / "data" / "sst2" / "dev.jsonl.gz"))
    assert foreign.returncode == 2


def test_predictions_are_held_against_every_part_and_the_whole(world: Path) -> None:
    asked = ("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data"), "--rows", "24")
    asked += ("--output-dir", str(world / "judged"), "--calibration-rows", "128", "--teacher-epochs", "1")
    done = run_here("study/plan_predictions.py", *asked, "--size-mb", "0.025", QBERT_CACHE=str(world / "cache"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((world / "judged" / "budget.json").read_text())["rows"]
    assert len(rows) == 18 and {"predicted", "training rows", "held-out rows"} <= set(rows["0.025 MB: all parts"][0])
    page = (world / "judged" / "predictions.md").read_text()
    assert "whole, activations too" in page and "encoder.layer.1.output.dense" in page


def test_students_and_budgets_exclude_each_other(world: Path) -> None:
    done = run_here("compress.py", *arguments_for(world, "--student", "small", "--size-mb", "1"))
    assert done.returncode == 2 and "--student trains a student; --size-mb" in done.stderr
