"""`export_onnx`: ONNX Runtime computes what the packed model does, from weights in as few bits."""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import build, inputs_for
from tiny_tasks import tiny_encoder
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import qbert

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

CONFIGS = {
    "2": qbert.BitsConfig(2, activation_bits=None),
    "2 midrise": qbert.BitsConfig(2, scheme="midrise", activation_bits=None),
    "3 symmetric": qbert.BitsConfig(3, scheme="symmetric", activation_bits=None),
    "4, input groups of 16": qbert.BitsConfig(4, input_group_size=16, activation_bits=None),
    "4, input groups of 12": qbert.BitsConfig(4, input_group_size=12, activation_bits=None),
    "2 offset": qbert.BitsConfig(2, scheme="offset", activation_bits=None),
    "3 offset, input groups of 16": qbert.BitsConfig(3, scheme="offset", input_group_size=16, activation_bits=None),
    "8 offset": qbert.BitsConfig(8, scheme="offset", activation_bits=None),
    "8, tables 4": qbert.BitsConfig(8, embedding_bits=4, activation_bits=None),
}


def run(path: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])


def expected(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_onnx_runtime_gives_our_outputs(config: qbert.BitsConfig, tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), config))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    for shape in ((1, 4), (3, 11)):
        batch = inputs_for("bert", *shape)
        keep = batch["attention_mask"].bool()
        assert torch.allclose(run(tmp_path / "model.onnx", batch)[keep], expected(packed, batch)[keep], atol=2e-5)


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_activations_are_quantized_or_left_alone(ranges: str, tmp_path: Path) -> None:
    model, batch = build("bert").eval(), inputs_for("bert")
    config = qbert.BitsConfig(4, activation_range=ranges)
    packed = qbert.pack(qbert.quantize_model(model, config, calibration_data=[batch]))
    qbert.export_onnx(packed, tmp_path / "as_trained.onnx")
    assert torch.allclose(run(tmp_path / "as_trained.onnx", batch), expected(packed, batch), atol=1e-3)
    qbert.export_onnx(packed, tmp_path / "float.onnx", quantize_activations=False)
    plain = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    assert torch.allclose(run(tmp_path / "float.onnx", batch), expected(plain, batch), atol=2e-5)


def test_weights_are_stored_in_few_bits(tmp_path: Path) -> None:
    config = build("bert", hidden_size=128, intermediate_size=512, vocab_size=50).config
    model = AutoModel.from_config(config)
    sizes = {}
    for bits in (2, 4, 8):
        packed = qbert.pack(qbert.quantize_model(model, bits))
        qbert.export_onnx(packed, tmp_path / "model.onnx")
        sizes[bits] = (tmp_path / "model.onnx").stat().st_size
        kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert kinds.count("MatMulNBits") == (0 if bits == 8 else 12)
        assert kinds.count("DequantizeLinear") == (12 if bits == 8 else 0)
    weights = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    assert sizes[8] - sizes[4] > 0.8 * weights / 2 and sizes[4] - sizes[2] > 0.8 * weights / 4


