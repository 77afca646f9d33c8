"""The command line as a user meets it: a float model in, files and scores out, and sentences for what cannot be."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import qbert
from qbert.cli.inspect import folder_content
from qbert.cli.main import app, main
from qbert.cli.options import beside, build_for, in_fours, load_any, text_batches, unlabelled_batches
from qbert.files import file_sha256, read_json
from qbert.pipeline import Distill, Pack, Pipeline, Prune, Quantize
from qbert.pipeline.plan import Planner
from qbert.results import COMMAND_FILE
from qbert.rounded import RoundedLayers
from qbert.tasks import SentenceRegression, build_model, evaluate, heads, load_task, pooling


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier for two labels, its data, and a text file."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2)
    model.config.id2label, model.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "encoder").save_pretrained(folder / "model")
    write_task(folder / "data", "sst2", {"train.jsonl.gz": sentiment_rows(64), "dev.jsonl.gz": sentiment_rows(40)})
    (folder / "list.json").write_text("[4]")
    (folder / "parts").mkdir()
    (folder / "parts" / "modules.json").write_text("[]")
    (folder / "long.txt").write_text("\n".join(row["sentence"] for row in sentiment_rows(160)))
    (folder / "texts.txt").write_text("\n".join(row["sentence"] for row in sentiment_rows(64)) + "\n\n")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``qbert ARGUMENTS``."""
    code = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def task(world: Path) -> list[object]:
    return ["--task", "sst2", "--data-dir", world / "data"]


