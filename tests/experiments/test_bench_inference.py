"""The CPU benchmark as a user runs it: a page with every engine on any encoder and data, refusals of one sentence."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_bench
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

SCRIPT = Path(__file__).parents[2] / "experiments" / "bench" / "inference.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and a tiny task."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    rows = sentiment_rows(40)
    write_task(folder / "data", "sst2", {"train.jsonl": rows, "dev.jsonl": rows})
    return folder


def run(world: Path, *more: str) -> subprocess.CompletedProcess[str]:
    quick = ("--torch-only", "--bits", "4", "--seconds", "0.01", "--shapes", "2x4", "--layers", "--sentences", "5")
    where = ("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data"))
    kept = ("--record", str(world / "record.json"), "--output", str(world / "page.md"))
    command = [sys.executable, str(SCRIPT), *where, *quick, *kept, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_page_has_every_engine(world: Path) -> None:
    done = run(world)
    assert done.returncode == 0, done.stderr
    page = (world / "page.md").read_text()
    assert (
        page.strip() in done.stdout
        and "5 sentences of sst2" in page
        and "ONNX Runtime dynamic int8 (left out on request)" in page
    )
    errors = {
        name: float(error)
        for name, error in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| [\d.]+ \| - \| [\d.-]+ \| - \| - \|$", page, re.M)
    }
    assert list(errors) == [
        "torch fp32",
        "model.bfloat16()",
        "qbert 4-bit, asymmetric",
        "qbert 4-bit",
        "torch dynamic int8",
    ]
    assert errors["torch fp32"] == 0 and max(errors.values()) < 0.5


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return load_bench("inference")


def rows_of(world: Any, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[Any, Any]:
    """What is measured and recorded with three engines, one of which cannot be made and one of which fails at work."""
    model = str(world / "encoder")
    arguments = ["--model", model, "--shapes", "2x4", "--seconds", "0.01", "--activations", "dynamic", *more]
    monkeypatch.setattr(sys, "argv", ["bench/inference.py", *arguments])
    asked = bench.parse_arguments()
    record = bench.Record(world / "engines.json", {"a": 1}, resume=asked.resume)

    def fails(*_: Any) -> Any:
        raise RuntimeError("it broke\nwith details")

    def rows(self: Any) -> list[Any]:
        return [*original(self)[:2], bench.Row("unmade", fails), bench.Row("unrun", lambda threads: fails)]

    original = bench.World.rows
    monkeypatch.setattr(bench.World, "rows", rows)
    bench.Bench(asked, record, time.monotonic() + 60 * asked.minutes).model(model, ["the film was superb .", "dull"])
    return record, model


def test_an_engine_that_fails_does_not_lose_the_others(
    world: Path, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, model = rows_of(world, bench, monkeypatch)
    assert set(record[f"{model}/1/2x4"][-1]) == {"torch fp32", "model.bfloat16()"}
    for name in ("unmade", "unrun"):
        assert record[f"{model}/missing/{name}"] == ["RuntimeError: it broke"]
    page = bench.render(record, "by this", "data", 2)
    assert "Not measured: unmade (RuntimeError: it broke)." in page and "| model.bfloat16() |" in page


def test_what_was_measured_is_not_measured_again(
    world: Path, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, model = rows_of(world, bench, monkeypatch)
    before = first.path.read_bytes()
    again, _ = rows_of(world, bench, monkeypatch, "--resume")
    assert first.path.read_bytes() == before and len(again[f"{model}/1/2x4"]) == 1


def test_a_run_out_of_time_begins_no_column(world: Path, bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    record, model = rows_of(world, bench, monkeypatch, "--minutes", "0")
    assert f"{model}/1/2x4" not in record and record[f"{model}/missing/model.bfloat16()"] == ["out of time"]


def test_the_page_says_where_packed_models_gain_least(bench: ModuleType) -> None:
    times = {"torch fp32": 8.0, "model.bfloat16()": 4.0, "qbert 8-bit": 2.0, "ONNX Runtime fp32": 1.0}
    columns = {"1x16": times, "8x32": {**times, "model.bfloat16()": 3.0}}
    (line,) = bench.least_gains(columns, times)
    assert line.startswith("qbert 8-bit: at least 1.50 times as fast") and line.endswith("(8x32).")


def test_notes_by_hand_stay(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert bench.notes_of(page) == f"\n{bench.NOTES}\n"
    page.write_text(f"| old | table |\n{bench.NOTES}\nThis machine has no AMX.\n")
    assert bench.notes_of(page) == f"\n{bench.NOTES}\nThis machine has no AMX.\n"


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    ids, mask = (openvino.opset13.parameter([-1, -1], openvino.Type.i64) for _ in range(2))
    path = tmp_path / "sum.xml"
    openvino.save_model(openvino.Model([openvino.opset13.add(ids, mask)], [ids, mask]), path)
    command = [sys.executable, str(SCRIPT.with_name("cpu_memory.py")), "openvino", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = json.loads(done.stdout)
    assert said["load_s"] >= 0 and said["peak_mb"] > 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--bits", "5"), "invalid choice: 5"),
        (("--shapes", "8x"), "'8x' is not two positive numbers such as 8x32"),
        (("--layers", "0x4"), "'0x4' is not two positive numbers"),
        (("--sentences", "0"), "--sentences"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    bench: ModuleType,
    arguments: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/inference.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments()
    assert sentence in capsys.readouterr().err


def test_sentences_come_from_any_task_or_its_absence_is_named(world: Path, bench: ModuleType) -> None:
    asked = argparse.Namespace(task="sst2", data_dir=world / "data", sentences=3)
    assert len(bench.sentences(asked)) == 3 and asked.data == "sst2"
    with pytest.raises(FileNotFoundError, match="has no task 'nope'"):
        bench.sentences(argparse.Namespace(task="nope", data_dir=world / "data", sentences=3))
    assert len(bench.sentences(argparse.Namespace(task="reviews", data_dir=None, sentences=4))) == 4
