"""The sensitivity study as a user runs it: its files, its numbers against the library's, and what it refuses."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

from qbert.allocation.predictions import METRICS, Sensitivities
from qbert.bits import BitsConfig
from qbert.hessian import parameter_blocks
from qbert.quantize import quantize_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a tiny task and a cache of its own."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    rows = {"train.jsonl.gz": sentiment_rows(64), "dev.jsonl.gz": sentiment_rows(32)}
    write_task(folder / "data", "sst2", rows)
    return folder


def run(world: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        *("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data")),
        *("--output-dir", str(world / "out"), "--epochs", "1"),
        *("--samples", "32", "--runs", "2", "--run-rows", "8", "--probes", "4", "--groups", "4"),
        *more,
    ]
    return run_here("study/sensitivity_study.py", *arguments, QBERT_CACHE=str(world / "cache"))


MORE = ("--pairs", "2/4", "--allocations", "3")
FILES = {
    "study.md",
    "study-sst2.json",
    "study.png",
    "study-sst2.png",
    "sensitivity-sst2.json",
    "spectrum-sst2.json",
    "scores-sst2.json",
}


@pytest.fixture(scope="module")
def layers(world: Path) -> Path:
    """The folder of a finished study of layers."""
    done = run(world, *MORE, "--output-dir", str(world / "layers"))
    assert done.returncode == 0, done.stderr
    return world / "layers"


@pytest.fixture(scope="module")
def matrices(world: Path) -> Path:
    """The folder of a finished study of matrices."""
    done = run(world, *MORE, "--granularity", "matrix", "--output-dir", str(world / "matrices"))
    assert done.returncode == 0, done.stderr
    return world / "matrices"


def test_changes_on_other_rows_without_any_allocation(world: Path, tmp_path: Path) -> None:
    done = run(world, "--pairs", "--held-out", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    settings = Sensitivities.load(tmp_path / "sensitivity-sst2.json").settings
    assert settings["samples"] == settings["held_out"] == 32
    assert "changes on 32 others" in (tmp_path / "study.md").read_text()


def comparison(folder: Path) -> dict[str, Any]:
    """The study's only comparison of allocations."""
    (entry,) = json.loads((folder / "study-sst2.json").read_text())["comparisons"]
    assert isinstance(entry, dict)
    return entry


def test_study_writes_its_files(layers: Path, matrices: Path) -> None:
    for folder, granularity in ((layers, "layer"), (matrices, "matrix")):
        assert {p.name for p in folder.iterdir() if p.is_file()} == FILES
        report = Sensitivities.load(folder / "sensitivity-sst2.json")
        assert report.settings["granularity"] == granularity and report.bits == (2, 3, 4, 8)


def test_study_allocates_by_every_measure_and_rule_beside_others_of_the_same_size(layers: Path, matrices: Path) -> None:
    # Two layers have only two allocations, and all are scored; of those of the matrices a sample.
    for folder, rules, others in ((layers, 3, 2), (matrices, 2, 3)):
        entry, names = comparison(folder), Sensitivities.load(folder / "sensitivity-sst2.json").names
        assert len(entry["picks"]) == rules * len(METRICS) and len(entry["others"]) == others
        assert all(0 <= pick["better"] <= 1 and len(pick["bits"]) == len(names) for pick in entry["picks"])
    assert comparison(layers)["all"] and comparison(layers)["average"] == 3.0


def test_study_gives_the_larger_width_to_the_layer_that_a_measure_ranks_first(layers: Path) -> None:
    report = Sensitivities.load(layers / "sensitivity-sst2.json")
    ranked = {p["metric"]: p["bits"] for p in comparison(layers)["picks"] if p["rule"].startswith("rank")}
    for metric in METRICS:
        top = report.ranking(metric)[0]
        assert ranked[metric] == [4 if name == top else 2 for name in report.names]


def test_study_goes_on_from_its_finished_parts_to_the_same_numbers(world: Path, layers: Path) -> None:
    shutil.copytree(layers, world / "cut")
    (world / "cut" / "sensitivity-sst2.json").unlink()
    again = run(world, *MORE, "--output-dir", str(world / "cut"), "--resume")
    assert again.returncode == 0, again.stderr
    for name in ("spectrum-sst2.json", "scores-sst2.json"):
        assert (world / "cut" / name).read_bytes() == (layers / name).read_bytes()
    assert comparison(world / "cut") == comparison(layers)


def test_study_does_not_go_on_from_another_question(world: Path, layers: Path) -> None:
    foreign = run(world, *MORE, "--output-dir", str(layers), "--resume", "--samples", "16")
    assert foreign.returncode == 2 and "was made with another samples" in foreign.stderr


def test_page_of_a_study_shows_the_correlations_of_its_report(layers: Path, matrices: Path) -> None:
    for folder in (layers, matrices):
        page, report = (folder / "study.md").read_text(), Sensitivities.load(folder / "sensitivity-sst2.json")
        correlation = report.rank_correlations()["trace"][4]
        assert f"{correlation.kendall:+.2f} / {correlation.spearman:+.2f}" in page
        mean = sum(found.kendall for found in report.rank_correlations()["curvature"].values()) / len(report.bits)
        assert f"| curvature | {mean:+.2f} | {mean:+.2f} |" in page  # one task: its own mean is that of all


