"""`save_trainable`: a float checkpoint that everybody can read, from which the same trainable model comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build, inputs_for
from torch import nn

import qbert
from qbert.layers.linear import QuantLinear
from qbert.saving.trainable import GRIDS, RECORD, save_trainable


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "vit"])
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_a_trained_model_comes_back(family: str, ranges: str, tmp_path: Path) -> None:
    model, batch = build(family).eval(), inputs_for(family)
    config = qbert.BitsConfig(3, activation_range=ranges)
    student = qbert.quantize_model(model, config, calibration_data=[batch]).eval()
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.weight.data += 0.01
            module.weight_quantizer.scale.data *= 1.1
            module.weight_quantizer.zero.data += 0.25
    save_trainable(student, tmp_path)
    loaded = qbert.load(tmp_path)
    assert type(loaded) is type(student) and same_state(loaded, student)
    assert (outputs(loaded, batch) - outputs(student, batch)).abs().max() <= 1e-6
    assert same_state(qbert.pack(loaded), qbert.pack(student))
    plain, report = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in plain.state_dict().items())


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    student = qbert.quantize_model(tf.AutoModelForMaskedLM.from_config(build("bert").config), 4).eval()
    save_trainable(student, tmp_path)
    loaded = qbert.load(tmp_path)
    head, table = loaded.cls.predictions.decoder, loaded.bert.embeddings.word_embeddings
    assert head.weight is table.weight and head.weight_quantizer is table.weight_quantizer
    assert same_state(loaded, student)
    loaded.train()(**inputs_for("bert"), labels=torch.full((2, 9), 7)).loss.backward()
    assert table.weight.grad is not None


def test_damage_and_wrong_models_are_refused(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), 4)
    with pytest.raises(ValueError, match="quantize_model first"):
        save_trainable(build("bert"), tmp_path)
    with pytest.raises(TypeError, match="not a transformers model"):
        save_trainable(nn.Linear(2, 2), tmp_path)
    save_trainable(student, tmp_path)
    for name in ("model.safetensors", GRIDS):
        content = bytearray((tmp_path / name).read_bytes())
        content[-9] ^= 4
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not those that were saved"):
            qbert.load(tmp_path)
        save_trainable(student, tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "format_version": 9}))
    with pytest.raises(ValueError, match="not of format 1"):
        qbert.load(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        qbert.load(tmp_path)


def test_a_folder_is_reused_for_the_other_form(tmp_path: Path) -> None:
    student, batch = qbert.quantize_model(build("bert"), 4).eval(), inputs_for("bert")
    packed = qbert.pack(student)
    save_trainable(student, tmp_path)
    packed.save_pretrained(tmp_path)
    assert same_state(qbert.load(tmp_path), packed)
    assert (outputs(qbert.load(tmp_path), batch) - outputs(packed, batch)).abs().max() <= 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    save_trainable(student, tmp_path)
    assert same_state(qbert.load(tmp_path), student)


def test_subfolders_are_read_and_files_are_not_folders(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), 4).eval()
    save_trainable(student, tmp_path / "inner")
    assert same_state(qbert.load(tmp_path, subfolder="inner"), student)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: .*file is a file"):
        save_trainable(student, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": None}, "does not fit AutoModel"),
        ({"architectures": ["BertForNothing"]}, "no model class 'BertForNothing'"),
        ({"architectures": ["BertConfig"]}, "no model class 'BertConfig'"),
        ({"num_hidden_layers": 3}, "layer.2.* does not fit"),
        ({"num_hidden_layers": 1}, "layer.1.* does not fit"),
    ],
)
def test_a_changed_configuration_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), 4)
    config = tmp_path / "config.json"
    for save in (lambda: save_trainable(student, tmp_path), lambda: qbert.pack(student).save_pretrained(tmp_path)):
        save()
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        with pytest.raises(ValueError, match=match.replace("fit", "fit|has no module 'encoder.layer.1")):
            qbert.load(tmp_path)
