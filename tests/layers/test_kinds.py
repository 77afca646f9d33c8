"""Every kind of layer: its twins compute what the float module computes with quantized weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import qbert
from qbert.encoders.weights import matrix_size, stored, weight_matrix
from qbert.inference.engines import INT8, reason_not
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.packed import PackedTensor
from qbert.layers.recurrent import GateRecurrence, open_recurrent

WEIGHTS_ONLY = {"groups": 6, "activation_bits": None}


def sequence(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 11)


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(8, 12), torch.randn(2, 5, 8)),
    "transposed": (Conv1D(12, 8), torch.randn(2, 5, 8)),
    "table": (nn.Embedding(12, 8), torch.randint(12, (2, 5))),
    "conv": (nn.Conv1d(8, 12, 3), sequence()),
    "conv, same, dilated": (nn.Conv1d(8, 12, 4, padding="same", dilation=2), sequence()),
    "conv, strided, padded": (nn.Conv1d(8, 12, 3, stride=2, padding=2, bias=False), sequence()),
    "conv, groups": (nn.Conv1d(8, 12, 3, groups=4, padding=1), sequence()),
}
RECURRENT = {
    "lstm": nn.LSTM(8, 6, batch_first=True),
    "lstm, 2 layers, bidirectional": nn.LSTM(8, 6, num_layers=2, bidirectional=True),
    "gru, bidirectional": nn.GRU(8, 6, bidirectional=True, batch_first=True),
    "gru, no bias": nn.GRU(8, 6, bias=False),
}


def with_quantized_weights(model: nn.Module, student: nn.Module) -> nn.Module:
    """The float model with the student's dequantized weights in its own modules: torch computes the rest."""
    twin = copy.deepcopy(model)
    for path, layer in student.named_modules():
        if isinstance(layer, TrainableLayer):
            holder, _, leaf = path.rpartition(".")
            parent = twin.get_submodule(holder)
            if isinstance(parent, nn.RNNBase):
                getattr(parent, leaf).data = layer.quantized_weight()
            else:
                module: Any = twin.get_submodule(path)
                module.weight.data = stored(module, layer.quantized_weight()).contiguous()
    return twin


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_its_quantized_weights(name: str, bits: int) -> None:
    layer, x = LAYERS[name]
    model = nn.Sequential(layer)
    config = {"*": {"bits": bits, **WEIGHTS_ONLY}, "embeddings": bits}
    student = qbert.quantize_model(model, {k: v for k, v in config.items() if (k == "*") != (name == "table")})
    torch.testing.assert_close(student(x), with_quantized_weights(model, student)(x))


@pytest.mark.parametrize("name", [*LAYERS, *RECURRENT])
def test_both_twins_of_a_layer_have_the_weights_of_its_matrices(name: str) -> None:
    layer = LAYERS[name][0] if name in LAYERS else RECURRENT[name]
    student = qbert.quantize_model(nn.Sequential(layer), {"embeddings": 4} if name == "table" else 4)
    expected = sum(p.numel() for p in layer.parameters() if p.dim() > 1 and name != "table")
    assert [sum(map(matrix_size, m.modules())) for m in (layer, student, qbert.pack(student))] == [expected] * 3


