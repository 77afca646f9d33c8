"""Every block of code in README and documentation runs as written, in a folder that has what its words name."""

import difflib
import fnmatch
import itertools
import re
import shlex
import tomllib
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


def test_what_a_page_installs_is_there_to_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wheel = f"{project['name'].replace('-', '_')}-{project['version']}-py3-none-any.whl"
    commands = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        made = re.findall(r"--wheel-dir (\S+)", text)
        for command in re.findall(r"pip (?:install|wheel) ([^`\n&;|]+)", text):
            words = shlex.split(command, comments=True)
            files = [words.pop(i + 1) for i in reversed(range(len(words))) if words[i] == "-c"]
            places = [words.pop(i + 1) for i in reversed(range(len(words))) if words[i] == "--wheel-dir"]
            assert all((ROOT / file).is_file() for file in files) and len(places) < 2, f"{page}: {command}"
            commands += 1
            for word in (w for w in words if not w.startswith(("-", "git+"))):
                name, _, extras = word.rstrip("]").partition("[")
                folder, _, file = word.rpartition("/")
                if name == ".":
                    there = set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
                elif file.endswith(".whl"):
                    there = fnmatch.fnmatch(wheel, file) and folder.strip("/") in made
                else:  # of others; the library is not on the package index, and its import name is someone else's there
                    there = name.replace("_", "-").lower() not in (project["name"], "qbert")
                assert there, f"{page}: pip gets no {word}"
    assert commands >= 8


def test_no_change_is_told_twice() -> None:
    sections = re.split(r"^#+ .*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections:
        entries = [" ".join(entry.split()) for entry in re.split(r"^- ", section, flags=re.MULTILINE)[1:]]
        for first, second in itertools.combinations(entries, 2):
            like = difflib.SequenceMatcher(None, first, second)
            twice = like.real_quick_ratio() > 0.85 and like.quick_ratio() > 0.85 and like.ratio() > 0.85
            assert not twice, f"{first}\n{second}"


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
