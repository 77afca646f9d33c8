"""Every block of code in README and documentation runs as written, in a folder that has what its words name."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from qbert.cli.main import main
from qbert.tasks import load_task

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def with_head(folder: Path, kind: Any, names: tuple[str, ...]) -> None:
    """A random encoder with a head for labels of these names."""
    tiny_encoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    kind.from_pretrained(folder, **labels).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader with fine-tuned models and data."""
    write_task(tmp_path / "DATA", "sst2", {"train.jsonl": sentiment_rows(700), "dev.jsonl": sentiment_rows(40)})
    words = [row["sentence"].split() for row in sentiment_rows(64)]
    tagged = [{"tokens": w, "ner_tags": ["B-PER", *["O"] * (len(w) - 1)]} for w in words]
    write_task(tmp_path / "DATA", "wnut17", {"train.jsonl": tagged, "dev.jsonl": tagged[:20]})
    with_head(tmp_path / "my-model", AutoModelForSequenceClassification, ("negative", "positive"))
    names = load_task("wnut17", data_dir=tmp_path / "DATA").label_names
    with_head(tmp_path / "my-tagger", AutoModelForTokenClassification, names)
    tiny_encoder(tmp_path / "my-encoder")
    (tmp_path / "sentences.txt").write_text("\n".join(row["sentence"] for row in sentiment_rows(128)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_the_first_to_the_last_block(page: str, folder: Path) -> None:
    for package in ("onnx", "openvino", "sentence_transformers"):
        if package in "".join(blocks(page, "python")):
            pytest.importorskip(package)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {"__name__": page})


def test_the_commands_of_the_readme_run_in_order(folder: Path) -> None:
    pytest.importorskip("onnx")
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines() if line.startswith("qbert ")]
    assert len(lines) >= 6
    for line in lines:
        main(shlex.split(line, comments=True)[1:])
    assert {"out-2", "out-4", "out-mixed", "model.onnx", "report.html"} <= {path.name for path in folder.iterdir()}


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [name for part in parts for name in named(part)]

    listed = named(yaml.safe_load(text)["nav"])
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    results = {f"results/{p.name}": p for p in (ROOT / "experiments" / "results").iterdir()}  # docs/site.py brings them
    assert sorted(listed) == sorted([*pages, *(name for name, p in results.items() if p.suffix == ".md")])
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
        for link in links:
            there = ((ROOT / page).parent / link).exists() or link in results
            assert there, f"{page} links {link}, which is not there"
