"""Fine-tuning: it learns, repeats itself, is cached, resumes exactly, and refuses what cannot work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import qbert.tasks.training as training
from qbert.files import read_json
from qbert.tasks import Task, evaluate, fine_tune, load_task
from qbert.tasks.checkpoint import load_checkpoint, save_checkpoint
from qbert.tasks.training import TrainingSettings, cache_folder, default_settings, run_key, weights_id


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    rows = sentiment_rows(96)
    folder = write_task(tmp_path_factory.mktemp("data"), "sst2", {"train.jsonl": rows, "dev.jsonl": rows[:40]})
    return load_task("sst2", data_dir=folder)


def _tune(task: Task, encoder: Path, cache: Path, **settings: Any) -> training.FineTuned:
    values = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "progress": False} | settings
    return fine_tune(task, encoder, cache_dir=cache, **values)


def _same_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_tuned_model_has_learned_and_is_loaded_the_second_time(task: Task, encoder: Path, tmp_path: Path) -> None:
    first = _tune(task, encoder, tmp_path)
    assert first.scores["accuracy"] > 90
    assert not first.from_cache
    assert not first.model.training
    second = _tune(task, encoder, tmp_path)
    assert second.from_cache
    assert second.scores == first.scores
    assert second.seconds == pytest.approx(first.seconds, abs=0.1)
    assert _same_weights(first.model, second.model)
    assert evaluate(second.model, task, second.tokenizer, progress=False)["accuracy"] == first.scores["accuracy"]
    plain = AutoModelForSequenceClassification.from_pretrained(first.path)
    assert _same_weights(first.model, plain)
    record = json.loads((first.path / "training.json").read_text())
    assert record["settings"]["learning_rate"] == 3e-3
    assert "sst2" in record["task"]
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


def test_same_seed_same_weights_and_no_trace_in_the_random_state(task: Task, encoder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one = _tune(task, encoder, tmp_path / "a", epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(7)
    two = _tune(task, encoder, tmp_path / "b", epochs=1, progress=True)
    assert _same_weights(one.model, two.model)
    assert not _same_weights(one.model, _tune(task, encoder, tmp_path / "c", epochs=1, seed=1).model)


def test_key_changes_with_whatever_the_result_depends_on(task: Task, encoder: Path, tmp_path: Path) -> None:
    settings = TrainingSettings()
    cpu = torch.device("cpu")
    key = training._key(task, str(encoder), settings, cpu)
    assert key == training._key(task, str(encoder), TrainingSettings(), cpu)
    assert key != training._key(task, str(encoder), TrainingSettings(seed=1), cpu)
    assert key != training._key(task.subset(train=50), str(encoder), settings, cpu)
    assert key != training._key(task.subset(validation=10), str(encoder), settings, cpu)
    other = Path(shutil.copytree(encoder, tmp_path / "copy"))
    assert weights_id(other) == weights_id(encoder)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    assert key != training._key(task, str(other), settings, cpu)
    assert run_key({"a": 1, "b": 2}) == run_key({"b": 2, "a": 1})


@pytest.mark.parametrize("stop_at", [1, 14, 30])
def test_interrupted_run_ends_in_the_numbers_of_an_uninterrupted_one(
    stop_at: int, task: Task, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = _tune(task, encoder, tmp_path / "straight")
    original = training._steps

    def interrupted(*arguments: Any) -> Any:
        for item in original(*arguments):
            if item[0] == stop_at:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(training, "_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _tune(task, encoder, tmp_path / "broken")
    left = list((tmp_path / "broken").iterdir())
    assert [path.suffix for path in left] == [".safetensors"]  # one whole file, nothing half-written
    steps: list[int] = []

    def recorded(*arguments: Any) -> Any:
        for item in original(*arguments):
            steps.append(item[0])
            yield item

    monkeypatch.setattr(training, "_steps", recorded)
    resumed = _tune(task, encoder, tmp_path / "broken")
    assert steps == list(range(stop_at, 36))
    assert _same_weights(straight.model, resumed.model)
    assert resumed.scores == straight.scores
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [resumed.path.name]


def test_checkpoints_are_written_on_the_way_and_can_be_ignored(
    task: Task, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original = training._steps

    def killed(*arguments: Any) -> Any:
        for item in original(*arguments):
            if item[0] == 10:
                raise RuntimeError("power cut")
            yield item

    monkeypatch.setattr(training, "_steps", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        _tune(task, encoder, tmp_path)
    (part,) = tmp_path.iterdir()
    assert any(name.startswith("exp_avg_sq/") for name in load_file(part))
    monkeypatch.setattr(training, "_steps", original)
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"the checkpoint .* cannot be read .*delete it to start anew"):
        _tune(task, encoder, tmp_path)
    assert _tune(task, encoder, tmp_path, resume=False).scores["accuracy"] > 90


def test_loss_that_is_not_finite_stops_the_run(task: Task, encoder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(encoder, tmp_path / "broken"))
    from transformers import BertModel

    model: Any = BertModel.from_pretrained(broken)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match=r"the loss became nan at step 0 of 36 on 'sst2'"):
        _tune(task, broken, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_sentences_without_a_tag_are_left_out_of_training(encoder: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["Anna", "visited", "Rome"], "tags": ["B-PER", "O", "B-LOC"]}, {"tokens": [], "tags": []}] * 9
    tasks = [
        load_task("mine", data_dir=write_task(tmp_path / name, "mine", {"train.jsonl": kept, "dev.jsonl": rows[:2]}))
        for name, kept in (("all", rows), ("tagged", rows[::2]), ("none", rows[1::2] * 9))
    ]
    tuned = [_tune(task, encoder, tmp_path / "cache", batch_size=1) for task in tasks[:2]]
    assert _same_weights(tuned[0].model, tuned[1].model) and tuned[0].settings == tuned[1].settings
    with pytest.raises(ValueError, match="no word of the training rows of 'mine' has a tag"):
        _tune(tasks[2], encoder, tmp_path / "cache")


def test_damaged_cache_entry_is_refused(task: Task, encoder: Path, tmp_path: Path) -> None:
    entry = _tune(task, encoder, tmp_path, epochs=1).path
    weights = entry / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 64
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"damaged; delete the folder {entry} to train again"):
        _tune(task, encoder, tmp_path, epochs=1)
    (entry / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read .*delete the folder"):
        _tune(task, encoder, tmp_path, epochs=1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "training.json"])
def test_any_damaged_file_of_a_cache_entry_is_refused(name: str, task: Task, encoder: Path, tmp_path: Path) -> None:
    entry = _tune(task, encoder, tmp_path, epochs=1).path
    content = bytearray((entry / name).read_bytes())
    digit = next(i for i, byte in enumerate(content) if chr(byte) in "123456789")
    content[digit] ^= 1
    (entry / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*delete the folder {entry} to train again"):
        _tune(task, encoder, tmp_path, epochs=1)


def test_a_cache_entry_of_an_earlier_version_is_read(task: Task, encoder: Path, tmp_path: Path) -> None:
    entry = _tune(task, encoder, tmp_path, epochs=1).path
    record = read_json(entry / "training.json")
    record["sha256"] = record.pop("files")["model.safetensors"]
    (entry / "training.json").write_text(json.dumps(record))
    assert _tune(task, encoder, tmp_path, epochs=1).from_cache


def test_an_entry_that_another_process_has_finished_stays(task: Task, encoder: Path, tmp_path: Path) -> None:
    tuned = _tune(task, encoder, tmp_path, epochs=1)
    before = (tuned.path / "training.json").stat()
    training._save_entry(tuned.path, tuned.model, tuned.tokenizer, {"scores": {}, "seconds": 0.0})
    after = (tuned.path / "training.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (tuned.path / "model.safetensors").write_bytes(b"damaged")
    training._save_entry(tuned.path, tuned.model, tuned.tokenizer, {"scores": {}, "seconds": 0.0})
    assert read_json(tuned.path / "training.json")["seconds"] == 0.0
    assert [path.name for path in tuned.path.parent.iterdir()] == [tuned.path.name]


def test_a_flipped_bit_of_a_training_checkpoint_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "part.safetensors"
    save_checkpoint(path, model, optimizer, 7, 1.5)
    assert load_checkpoint(path, model, optimizer) == (7, 1.5)
    content = path.read_bytes()
    for place in range(8, len(content), 37):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"the checkpoint .*part\.safetensors cannot be read"):
            load_checkpoint(path, model, optimizer)


def test_cache_folder_that_cannot_be_written_is_named(
    task: Task, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PermissionError, match=r"cache folder .*file/cache' cannot be written .*set QBERT_CACHE"):
        fine_tune(task, encoder)
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("QBERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "qbert"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 2.5),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("train_limit", 0),
        ("seed", -1),
    ],
)
def test_impossible_settings_are_named(name: str, value: Any, task: Task, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not"):
        _tune(task, encoder, tmp_path, **{name: value})
    with pytest.raises(TypeError, match=r"'epoch' is no training setting; the settings are batch_size, bf16, clip"):
        _tune(task, encoder, tmp_path, epoch=3)


def test_default_rate_follows_the_width(task: Task) -> None:
    assert default_settings(task, 384).learning_rate > default_settings(task, 768).learning_rate
    assert default_settings(task, 768, learning_rate=1e-5, epochs=None) == TrainingSettings(learning_rate=1e-5)


def test_learning_rate_rises_and_falls_linearly() -> None:
    rates = [training._rate(step, 20, 0.25) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 20)])
    assert training._rate(0, 1, 0.1) == 1.0


def test_progress_names_loss_epoch_and_held_out_score(
    task: Task, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _tune(task, encoder, tmp_path, epochs=2, progress=True)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "fine-tuning sst2" in text
    assert "loss=" in text
    assert "epoch 1/2: accuracy" in text
    assert "on 40 held-out rows" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_tuned_in_float32(
    dtype: torch.dtype, task: Task, encoder: Path, tmp_path: Path
) -> None:
    """Steps of a thousandth of a weight's last bit are lost in half precision, or become NaN."""
    AutoModel.from_pretrained(encoder).to(dtype).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "half")
    before = AutoModel.from_pretrained(tmp_path / "half").state_dict()
    tuned = _tune(task, tmp_path / "half", tmp_path / "cache", epochs=1, learning_rate=3e-5)
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert before[name].dtype == dtype
    assert float((tuned.model.base_model.state_dict()[name] != before[name].float()).float().mean()) > 0.95
    again = _tune(task, tmp_path / "half", tmp_path / "cache", epochs=1, learning_rate=3e-5)
    assert again.from_cache
    assert _same_weights(tuned.model, again.model)
