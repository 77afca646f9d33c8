"""Models in training on disk: whoever saves and whoever loads, the same trainable model with its grids comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import build, inputs_for, outputs, same_state
from safetensors.torch import save_file
from torch import nn

import qbert
from qbert.layers.layout import layout_of
from qbert.layers.linear import QuantLinear
from qbert.saving.folder import digest
from qbert.saving.records import record_layouts
from qbert.saving.trainable import GRIDS, RECORD, save_trainable


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
    again, report = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert same_state(again, student) and torch.equal(outputs(again, batch), outputs(loaded, batch))


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    student = qbert.quantize_model(tf.AutoModelForMaskedLM.from_config(build("bert").config), 4).eval()
    save_trainable(student, tmp_path)
    loaded = qbert.load(tmp_path)
    head, table = loaded.cls.predictions.decoder, loaded.bert.embeddings.word_embeddings
    assert head.weight is table.weight and head.weight_quantizer is table.weight_quantizer
    assert same_state(loaded, student)
    loaded.train()(**inputs_for("bert"), labels=torch.full((2, 9), 7)).loss.backward()
    assert table.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_comes_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    config = qbert.BitsConfig(3, activation_range="static")
    student = qbert.quantize_model(build("bert"), config, calibration_data=[inputs_for("bert")]).to(dtype).eval()
    student.save_pretrained(tmp_path)
    assert same_state(qbert.load(tmp_path), student)


def test_what_has_no_grids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize_model first"):
        save_trainable(build("bert"), tmp_path)
    with pytest.raises(TypeError, match="not a transformers model"):
        save_trainable(nn.Linear(2, 2), tmp_path)


def test_damage_is_refused(tmp_path: Path) -> None:
    save_trainable(qbert.quantize_model(build("bert"), 4), tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-9] ^= 4
    (tmp_path / "model.safetensors").write_bytes(content)
    for load in (qbert.load, tf.AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match="not those that were saved"):
            load(tmp_path)


def older_folder(student: Any, folder: Path) -> None:
    """What `save_trainable` wrote before there was a trainable form of ``quantization_config``."""
    layers = {n.removeprefix("bert."): m for n, m in student.named_modules() if hasattr(m, "weight_quantizer")}
    float_state = {k: v for k, v in student.state_dict().items() if "_quantizer." not in k}
    type(student)(student.config).save_pretrained(folder, state_dict=float_state)
    grids = {f"{n}.{k}": getattr(m.weight_quantizer, k).detach() for n, m in layers.items() for k in ("scale", "zero")}
    save_file({k: v.clone() for k, v in grids.items()}, folder / GRIDS)
    specs, tensors = record_layouts("bert", {f"bert.{n}": layout_of(m) for n, m in layers.items()})
    record = {"format_version": 1, "specs": specs, "tensors": tensors}
    record["sha256"] = digest([folder / "model.safetensors", folder / GRIDS], record)
    (folder / RECORD).write_text(json.dumps(record))


def test_an_older_folder_is_read(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), {"encoder.layer.0": 2, "*": 4}).eval()
    older_folder(student, tmp_path)
    assert same_state(qbert.load(tmp_path), student)
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "format_version": 9}))
    with pytest.raises(ValueError, match="not of format 1"):
        qbert.load(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        qbert.load(tmp_path)


def test_a_folder_that_lost_its_bits_is_told_apart(tmp_path: Path) -> None:
    model = build("bert")
    state = dict(qbert.quantize_model(model, 4).state_dict())
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="weights and grids of a fake-quantized model, but not its bits"):
        qbert.load(tmp_path)


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": [5 + i] * 6, "labels": i % 2} for i in range(16)]


def trainer(student: Any, folder: Path, **arguments: Any) -> tf.Trainer:
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, **arguments}
    return tf.Trainer(student, tf.TrainingArguments(str(folder), max_steps=4, **settings), train_dataset=rows())


def learner(seed: int) -> Any:
    torch.manual_seed(seed)
    student = qbert.quantize_model(build("bert"), {"encoder.layer.0": 2, "*": 4})
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.weight_quantizer.learn()
    return student


def test_what_a_trainer_saves_comes_back_and_goes_on(tmp_path: Path) -> None:
    run = trainer(learner(0), tmp_path / "run", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-4"):
        for load in (qbert.load, tf.AutoModelForSequenceClassification.from_pretrained):
            loaded = load(folder)
            assert (
                same_state(loaded, run.model) and loaded.bert.encoder.layer[0].output.dense.weight_quantizer.bits == 2
            )
    trainer(loaded, tmp_path / "next").train()
    assert not same_state(loaded, run.model)


def test_a_trainer_resumes_its_checkpoint_exactly(tmp_path: Path) -> None:
    whole, resumed = learner(0), learner(1)
    trainer(whole, tmp_path, save_steps=2).train()
    trainer(resumed, tmp_path, save_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(whole, resumed)


def test_an_encoder_and_a_new_head_are_saved_with_their_grids(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), 4).eval()
    student.bert.save_pretrained(tmp_path / "encoder")
    assert same_state(tf.AutoModel.from_pretrained(tmp_path / "encoder"), student.bert)
    other = build("bert").eval()
    other.bert = student.bert
    other.save_pretrained(tmp_path / "headed")
    assert same_state(qbert.load(tmp_path / "headed"), other)


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
    "change",
    [{"architectures": None}, {"num_hidden_layers": 3}, {"num_attention_heads": 6}, {"layer_norm_eps": 0.5}, {"x": 1}],
)
def test_a_changed_configuration_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), 4)
    config = tmp_path / "config.json"
    for save in (lambda: save_trainable(student, tmp_path), lambda: qbert.pack(student).save_pretrained(tmp_path)):
        save()
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        for load in (qbert.load, tf.BertForSequenceClassification.from_pretrained):
            with pytest.raises(ValueError, match=r"config\.json is damaged or was altered"):
                load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": None}, "does not fit AutoModel"),
        ({"architectures": ["BertForNothing"]}, "no model class 'BertForNothing'"),
        ({"architectures": ["BertConfig"]}, "no model class 'BertConfig'"),
        ({"num_hidden_layers": 3}, "layer.2.* does not fit"),
        ({"num_hidden_layers": 1}, "layer.1.* does not fit|has no module 'encoder.layer.1"),
    ],
)
def test_a_changed_configuration_of_an_older_folder_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    older_folder(qbert.quantize_model(build("bert"), 4), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=match):
        qbert.load(tmp_path)
