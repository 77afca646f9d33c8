"""Packed models on disk: what comes back is what was saved, in every class, process and dtype, in as few bytes."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import FAMILIES, build, inputs_for, outputs, same_state
from safetensors.torch import load_file

import qbert
from qbert.layers.linear import PackedLinear, QuantLinear
from qbert.layers.packed import PackedTensor
from qbert.packing import pack, unpack
from qbert.sizes import model_size

ROOT = Path(__file__).parents[2]


def file_tensors(path: Path) -> tuple[int, int]:
    """Length of the header and of the data of a safetensors file, read independently of any library."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    assert len(content) == 8 + length + max(ends)
    return 8 + length, max(ends)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed BERT classifier on disk."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    pack(qbert.quantize_model(build("bert"), {"encoder.layer.0": 2, "*": 3})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_every_family_comes_back_bit_equal(family: str, ranges: str, tmp_path: Path) -> None:
    model, batch = build(family).eval(), inputs_for(family)
    config = qbert.BitsConfig(3, activation_range=ranges)
    packed = pack(qbert.quantize_model(model, config, calibration_data=[batch]))
    packed.save_pretrained(tmp_path)
    for loaded in (type(model).from_pretrained(tmp_path), qbert.load(tmp_path)):
        assert type(loaded) is type(model) and not loaded.training and same_state(packed, loaded)
        assert (outputs(loaded, batch) - outputs(packed, batch)).abs().max() <= 1e-6
    _, data = file_tensors(tmp_path / "model.safetensors")
    assert data == sum(t.numel() * t.element_size() for t in packed.state_dict().values())


# MobileBERT's head reads its weight past the layer, and is refused by `pack` (layers/test_packed.py).
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "mobilebert")])
def test_every_masked_language_model_comes_back_with_its_tied_head(family: str, tmp_path: Path) -> None:
    model = tf.AutoModelForMaskedLM.from_config(build(family).config).eval()
    packed, batch = pack(qbert.quantize_model(model, 4)), inputs_for(family)
    packed.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert isinstance(head, PackedLinear) and head.owner is table
    assert same_state(packed, loaded) and (outputs(loaded, batch) - outputs(packed, batch)).abs().max() <= 1e-6


def test_a_table_that_two_parts_share_is_saved_with_the_whole(tmp_path: Path) -> None:
    config = tf.T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4)
    model, batch = tf.T5EncoderModel(config).eval(), inputs_for("bert")
    student = qbert.quantize_model(model, 4)
    packed = pack(student)
    packed.save_pretrained(tmp_path / "whole")
    loaded = qbert.load(tmp_path / "whole")
    assert loaded.encoder.embed_tokens.owner is loaded.shared
    with torch.no_grad():
        wanted = student(**batch)[0]
        assert torch.allclose(packed(**batch)[0], wanted, rtol=1e-5, atol=1e-6)
        assert torch.allclose(loaded(**batch)[0], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"embed_tokens belong to a layer outside of T5Stack; save the whole model"):
        packed.encoder.save_pretrained(tmp_path / "part")


@pytest.mark.parametrize(
    "auto",
    ["", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"],
)
@pytest.mark.parametrize("source", ["classifier", "bare"])
def test_every_head_loads_the_encoder(auto: str, source: str, tmp_path: Path) -> None:
    model = build("bert") if source == "classifier" else tf.BertModel(build("bert").config)
    packed = pack(qbert.quantize_model(model, {"encoder.layer.1": 2, "*": 4, "pooler": 8}))
    packed.save_pretrained(tmp_path)
    loaded = getattr(tf, f"AutoModel{auto}").from_pretrained(tmp_path)
    encoder, wanted = getattr(loaded, "bert", loaded), getattr(packed, "bert", packed)
    for name, layer in wanted.named_modules():
        if isinstance(layer, PackedTensor) and (encoder.pooler is not None or "pooler" not in name):
            assert same_state(layer, encoder.get_submodule(name)), name
    loaded.save_pretrained(tmp_path / "again")
    again = qbert.load(tmp_path / "again")
    assert type(again) is type(loaded) and same_state(again, loaded)
    if auto == "ForMaskedLM":
        assert loaded.cls.predictions.decoder.owner is encoder.embeddings.word_embeddings


def test_a_quantized_head_comes_back(tmp_path: Path) -> None:
    model, batch = build("bert").eval(), inputs_for("bert")
    packed = pack(qbert.quantize_model(model, {"*": 4, "classifier": 8}))
    packed.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded.classifier, PackedLinear) and same_state(loaded, packed)
    assert (outputs(loaded, batch) - outputs(packed, batch)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "imports",
    [
        "import qbert; import transformers",
        "import transformers; import qbert",
        "from transformers import PreTrainedModel; import qbert",
        "import qbert.saving.hf; import transformers",
    ],
)
def test_another_process_reads_the_same_in_any_import_order(imports: str, saved: Path, tmp_path: Path) -> None:
    code = (
        f"{imports}\nimport torch\nfrom safetensors.torch import save_file\n"
        f"model = transformers.AutoModelForSequenceClassification.from_pretrained({str(saved)!r})\n"
        "ids = torch.arange(5, 25).view(2, 10)\n"
        f"save_file({{**model.state_dict(), 'logits': model(input_ids=ids).logits.detach()}}, {str(tmp_path / 'x')!r})"
    )
    code = code.replace("import PreTrainedModel; import qbert", "import PreTrainedModel; import transformers, qbert")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
    there, here = load_file(tmp_path / "x"), qbert.load(saved)
    expected = outputs(here, {"input_ids": torch.arange(5, 25).view(2, 10)})
    assert (there.pop("logits") - expected).abs().max() <= 1e-6
    assert there.keys() == here.state_dict().keys()
    assert all(torch.equal(v, there[k]) for k, v in here.state_dict().items())


