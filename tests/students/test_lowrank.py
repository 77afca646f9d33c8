"""Low rank: the best factors of three weightings, ranks within a budget, corrections beside few bits."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for, outputs, same_state
from hypothesis import given, settings
from hypothesis import strategies as st

import qbert
from qbert.encoders.factors import CorrectedLinear, FactoredLinear
from qbert.encoders.zeros import noted_zeros
from qbert.inference.engines import INT8, reason_not
from qbert.students.curvature import layer_matrices, second_moments
from qbert.students.lowrank import Spectrum, paying_rank, quantize_with_correction, ranks_within

QUERY, FFN = "encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense"


def model_and_data() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    return build("bert").eval(), [inputs_for("bert", 8) for _ in range(3)]


def test_the_plain_factors_are_the_truncated_svd() -> None:
    model, _ = model_and_data()
    student = qbert.factorize(model, {QUERY: 10}, weighting="none")
    layer = student.bert.get_submodule(QUERY)
    assert isinstance(layer, FactoredLinear)
    u, s, v = np.linalg.svd(model.bert.get_submodule(QUERY).weight.detach().numpy().astype(np.float64))
    np.testing.assert_allclose(layer.weight.detach().numpy(), (u[:, :10] * s[:10]) @ v[:10], atol=1e-6)
    assert torch.equal(layer.bias, model.bert.get_submodule(QUERY).bias)


@pytest.mark.parametrize("weighting", ["activations", "both"])
def test_no_other_matrix_of_that_rank_costs_less(weighting: str) -> None:
    """The damage is the sum of the squares left out, and a descent from the factors finds nothing better."""
    model, data = model_and_data()
    linear = model.bert.get_submodule(FFN)
    moments = second_moments(model, data, [linear], gradients=weighting == "both")[linear]
    damping = 0.01
    spectrum = Spectrum.of(linear.weight.detach(), moments, damping)
    inputs = moments.inputs + damping * moments.inputs.diagonal().mean() * torch.eye(48)
    gradients = torch.eye(96, dtype=torch.float64)
    if moments.gradients is not None:
        gradients = moments.gradients + damping * moments.gradients.diagonal().mean() * gradients
    down, up = (x.clone().requires_grad_() for x in spectrum.factors(5))

    def damage() -> torch.Tensor:
        change = linear.weight.detach().double() - up @ down
        return torch.trace(gradients @ change @ inputs @ change.T)

    start = float(damage().detach())
    assert start == pytest.approx(float(spectrum.values[5:].square().sum()), rel=1e-6)
    found = torch.autograd.grad(damage(), [down, up])
    scale = float(torch.trace(gradients @ linear.weight.detach().double() @ inputs @ linear.weight.detach().double().T))
    assert all(float(g.norm()) < 1e-6 * scale for g in found)  # stationary
    for seed in range(5):  # and no point near by is lower
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            moved = [x + 0.05 * x.std() * torch.randn(x.shape, generator=generator).double() for x in (up, down)]
            change = linear.weight.double() - moved[0] @ moved[1]
            assert float(torch.trace(gradients @ change @ inputs @ change.T)) > start


def test_gradient_moments_need_no_labels() -> None:
    model, data = model_and_data()
    linear = model.bert.get_submodule(FFN)
    plain = second_moments(model, data, [linear], gradients=True)[linear]
    labelled = [{**batch, "labels": torch.ones(8, dtype=torch.long)} for batch in data]
    other = second_moments(model, labelled, [linear], gradients=True)[linear]
    assert plain.gradients is not None and other.gradients is not None
    torch.testing.assert_close(plain.gradients, other.gradients)


@given(st.lists(st.tuples(st.integers(2, 4), st.integers(2, 4)), min_size=1, max_size=3), st.floats(0.4, 0.99))
@settings(max_examples=40, deadline=None)
def test_ranks_within_a_budget_are_the_best_but_for_less_than_one_term(shapes: list[Any], share: float) -> None:
    """Against all choices: what the greedy order leaves is at most that of the best choice of one term's price less."""
    generator = torch.Generator().manual_seed(len(shapes))
    spectra = {
        str(i): Spectrum.of(torch.randn(o, n, generator=generator), None, 0.0) for i, (o, n) in enumerate(shapes)
    }
    budget = share * sum(o * n for o, n in shapes)
    found = ranks_within(spectra, share, start_empty=True)

    def cost(ranks: tuple[int, ...]) -> int:
        return sum(r * (o + n) for r, (o, n) in zip(ranks, shapes, strict=True))

    def left(ranks: tuple[int, ...]) -> float:
        return sum(float(s.values[r:].square().sum()) for r, s in zip(ranks, spectra.values(), strict=True))

    choices = list(itertools.product(*(range(paying_rank(o, n) + 1) for o, n in shapes)))
    ours = tuple(found.get(str(i), 0) for i in range(len(shapes)))
    assert cost(ours) <= budget
    dearest = max(o + n for o, n in shapes)
    best = min(left(c) for c in choices if cost(c) <= budget - dearest or not any(c))
    assert left(ours) <= best + 1e-9


def test_a_share_keeps_no_more_values_than_that() -> None:
    model, data = model_and_data()
    for weighting in ("none", "activations", "both"):
        student = qbert.factorize(model, 0.5, weighting=weighting, data=data)  # type: ignore[arg-type]
        before = sum(t.matrix.numel() for t in layer_matrices(model))
        after = sum(t.matrix.numel() for t in layer_matrices(student))
        assert 0.4 * before < after <= 0.5 * before, weighting


