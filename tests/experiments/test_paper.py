"""Tables and figures of the paper from recipes: a tiny one from end to end, resumed, and what is refused."""

import json
import subprocess
from pathlib import Path

import pytest
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

ROWS = [
    {"label": "lower half", "mixed": [2, 3], "by": "lower", "method": "ptq", "start": "nearest"},
    {"label": "random half", "mixed": [2, 3], "by": "random 1", "method": "ptq", "start": "nearest"},
    {"label": "4 bits", "bits": {"*": 4, "*.attention.*": 8}, "method": "qat", "start": "nearest"},
]

FIGURE = {"title": "Spectrum", "reference": "nobody", "kind": "spectrum", "tasks": ["sst2"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    tiny_encoder(folder / "encoder")
    write_task(folder / "data", "sst2", {"train.jsonl": sentiment_rows(64), "dev.jsonl": sentiment_rows(40)})
    return folder


def run(world: Path, recipe: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    (world / "recipe.json").write_text(json.dumps(recipe))
    shared = ["--recipe", str(world / "recipe.json"), "--tasks", "sst2", "--data-dir", str(world / "data")]
    shared += ["--model", str(world / "encoder"), "--output-dir", str(world / "out")]
    return run_here("paper.py", *shared, *arguments, QBERT_CACHE=str(world / "cache"))


def recipes(rows: list[dict[str, object]]) -> dict[str, object]:
    budget = {"teacher_rows": 32, "teacher_epochs": 1, "train_limit": 32, "eval_limit": 24, "epochs": 1}
    table = {"title": "Halves", "reference": "nobody", "tasks": ["sst2"], "rows": rows}
    return {"budgets": {"*": {"calibration_rows": 8}, "sst2": budget}, "tables": {"h": table}, "figures": {"s": FIGURE}}


def test_a_table_is_made_and_goes_on_from_the_rows_that_are_there(world: Path) -> None:
    first = run(world, recipes(ROWS), "--table", "h", "--rows", "lower", "random")
    assert first.returncode == 0, first.stderr[-2000:]
    assert "sst2: about" in first.stdout and first.stdout.index("in all about") < first.stdout.index("[1/2] lower half")
    kept = json.loads((world / "out" / "sst2" / "table-h.json").read_text())["rows"]
    again = run(world, recipes(ROWS), "--table", "h", "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "[1/1] 4 bits" in again.stdout and "lower half, " not in again.stdout
    assert "for 1 rows, 1 of them trained" in again.stdout  # the estimate is of what is left
    rows = json.loads((world / "out" / "sst2" / "table-h.json").read_text())["rows"]
    assert {label: rows[label] for label in kept} == kept and set(rows) == {"lower half", "random half", "4 bits"}
    assert rows["4 bits"][0]["widths"] == "4/8 mixed" and rows["lower half"][0]["widths"] == "2/3 mixed"
    page = (world / "out" / "table-h.md").read_text()
    assert page.startswith("# Table h: halves") and "| 4 bits |" in page and "trained on 32 rows" in page
    assert (world / "out" / "table-h.png").stat().st_size > 5000
    other = run(world, recipes([{**ROWS[0], "mixed": [2, 4]}]), "--table", "h", "--resume")
    assert other.returncode == 2 and "was made with another mixed" in other.stderr
    foreign = run(world, recipes(ROWS), "--table", "h", "--resume", "--seed", "1")
    assert foreign.returncode == 2 and "was made with another weights" in foreign.stderr  # a teacher of another seed


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS, ["--table", "9"], "--table 9 is not in recipe.json; it has h"),
        (ROWS, ["--figure", "1"], "--figure 1 is not in recipe.json"),
        (ROWS, ["--figure", "s", "--rows", "lower"], "--rows lower chooses rows of a --table"),
        (ROWS, ["--figure", "s", "--fraction", "2"], "--fraction 2.0 is not a share of the data"),
        (ROWS, ["--table", "h", "--tol", "0"], "tol"),
        ([{**ROWS[0], "bits": 4}], ["--table", "h"], "needs a label, and either bits or mixed"),
        ([{**ROWS[0], "colour": 4}], ["--table", "h"], "of the recipe says 'colour'"),
        ([{**ROWS[0], "method": "luck"}], ["--table", "h"], "method is one of qat, kd, ptq"),
        (ROWS, ["--table", "h", "--rows", "nine"], "--rows nine leaves no row of table h"),
        (ROWS, ["--table", "h", "--seeds", "1", "1"], "--seeds 1 1 names a seed twice"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    world: Path, rows: list[dict[str, object]], arguments: list[str], message: str
) -> None:
    done = run(world, recipes(rows), *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_recipes_beside_the_script_are_whole() -> None:
    content = json.loads((EXPERIMENTS / "paper.json").read_text())
    assert {"1", "2", "3"} <= set(content["tables"]) and {"1", "2"} <= set(content["figures"])
    for table in content["tables"].values():
        labels = [row["label"] for row in table["rows"]]
        assert len(labels) == len(set(labels)) and set(table["tasks"]) <= set(content["budgets"])
