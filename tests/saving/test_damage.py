"""Files that are not what was saved: refused with one sentence that names them, and never a wrong number."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qbert
from qbert.packing import pack
from qbert.saving.folder import digest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed classifier on disk."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = build("bert", hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=16)
    pack(qbert.quantize_model(model, 3)).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, torch.Tensor]:
    """The tensors of `saved`."""
    return dict(qbert.load(saved).state_dict())


def edit_record(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def load_both_ways(folder: Path, match: str) -> None:
    for load in (tf.AutoModelForSequenceClassification.from_pretrained, tf.AutoModel.from_pretrained, qbert.load):
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated(broken: Path, keep: float) -> None:
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    load_both_ways(broken, r"model\.safetensors is truncated")


def test_one_bit_flipped(broken: Path) -> None:
    file = broken / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    load_both_ways(broken, "broken: the tensors or the quantization_config are not those that were saved")


def reseal(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors under digests that fit them, as a hand or a foreign tool may write."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if "sha256" not in k}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    edit_record(folder, lambda record: record.update(sha256=digest([folder / "model.safetensors"], record)))


def test_a_sealed_file_with_broken_scales_is_refused(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    name = next(key for key in tensors if key.endswith("output.dense.scale"))
    tensors[name] = tensors[name] * float("nan")
    reseal(broken, tensors)
    load_both_ways(broken, r"output\.dense\.scale holds NaN or infinity")


def test_tensors_of_another_model(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    first, second = (f"bert.encoder.layer.0.attention.self.{n}.codes" for n in ("query", "key"))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    load_both_ways(broken, "sha256")


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 2), ("scheme", "midrise"), ("groups", 8), ("activation_bits", None)]
)
def test_a_changed_layout(broken: Path, field: str, value: Any) -> None:
    edit_record(broken, lambda record: record["specs"]["w3"].update({field: value}))
    load_both_ways(broken, "sha256|damaged|does not fit")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.update(format_version=3), "format_version=3 is not of format 1 or 2"),
        (lambda r: r.pop("format_version"), "format_version=None"),
        (lambda r: r.update(compression="zip"), "'compression' is not of format 1"),
        (lambda r: r.pop("tensors"), "'tensors'"),
        (lambda r: r.pop("sha256"), "sha256"),
        (lambda r: r["tensors"].update({"encoder.layer.7.output.dense": "w3"}), "sha256"),
        (lambda r: r["tensors"].update({"encoder.layer.0.output.dense": "w9"}), "sha256"),
    ],
)
def test_version_skew_and_a_damaged_record(broken: Path, change: Any, match: str) -> None:
    edit_record(broken, change)
    load_both_ways(broken, match)


def test_a_config_of_another_model(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 0
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is damaged or was altered"):
        tf.AutoModelForSequenceClassification.from_pretrained(broken)


@pytest.mark.parametrize("content", ["[1]", '{"quantization_config": [1]}', '{"quantization_config": "gptq"}'])
def test_a_configuration_that_is_none(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json does not hold|is not a packed model"):
        qbert.load(broken)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", r"index\.json is not valid JSON"),
        ("[1]", r"index\.json does not say which file"),
        ('{"weight_map": {"a": 1}}', r"index\.json does not say which file"),
        (None, r"index\.json names model-00002-of-.*, which is not there"),
    ],
)
def test_the_index_of_several_files(saved: Path, tmp_path: Path, content: str | None, match: str) -> None:
    model = qbert.load(saved)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert qbert.load(tmp_path).state_dict().keys() == model.state_dict().keys()
    if content is None:
        next(tmp_path.glob("model-00002-*")).unlink()
    else:
        (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        qbert.load(tmp_path)


def test_an_argument_that_does_not_fit_the_files_is_named(saved: Path) -> None:
    told = (
        r"tensor 'classifier.bias' has the shape \[2\] in the files, and \[5\] with num_labels=5; leave that argument"
    )
    with pytest.raises(ValueError, match=told):
        qbert.load(saved, num_labels=5)


def test_foreign_files(broken: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    build("bert").save_pretrained(plain)
    with pytest.raises(ValueError, match="plain is not a packed model"):
        qbert.load(plain)
    (broken / "model.safetensors").write_bytes(b"PK\x03\x04 not a tensor in sight")
    load_both_ways(broken, "not a safetensors file")
    (broken / "model.safetensors").unlink()
    torch.save({"codes": torch.zeros(3)}, broken / "pytorch_model.bin")  # never looked at
    with pytest.raises(OSError, match="broken"):
        qbert.load(broken)


def test_an_older_folder_with_pickled_weights_is_refused(broken: Path) -> None:
    edit_record(broken, lambda record: (record.pop("weights"), record.pop("config_sha256")))
    (broken / "model.safetensors").unlink()
    torch.save({"codes": torch.zeros(3)}, broken / "pytorch_model.bin")
    load_both_ways(broken, "safetensors only")


def test_a_float_checkpoint_is_not_quantized_on_the_fly(saved: Path, tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    config = qbert.load(saved).config.quantization_config
    with pytest.raises(ValueError, match="quantize_model"):
        tf.AutoModel.from_pretrained(tmp_path, quantization_config=config)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["weights", "record"]), st.sampled_from(["flip", "cut", "insert"]))
def test_fuzzed_files_are_refused_or_mean_the_same(
    saved: Path, broken: Path, expected: dict[str, torch.Tensor], seed: int, where: str, how: str
) -> None:
    chance = random.Random(seed)
    name = {"weights": "model.safetensors", "record": "config.json"}[where]
    content = bytearray((saved / name).read_bytes())
    low, high = 0, len(content)
    if where == "record":
        low, high = content.index(b'"quantization_config"'), content.index(b'"transformers_version"')
    elif chance.random() < 0.5:
        high = 8 + int.from_bytes(content[:8], "little")
    position = chance.randrange(low, high)
    if how == "flip":
        content[position] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[position : position + chance.randrange(1, 9)]
    else:
        content[position:position] = chance.randbytes(chance.randrange(1, 9))
    for other in ("model.safetensors", "config.json"):
        shutil.copy(saved / other, broken / other)
    (broken / name).write_bytes(content)
    try:
        loaded = qbert.load(broken).state_dict()
    except (ValueError, OSError):
        return
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(v, loaded[k]) and v.dtype == loaded[k].dtype for k, v in expected.items())