def test_studies_of_several_folders_make_one_page(world: Path) -> None:
    (world / "a").mkdir()
    names = ["encoder.layer.0", "encoder.layer.1"]
    members = {name: [f"{name}.output.dense"] for name in names}
    one, two = np.array([2.0, 1.0]), np.array([[2.0, 1.0], [1.5, 0.5]])
    report = Sensitivities(
        names,
        members,
        (2, 4),
        **dict.fromkeys(("omega", "eigenvalue", "trace", "trace_error"), one),
        **dict.fromkeys(("weight_error", "curvature", "gradient", "loss_change"), two),
        loss=0.5,
        settings={"granularity": "layer", "samples": 8},
    )
    pick = {"rule": "rank, 2/4", "bits": [4, 2], "loss": 0.7, "score": 81.5, "better": 0.25}
    entry = {"pair": [2, 4], "average": 3.0, "all": True, "others": [[0.6, 82.0], [0.9, 70.0]]}
    entry["picks"] = [{"metric": metric, **pick} for metric in METRICS]
    for task, folder in (("sst2", "a"), ("cola", "b")):
        report.save(world / folder / f"sensitivity-{task}.json")
        content = {"task": task, "described": f"rows of {task}", "made_by": "a machine", "metric": "accuracy"}
        content |= {"float": [0.5, 83.0], "comparisons": [entry]}
        (world / folder / f"study-{task}.json").write_text(json.dumps(content))
    done = run(world, "--collect", str(world / "a"), str(world / "b"), "--report", str(world / "page.md"))
    assert done.returncode == 0, done.stderr
    text = (world / "page.md").read_text()
    assert "| omega | +1.00 | +1.00 | +1.00 |" in text and "rows of sst2" in text and "rows of cola" in text
    assert "| trace | rank, 2/4 | 81.50 (25 %) | 81.50 (25 %) | 25 % |" in text
    assert (world / "page.png").stat().st_size > 5000
    for folders, words in ((["a", "a"], "sst2 was studied in two"), (["encoder"], "holds no finished study")):
        refused = run(world, "--collect", *(str(world / f) for f in folders))
        assert refused.returncode == 2 and words in refused.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--pairs", "2/16"), "--pairs 2/16 needs 16 bits"),
        (("--bits", "2", "5", "--pairs", "2/5"), "bits=(2, 5)"),
        (("--bits", "2", "32", "--pairs", "2/32"), "16 and 32 bits"),
        (("--tasks", "sst2", "nothing", "--pairs", "2/4"), "nothing"),
        (("--groups", "5"), "groups=5"),
        (("--probes", "1"), "--probes 1 gives no error"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(world: Path, more: tuple[str, ...], words: str) -> None:
    done = run(world, *more)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in done.stderr
    assert "fine-tuned" not in done.stdout  # refused before the work begins


@pytest.mark.parametrize("text", ["4/2", "2", "2/3/4", "a/b"])
def test_pairs_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "study"))
    study = importlib.import_module("sensitivity_study")
    assert study.parse_pairs(["2/4", "3/8"], [2, 3, 4, 8]) == [(2, 4), (3, 8)]
    with pytest.raises(ValueError, match=f"--pairs {text} is not a pair"):
        study.parse_pairs([text], [2, 3, 4, 8])


def test_assembled_allocations_are_those_of_quantize_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "study"))
    compare = importlib.import_module("allocation_compare")
    model, batch = build("bert", num_hidden_layers=3).eval(), inputs_for("bert")
    blocks = {b.name: b.members for b in parameter_blocks(model, "layer")}

    class Sums(compare.Scores):  # type: ignore[misc, name-defined]
        def score(self, model: Any) -> tuple[float, float]:
            with torch.no_grad():
                return float(model(**batch).logits.double().sum()), 0.0

    report = SimpleNamespace(members=blocks, bits=(2, 4))
    arguments = (model, None, None, report, {"groups": 4}, None, tmp_path / "kept.json", {"weights": "a"})
    scores = Sums(*arguments, False)
    for bits in [(2, 4, 2), (4, 2, 4), (4, 4, 2), (2, 4, 2)]:
        whole = quantize_model(model, BitsConfig(dict(zip(blocks, bits, strict=True)), embedding_bits=8, groups=4))
        assert scores.of(bits) == pytest.approx(scores.score(whole), rel=1e-6, abs=1e-6)
    assert scores.float == scores.score(model)
    again = Sums(*arguments, True)
    monkeypatch.setattr(Sums, "score", None)
    assert again.known == scores.known and again.float == scores.float and again.of((4, 2, 4)) == scores.of((4, 2, 4))
    with pytest.raises(ValueError, match="was made with another weights"):
        Sums(*arguments[:-1], {"weights": "b"}, True)
