"""`export_openvino`: OpenVINO computes what the packed model does, from weights in as few bits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from torch import nn
from transformers import AutoModel, AutoModelForQuestionAnswering

import qbert
from qbert.runtimes.recorded import ALIKE, SAME

openvino = pytest.importorskip("openvino")

ONE_THREAD = {"INFERENCE_NUM_THREADS": 1}
# Configuration -> bits in which its twelve matrices and its tables (word, position and type embeddings) are stored.
CONFIGS: dict[str, tuple[qbert.BitsConfig, dict[int, int]]] = {
    "2 midrise": (qbert.BitsConfig(2, scheme="midrise", activation_bits=None), {2: 12, 4: 3}),
    "3, input groups of 12": (qbert.BitsConfig(3, input_group_size=12, activation_bits=None), {4: 15}),
    "4 offset, tables 2": (qbert.BitsConfig(4, embedding_bits=2, scheme="offset", activation_bits=None), {4: 15}),
}


def run(path: Path, batch: dict[str, torch.Tensor], precision: str = "f32") -> list[torch.Tensor]:
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": precision, **ONE_THREAD})
    found = compiled({name: value.numpy() for name, value in batch.items()})
    return [torch.from_numpy(found[i]) for i in range(len(compiled.outputs))]


def expected(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize(("config", "bits"), CONFIGS.values(), ids=CONFIGS)
def test_openvino_gives_our_outputs_from_low_bit_weights(
    config: qbert.BitsConfig, bits: dict[int, int], tmp_path: Path
) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config).eval(), config))
    report = qbert.export_openvino(packed, tmp_path / "model.xml")
    assert report.error < SAME and report.error_by_default < ALIKE and report.stored_bits == bits
    for shape in ((1, 4), (3, 11)):
        batch = inputs_for("bert", *shape)
        keep = batch["attention_mask"].bool()
        got, wanted = run(tmp_path / "model.xml", batch, "bf16")[0][keep], expected(packed, batch)[keep]
        assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A packed encoder with 2-bit weights and static 8-bit activations, its file, and what the export returned."""
    path = tmp_path_factory.mktemp("exported") / "model.xml"
    model, batch = build("bert", hidden_size=96, intermediate_size=384).eval(), inputs_for("bert")
    config = qbert.BitsConfig(2, groups=1, scheme="symmetric", activation_range="static")
    packed = qbert.pack(qbert.quantize_model(model, config, calibration_data=[batch]))
    return packed, path, qbert.export_openvino(packed, path)


def test_the_files_are_as_small_as_their_codes(two_bits: tuple[Any, Path, Any]) -> None:
    packed, path, report = two_bits
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    assert report.nbytes == sum(file.stat().st_size for file in path.parent.iterdir())
    matrices, tables = 2 * (4 * 96 * 96 + 2 * 96 * 384), (100 + 512 + 2) * 96
    floats = sum(p.numel() for p in packed.parameters()) + 6 * 2 * 96 + 2 * 2 * 384 + 3 * (100 + 512 + 2)
    assert matrices / 4 + tables < (path.parent / "model.bin").stat().st_size < matrices / 4 + tables + 4.5 * floats


def test_activations_are_quantized_as_the_packed_model_does(two_bits: tuple[Any, Path, Any]) -> None:
    packed, path, report = two_bits
    batch = inputs_for("bert")
    assert report.stored_bits == {2: 12, 4: 3}
    assert torch.allclose(run(path, batch)[0], expected(packed, batch), atol=2e-3)