def test_import_of_qbert_alone_stays_light() -> None:
    code = "import sys, qbert; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_loads_in_another_dtype_with_the_same_codes_and_scales(saved: Path) -> None:
    exact = qbert.load(saved)
    half = tf.AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.bfloat16)
    batch = inputs_for("bert")
    assert half.dtype == torch.bfloat16 and outputs(half, batch).dtype == torch.bfloat16
    for name, layer in exact.named_modules():
        if isinstance(layer, PackedTensor):
            twin = half.get_submodule(name)
            assert same_state(layer, twin) or layer.state_dict().keys() == {"codes", "scale", "zero", "bias"}
            assert torch.equal(layer.int_codes(), twin.int_codes())
            assert layer.state_dict()["scale"].equal(twin.state_dict()["scale"])
            assert torch.equal(layer.quantized_weight().bfloat16(), twin.quantized_weight())
    assert (outputs(half, batch).float() - outputs(exact, batch)).abs().max() < 0.05


def test_configuration_and_card_say_what_is_inside(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    record = config["quantization_config"]
    assert record["quant_method"] == "qbert" and record["tied"] == {}
    assert record["specs"][record["tensors"]["encoder.layer.0.attention.self.query"]]["bits"] == 2
    assert all(not name.startswith("bert.") for name in record["tensors"])
    card = (saved / "README.md").read_text()
    assert "import qbert" in card and "AutoModelForSequenceClassification" in card and "| 3 | 6 |" in card


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: tf.BertModel(build("bert").config), "AutoModel"),
        (lambda: tf.AutoModelForMaskedLM.from_config(build("bert").config), "AutoModelForMaskedLM"),
        (lambda: tf.T5EncoderModel(tf.T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=96, num_layers=2,
                                               num_heads=4)), "T5EncoderModel"),
    ],
)  # fmt: skip
def test_the_card_names_a_class_that_gives_the_model_back(model: Any, name: str, tmp_path: Path) -> None:
    packed = pack(qbert.quantize_model(model(), 4))
    packed.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"from transformers import {name}\n" in card and f"model = {name}.from_pretrained(" in card
    assert same_state(getattr(tf, name).from_pretrained(tmp_path), packed)


def test_saving_keeps_a_card_and_replaces_old_weights(tmp_path: Path) -> None:
    packed = pack(qbert.quantize_model(build("bert"), 4))
    (tmp_path / "README.md").write_text("mine")
    packed.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and same_state(qbert.load(tmp_path), packed)
    packed.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*")) and same_state(qbert.load(tmp_path), packed)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        packed.save_pretrained(tmp_path / "config.json")


def test_arguments_may_be_positional_as_in_transformers(tmp_path: Path) -> None:
    packed = pack(qbert.quantize_model(build("bert"), 4))
    packed.save_pretrained(tmp_path / "worker", False)
    assert not (tmp_path / "worker" / "model.safetensors").exists()
    packed.save_pretrained(tmp_path / "main", True, None, False, "10KB")
    assert len(list((tmp_path / "main").glob("model-*"))) > 2 and same_state(qbert.load(tmp_path / "main"), packed)


def test_push_to_hub_uploads_what_save_pretrained_writes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qbert.load(saved)
    pushed: list[Path] = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, repo_id, **kw: self.save_pretrained(pushed[0]))
    pushed.append(saved.with_name("pushed"))
    model.save_pretrained(saved.with_name("local"), push_to_hub=True, repo_id="me/model")
    assert same_state(qbert.load(pushed[0]), model)


