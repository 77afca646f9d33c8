"""Activations of 4 and 6 bits: fewer values a token, the same from training to the packed model and ONNX."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for

import qbert
from qbert.layers.linear import QuantLinear


@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
@pytest.mark.parametrize("bits", [4, 6])
def test_trained_packed_loaded_optimized_and_unpacked_models_agree(bits: int, ranges: Any, tmp_path: Path) -> None:
    model, batch = build("bert").eval(), inputs_for("bert")
    config = qbert.BitsConfig(4, activation_bits=bits, activation_range=ranges)
    student = qbert.quantize_model(model, config, calibration_data=[batch])
    layer = next(m for m in student.modules() if isinstance(m, QuantLinear))
    x = torch.randn(3, 48)
    assert all(len(row.unique()) <= 2**bits for row in layer.activation_quantizer(x))  # type: ignore[misc]
    packed = qbert.pack(student)
    packed.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = student(**batch).logits
        for other in (packed, qbert.load(tmp_path), qbert.unpack(packed), qbert.optimize_for_inference(packed)):
            assert torch.allclose(other(**batch).logits, expected, atol=1e-5)
    full = qbert.quantize_model(model, qbert.BitsConfig(4, activation_range=ranges), calibration_data=[batch])
    with torch.no_grad():
        assert not torch.equal(full(**batch).logits, expected)


def test_the_log_says_why_such_a_layer_is_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    packed = qbert.pack(qbert.quantize_model(build("bert").eval(), qbert.BitsConfig(4, activation_bits=6)))
    with caplog.at_level(logging.INFO):
        qbert.optimize_for_inference(packed)
    assert "fewer than 8 bits" in caplog.text


def test_onnx_files_quantize_to_the_same_values(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    batch = inputs_for("bert")
    packed = qbert.pack(qbert.quantize_model(build("bert").eval(), qbert.BitsConfig(4, activation_bits=6)))
    qbert.export_onnx(packed, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])
    with torch.no_grad():
        assert torch.allclose(found, packed(**batch).logits, atol=5e-3)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_bits=5"):
        qbert.BitsConfig(4, activation_bits=5)
