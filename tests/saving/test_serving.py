"""What `torch.jit.trace` and `torch.export` record of quantized models can be saved, loaded and run; casts by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for

import qbert


def forms(ranges: str) -> dict[str, Any]:
    """The trainable, packed and optimized form of one small model."""
    torch.manual_seed(0)
    config = qbert.BitsConfig(3, activation_range=ranges)
    student = qbert.quantize_model(build("bert"), config, calibration_data=[inputs_for("bert")]).eval()
    packed = qbert.pack(student)
    return {"trainable": student, "packed": packed, "optimized": qbert.optimize_for_inference(packed)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["trainable", "packed", "optimized"])
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_a_trace_is_saved_loaded_and_run_on_another_length(form: str, ranges: str, tmp_path: Path) -> None:
    model = forms(ranges)[form]
    batch, longer = (tuple(inputs_for("bert", length=n).values()) for n in (9, 12))
    traced = torch.jit.trace(model, batch, strict=False, check_trace=False)
    torch.jit.save(traced, str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for inputs in (batch, longer):
        with torch.no_grad():
            assert torch.allclose(loaded(*inputs)["logits"], model(*inputs).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["trainable", "packed", "optimized"])
def test_an_exported_program_is_saved_and_loaded(form: str, tmp_path: Path) -> None:
    model = forms("static")[form]
    batch = tuple(inputs_for("bert").values())
    torch.export.save(torch.export.export(model, batch, strict=False), str(tmp_path / "model.pt2"))
    loaded = torch.export.load(str(tmp_path / "model.pt2")).module()
    with torch.no_grad():
        assert torch.allclose(loaded(*batch).logits, model(*batch).logits, atol=1e-5)


@pytest.mark.parametrize(("method", "dtype"), [("half", torch.float16), ("float", torch.float32)])
def test_casts_by_name_do_what_to_does(method: str, dtype: torch.dtype) -> None:
    one, other = forms("dynamic")["packed"].bfloat16(), forms("dynamic")["packed"].bfloat16().to(dtype)
    assert getattr(one, method)() is one and one.dtype == dtype
    state = other.state_dict()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in one.state_dict().items())
