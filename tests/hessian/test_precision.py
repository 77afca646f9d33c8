"""bfloat16 iterations with one product in float32: the eigenvalue, and a residual that is measured, not hoped for."""

from typing import Any

import pytest
import torch
from encoders import build, inputs_for

from qbert.hessian import HessianOperator, hessian_spectrum, parameter_blocks

SETTINGS: dict[str, Any] = {"runs": 1, "fraction": 1.0, "progress": False}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A tiny classifier after some steps, so that a few eigenvalues stand out, and its data."""
    torch.manual_seed(0)
    model = build("bert").eval()
    batch = {**inputs_for("bert", batch=16), "labels": torch.arange(16) % 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(15):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [batch]


def test_values_are_those_of_float32_and_residuals_are_measured_in_float32(trained: Any) -> None:
    model, batches = trained
    exact = hessian_spectrum(model, batches, tol=1e-5, **SETTINGS)
    found = hessian_spectrum(model, batches, tol=1e-2, bound="gap", precision="bf16", **SETTINGS)
    assert found.settings["precision"] == "bf16" and exact.settings["precision"] == "fp32"
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    operator = HessianOperator(model, batches, blocks)
    rounded = HessianOperator(model, batches, blocks, autocast=torch.bfloat16)
    assert found.converged.any()
    for i, name in enumerate(found.names):
        value, true = found.eigenvalues[0, i], exact.eigenvalues[0, i]
        assert value == pytest.approx(true, rel=1e-2) or not found.converged[0, i]
        # The top eigenvalue of the float32 Hessian lies within the stated error, which bfloat16 alone could not tell.
        assert abs(value - true) <= found.errors[0, i] * abs(value)
        assert found.upper_bounds[0, i] == float("inf")
        assert found.converged[0, i] == (found.errors[0, i] <= 1e-2)
        v = torch.randn(operator.size(name))
        difference = (rounded.product(name, v) - operator.product(name, v)).norm() / operator.product(name, v).norm()
        assert 1e-4 < difference < 0.1  # it was bfloat16
        assert rounded.product(name, v).dtype == torch.float32


@pytest.mark.parametrize("bound", ["residual", "gap"])
def test_what_the_rounding_leaves_open_is_not_called_converged(trained: Any, bound: str) -> None:
    found = hessian_spectrum(*trained, tol=1e-6, bound=bound, precision="bf16", **SETTINGS)
    assert not found.converged.any() and (found.errors > 1e-6).all()
    loose = hessian_spectrum(*trained, tol=0.2, bound=bound, precision="bf16", **SETTINGS)
    assert loose.converged.all() and (loose.errors <= 0.2).all()


def test_the_model_comes_back_and_a_second_measurement_is_the_same(trained: Any) -> None:
    model, batches = trained
    before = {n: p.clone() for n, p in model.named_parameters()}
    first, second = (hessian_spectrum(model, batches, precision="bf16", tol=0.1, **SETTINGS) for _ in range(2))
    assert (first.eigenvalues == second.eigenvalues).all() and (first.products >= 4).all()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "precision: 'fp8' is unknown"),
        ({"precision": "bf16", "confidence": 0.99}, "rounded products prove nothing"),
        ({"precision": "bf16", "method": "ggn"}, "goes with method='lanczos'"),
    ],
)
def test_what_does_not_go_together_is_refused(trained: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(*trained, **changes, **SETTINGS)


def test_float64_models_are_refused() -> None:
    batch = {**inputs_for("bert"), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="this one is float64"):
        hessian_spectrum(build("bert").double(), [batch], precision="bf16", **SETTINGS)