def test_a_model_that_answers_questions_has_both_ends_and_reads_types(tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_config(build("bert").config).eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    names = ("input_ids", "token_type_ids", "attention_mask")
    qbert.export_openvino(packed, tmp_path / "model.xml", inputs=names)
    read = openvino.Core().read_model(str(tmp_path / "model.xml"))
    assert [put.get_any_name() for put in read.inputs] == list(names)
    assert [put.get_any_name() for put in read.outputs] == ["start_logits", "end_logits"]
    batch = inputs_for("bert", 3, 12)
    batch["token_type_ids"] = (torch.arange(12) > 5).long().expand(3, 12)
    with torch.no_grad():
        wanted = packed(**batch)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, **ONE_THREAD}
    compiled = openvino.compile_model(read, "CPU", settings)
    found = compiled({name: value.numpy() for name, value in batch.items()})
    for name in ("start_logits", "end_logits"):
        assert torch.allclose(torch.from_numpy(found[name]), wanted[name], atol=2e-5)


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_other_families_are_exported(family: str, tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(build(family).eval(), qbert.BitsConfig(4, activation_bits=None)))
    assert qbert.export_openvino(packed, tmp_path / "model.xml").error < SAME


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_sequence_without_a_token_gets_what_torch_gives_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = qbert.pack(qbert.quantize_model(build(family).eval(), qbert.BitsConfig(4, activation_bits=None)))
    assert qbert.export_openvino(packed, tmp_path / "model.xml").error < SAME
    batch = inputs_for(family, 3)
    batch["attention_mask"][1] = 0
    assert torch.allclose(run(tmp_path / "model.xml", batch)[0], expected(packed, batch), atol=1e-4)
    if family == "bert":
        monkeypatch.setattr("qbert.runtimes.openvino._give_zeros_where_nothing_is_seen", lambda model: None)
        with pytest.raises(ValueError, match="relative error inf where a sequence has no token"):
            qbert.export_openvino(packed, tmp_path / "model.xml")


class Parity(nn.Module):
    """A head whose steps depend on whether the length is even, which only a run at another length shows."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = AutoModel.from_config(build("bert").config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids, attention_mask)[0]
        return hidden.mean(1) if input_ids.shape[1] % 2 else hidden.amax(1)


def test_steps_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    packed = qbert.pack(qbert.quantize_model(Parity().eval(), 4))
    with pytest.raises(ValueError, match=r"Parity takes other steps for 64 tokens than for 9 \(relative error"):
        qbert.export_openvino(packed, tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


def test_operators_that_openvino_lacks_are_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.map = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(self.map(self.table(input_ids)))

    packed = qbert.pack(qbert.quantize_model(Odd().eval(), 4))
    with pytest.raises(ValueError, match=r"Odd cannot be converted by OpenVINO \(.*bessel"):
        qbert.export_openvino(packed, tmp_path / "model.xml", inputs=("input_ids",))
    assert not list(tmp_path.iterdir())


def test_files_that_compute_something_else_are_refused_and_older_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config).eval(), 4))
    (tmp_path / "model.xml").write_text("older")
    (tmp_path / "model.bin").write_text("older too")
    original = openvino.InferRequest.infer

    def negated(*args: Any, **settings: Any) -> Any:
        return {i: -value for i, value in enumerate(original(*args, **settings).values())}

    monkeypatch.setattr(openvino.InferRequest, "infer", negated)
    with pytest.raises(ValueError, match=r"OpenVINO does not compute what BertModel does \(relative error 2"):
        qbert.export_openvino(packed, tmp_path / "model.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert (tmp_path / "model.bin").read_text() == "older too"


def test_nothing_is_printed_and_the_model_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    packed = qbert.pack(qbert.quantize_model(AutoModel.from_config(build("bert").config).eval(), 4))
    fast, before = qbert.optimize_for_inference(packed, engine="fp32"), packed.state_dict()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qbert.export_openvino(fast, tmp_path / "model.xml")
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    model = AutoModel.from_config(build("bert").config)
    with pytest.raises(ValueError, match=r"call qbert\.pack first"):
        qbert.export_openvino(model, tmp_path / "model.xml")
    packed = qbert.pack(qbert.quantize_model(model, 4))
    with pytest.raises(ValueError, match=r"path: .*model\.onnx is no name of a model of OpenVINO"):
        qbert.export_openvino(packed, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"inputs: 'segments' is not among the inputs of BertModel"):
        qbert.export_openvino(packed, tmp_path / "model.xml", inputs=("segments",))
    with pytest.raises(ValueError, match=r"inputs: 'input_ids' is a text, not a list of names"):
        qbert.export_openvino(packed, tmp_path / "model.xml", inputs="input_ids")
    with pytest.raises(ValueError, match="not on the CPU"):
        qbert.export_openvino(packed.to("meta"), tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())
