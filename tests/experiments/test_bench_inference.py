"""The CPU benchmark as a user runs it: a page with every engine on any encoder and data, refusals of one sentence."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
    command = [sys.executable, str(SCRIPT), *where, *quick, "--output", str(world / "page.md"), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_page_has_every_engine(world: Path) -> None:
    done = run(world)
    assert done.returncode == 0, done.stderr
    page = (world / "page.md").read_text()
    assert (
        page.strip() in done.stdout and "5 sentences of sst2" in page and "ONNX Runtime (left out on request)" in page
    )
    errors = {
        name: float(error) for name, error in re.findall(r"^\| ([^|]+) \|.*\| ([\d.]+) \| [\d.-]+ \|$", page, re.M)
    }
    assert list(errors) == [
        "torch fp32",
        "torch dynamic int8",
        "model.bfloat16()",
        "qbert 4-bit",
        "qbert 4-bit, asymmetric",
    ]
    assert errors["torch fp32"] == 0 and max(errors.values()) < 0.5


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return load_bench("inference")


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