@pytest.mark.parametrize("name", RECURRENT)
def test_gates_compute_with_their_quantized_weights(name: str) -> None:
    model = nn.Sequential(RECURRENT[name])
    student = qbert.quantize_model(model, qbert.BitsConfig(3, **WEIGHTS_ONLY))
    x = torch.randn(5, 4, 8)
    for got, expected in zip(flat(student(x)), flat(with_quantized_weights(model, student)(x)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [*LAYERS, *RECURRENT])
@pytest.mark.parametrize("activation_range", ["dynamic", "asymmetric", "static"])
def test_packed_and_unpacked_compute_the_same(name: str, activation_range: str) -> None:
    layer, x = LAYERS[name] if name in LAYERS else (RECURRENT[name], torch.randn(5, 4, 8))
    model = nn.Sequential(layer).eval()
    config = qbert.BitsConfig(4, groups=6, activation_range=activation_range)
    data = None if name == "table" else [{"input": x}]
    student = qbert.quantize_model(model, config, calibration_data=data)
    packed = qbert.pack(student)
    for got, again, expected in zip(flat(packed(x)), flat(qbert.unpack(packed)(x)), flat(student(x)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*LAYERS, *RECURRENT])
def test_the_optimized_form_computes_the_same(name: str) -> None:
    layer, x = LAYERS[name] if name in LAYERS else (RECURRENT[name], torch.randn(5, 4, 8))
    packed = qbert.pack(qbert.quantize_model(nn.Sequential(layer).eval(), qbert.BitsConfig(4, groups=6)))
    with torch.no_grad():
        engine = next(e for e in INT8 if not reason_not(e))  # at this size fp32, which rounds less, may be the fastest
        fast = qbert.optimize_for_inference(packed, engine=engine)
        for got, expected in zip(flat(fast(x)), flat(packed(x)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


@pytest.mark.parametrize("name", RECURRENT)
def test_gate_recurrence_is_the_float_module(name: str) -> None:
    module = RECURRENT[name]
    opened = GateRecurrence(module)
    lengths = torch.tensor([2, 5, 1, 4])
    x = torch.randn(5, 4, 8)
    states = torch.randn(2, module.num_layers * (2 if module.bidirectional else 1), 4, 6)
    state = tuple(states) if isinstance(module, nn.LSTM) else states[0]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    batch = x.transpose(0, 1) if module.batch_first else x
    for given in ((batch,), (batch, state), (x[:, 0],)):
        for got, expected in zip(flat(opened(*given)), flat(module(*given)), strict=True):
            torch.testing.assert_close(got, expected)
    (got, got_state), (expected, expected_state) = opened(packed, state), module(packed, state)
    torch.testing.assert_close(pad_packed_sequence(got)[0], pad_packed_sequence(expected)[0])
    for a, b in zip(flat(got_state), flat(expected_state), strict=True):
        torch.testing.assert_close(a, b)


def test_an_opened_recurrence_keeps_the_names_of_the_float_checkpoint() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 6, bidirectional=True)})
    before = model.state_dict()
    opened = copy.deepcopy(model)
    open_recurrent(opened, {"lstm.weight_ih_l0"})
    assert isinstance(opened["lstm"], GateRecurrence)
    assert set(opened.state_dict()) == set(before)
    fresh = nn.ModuleDict({"lstm": nn.LSTM(8, 6, bidirectional=True)})
    open_recurrent(fresh, {"lstm.weight_ih_l0"})
    fresh.load_state_dict(before)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(fresh["lstm"](x)[0], model["lstm"](x)[0])


def test_float_modules_and_their_twins_know_their_kind() -> None:
    for layer, _ in LAYERS.values():
        student = qbert.quantize_model(nn.Sequential(copy.deepcopy(layer)), 4)
        packed = qbert.pack(student)
        kind = kind_of(layer)
        assert kind is not None
        assert type(student[0]) is kind.trainable and type(packed[0]) is kind.packed
        assert packed[0].float_module().weight.shape == layer.weight.shape  # type: ignore[union-attr]
    assert kind_of(nn.LayerNorm(3)) is None


def test_a_mixed_model_is_quantized_whole() -> None:
    model = nn.ModuleList(
        [nn.Embedding(50, 16), nn.LSTM(16, 12, bidirectional=True), nn.Conv1d(24, 8, 3), nn.Linear(8, 2)]
    )
    size = qbert.model_size(qbert.pack(qbert.quantize_model(model, 4)))
    assert size.left_in_float == ()
    assert {t.bits for t in size.tensors if t.is_matrix} == {4}


class Recurrent(PreTrainedModel):
    """A classifier that transformers saves and loads, of layers that it has no quantizer for."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 12, bidirectional=True, batch_first=True)
        self.conv = nn.Conv1d(24, 8, 3, padding=1)
        self.out = Conv1D(2, 8)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.table(input_ids))
        return self.out(self.conv(states.transpose(1, 2)).amax(-1))  # type: ignore[no-any-return]


def test_every_kind_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Recurrent(BertConfig()).eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(3, groups=2)))
    ids = torch.randint(50, (2, 7))
    packed.save_pretrained(tmp_path)
    loaded = Recurrent.from_pretrained(tmp_path)
    assert sum(isinstance(m, PackedTensor) for m in loaded.modules()) == 7
    torch.testing.assert_close(loaded(ids), packed(ids))


def test_weight_matrix_of_every_kind_has_a_row_an_output() -> None:
    assert {tuple(weight_matrix(layer).shape) for layer, _ in LAYERS.values()} == {(12, 8), (12, 24), (12, 32), (12, 6)}
