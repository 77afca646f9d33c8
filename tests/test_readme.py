"""Every block of code in the README runs as written, in a folder that has what its words name: my-model and DATA."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qbert.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader with a fine-tuned model and data."""
    tiny_encoder(tmp_path / "my-model")
    torch.manual_seed(0)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-model", **labels).save_pretrained(
        tmp_path / "my-model"
    )
    tokenizer.save_pretrained(tmp_path / "my-model")
    rows = {"train.jsonl.gz": sentiment_rows(700), "dev.jsonl.gz": sentiment_rows(40)}
    write_task(tmp_path / "DATA", "sst2", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_runs_from_the_first_to_the_last_block(folder: Path) -> None:
    found = blocks("python")
    assert len(found) >= 2
    exec(compile("\n".join(found), "README.md", "exec"), {"__name__": "README"})
    assert {"spectrum.json", "spectrum.png", "out"} <= {path.name for path in folder.iterdir()}


def test_the_commands_run_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("qbert ")]
    assert len(lines) >= 6
    for line in lines:
        main(shlex.split(line, comments=True)[1:])
    assert {"out-2", "out-4", "out-mixed", "model.onnx"} <= {path.name for path in folder.iterdir()}