def test_a_model_that_answers_questions_has_both_ends(tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_config(build("bert").config)
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["start_logits", "end_logits"]
    batch = inputs_for("bert", 3, 12)
    got = session.run(None, {k: v.numpy() for k, v in batch.items()})
    with torch.no_grad():
        wanted = packed(**batch)
    for values, name in zip(got, ("start_logits", "end_logits"), strict=True):
        assert torch.allclose(torch.from_numpy(values), wanted[name], atol=2e-5)


def test_axes_are_named_after_what_they_follow(tmp_path: Path) -> None:
    config = build("bert", num_labels=9).config
    for kind, wanted in ((AutoModelForSequenceClassification, ["batch", 9]), (AutoModel, ["batch", "length", 48])):
        packed = qbert.pack(qbert.quantize_model(kind.from_config(config), 4))
        qbert.export_onnx(packed, tmp_path / "model.onnx")
        session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        assert session.get_outputs()[0].shape == wanted


HEADS = {
    AutoModel: "last_hidden_state",
    AutoModelForSequenceClassification: "logits",
    AutoModelForTokenClassification: "logits",
    AutoModelForMaskedLM: "logits",
    AutoModelForPreTraining: "prediction_logits",
}


@pytest.mark.parametrize(("kind", "name"), HEADS.items(), ids=[kind.__name__ for kind in HEADS])
def test_outputs_keep_the_names_that_optimum_looks_for(kind: Any, name: str, tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(kind.from_config(build("bert").config).eval(), 4))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [name]
    assert [put.name for put in session.get_inputs()] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("more", ["normalized", "dense"])
def test_a_sentence_model_keeps_pooling_and_what_follows(more: str, tmp_path: Path) -> None:
    sentence = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    words = Transformer(str(tiny_encoder(tmp_path / "encoder")))
    rest = [Normalize()] if more == "normalized" else [Dense(32, 16), Normalize()]
    model = sentence.SentenceTransformer(modules=[words, Pooling(32, pooling_mode="mean"), *rest], device="cpu").eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["sentence_embedding", "token_embeddings"]
    texts = ["the film was superb .", "Anna visited Rome and the hotel was dull , a dull hotel .", "Paris"]
    tokens = packed.tokenizer(texts, padding=True, return_tensors="np")
    given = {put.name: tokens[put.name].astype("int64") for put in session.get_inputs()}
    got = torch.from_numpy(session.run(["sentence_embedding"], given)[0])
    assert torch.allclose(got, packed.encode(texts, convert_to_tensor=True), atol=1e-5)
    assert torch.allclose(got.norm(dim=1), torch.ones(3), atol=1e-5)


def test_a_cross_encoder_has_logits(tmp_path: Path) -> None:
    sentence = pytest.importorskip("sentence_transformers")
    model = sentence.CrossEncoder(str(tiny_encoder(tmp_path / "encoder")), num_labels=1, device="cpu").eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    qbert.export_onnx(packed, tmp_path / "model.onnx", inputs=("input_ids", "attention_mask", "token_type_ids"))
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]
    pairs = [("who visited Rome ?", "Anna visited Rome ."), ("the film", "it was a dull film , the film was awful .")]
    tokens = packed.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="np")
    got = session.run(None, {name: value.astype("int64") for name, value in tokens.items()})[0]
    with torch.no_grad():
        wanted = packed({name: torch.from_numpy(value) for name, value in tokens.items()})["scores"]
    assert torch.allclose(torch.from_numpy(got), wanted, atol=1e-5)


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("family", ["CLIPText", "SiglipText", "XCLIPText"])
def test_forwards_may_look_at_a_table(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL, max_position_embeddings=16)
    model = getattr(transformers, f"{family}Model")(config).eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    ids = torch.randint(3, 50, (3, 13))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(13) < torch.tensor([[13], [2], [7]])).long()}
    keep = batch["attention_mask"].bool()
    assert torch.allclose(run(tmp_path / "model.onnx", batch)[keep], expected(packed, batch)[keep], atol=2e-5)


LONG = {"Longformer": {"attention_window": 8}, "BigBird": {"block_size": 4, "num_random_blocks": 1}}


@pytest.mark.parametrize(("family", "settings"), LONG.items(), ids=LONG)
def test_steps_that_depend_on_the_length_are_refused(family: str, settings: Any, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL, max_position_embeddings=160, **settings)
    model = getattr(transformers, f"{family}Model")(config).eval()
    packed = qbert.pack(qbert.quantize_model(model, 8))
    before = copy.deepcopy(packed.config.to_dict())
    with pytest.raises(
        ValueError, match=rf"packed: {family}Model (takes other steps for \d+ tokens than for|cannot be)"
    ):
        qbert.export_onnx(packed, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir()) and packed.config.to_dict() == before
    assert getattr(packed, "attention_type", None) == getattr(model, "attention_type", None)


