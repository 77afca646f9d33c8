"""The folder of a model: killed at any moment it holds the older or the newer one, and nothing of others is touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build

import qbert
from qbert.saving.folder import quantized_files

IDS = torch.arange(5, 25).view(2, 10)


def student(seed: int) -> Any:
    torch.manual_seed(seed)
    small = build("bert", hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=16)
    return qbert.quantize_model(small, 4).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def killed_at(step: int, save: Callable[[], None]) -> bool:
    """Run `save` in a process that dies before its `step`-th change of a name; whether it came that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return changed

        for name in ("replace", "link", "unlink", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        save()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a process in the middle")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda m, f: qbert.pack(m).save_pretrained(f), lambda m, f: qbert.pack(m).save_pretrained(f)),
        (lambda m, f: qbert.pack(m).save_pretrained(f, max_shard_size="2KB"), lambda m, f: m.save_pretrained(f)),
        (
            lambda m, f: m.save_pretrained(f),
            lambda m, f: qbert.pack(m).save_pretrained(f, max_shard_size="2KB"),
        ),
    ],
    ids=["packed-packed", "shards-trainable", "trainable-shards"],
)
def test_killed_at_any_step_the_older_or_the_newer_model_loads(before: Any, after: Any, tmp_path: Path) -> None:
    older, newer = student(0), student(1)
    before(older, tmp_path / "kept")
    known = [logits(older), logits(newer)]
    step, met = 1, set()
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "kept", folder)
        died = killed_at(step, lambda folder=folder: after(newer, folder))
        found = logits(qbert.load(folder))
        met.add(next(i for i, wanted in enumerate(known) if torch.allclose(found, wanted, atol=1e-6)))
        if died:
            after(newer, folder)
        assert {p.name for p in folder.iterdir()} == quantized_files(folder) | {"README.md", "config.json"}
        assert torch.allclose(logits(qbert.load(folder)), known[1], atol=1e-6)
        shutil.rmtree(folder)
        if not died:
            break
        step += 1
    assert met == {0, 1} and step > 5


def test_a_file_system_without_second_names_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for seed in range(3):
        model = student(seed)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(qbert.load(tmp_path)), logits(model)) and len(list(tmp_path.iterdir())) == 3 + (
            seed > 0 and (tmp_path / "model.safetensors").exists()
        )


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    mine = [
        "model_float_backup.safetensors",
        "model.fp32.safetensors",
        "model-teacher.safetensors",
        "pytorch_model.bin",
    ]
    mine += ["model-00001-of-00009.safetensors", "qbert_grids.safetensors", "notes.json"]
    for name in mine:
        (tmp_path / name).write_bytes(b"precious")
    model = student(0)
    for save in (model.save_pretrained, qbert.pack(model).save_pretrained):
        for options in ({}, {"max_shard_size": "2KB"}, {}):
            save(tmp_path, **options)
    assert all((tmp_path / name).read_bytes() == b"precious" for name in mine)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}, {"variant": "fp16"}])
@pytest.mark.parametrize("form", [lambda model: model, qbert.pack], ids=["trainable", "packed"])
def test_every_way_of_saving_is_found_again(form: Any, options: Any, tmp_path: Path) -> None:
    model = form(student(0))
    for _ in range(2):
        model.save_pretrained(tmp_path, **options)
    found = {k: v for k, v in options.items() if k == "variant"}
    for loaded in (qbert.load(tmp_path), tf.BertForSequenceClassification.from_pretrained(tmp_path, **found)):
        assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
        assert not hasattr(loaded.config, "transformers_weights")


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_who_may_read_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        qbert.pack(student(0)).save_pretrained(tmp_path / "whole")
        student(0).save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    qbert.pack(student(0)).save_pretrained(folder, max_shard_size="2KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    shutil.move(folder / first, tmp_path / first)
    index.write_text(index.read_text().replace(first, f"../{first}"))
    for load in (qbert.load, tf.AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match="outside"):
            load(folder)


def test_foreign_code_is_never_asked_for(tmp_path: Path) -> None:
    qbert.pack(student(0)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, "architectures": None}
    del config["quantization_config"]["config_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"trust_remote_code|sha256"):
        qbert.load(tmp_path)


def test_without_qbert_nothing_is_loaded(tmp_path: Path) -> None:
    forms = {"packed": qbert.pack(student(0)), "trainable": student(0)}
    for name, model in forms.items():
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-shards", max_shard_size="2KB")
    code = (
        "import sys, transformers as tf\n"
        "for folder in sys.argv[1:]:\n"
        "    for kind in (tf.AutoModel, tf.AutoModelForSequenceClassification, tf.BertForMaskedLM):\n"
        "        try: kind.from_pretrained(folder)\n"
        "        except OSError as error: assert 'import_qbert_before_loading_this_model' in str(error), error\n"
        "        else: raise SystemExit(f'{kind.__name__} loaded {folder}')\n"
        "assert 'qbert' not in sys.modules"
    )
    folders = [str(path) for path in tmp_path.iterdir()]
    assert len(folders) == 4
    subprocess.run([sys.executable, "-c", code, *folders], cwd=tmp_path, check=True, timeout=300)


def test_the_card_says_how_to_load_a_model_in_training(tmp_path: Path) -> None:
    student(0).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import qbert" in card and "trained for" in card and "| 4 |" in card


def test_what_earlier_versions_left_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".saving-ab12_xyz").mkdir()
    (tmp_path / ".saving-ab12_xyz" / "model.safetensors").write_bytes(b"half")
    student(0).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_distributed_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distributed_checkpoint: a quantized model is written whole"):
        student(0).save_pretrained(tmp_path, distributed_checkpoint=True)


def test_a_full_disk_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = student(0)
    older.save_pretrained(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
        student(1).save_pretrained(tmp_path)
    assert torch.equal(logits(qbert.load(tmp_path)), logits(older)) and len(list(tmp_path.iterdir())) == 3