def test_quantize_writes_what_the_library_calls_give(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "quantize", world / "model", tmp_path / "out", "--bits", "3", "--groups", "8")
    assert code == 0, err
    assert "encoder matrices" in out and "qbert inspect" in out
    model = AutoModelForSequenceClassification.from_pretrained(world / "model").eval()
    wanted = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(3, groups=8))).state_dict()
    found = qbert.load(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the film was kind")["input_ids"]


def test_force_leaves_nothing_that_tells_of_the_model_before(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(world / "model", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(other)
    out.mkdir()
    for name in ("notes.txt", "vocab.txt", "modules.json"):
        (out / name).write_text("[]")
    assert run(capsys, "quantize", world / "model", out, "--bits", "8", "--force")[0] == 0
    assert sorted(path.name for path in out.glob("*.t*t")) == ["notes.txt"]
    assert not (out / "modules.json").exists()
    assert run(capsys, "quantize", other, out, "--bits", "2", "--force")[0] == 0
    assert "unheard" in AutoTokenizer.from_pretrained(out).get_vocab()
    assert "| 8 |" not in (out / "README.md").read_text() and "| 2 |" in (out / "README.md").read_text()


def test_force_without_a_tokenizer_leaves_none(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    AutoModelForSequenceClassification.from_pretrained(world / "model").save_pretrained(bare)
    assert run(capsys, "quantize", world / "model", out)[0] == 0
    assert run(capsys, "quantize", bare, out, "--force")[0] == 0
    assert not (out / "tokenizer_config.json").exists()


@pytest.mark.parametrize("command", ["quantize", "distill", "compress"])
@pytest.mark.parametrize("out", ["mine", "./mine/", "mine/../mine", "link", "."])
def test_force_never_replaces_the_model_that_is_read(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", "mine")
    Path("link").symlink_to("mine")
    before = {file.name: file_sha256(file) for file in Path("mine").iterdir()}
    Pipeline((Quantize(4, "nearest"), Pack())).save("plan.json")
    more = {
        "quantize": [],
        "distill": [*task(world), "--bits", "2", "--steps", "1"],
        "compress": [*task(world), "--plan", "plan.json"],
    }[command]
    code, _, err = run(capsys, command, "mine", out, *more, "--force")
    assert code == 2 and re.search(r"OUT \S+ (is the folder of|holds) (MODEL|TEACHER)", err), err
    assert {file.name: file_sha256(file) for file in Path("mine").iterdir()} == before


def test_a_student_is_not_replaced_by_what_it_becomes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "small")
    asked = [*task(world), "--student", tmp_path / "small", "--steps", "1", "--force"]
    code, _, err = run(capsys, "distill", world / "model", tmp_path / "small", *asked)
    assert code == 2 and "is the folder of --student" in err


def test_what_is_saved_replaces_nothing_that_is_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", "mine")
    for name in ("spectrum.json", "texts.txt", "kept.json"):
        shutil.copy(world / "texts.txt", name)
    before = {file: file_sha256(file) for file in Path().rglob("*.*") if file.is_file()}
    for asked in (
        ["allocate", "spectrum.json", "--save", "./spectrum.json"],
        ["evaluate", "mine", *task(world), "--save", "mine/config.json"],
        ["spectrum", "mine", *task(world), "--save", "mine/tokenizer.json"],
        ["plan", "mine", "--texts", "texts.txt", "--size-mb", "1", "--save", "texts.txt"],
        ["report", ".", "--out", "kept.json"],
    ):
        code, _, err = run(capsys, *asked)
        assert code == 2 and re.search("would replace what|is there and no page", err), err
    assert {file: file_sha256(file) for file in before} == before


def test_what_others_keep_beside_a_spectrum_stays(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "s.json.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    asked = [*task(world), "--runs", "1", "--fraction", "0.1", "--save", tmp_path / "s.json"]
    assert run(capsys, "spectrum", world / "model", *asked)[0] == 0
    assert [file.name for file in partial.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("data", ["texts", "task"])
def test_compensated_rounding_takes_texts_or_a_task(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    named = ["--texts", world / "texts.txt"] if data == "texts" else task(world)
    asked = ["--bits", "2", "--rounding", "compensated", "--rows", "48", *named]
    code, out, err = run(capsys, "quantize", world / "model", tmp_path / "out", *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["rounding"] == "compensated"
    layers = {label["rounding"] for label in folder_content(tmp_path / "out")["grids"].values() if label["bits"] == 2}
    assert layers == {"compensated"}


@pytest.mark.parametrize("command", ["quantize", "distill", "compress"])
def test_compensated_rounding_goes_on_after_the_last_whole_layer(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    Pipeline((Quantize(2, rows=48), Pack())).save(tmp_path / "plan.json")
    asked = {
        "quantize": ["--bits", "2", "--rounding", "compensated", "--rows", "48"],
        "distill": ["--bits", "2", "--rows", "48", "--steps", "1", "--batch-size", "4", "--eval-limit", "4"],
        "compress": ["--plan", tmp_path / "plan.json", "--eval-limit", "4"],
    }[command]

    def call(out: str, *more: object) -> tuple[int, str, str]:
        return run(capsys, command, world / "model", tmp_path / out, *task(world), *asked, *more)

    finish = RoundedLayers.finish_layer
    finished: list[int] = []

    def interrupted(layers: RoundedLayers) -> None:
        finish(layers)
        finished.append(len(layers._tensors))
        if len(finished) == 1:
            raise KeyboardInterrupt

    assert call("whole")[0] == 0
    monkeypatch.setattr(RoundedLayers, "finish_layer", interrupted)
    code, _, err = call("out")
    assert code == 130 and "out.partial" in err and not (tmp_path / "out").exists()
    code, _, err = call("out", "--seed", "3")
    assert code == 2 and "out.partial is of an interrupted run with another seed" in err
    code, _, err = call("out")
    assert code == 0, err
    assert finished[-1] > 0, "nothing was taken over"
    assert not (tmp_path / "out.partial").exists()
    found, wanted = (qbert.load(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_lies_beside_out_and_is_of_no_run_is_left_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    asked = ["--rounding", "compensated", "--texts", world / "texts.txt"]
    for note in ("mine.txt", "asked.json"):
        (tmp_path / "out.partial" / note).write_text("[]")
        code, _, err = run(capsys, "quantize", world / "model", tmp_path / "out", *asked)
        assert code == 2 and "of no interrupted run" in err
    (tmp_path / "out.partial" / "asked.json").unlink()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["mine.txt"]


def test_a_request_that_is_refused_keeps_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--rounding", "compensated", "--texts", world / "texts.txt", "--groups", "5"]
    code, _, err = run(capsys, "quantize", world / "model", tmp_path / "out", *asked)
    assert code == 2 and "groups=5 does not divide" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "distill"])
def test_a_rounding_beside_a_configuration_that_names_none_is_taken(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    bits, out = tmp_path / "bits.json", tmp_path / "out"
    qbert.BitsConfig(3).save(bits)
    asked = [command, world / "model", out, *task(world), "--config", bits, "--rounding", "compensated", "--rows", "48"]
    more = ["--steps", "1", "--batch-size", "4"] if command == "distill" else []
    code, _, err = run(capsys, *asked, *more)
    assert code == 0, err
    assert "compensated" in {grid.get("rounding") for grid in folder_content(out)["grids"].values()}
    qbert.BitsConfig(3, rounding="nearest").save(bits)
    code, _, err = run(capsys, *asked, *more, "--force")
    assert code == 2 and "names a rounding itself; leave out --rounding" in err


def test_from_spectrum_to_bits_to_a_folder_to_a_score(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spectrum, bits, out = tmp_path / "spectrum.json", tmp_path / "bits.json", tmp_path / "out"
    code, text, err = run(
        capsys, "spectrum", world / "model", *task(world), "--runs", "2", "--fraction", "0.3", "--save", spectrum
    )
    assert code == 0, err
    assert "|mean|+std" in text and spectrum.is_file() and not Path(f"{spectrum}.partial").exists()
    settings = qbert.HessianSpectrum.load(spectrum).settings
    assert settings["model"] == str(world / "model") and settings["task"] == "sst2"
    assert settings["made by"].startswith("`qbert spectrum ")
    code, text, err = run(capsys, "allocate", spectrum, "--bits", "2,4", "--model", world / "model", "--save", bits)
    assert code == 0, err
    assert qbert.BitsConfig.parse(bits).rules == qbert.allocate_bits(qbert.HessianSpectrum.load(spectrum), (2, 4)).rules
    assert run(capsys, "quantize", world / "model", out, "--config", bits)[0] == 0
    code, text, err = run(capsys, "evaluate", out, *task(world), "--beside", world / "model", "--json")
    assert code == 0, err
    scores = json.loads(text)
    assert 0 <= scores["agreement"] <= 100 and scores["scores"][str(out)]["examples"] == 40


def test_a_student_is_distilled_and_packed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = [*task(world), "--bits", "3", "--steps", "2", "--batch-size", "4", "--rows", "16", "--json"]
    code, text, err = run(capsys, "distill", world / "model", out, *asked)
    assert code == 0, err
    content = json.loads(text)
    assert not Path(f"{out}.partial").exists() and content["file_mb"] > 0 and content["divergence"] >= 0
    assert folder_content(out)["form"] == "packed"
    _, text, _ = run(capsys, "evaluate", out, *task(world), "--beside", world / "model", "--json")
    assert json.loads(text)["scores"][str(out)]["accuracy"] == content["score"]


@pytest.fixture(scope="module")
def sentences(world: Path) -> Path:
    """The world with a SentenceTransformer whose vector is the first token's state, and pairs with a number."""
    texts = [row["sentence"] for row in sentiment_rows(40)]
    rows = [{"sentence1": texts[i], "sentence2": texts[-1 - i], "label": float(i % 6)} for i in range(24)]
    write_task(world / "data", "stsb", {"train.jsonl": rows, "dev.jsonl": rows[:12]})
    SentenceRegression(AutoModel.from_pretrained(world / "encoder"), 5.0, "cls").save_pretrained(world / "vectors")
    AutoTokenizer.from_pretrained(world / "encoder").save_pretrained(world / "vectors")
    return world


@pytest.mark.parametrize("command", ["quantize", "distill", "compress"])
def test_what_becomes_of_a_sentence_encoder_pools_as_it_did(
    sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    library = pytest.importorskip("sentence_transformers")
    Pipeline((Quantize(4, "nearest"), Distill("logits", steps=1), Pack())).save(tmp_path / "plan.json")
    pairs = ["--task", "stsb", "--data-dir", sentences / "data"]
    more = {
        "quantize": ["--bits", "4"],
        "distill": [*pairs, "--bits", "2", "--steps", "1", "--batch-size", "4"],
        "compress": [*pairs, "--plan", tmp_path / "plan.json"],
    }[command]
    code, _, err = run(capsys, command, sentences / "vectors", tmp_path / "out", *more)
    assert code == 0, err
    task = load_task("stsb", data_dir=sentences / "data")
    model, tokenizer = build_for(task, str(tmp_path / "out"))
    found = evaluate(model, task, tokenizer, progress=False).logits
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    rows = task.rows("validation")
    a, b = (theirs.encode([r[k] for r in rows], normalize_embeddings=True) for k in ("sentence1", "sentence2"))
    np.testing.assert_allclose(found.numpy(), (a * b).sum(1), atol=1e-5)


@pytest.mark.parametrize(("model", "tokens"), [("encoder", 2), ("vectors", 2), ("regression", 3), ("pairs", 2)])
def test_pairs_are_calibrated_on_as_the_model_reads_them(sentences: Path, model: str, tokens: int) -> None:
    task = load_task("stsb", data_dir=sentences / "data")
    loaded = {
        "encoder": lambda: AutoModel.from_pretrained(sentences / "encoder"),
        "vectors": lambda: load_any(str(sentences / "vectors")),
        "regression": lambda: build_model(task, sentences / "encoder")[0],
        "pairs": lambda: build_for(task, str(sentences / "vectors"))[0],
    }[model]()
    tokenizer = AutoTokenizer.from_pretrained(sentences / "encoder")
    asked = {"texts": None, "task": "stsb", "data_dir": sentences / "data", "rows": 8, "seed": 0}
    (batch,) = unlabelled_batches(asked, tokenizer, loaded) or []
    shape = batch["input_ids"].shape[:-1]
    assert shape == {"regression": (8,), "pairs": (8, 2)}.get(model, (16,))
    ends = (batch["input_ids"] == tokenizer.sep_token_id).sum(-1).unique().tolist()
    assert ends == [tokens - 1]


def test_a_name_on_the_hub_is_scored_as_a_folder_is(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_folder(plain: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            return plain(*(sentences / "vectors" if a == "some/encoder" else a for a in arguments), **named)

        return call

    monkeypatch.setattr("qbert.tasks.heads.load_quietly", from_folder(heads.load_quietly))
    monkeypatch.setattr("qbert.tasks.pooling.cached_file", from_folder(pooling.cached_file))
    model, _ = build_for(load_task("stsb", data_dir=sentences / "data"), "some/encoder")
    assert model.pooling.kind == "cls"


def test_teacher_and_student_read_pairs_alike(
    sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task("stsb", data_dir=sentences / "data")
    student, tokenizer = build_model(task, sentences / "encoder")
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    asked = ["--task", "stsb", "--data-dir", sentences / "data", "--student", tmp_path / "student", "--steps", "1"]
    code, _, err = run(capsys, "distill", sentences / "encoder", tmp_path / "out", *asked)
    assert code == 2 and "give a student of the teacher's kind" in err


def test_a_float_student_learns_from_its_teacher_and_goes_on_where_it_was_interrupted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = [*task(world), "--student", world / "model", "--recipe", "logits", "--steps", "2", "--batch-size", "4"]

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on the device")

    with monkeypatch.context() as patched:
        patched.setattr("qbert.pipeline.steps.Distill.apply", full)
        code, _, err = run(capsys, "distill", world / "model", out, *asked)
    assert code == 2 and "no space left" in err
    code, _, err = run(capsys, "distill", world / "model", out, *asked, "--seed", "5")
    assert code == 2 and "is of an interrupted run with another seed" in err
    code, text, err = run(capsys, "distill", world / "model", out, *asked)
    assert code == 0, err
    assert "the teacher's" in text and AutoModelForSequenceClassification.from_pretrained(out) is not None


def test_a_slash_after_out_changes_nothing_for_what_is_kept(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked = [*task(world), "--bits", "4", "--steps", "1", "--batch-size", "4", "--rounding", "nearest"]
    with monkeypatch.context() as patched:
        patched.setattr("qbert.pipeline.steps.Distill.apply", interrupted)
        assert run(capsys, "distill", world / "model", f"{tmp_path}/out/", *asked)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    code, _, err = run(capsys, "distill", world / "model", f"{tmp_path}/out/", *asked)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("given", "name"), [("a/out", "out.x"), ("a/out/", "out.x"), ("a/b/..", "a.x")])
def test_what_lies_beside_a_result_bears_its_name(given: str, name: str) -> None:
    assert beside(given, ".x").name == name
    assert beside(".", ".x") == Path.cwd().with_name(Path.cwd().name + ".x")
    with pytest.raises(ValueError, match="no place to write a result to"):
        beside("/", ".x")


def test_a_plan_is_made_saved_and_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 0.4 * qbert.model_size(AutoModelForSequenceClassification.from_pretrained(world / "model")).mb
    saved = tmp_path / "plan.json"
    asked = ["--size-mb", size, "--texts", world / "long.txt", "--save", saved, "--plot", tmp_path / "front.png"]
    part, kept = Planner.part, tmp_path / "plan.json.partial"

    def interrupted(planner: Planner, steps: Any) -> Any:
        if steps:
            raise KeyboardInterrupt
        return part(planner, steps)

    with monkeypatch.context() as patched:
        patched.setattr(Planner, "part", interrupted)
        code, _, err = run(capsys, "plan", world / "model", *asked)
    assert code == 130 and f"goes on from what {kept} holds" in err
    code, _, err = run(capsys, "plan", world / "model", *asked, "--rows", "100")
    assert code == 2 and f"{kept} is of an interrupted run with another rows; remove it, or name another --save" in err
    measured = len(read_json(kept / "measured.json")["rows"])
    with monkeypatch.context() as patched:
        patched.setattr(Planner, "_usual", None)  # which is not asked again
        code, out, err = run(capsys, "plan", world / "model", *asked)
    assert code == 0, err
    assert measured >= 3 and not kept.exists()
    assert "bits alone" in out and (tmp_path / "front.png").is_file()
    tried = read_json(tmp_path / "plan.record.json")
    assert [row["chosen"] for row in tried["rows"]].count("*") == 1 and tried["curves"]["lines"]
    code, out, err = run(capsys, "compress", world / "model", tmp_path / "out", *task(world), "--plan", saved, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert content["steps"][-1]["megabytes"] <= size and content["steps"][0]["step"] == "float"
    kept = read_json(tmp_path / "out" / COMMAND_FILE)["rows"]
    assert [row["MB"] for row in kept] == [step["megabytes"] for step in content["steps"]]
    assert qbert.load(content["folder"]) is not None


def test_a_plan_is_run_into_out_itself_and_goes_on_after_an_interrupt(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    Pipeline((Prune(heads=0.5, rows=32), Quantize(4, "nearest"), Pack())).save(plan)
    asked = ["compress", world / "model", out, *task(world), "--plan", plan, "--eval-limit", "16", "--json"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Pack, "apply", interrupted)
        assert run(capsys, *asked)[0] == 130
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr(Prune, "apply", interrupted)  # which is not asked again
        code, text, err = run(capsys, *asked)
    assert code == 0, err
    assert len(json.loads(text)["steps"]) == 4 and not (tmp_path / "out.partial").exists()
    assert run(capsys, "inspect", out)[0] == 0
    assert AutoTokenizer.from_pretrained(out)("kind")["input_ids"]
    code, _, err = run(capsys, *asked)
    assert code == 2 and "is not empty" in err


def test_commands_leave_what_report_shows(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    few = ["--eval-limit", "8", "--steps", "2", "--batch-size", "4", "--bits", "8", "--rounding", "nearest"]
    assert run(capsys, "quantize", world / "model", tmp_path / "q", "--bits", "4")[0] == 0
    assert run(capsys, "distill", world / "model", tmp_path / "d", *task(world), *few)[0] == 0
    scores = ["--limit", "8", "--beside", world / "model", "--save", tmp_path / "scores.json"]
    assert run(capsys, "evaluate", tmp_path / "q", *task(world), *scores)[0] == 0
    code, text, err = run(capsys, "report", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(text)["shown"] == [f"d/{COMMAND_FILE}", f"q/{COMMAND_FILE}", "scores.json"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"qbert quantize {world / 'model'} {tmp_path / 'q'} --bits 4` - " in page
    assert "qbert evaluate: scores.json" in page
    distilled, scored = read_json(tmp_path / "d" / COMMAND_FILE), read_json(tmp_path / "scores.json")
    assert [step for step, _ in distilled["curves"]["lines"]["loss"]] == [1, 2]
    assert distilled["metric"] in distilled["rows"][1] and distilled["settings"]["steps"] == 2
    assert [row["model"] for row in scored["rows"]] == [str(tmp_path / "q"), str(world / "model")]
    assert "agreement" in scored["rows"][0]


def test_a_fused_model_is_compared_with_itself_as_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(packed: Any) -> Any:
        with torch.no_grad():
            packed.classifier.bias[0] += 100.0  # so that nothing else can give its answers
        return packed

    monkeypatch.chdir(tmp_path)
    assert run(capsys, "quantize", world / "model", "out", "--bits", "8")[0] == 0
    monkeypatch.setattr(qbert, "optimize_for_inference", changed, raising=False)
    asked = ["evaluate", "out", *task(world), "--beside", "out", "--optimize", "--save", "scores.json", "--json"]
    code, text, err = run(capsys, *asked)
    assert code == 0, err
    said = json.loads(text)
    assert list(said["scores"]) == ["out, fused", "out"] and said["divergence"] > 1
    assert [row["model"] for row in read_json("scores.json")["rows"]] == ["out, fused", "out"]
    code, text, _ = run(capsys, "evaluate", "out", *task(world), "--beside", "out", "--json")
    assert list(json.loads(text)["scores"]) == ["out", "out (beside)"]


def test_inspect_counts_what_the_files_hold(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "quantize", world / "model", tmp_path, "--bits", "4")
    content = folder_content(tmp_path)
    packed = qbert.load(tmp_path)
    size = qbert.model_size(packed)
    quantized = [t for t in size.tensors if t.bits < 16]
    assert sum(grid["values"] for grid in content["grids"].values()) == sum(t.elements for t in quantized)
    assert sum(grid["bytes"] for grid in content["grids"].values()) + content["float"]["bytes"] == size.total
    assert sum(grid["tensors"] for grid in content["grids"].values()) == len(quantized)
    code, out, _ = run(capsys, "inspect", tmp_path, "--tensors")
    assert code == 0 and "encoder.layer.1.output.dense.codes" in out


@pytest.mark.parametrize(("given", "found"), [(True, "static"), (False, "asymmetric")])
def test_inspect_tells_ranges_that_texts_fixed_from_those_of_a_token(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool, found: str
) -> None:
    texts = ["--texts", world / "texts.txt"] if given else []
    assert run(capsys, "quantize", world / "model", tmp_path / "out", *texts)[0] == 0
    header, _, *lines = run(capsys, "inspect", tmp_path / "out")[1].splitlines()[2:]
    ends = [header.index(name) + len(name) for name in ("activations", "range")]
    cells = {line[ends[0] : ends[1]].strip() for line in lines}
    assert cells == {"", found}


def test_inspect_reads_a_trainable_model(world: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world / "model").eval()
    qbert.quantize_model(model, 2).save_pretrained(tmp_path)
    content = folder_content(tmp_path)
    assert content["form"] == "trainable"
    assert sum(grid["values"] for grid in content["grids"].values()) == sum(
        t.elements for t in qbert.model_size(qbert.load(tmp_path)).tensors if t.bits < 16
    )


def test_inspect_notices_altered_files(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "quantize", world / "model", tmp_path, "--bits", "4")
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "not those that were saved" in err


def test_export_writes_a_file_that_runs(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    run(capsys, "quantize", world / "model", tmp_path / "out", "--bits", "4")
    code, out, err = run(capsys, "export", tmp_path / "out", tmp_path / "model.onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == (tmp_path / "model.onnx").stat().st_size
    ids = np.array([[2, 5, 6, 3]], dtype=np.int64)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    wanted = qbert.load(tmp_path / "out").eval()(input_ids=torch.from_numpy(ids)).logits
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-2)


def test_export_to_openvino_says_how_near_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    run(capsys, "quantize", world / "model", tmp_path / "out", "--bits", "4")
    code, out, err = run(capsys, "export", tmp_path / "out", tmp_path / "model.xml", "--to", "openvino", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["bytes"] == sum((tmp_path / f"model.{suffix}").stat().st_size for suffix in ("xml", "bin"))
    assert 0 <= said["error"] < 0.25 and 0 <= said["error_by_default"] < 0.25


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantize", "WORLD/model", "WORLD/data"], "OUT .* is not empty; name another folder, or add --force"),
        (["compress", "WORLD/model", "WORLD/data", "--task", "x", "--plan", "WORLD/texts.txt"], "OUT .* is not empty"),
        (
            ["quantize", "WORLD/model", "WORLD/texts.txt/out"],
            r"OUT .*/out cannot be there, since .*texts\.txt is a file",
        ),
        (["report", "WORLD", "--out", "WORLD/texts.txt/a.html"], r"--out .* cannot be there, since .*texts\.txt is a"),
        (["quantize", "WORLD/data", "NEW"], "is a folder without config.json"),
        (["quantize", "WORLD/model", "NEW", "--rounding", "compensated"], "--rounding compensated needs data"),
        (
            ["quantize", "WORLD/model", "NEW", "--texts", "WORLD/texts.txt", "--task", "sst2"],
            "--texts and --task both name calibration data",
        ),
        (["quantize", "WORLD/model", "NEW", "--bits", "5"], "'5' is not one of '2', '3', '4', '8'"),
        (["quantize", "WORLD/model", "NEW", "--device", "nowhere"], "--device nowhere is not usable here"),
        (["quantize", "WORLD/parts", "NEW"], "modules.json of .*parts.* names no parts of a SentenceTransformer"),
        (["inspect", "WORLD/model"], "holds no quantized model; make one with: qbert quantize"),
        (["export", "WORLD/model", "out.bin"], "let it end in .onnx or .xml"),
        (["export", "WORLD/model", "out.onnx", "--to", "openvino"], "no name for --to openvino; let it end in .xml"),
        (["evaluate", "WORLD/encoder", "--task", "sst2", "--data-dir", "WORLD/data"], "no head tuned for task"),
        (["evaluate", "WORLD/model", "--task", "nothing"], "unknown task 'nothing'"),
        (["allocate", "WORLD/model/config.json"], "config.json"),
        (["plan", "WORLD/model", "--size-mb", "1"], "give --texts FILE or --task NAME"),
        (["plan", "WORLD/model", "--shape", "8", "--texts", "WORLD/long.txt"], "--shape 8 is no shape"),
        (["plan", "WORLD/model", "--texts", "WORLD/long.txt"], "a plan needs a budget"),
        (["plan", "WORLD/model", "--size-mb", "1", "--texts", "WORLD/long.txt", "--plot", "x.gif"], "end it in .png"),
        (["plan", "WORLD/model", "--size-mb", "1", "--texts", "WORLD/long.txt", "--save", "NEW/a/b.json"], "no folder"),
        (["evaluate", "WORLD/model", "--task", "sst2", "--data-dir", "WORLD/data", "--optimize"], "is no packed model"),
        (["export", "WORLD/model", "out.onnx"], "FOLDER .* is no packed model; make one: qbert quantize"),
        (["compress", "WORLD/model", "NEW", "--task", "sst2", "--plan", "WORLD/model/config.json"], "--plan .*config"),
        (
            ["compress", "WORLD/model", "NEW", "--task", "sst2", "--plan", "WORLD/list.json"],
            "--plan .*list.json: the val",
        ),
        (["distill", "WORLD/model", "NEW", "--task", "sst2"], "there is no student; give --bits 2"),
        (
            ["distill", "WORLD/model", "NEW", "--task", "sst2", "--bits", "2", "--recipe", "x"],
            "recipe='x' is not known",
        ),
        (
            ["distill", "WORLD/model", "NEW", "--task", "sst2", "--student", "x", "--rounding", "nearest"],
            "--rounding is for a student in few bits",
        ),
        (
            ["spectrum", "WORLD/model", "--task", "sst2", "--plot", "x.bmpx"],
            "--plot x.bmpx is no kind of picture that can be drawn; end it in .png",
        ),
        (["spectrum", "WORLD/model", "--task", "sst2", "--save", "NEW/a/b.json"], "--save .* is in no folder"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    new = str(tmp_path / "new")
    code, _, err = run(capsys, *(a.replace("WORLD", str(world)).replace("NEW", new) for a in arguments))
    assert code == 2
    assert re.search(sentence, err), err
    assert not Path(new).exists()


@pytest.mark.parametrize(
    ("command", "given", "sentence", "said"),
    [
        ("allocate", [], "model: a budget needs the float model; pass model=...", "--model: .*; add --model MODEL"),
        ("spectrum", [], "tol: 2.0 is not a relative tolerance", "error: --tol: 2.0 is"),
        ("spectrum", [], "checkpoint: a/b belongs to 3 runs; ask for as many, leave out resume, or give another folder",
         "error: a/b belongs to 3 runs; ask for as many, add --anew, or name another --save"),
        ("plan", ["--size-mb", "3"], "size_mb=3 is too small", "--size-mb=3 is too small"),
        ("plan", [], "within and size_mb contradict", "within and --size-mb contradict"),
        ("compress", [], "--resume: a/p.json was made with another model; remove the file, or leave --resume out",
         "error: a/p.json was made with another model; remove its folder, or name another OUT"),
        ("quantize", ["--groups", "5"], "a.b: groups=5 does not divide", "a.b: --groups=5 does not divide"),
        ("quantize", [], "a.b: groups=5 does not divide", "a.b: groups=5 does not divide"),
        ("quantize", [], "bits_config: x.json is wrong: bits=5", "error: --config: x.json is wrong: bits=5"),
        ("quantize", [], "calibration_data: it is empty", "--texts or --task: it is empty"),
    ],
)  # fmt: skip
def test_refusals_of_the_library_name_options(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, given: list[str],
    sentence: str, said: str
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(sentence)

    for place in ("quantize", "plan", "compress", "spectrum"):
        monkeypatch.setattr(f"qbert.cli.{place}.set_machine", refuse)
    monkeypatch.setattr("qbert.hessian.spectrum.HessianSpectrum.load", lambda _: None)
    monkeypatch.setattr(qbert, "allocate_bits", refuse, raising=False)
    needed = {
        "allocate": [world / "texts.txt"],
        "spectrum": [world / "model", "--task", "sst2"],
        "plan": [world / "model"],
        "compress": [world / "model", world / "new", "--task", "sst2", "--plan", world / "texts.txt"],
        "quantize": [world / "model", world / "new"],
    }[command]
    code, _, err = run(capsys, command, *needed, *given)
    assert code == 2 and re.search(said, err), err


@pytest.mark.parametrize(("given", "rows"), [([], 6), (["--fraction", "0.5"], 32)])
def test_a_spectrum_says_on_how_many_rows_and_about_how_long(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], rows: int
) -> None:
    def interrupted(*_: object, **asked: object) -> None:
        assert round(float(str(asked["fraction"])) * 64) == rows
        raise KeyboardInterrupt

    monkeypatch.setattr(qbert, "hessian_spectrum", interrupted, raising=False)
    code, _, err = run(capsys, "spectrum", world / "model", *task(world), *given)
    assert code == 130
    assert re.search(rf"10 subsets of {rows} of 64 training rows: about \d+ (s|minutes)", err), err


def test_a_subset_of_a_large_task_has_32_rows_unless_told_otherwise(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qbert, "hessian_spectrum", interrupted, raising=False)
    rows = sentiment_rows(640)
    write_task(tmp_path, "sst2", {"train.jsonl.gz": rows, "dev.jsonl.gz": rows[:4]})
    asked = ["spectrum", world / "model", "--task", "sst2", "--data-dir", tmp_path]
    code, _, err = run(capsys, *asked)
    assert code == 130 and "10 subsets of 32 of 640" in err
    assert "nothing is kept without --save" in err
    _, _, err = run(capsys, *asked, "--save", tmp_path / "s.json")
    assert "it goes on from what" in err and "s.json.partial holds" in err


@pytest.mark.parametrize("command", ["spectrum", "plan"])
def test_a_picture_is_refused_before_any_work_where_nothing_can_draw_it(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("qbert.extras.is_installed", lambda package: package != "matplotlib")
    budget = ["--size-mb", "1"] if command == "plan" else []
    code, _, err = run(capsys, command, world / "nothing", "--task", "nothing", "--plot", "x.png", *budget)
    assert code == 2 and "--plot needs the package matplotlib" in err


def test_texts_of_another_encoding_are_refused_by_name(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "latin.txt"
    texts.write_bytes("the f\xeflm was kind\n".encode("latin-1"))
    code, _, err = run(capsys, "quantize", world / "model", tmp_path / "out", "--texts", texts)
    assert code == 2 and re.search(r"--texts .*latin\.txt is not UTF-8 .*; convert it, such as: iconv", err), err
    texts.write_text("the film was kind", encoding="utf-8-sig")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    (batch,) = text_batches(str(texts), tokenizer, 4)
    assert tokenizer.unk_token_id not in batch["input_ids"]


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_tokenizer_that_cannot_pad_is_mended_in_its_file(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    kept = tmp_path / "model" / "tokenizer_config.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "pad_token": None}))
    more = ["--limit", "4"] if command == "evaluate" else [tmp_path / "out", "--rows", "4", "--rounding", "nearest"]
    code, _, err = run(capsys, command, tmp_path / "model", *more, *task(world))
    found = re.search(r"has no padding token; name one of its tokens in its tokenizer_config.json: ({?\S+: \S+)", err)
    assert code == 2 and found, err
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **json.loads("{" + found.group(1) + "}")}))
    code, _, err = run(capsys, command, tmp_path / "model", *more, *task(world))
    assert code == 0, err


def test_few_rows_are_planned_on_in_four_batches() -> None:
    rows = torch.arange(10).view(10, 1)
    found = in_fours([{"input_ids": rows[:7]}, {"input_ids": rows[7:]}])
    assert len(found) >= 4 and torch.equal(torch.cat([batch["input_ids"] for batch in found]), rows)
    with pytest.raises(ValueError, match="there are 3 rows to plan on; give at least 4"):
        in_fours([{"input_ids": rows[:3]}])


@pytest.mark.parametrize("name", sorted(app.commands))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "Usage: qbert " + name in out and len(out.splitlines()) > 6


def test_an_interrupt_leaves_with_130(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qbert, "quantize_model", interrupted, raising=False)
    code, _, err = run(capsys, "quantize", world / "model", tmp_path / "out")
    assert code == 130 and "interrupted" in err