class Parity(nn.Module):
    """A head whose steps depend on whether the length is even, which only a run at another length shows."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = AutoModel.from_config(build("bert").config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids, attention_mask)[0]
        return hidden.mean(1) if input_ids.shape[1] % 2 else hidden.amax(1)


def test_a_length_that_only_changes_values_is_found(tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(Parity().eval(), 4))
    with pytest.raises(ValueError, match=r"Parity takes other steps for 64 tokens than for 9 \(relative error"):
        qbert.export_onnx(packed, tmp_path / "model.onnx")


def test_operators_that_onnx_lacks_are_named(tmp_path: Path) -> None:
    model = transformers.FNetModel(transformers.FNetConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)).eval()
    packed = qbert.pack(qbert.quantize_model(model, 8))
    with pytest.raises(ValueError, match=r"FNetModel cannot be written as an ONNX file \(.*fft"):
        qbert.export_onnx(packed, tmp_path / "model.onnx", inputs=("input_ids",))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_exporter_says_nothing(bits: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), bits))
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qbert.export_onnx(packed, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_file_that_was_not_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), 4))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.warns(UserWarning, match="not run, because onnxruntime is not installed"):
        qbert.export_onnx(packed, tmp_path / "model.onnx")


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), 4))
    original = ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, "run", lambda *a, **k: [-value for value in original(*a, **k)])
    with pytest.raises(ValueError, match=r"ONNX Runtime does not compute what BertModel does \(relative error 2"):
        qbert.export_onnx(packed, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_exported_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = AutoModel.from_config(build("bert").config), inputs_for("bert")
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    keep, wanted = batch["attention_mask"].bool(), expected(packed, batch)
    packed.to(dtype)
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    got = run(tmp_path / "model.onnx", batch)
    assert packed.dtype == dtype and got.dtype == torch.float32
    assert torch.allclose(got[keep], wanted[keep], atol=0.02 if dtype == torch.bfloat16 else 0.003)


def test_an_optimized_model_is_exported_like_the_packed_one(tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), 4))
    qbert.export_onnx(packed, tmp_path / "packed.onnx")
    qbert.export_onnx(qbert.optimize_for_inference(packed), tmp_path / "optimized.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == (tmp_path / "optimized.onnx").read_bytes()


@pytest.mark.parametrize("inputs", [("input_ids", "segments"), ()])
def test_inputs_that_the_model_does_not_have_are_named(inputs: Any, tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), 4))
    with pytest.raises(ValueError, match=r"inputs: .* is not among the inputs of BertModel.*token_type_ids"):
        qbert.export_onnx(packed, tmp_path / "model.onnx", inputs=inputs)


def test_inputs_that_are_one_text_are_refused_as_that(tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config), 4))
    with pytest.raises(ValueError, match=r"inputs: 'input_ids' is a text, not a list.*\['input_ids'\].*token_type_ids"):
        qbert.export_onnx(packed, tmp_path / "model.onnx", inputs="input_ids")


def test_what_is_no_text_encoder_is_named(tmp_path: Path) -> None:
    choices = AutoModelForMultipleChoice.from_config(build("bert").config)
    packed = qbert.pack(qbert.quantize_model(choices, 4))
    with pytest.raises(ValueError, match=r"BertForMultipleChoice cannot be called with input_ids, attention_mask"):
        qbert.export_onnx(packed, tmp_path / "model.onnx")
    packed = qbert.pack(qbert.quantize_model(build("vit"), 4))
    with pytest.raises(ValueError, match=r"not among the inputs of ViT.*pixel_values"):
        qbert.export_onnx(packed, tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call qbert\.pack first"):
        qbert.export_onnx(build("bert"), tmp_path / "model.onnx")
    packed = qbert.pack(qbert.quantize_model(build("bert"), 4))
    with pytest.raises(ValueError, match="not on the CPU"):
        qbert.export_onnx(copy.deepcopy(packed).to("meta"), tmp_path / "model.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        qbert.export_onnx(packed, tmp_path)
    assert not list(tmp_path.iterdir())