def test_a_model_can_be_copied_pickled_and_unpacked_after_loading(saved: Path, tmp_path: Path) -> None:
    model, batch = qbert.load(saved), inputs_for("bert")
    copied = pickle.loads(pickle.dumps(model))
    copied.save_pretrained(tmp_path)
    assert same_state(qbert.load(tmp_path), model)
    trainable = unpack(model).train()
    assert isinstance(trainable.bert.encoder.layer[0].output.dense, QuantLinear)
    assert not hasattr(trainable, "hf_quantizer") and not hasattr(trainable.config, "quantization_config")
    trainable(**batch, labels=torch.tensor([0, 1])).loss.backward()
    gradient = trainable.bert.encoder.layer[0].output.dense.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    assert torch.allclose(outputs(trainable.eval(), batch), outputs(model, batch), atol=1e-6)


def test_dequantize_gives_a_plain_float_model(saved: Path, tmp_path: Path) -> None:
    packed = qbert.load(saved)
    weight = packed.bert.encoder.layer[0].output.dense.quantized_weight()
    plain = packed.dequantize()
    assert not any(isinstance(m, PackedTensor) for m in plain.modules())
    assert torch.equal(plain.bert.encoder.layer[0].output.dense.weight, weight)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same_state(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path), plain)


def test_trainer_refuses_a_packed_model(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"packed weights cannot be trained.*qbert\.unpack"):
        tf.Trainer(qbert.load(saved), tf.TrainingArguments(str(tmp_path), report_to=[]))


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Folder of the real MiniLM encoder."""
    from qbert.tasks.embedded import embedded_encoder

    try:
        return embedded_encoder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("bits", [4, 8, "2/3"])
def test_minilm_takes_the_bytes_that_were_promised(minilm: Path, bits: int | str, tmp_path: Path) -> None:
    model = tf.AutoModel.from_pretrained(minilm)
    mixed = {f"encoder.layer.{i}": 2 + i % 2 for i in range(6)}
    # Which ranges are found changes no byte; these take no search.
    config = qbert.BitsConfig(mixed if bits == "2/3" else {"*": int(bits)}, range_method="minmax")
    size = model_size(model, config)
    packed = pack(qbert.quantize_model(model, config))
    packed.save_pretrained(tmp_path)
    header, data = file_tensors(tmp_path / "model.safetensors")
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert data == size.total and header < 0.01 * on_disk and on_disk < 1.01 * size.total
    if bits == "2/3":
        assert size.encoder_ratio == pytest.approx(12.8)
    assert same_state(qbert.load(tmp_path), packed)


def test_sentence_transformers_saves_and_loads(minilm: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(minilm), device="cpu")
    texts = ["A man is playing a guitar.", "The weather in Lagos is hot and humid today."]
    packed = pack(qbert.quantize_model(model, 4))
    expected = packed.encode(texts)
    packed.save(str(tmp_path))
    loaded = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert sum(isinstance(m, PackedTensor) for m in loaded.modules()) == 39
    assert abs(loaded.encode(texts) - expected).max() <= 1e-6
    assert (model.encode(texts) * expected).sum(1).min() > 0.9


@pytest.mark.parametrize("form", [lambda model: model, pack], ids=["trainable", "packed"])
def test_a_sentence_transformer_comes_back_as_one_and_its_card_says_what_it_is(
    form: Any, minilm: Path, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = form(qbert.quantize_model(library.SentenceTransformer(str(minilm), device="cpu").eval(), 4))
    expected = model.encode(["a sentence"])
    model.save(str(tmp_path / "one"))
    loaded = qbert.load(tmp_path / "one")
    assert type(loaded) is library.SentenceTransformer and abs(loaded.encode(["a sentence"]) - expected).max() <= 1e-6
    loaded.save(str(tmp_path / "two"))
    for folder in ("one", "two"):
        card = (tmp_path / folder / "README.md").read_text()
        assert card.startswith("---\n") and card.count("**`import qbert` before you load it.**") == 1
    code = (
        "import sys, sentence_transformers\n"
        "try: sentence_transformers.SentenceTransformer(sys.argv[1], device='cpu')\n"
        "except OSError as error: assert 'import_qbert' in str(error), error\n"
        "else: raise SystemExit('loaded')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one")], cwd=tmp_path, check=True, timeout=300)


def test_a_cross_encoder_comes_back_as_one(minilm: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", minversion="5.4")
    model = library.CrossEncoder(str(minilm), device="cpu", num_labels=1)
    packed = pack(qbert.quantize_model(model.eval(), 4))
    packed.save_pretrained(str(tmp_path))
    loaded = qbert.load(tmp_path)
    assert type(loaded) is library.CrossEncoder
    assert abs(loaded.predict([("a", "b")]) - packed.predict([("a", "b")])).max() <= 1e-6
