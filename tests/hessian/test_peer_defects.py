"""Faults that other tools have, each with the model and call that shows it, on `hessian_spectrum` as users call it.

Those of single functions are tested beside them: two Lanczos steps taken for an answer and power iteration that stops
too early (test_eigen), noise added to a trace (test_trace), and operators on models with leftover
gradients, unused parameters or fused attention (test_operator).
"""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for
from torch import nn

from qbert.hessian import HessianOperator, gauss_newton_top, hessian_spectrum, parameter_blocks
from qbert.hessian.eigen import Lanczos
from qbert.hessian.gauss_newton.top import gauss_newton_starts

SETTINGS: dict[str, Any] = {"runs": 1, "fraction": 1.0, "tol": 1e-4, "progress": False}


def case() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = build("bert", hidden_size=8, num_attention_heads=2, intermediate_size=12).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model, [{**inputs_for("bert", batch=6), "labels": torch.tensor([0, 1, 1, 0, 1, 1])}]


def dense(model: Any, batches: Any, name: str) -> torch.Tensor:
    parameters = {b.name: b.parameters for b in parameter_blocks(model, "layer")}[name]
    operator = HessianOperator(model, batches, {"x": parameters})
    H = torch.stack([operator.product("x", e) for e in torch.eye(operator.size("x"), dtype=torch.float64)])
    return (H + H.T) / 2


def test_a_second_measurement_is_not_doubled() -> None:
    """PyHessian adds up `.grad`: a second instance on a model gives twice the eigenvalue."""
    model, batches = case()
    first = hessian_spectrum(model, batches, **SETTINGS)
    model(**batches[0]).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    second = hessian_spectrum(model, batches, **SETTINGS)
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)


def test_a_parameter_without_use_is_no_obstacle() -> None:
    """PyHessian fails on parameters that the loss does not depend on."""
    model, batches = case()
    expected = hessian_spectrum(model, batches, **SETTINGS)
    for layer in model.bert.encoder.layer:
        layer.register_parameter("never_used", nn.Parameter(torch.ones(9, dtype=torch.float64)))
    found = hessian_spectrum(model, batches, **SETTINGS)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-4)
    assert found.converged.all()


def test_a_negative_dominant_eigenvalue_keeps_its_sign_and_its_size() -> None:
    """Tools that look for the largest eigenvalue, or that normalize with it, lose a dominant negative one."""
    model, batches = case()
    with torch.no_grad():  # certain of the wrong class: negative curvature
        logits = model(**{k: v for k, v in batches[0].items() if k != "labels"}).logits
    batches[0]["labels"] = logits.argmin(dim=1)
    spectrum = hessian_spectrum(model, batches, **SETTINGS)
    negative = 0
    for i, name in enumerate(spectrum.names):
        values = torch.linalg.eigvalsh(dense(model, batches, name))
        expected = float(values[values.abs().argmax()])
        negative += expected < 0
        assert spectrum.eigenvalues[0, i] == pytest.approx(expected, rel=1e-4)
        other = float(values[-1] if expected < 0 else values[0])
        assert abs(spectrum.other_end[0, i] - other) <= 0.2 * abs(expected)
    assert negative and "top eigenvalues are negative" in str(spectrum)


def test_a_layer_of_no_influence_comes_last() -> None:
    """DeepSpeed turns a layer with the eigenvalue 0, and one with NaN, into the most sensitive one."""
    model, batches = case()
    top = model.bert.encoder.layer[1]
    for module in (top.attention.output, top.output):  # x + 0: no parameter inside of the layer matters any more
        module.dense.weight.data.zero_()
        module.dense.bias.data.zero_()
    frozen = {n for n, p in top.named_parameters() if "LayerNorm" not in n and "output.dense" not in n}
    for name in frozen:
        top.get_parameter(name).data.zero_()
    spectrum = hessian_spectrum(model, batches, granularity="matrix", **SETTINGS)
    silent = spectrum.names.index("encoder.layer.1.attention.self.query")
    assert spectrum.eigenvalues[0, silent] == 0 and spectrum.converged[0, silent]
    assert spectrum.sensitivity[silent] == 0 and spectrum.ranking()[0] != spectrum.names[silent]


def test_the_hessian_is_taken_at_the_models_own_weights() -> None:
    """HessFormer differentiates at the direction v instead of the parameters."""
    model, batches = case()
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    operator = HessianOperator(model, batches, blocks)
    name = "encoder.layer.1"
    v = torch.randn(operator.size(name), dtype=torch.float64)
    at_weights = operator.product(name, v)
    torch.testing.assert_close(operator.product(name, 10 * v), 10 * at_weights)  # linear in v


def test_graphs_are_freed() -> None:
    """PyHessian's retained graphs and gradients refer to each other and pile up."""
    model, batches = case()
    operator = HessianOperator(model, batches, {"x": parameter_blocks(model, "layer")[0].parameters}, retain=True)
    operator.product("x", torch.ones(operator.size("x"), dtype=torch.float64))
    (graph,) = operator._graphs.values()
    watched = [weakref.ref(gradient) for gradient in graph.gradients.values()]
    del graph
    operator.release()
    gc.collect()
    assert watched and not any(reference() is not None for reference in watched)


def test_a_start_from_the_top_gauss_newton_direction_alone_can_miss_where_the_mixture_does_not() -> None:
    """An eigenvalue that the top Gauss-Newton direction does not see: found, as on SST-2, through the lower ones."""
    n, generator = 4000, torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, 6, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([2.06, 2.153, 0.4, 0.3, 0.2, -0.3], dtype=torch.float64)

    def product(v: torch.Tensor) -> torch.Tensor:
        return Q @ (values * (Q.T @ v))

    def solve(start: torch.Tensor) -> Any:
        solver = Lanczos(n, bound="gap", warm=[start], generator=torch.Generator().manual_seed(1))
        while solver.query is not None:
            solver.receive(product(solver.query))
        return solver.result

    # what `gauss_newton_starts` makes of six directions with the shares 1, 0.6, 0.2, ...
    mixture = Q @ torch.tensor([1.0, 0.13, 0.045, 0.045, 0.045, 0.045], dtype=torch.float64)
    assert solve(mixture).value == pytest.approx(2.153, rel=1e-3)


def test_the_start_holds_every_gauss_newton_direction_with_its_share() -> None:
    model, batches = case()
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    starts, tops = gauss_newton_starts(model, batches, blocks), gauss_newton_top(model, batches, blocks)
    for name, start in starts.items():
        share = float(start @ tops[name].vector)
        assert abs(share) == pytest.approx(1, abs=1e-6)  # the top direction leads
        others = start - share * tops[name].vector
        assert 0.05 < float(others.norm()) < 1.5  # and the five others are there
    unused = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    found = gauss_newton_starts(model, batches, {**blocks, "unused": unused})
    assert torch.equal(found["unused"], torch.zeros(3, dtype=torch.float64))