def test_a_factored_student_goes_the_whole_way(tmp_path: Path) -> None:
    model, data = model_and_data()
    student = qbert.factorize(model, {"*.output.dense": 12, QUERY: 8}, data=data)
    assert sum(isinstance(m, FactoredLinear) for m in student.modules()) == 5
    quantized = qbert.quantize_model(student, {"*.up": 8, "*.down": 8, "*": 4})
    packed = qbert.pack(quantized)
    batch = inputs_for("bert")
    for name, saved in (("float", student), ("trainable", quantized), ("packed", packed)):
        saved.save_pretrained(tmp_path / name)
        assert same_state(qbert.load(tmp_path / name), saved)
    expected = outputs(packed, batch)
    for engine in (engine for engine in INT8 if not reason_not(engine)):
        got = outputs(qbert.optimize_for_inference(packed, engine=engine), batch)
        assert float((got - expected).norm() / expected.norm()) < 0.01  # a value between two codes may fall to either
    loss = quantized.train()(**batch, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert quantized.bert.get_submodule(QUERY).down.weight.grad.abs().sum() > 0


def test_a_correction_takes_off_what_it_says() -> None:
    """Beside the same codes, the error in the weights is that of the terms left out."""
    model, _ = model_and_data()
    config = qbert.BitsConfig(2, embedding_bits=32)
    plain = qbert.quantize_model(model, config).bert.get_submodule(FFN)
    student = quantize_with_correction(model, config, {FFN: 8}, weighting="none", factor_bits=32)
    layer = student.bert.get_submodule(FFN)
    assert isinstance(layer, CorrectedLinear) and layer.whole.spec.bits == 2
    assert torch.equal(layer.whole.quantized_weight(), plain.quantized_weight())
    weight = model.bert.get_submodule(FFN).weight.detach()
    error = np.linalg.svd((weight - plain.quantized_weight()).numpy(), compute_uv=False)
    left = (weight - layer.weight.detach()).square().sum()
    assert float(left) == pytest.approx(float((error[8:] ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_corrections_bring_the_outputs_nearer_and_can_be_packed(rounding: str, tmp_path: Path) -> None:
    model, data = model_and_data()
    config = qbert.BitsConfig(2, embedding_bits=32, rounding=rounding, activation_bits=None)
    alone = qbert.quantize_model(model, config, calibration_data=data if rounding == "compensated" else None)
    student = quantize_with_correction(model, config, 12, data=data)
    batch = data[0]
    error, before = ((outputs(m, batch) - outputs(model, batch)).square().mean() for m in (student, alone))
    assert float(error) < 0.5 * float(before)
    packed = qbert.pack(student)
    packed.save_pretrained(tmp_path)
    assert torch.equal(outputs(qbert.load(tmp_path), batch), outputs(packed, batch))
    torch.testing.assert_close(outputs(packed, batch), outputs(student, batch), rtol=1e-5, atol=1e-6)


def test_zeros_are_noted_where_they_still_are() -> None:
    pruned = qbert.prune(model_and_data()[0], pattern="2:4", names=[QUERY, FFN])
    assert set(noted_zeros(qbert.factorize(pruned, {QUERY: 8}))) == {FFN}
    student = quantize_with_correction(pruned, qbert.BitsConfig(3, embedding_bits=32), {QUERY: 8})
    assert set(noted_zeros(student)) == {f"{QUERY}.whole", FFN}
    whole = student.bert.get_submodule(f"{QUERY}.whole")
    assert not whole.quantized_weight()[pruned.bert.get_submodule(QUERY).weight == 0].any()


def test_a_share_for_corrections_is_an_upper_bound() -> None:
    model, data = model_and_data()
    student = quantize_with_correction(model, qbert.BitsConfig(2, embedding_bits=32), 0.2, data=data)
    parts = [m for m in student.modules() if isinstance(m, CorrectedLinear)]
    values = sum(p.down.weight.numel() + p.up.weight.numel() for p in parts)
    whole = sum(t.matrix.numel() for t in layer_matrices(model))
    assert 0.1 * whole < values <= 0.2 * whole


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (25, {}, r"rank=25 of encoder\.layer\.0\.attention\.self\.query takes 2,400 values.*up to 23 pay"),
        (0, {}, "rank=0 of .* whole number from 1 to 23"),
        ({"pooler": 3}, {}, "'pooler' matches no matrix"),
        (4, {"weighting": "inputs"}, "weighting='inputs' is not known"),
        (4, {"weighting": "both"}, "needs data"),
        (0.01, {}, "no room for one term of each of 12"),
    ],
)
def test_what_cannot_be_factorized_is_refused(rank: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qbert.factorize(build("bert"), rank, **options)


def test_gradients_of_a_model_without_a_head_are_refused() -> None:
    model, data = model_and_data()
    with pytest.raises(ValueError, match="has no logits"):
        qbert.factorize(model.bert, 4, weighting="both", data=data)


def test_corrections_without_data_round_to_nearest_as_quantize_model_does() -> None:
    model, _ = model_and_data()
    with pytest.warns(UserWarning, match="needs calibration_data, so they are rounded to nearest"):
        student = quantize_with_correction(model, {"encoder": {"bits": 4, "rounding": "compensated"}}, 2)
    assert isinstance(student.bert.get_submodule(QUERY), CorrectedLinear)
