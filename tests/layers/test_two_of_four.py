"""2:4 matrices in packed files: two in four codes and their places, and the same weights after loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for, outputs
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qbert
from qbert import students
from qbert.cli.inspect import folder_content
from qbert.kernels import formats
from qbert.layers.packed import PackedTensor

PRUNED = 2 * 6  # layers, matrices of each


def teacher() -> Any:
    torch.manual_seed(0)
    return build("bert", hidden_size=64, intermediate_size=128).eval()


def pruned() -> Any:
    return students.prune(teacher(), pattern="2:4").eval()


def packed(model: Any, bits: int, **options: Any) -> Any:
    return qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **options)))


def sparse_layers(model: Any) -> list[PackedTensor]:
    return [m for m in model.modules() if isinstance(m, PackedTensor) and m.layout.sparsity]


@given(st.sampled_from(formats.BITS), st.integers(1, 3), st.integers(1, 150), st.integers(0, 10**6))
def test_stored_halves_come_back_to_the_bit(bits: int, rows: int, fours: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, 4 * fours), generator=generator, dtype=torch.int8)
    zero = torch.randint(low, high + 1, (rows, 1), generator=generator, dtype=torch.int8).expand_as(codes)
    order = torch.rand(rows, fours, 4, generator=generator).argsort(-1)
    used = (order < torch.randint(0, 3, (rows, fours, 1), generator=generator)).flatten(1)
    codes = torch.where(used, codes, zero)
    stored = formats.pack_half(codes, used, bits)
    assert stored.shape == (rows, formats.half_row_nbytes(4 * fours, bits))
    assert torch.equal(formats.unpack_half(stored, bits, zero), codes)


def test_a_row_is_the_codes_and_then_the_numbers_of_their_pairs() -> None:
    codes = torch.tensor([[0, 0, 5, 7, 0, 3, 0, -2] * 4])
    stored = formats.pack_half(codes, codes != 0, 8)
    assert stored[0, :16].view(torch.int8).tolist() == [5, 7, 3, -2] * 4
    assert (formats.unpack(stored[:, 16:].contiguous(), 3, 8) + 4).tolist() == [[5, 4] * 4]


def test_what_is_no_half_is_refused() -> None:
    codes = torch.ones(1, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="more than two of four"):
        formats.pack_half(codes, codes != 0, 4)
    with pytest.raises(ValueError, match="multiple of 4"):
        formats.half_row_nbytes(6, 4)
    codes = torch.zeros(1, 32, dtype=torch.int8)
    damaged = formats.pack_half(codes, codes != 0, 4)
    damaged[0, 8:] = 0b01111111  # the largest number, which no pair has
    with pytest.raises(ValueError, match="a pair of four codes that does not exist"):
        formats.unpack_half(damaged, 4, codes)
    with pytest.raises(ValueError, match="two in four of them stored, got"):
        formats.unpack_half(damaged[:, 1:], 4, codes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_pruned_model_is_smaller_in_its_file_and_the_same_when_loaded(bits: int, tmp_path: Path) -> None:
    model, batch = pruned(), inputs_for("bert")
    quantized = qbert.quantize_model(model, bits)
    small = qbert.pack(quantized)
    assert len(sparse_layers(small)) == PRUNED
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 2
    loaded = qbert.load(tmp_path)
    for ours, theirs in zip(sparse_layers(small), sparse_layers(loaded), strict=True):
        assert torch.equal(ours.int_codes(), theirs.int_codes())
        assert torch.equal(ours.quantized_weight(), theirs.quantized_weight())
    torch.testing.assert_close(outputs(loaded, batch), outputs(small, batch), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(small, batch), outputs(quantized, batch), rtol=0, atol=1e-5)
    sizes = {qbert.model_size(m).total for m in (small, loaded, quantized)} | {qbert.model_size(model, bits).total}
    assert len(sizes) == 1
    stored = load_file(next(tmp_path.glob("*.safetensors")))
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sizes.pop()


def test_the_file_has_the_bytes_that_are_promised() -> None:
    small, dense = (qbert.model_size(packed(m, 3)).encoder for m in (pruned(), teacher()))
    assert small / dense == pytest.approx((3 / 2 + 3 / 4) / 3, rel=0.01)


def test_only_matrices_that_are_2_of_4_are_stored_so(tmp_path: Path) -> None:
    model = pruned()
    whole = model.bert.encoder.layer[0].output.dense
    whole.weight.data[3, :4] = torch.tensor([0.1, 0.2, 0.3, 0.0])
    assert len(sparse_layers(packed(model, 4))) == PRUNED - 1
    assert not sparse_layers(packed(model, 4, scheme="midrise")) and not sparse_layers(
        packed(model, 4, scheme="offset")
    )
    packed(teacher(), 4).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 1 and "sparsity" not in json.dumps(record)


def test_compensated_zeros_are_left_out_too(tmp_path: Path) -> None:
    batches = [inputs_for("bert")]
    model = students.prune(teacher(), pattern="2:4", data=batches)
    config = qbert.BitsConfig(3, rounding="compensated")
    quantized = qbert.quantize_model(model, config, calibration_data=batches, progress=False)
    small = qbert.pack(quantized)
    assert len(sparse_layers(small)) == PRUNED
    assert qbert.model_size(small).total == qbert.model_size(quantized).total


def test_state_dicts_and_unpacked_models_come_back() -> None:
    small, batch = packed(pruned(), 4), inputs_for("bert")
    twin = packed(pruned(), 4)
    for layer in sparse_layers(twin):
        layer.codes.zero_()
    twin.load_state_dict(small.state_dict())
    torch.testing.assert_close(outputs(twin, batch), outputs(small, batch))
    again = qbert.pack(qbert.unpack(small))
    assert len(sparse_layers(again)) == PRUNED
    torch.testing.assert_close(outputs(again, batch), outputs(small, batch))
    other = packed(teacher(), 4)
    with pytest.raises(RuntimeError, match="the state dict holds values for"):
        other.load_state_dict(small.state_dict())


def test_layers_are_optimized_as_dense_ones_are(tmp_path: Path) -> None:
    small, batch = packed(pruned(), 8), inputs_for("bert")
    small.save_pretrained(tmp_path)
    fast = qbert.optimize_for_inference(qbert.load(tmp_path))
    torch.testing.assert_close(outputs(fast, batch), outputs(small, batch), rtol=0, atol=2e-2)


def test_convolutions_are_matrices_too() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 4))
    with torch.no_grad():
        model[0].weight[:, :, 1:3] = 0
    assert len(sparse_layers(qbert.pack(qbert.quantize_model(model, 4)))) == 1


def test_inspect_tells_of_them(tmp_path: Path) -> None:
    model = pruned()
    packed(model, 3).save_pretrained(tmp_path)
    content = folder_content(tmp_path)
    grids = [g for g in content["grids"].values() if g.get("sparsity") == "2:4"]
    assert sum(g["tensors"] for g in grids) == PRUNED and content["format_version"] == 2
    assert sum(g["values"] for g in grids) == sum(
        m.weight.numel() for n, m in model.bert.encoder.named_modules() if type(m) is nn.Linear
    )


def test_files_whose_places_are_impossible_are_refused(tmp_path: Path) -> None:
    small = packed(pruned(), 4)
    small.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layer.0.output.dense.codes"))
    tensors[name][:, -1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those that were saved"):
        qbert.load(tmp_path)
