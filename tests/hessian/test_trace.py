"""Traces and densities: exact where they can be, within their stated error elsewhere."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for

from qbert.hessian import (
    HessianOperator,
    estimate_trace,
    hessian_density,
    hessian_traces,
    parameter_blocks,
    spectral_density,
)


def dense(eigenvalues: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(torch.as_tensor(np.asarray(eigenvalues), dtype=torch.float64)) @ Q.T


OUTLIERS = np.concatenate([[50.0, 20.0, -10.0], np.linspace(-0.5, 1, 200)])


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_no_noise_is_added_to_the_estimate(method: str) -> None:
    """NNCF and Neural Compressor start their sums from random numbers: their trace of a zero Hessian is not zero."""
    zero = estimate_trace(lambda v: torch.zeros_like(v), 100, method=method, probes=9)
    assert zero.value == 0 and zero.error == 0
    diagonal = torch.linspace(-1, 3, 100, dtype=torch.float64)  # signs have no variance on a diagonal operator
    plain = estimate_trace(lambda v: diagonal * v, 100, method="hutchinson", probes=2)
    assert plain.value == pytest.approx(float(diagonal.sum()), rel=1e-12) and plain.error < 1e-12


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_estimates_lie_within_their_stated_error(method: str) -> None:
    A = dense(OUTLIERS)
    scores = []
    for seed in range(60):
        found = estimate_trace(lambda v: A @ v, len(A), probes=30, method=method, seed=seed)
        scores.append((found.value - OUTLIERS.sum()) / found.error)
        assert found.products == 30
    assert np.mean(np.abs(scores) < 2) > 0.85
    assert abs(np.mean(scores)) < 0.5  # unbiased


def test_hutch_plus_plus_is_far_less_noisy_where_few_eigenvalues_carry_the_trace() -> None:
    A = dense(OUTLIERS)
    errors = {
        method: np.std(
            [estimate_trace(lambda v: A @ v, len(A), probes=30, method=method, seed=s).value for s in range(20)]
        )
        for method in ("hutch++", "hutchinson")
    }
    assert errors["hutch++"] < 0.5 * errors["hutchinson"]


def test_a_small_operator_is_summed_exactly() -> None:
    A = dense([1.0, -2.0, 4.0])
    found = estimate_trace(lambda v: A @ v, 3, probes=10)
    assert found.value == pytest.approx(3.0) and found.error == 0 and found.products == 3


def test_float32_traces_of_millions_of_parameters_are_sums_in_float64() -> None:
    """A probe of signs gives the trace of a diagonal operator exactly, but for how it is added up."""
    eigenvalues = torch.full((2_000_000,), 0.01)
    eigenvalues[0] = 1e6
    found = estimate_trace(lambda v: eigenvalues * v, 2_000_000, method="hutchinson", probes=1, dtype=torch.float32)
    assert found.value == pytest.approx(float(eigenvalues.double().sum()), rel=2e-5)


def test_one_probe_has_no_error_estimate() -> None:
    assert math.isnan(estimate_trace(lambda v: v, 10, probes=1, method="hutchinson").error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "guess"}, "method: 'guess'"), ({"probes": 2}, "probes: 2"), ({"probes": 0}, "probes: 0")],
)
def test_bad_trace_arguments_are_named(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_trace(lambda v: v, 10, **changes)
    with pytest.raises(ArithmeticError, match="not finite"):
        estimate_trace(lambda v: v * math.inf, 10, method="hutchinson")


def encoder() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model = build("bert", hidden_size=8, num_attention_heads=2, intermediate_size=8).double()
    return model, [{**inputs_for("bert", batch=6), "labels": torch.tensor([0, 1, 1, 0, 1, 1])}]


def dense_block(model: Any, batches: Any, name: str) -> torch.Tensor:
    parameters = {b.name: b.parameters for b in parameter_blocks(model, "layer")}[name]
    operator = HessianOperator(model, batches, {"x": parameters})
    return torch.stack([operator.product("x", e) for e in torch.eye(operator.size("x"), dtype=torch.float64)])


def test_traces_of_every_layer_are_those_of_the_dense_hessian() -> None:
    model, batches = encoder()
    found = hessian_traces(model, batches, probes=45, progress=False)
    assert list(found) == ["encoder.layer.0", "encoder.layer.1"]
    for name, estimate in found.items():
        expected = float(dense_block(model, batches, name).trace())
        assert abs(estimate.value - expected) < 4 * estimate.error
    assert model.training


def test_moments_of_the_density_are_traces_of_powers() -> None:
    A = dense(OUTLIERS)
    density = spectral_density(lambda v: A @ v, len(A), probes=60, steps=20)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-9)
    assert density.moment(1) * density.size == pytest.approx(OUTLIERS.sum(), rel=0.4)
    assert density.moment(2) * density.size == pytest.approx((OUTLIERS**2).sum(), rel=0.4)
    assert density.nodes.max() == pytest.approx(50) and density.nodes.min() == pytest.approx(-10)
    assert density.fraction_below(0) == pytest.approx(np.mean(OUTLIERS < 0), abs=0.1)
    x, y = density.curve(points=4000)
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-3)


def test_each_probe_integrates_its_own_measure_exactly() -> None:
    A = dense(np.linspace(-1, 2, 40))
    density = spectral_density(lambda v: A @ v, 40, probes=1, steps=6, seed=3)
    v = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v /= v.norm()
    power = v.clone()
    for degree in range(1, 12):
        power = A @ power
        assert density.moment(degree) == pytest.approx(float(v @ power), rel=1e-8), degree


@pytest.mark.parametrize("eigenvalues", [[0.0] * 10, [2.0] + [0.0] * 30, [3.0], [3.0] * 10])
def test_krylov_spaces_that_end_early_have_a_density_too(eigenvalues: Any, tmp_path: Any) -> None:
    A = dense(eigenvalues)
    density = spectral_density(lambda v: A @ v, len(A), probes=2, steps=8)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-6)
    assert density.nodes.max() == pytest.approx(max(eigenvalues), abs=1e-9)
    x, y = density.curve(points=4000)
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-3)
    density.plot(tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 5000


def test_density_of_a_layer_spans_its_dense_spectrum() -> None:
    model, batches = encoder()
    density = hessian_density(model, batches, "encoder.layer.1", probes=2, steps=25)
    eigenvalues = torch.linalg.eigvalsh(dense_block(model, batches, "encoder.layer.1"))
    assert density.size == len(eigenvalues)
    assert density.nodes.max() == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    assert density.nodes.min() == pytest.approx(float(eigenvalues[0]), rel=1e-3)
    with pytest.raises(ValueError, match="name: 'layer 7'"):
        hessian_density(model, batches, "layer 7")
    with pytest.raises(ValueError, match="probes: 0"):
        spectral_density(lambda v: v, 3, probes=0)
