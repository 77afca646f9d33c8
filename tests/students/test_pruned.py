"""Heads, columns and weights taken out of an encoder: the least damage, smaller models, zeros that stay."""

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
from qbert.encoders.parts import LayerParts
from qbert.encoders.targets import encoder_layers
from qbert.encoders.widths import layer_widths
from qbert.inference.cpu_layers import reason_not_native_layers
from qbert.inference.gpu import GpuEncoder
from qbert.inference.gpu_layers import reason_not_to_fuse_on_gpu
from qbert.quantizers.rounding import damped, output_error
from qbert.quantizers.sparsity import Pattern, sparsify
from qbert.students.curvature import layer_matrices, observe, observe_layers
from qbert.students.pruned import remove_groups


def correlated(columns: int, rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Inputs [rows, columns] float64 with a mean, whose columns tell of each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator).double()
    return torch.randn(rows, columns, generator=generator).double() @ mix + 0.5


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(0)
    return mean, x.T @ x / len(x) - torch.outer(mean, mean)


def test_what_stays_is_the_least_squares_fit_of_the_old_outputs() -> None:
    x = correlated(12)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    found = remove_groups(weight, *moments(x), keep_groups=7, width=1, damping=1e-9)
    stay = found.kept
    inputs = np.concatenate([x[:, stay].numpy(), np.ones((len(x), 1))], 1)
    expected, *_ = np.linalg.lstsq(inputs, (x @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(found.weight[:, stay].numpy(), expected[:-1].T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.bias_change.numpy(), expected[-1], rtol=1e-5, atol=1e-7)
    assert not found.weight[:, [i for i in range(12) if i not in stay]].any()


@pytest.mark.parametrize("width", [1, 3])
def test_one_group_less_is_the_best_choice_of_one(width: int) -> None:
    """Against every choice, each with its own least-squares fit, in the metric of the outputs' gradients."""
    x = correlated(6 * width)
    weight = torch.randn(5, 6 * width, generator=torch.Generator().manual_seed(2)).double()
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).double()
    gradients = root @ root.T
    found = remove_groups(weight, *moments(x), keep_groups=5, width=width, gradients=gradients, damping=1e-9)
    errors = {}
    for gone in range(6):
        stay = [c for c in range(6 * width) if c // width != gone]
        inputs = np.concatenate([x[:, stay].numpy(), np.ones((len(x), 1))], 1)
        wanted = (x @ weight.T).numpy()
        fit, *_ = np.linalg.lstsq(inputs, wanted, rcond=None)
        errors[gone] = float((((inputs @ fit - wanted) @ root.numpy()) ** 2).sum())
    assert [g for g in range(6) if g not in found.kept] == [min(errors, key=lambda g: errors[g])]


def test_without_compensation_the_cheapest_columns_go_and_nothing_else_changes() -> None:
    x = correlated(8)
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(4)).double()
    found = remove_groups(weight, *moments(x), keep_groups=5, width=1, compensate=False)
    costs = [float((torch.outer(x[:, j], weight[:, j])).square().sum()) for j in range(8)]
    assert found.kept == sorted(sorted(range(8), key=lambda j: -costs[j])[:5])
    assert torch.equal(found.weight[:, found.kept], weight[:, found.kept]) and not found.bias_change.any()


def test_patterns_are_kept_and_the_cheapest_weights_go() -> None:
    weight = torch.randn(6, 16)
    sparse = sparsify(weight, None, Pattern.parse("2:4"))
    runs, gone = weight.abs().unflatten(1, (-1, 4)), (sparse == 0).unflatten(1, (-1, 4))
    assert (gone.sum(2) == 2).all()
    assert (runs.masked_fill(~gone, 0).amax(2) <= runs.masked_fill(gone, 9).amin(2)).all()
    assert int((sparsify(weight, None, Pattern.parse(0.25)) == 0).sum()) == 24


@given(st.sampled_from(["2:4", "1:2", 0.5, 0.25]), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_weights_that_stay_are_settled_for_the_zeros(pattern: Any, seed: int) -> None:
    """Each row is the least-squares solution on the weights that it keeps."""
    x = correlated(16, seed=seed)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).double()
    metric = damped(x.T @ x / len(x), 0.01)
    found = sparsify(weight, x.T @ x / len(x), Pattern.parse(pattern), sweeps=2000)
    for row in range(4):
        stay = (found[row] != 0).nonzero().flatten()
        best = torch.linalg.solve(metric[stay][:, stay], metric[stay] @ weight[row])
        torch.testing.assert_close(found[row, stay], best, rtol=1e-3, atol=1e-4)


def test_compensated_zeros_cost_less_than_zeros_by_magnitude() -> None:
    x = correlated(32, rows=2000)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).double()
    moment = x.T @ x / len(x)
    errors = [
        float(output_error(weight - sparsify(weight, given, Pattern.parse("2:4")), moment).sum())
        for given in (moment, None)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_the_best_mask_of_a_small_matrix_is_not_much_better() -> None:
    """Against all 2:4 masks of a row of eight weights."""
    x = correlated(8, rows=2000, seed=3)
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(5)).double()
    moment = x.T @ x / len(x)
    metric = damped(moment, 0.01)
    pairs = list(itertools.combinations(range(4), 2))
    best = np.inf
    for first, second in itertools.product(pairs, pairs):
        stay = torch.tensor([*first, *(4 + i for i in second)])
        solution = torch.zeros(1, 8).double()
        solution[0, stay] = torch.linalg.solve(metric[stay][:, stay], metric[stay] @ weight[0])
        best = min(best, float(output_error(weight - solution, metric)))
    ours = float(output_error(weight - sparsify(weight, moment, Pattern.parse("2:4"), sweeps=500), metric))
    assert best - 1e-9 <= ours < 3 * best


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_heads_and_columns_go_and_the_student_takes_the_whole_way(family: str, tmp_path: Path) -> None:
    teacher = build(family).eval()
    data = [inputs_for(family, 6) for _ in range(2)]
    batch = data[0]
    before = outputs(teacher, batch)
    student = qbert.prune(teacher, heads=0.25, ffn=0.5, data=data)
    assert [layer_widths(layer) for _, layer in encoder_layers(student)] == [(3, 48)] * 2
    assert torch.equal(outputs(teacher, batch), before)
    quantized = qbert.quantize_model(student, 4)
    packed = qbert.pack(quantized)
    for name, saved in (("float", student), ("trainable", quantized), ("packed", packed)):
        saved.save_pretrained(tmp_path / name)
        loaded = qbert.load(tmp_path / name)
        assert same_state(loaded, saved) and torch.equal(outputs(loaded, batch), outputs(saved, batch))
    fast = qbert.optimize_for_inference(packed)
    torch.testing.assert_close(outputs(fast, batch), outputs(packed, batch), rtol=0, atol=1e-5)
    quantized.train()(**batch, labels=torch.zeros(6, dtype=torch.long)).loss.backward()


def test_compensation_brings_the_outputs_nearer_than_magnitude() -> None:
    teacher = build("bert").eval()
    data = [inputs_for("bert", 16, 12) for _ in range(6)]

    def error(**how: Any) -> float:
        student = qbert.prune(teacher, **how)
        return sum(float((outputs(student, b) - outputs(teacher, b)).square().mean()) for b in data)

    for what in ({"ffn": 0.5}, {"heads": 0.5}, {"pattern": "2:4"}):
        assert error(**what, data=data) < error(**what), what


def test_inputs_are_those_that_the_pruned_layers_below_give() -> None:
    model = build("bert").eval()
    data = [inputs_for("bert", 4) for _ in range(2)]
    seen = {}
    for layer, inputs in observe_layers(model, data, lambda layer: [layer.output.dense]):
        seen |= inputs
        with torch.no_grad():
            layer.output.dense.weight.mul_(0.5)
    last = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        again = observe(model, [last], lambda: (model(**b) for b in data), data)[last]
    torch.testing.assert_close(seen[last].second, again.second)
    torch.testing.assert_close(seen[last].covariance, again.covariance)


def test_inputs_that_vary_by_far_less_than_they_are_long_keep_their_covariance() -> None:
    linear = torch.nn.Linear(6, 2)
    x = (100 + 1e-3 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))).view(4, 16, 6)
    found = observe(linear, [linear], lambda: (linear(part) for part in x), [{"x": part} for part in x])[linear]
    expected = torch.cov(x.double().flatten(0, 1).T, correction=0)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("how", [{"heads": 0.25}, {"ffn": 0.25}])
def test_rows_that_are_all_alike_are_enough_to_prune_on(how: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = build("bert").eval()
    row = {"input_ids": torch.randint(5, 100, (1, 60)).repeat(8, 1)}
    student = qbert.prune(model, **how, data=[row])  # type: ignore[arg-type]
    assert bool(torch.isfinite(outputs(student, row)).all())


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_zeros_stay_zeros_on_low_bits(scheme: str) -> None:
    model = build("bert").eval()
    data = [inputs_for("bert", 8) for _ in range(3)]
    student = qbert.prune(model, pattern="2:4", data=data)
    config = qbert.BitsConfig(3, rounding="compensated", scheme=scheme)
    quantized = qbert.quantize_model(student, config, calibration_data=data)
    for target in layer_matrices(student):
        zeros = target.matrix == 0
        assert int(zeros.sum()) * 2 == zeros.numel()
        assert not quantized.get_submodule(target.path).quantized_weight()[zeros].any(), target.name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "nothing to prune"),
        ({"heads": 0.9}, "heads=0.9 leaves none of the 4"),
        ({"ffn": 1.0}, "ffn=1.0 is not a share"),
        ({"ffn": [0.5]}, "1 shares for 2 layers"),
        ({"pattern": "4:2"}, "pattern='4:2' is not known"),
        ({"pattern": "2:5"}, "48 columns, no multiple of 5"),
        ({"pattern": "2:4", "names": "pooler"}, "'pooler' matches no matrix"),
    ],
)
def test_what_cannot_be_pruned_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qbert.prune(build("bert"), **how)


def test_columns_of_a_pattern_are_not_taken_out_afterwards() -> None:
    with pytest.raises(ValueError, match="zeros in a pattern; take heads and columns out first"):
        qbert.prune(qbert.prune(build("bert"), pattern="2:4"), ffn=0.5)
    both = qbert.prune(build("bert"), pattern="2:4", ffn=0.5)
    matrix = both.bert.encoder.layer[0].output.dense.weight
    assert matrix.shape == (48, 48) and int((matrix == 0).sum()) * 2 == matrix.numel()


def test_families_that_cannot_lose_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="adds a bias of all heads"):
        qbert.prune(build("mpnet"), heads=0.5)
    with pytest.raises(ValueError, match="not a layer of the BERT kind"):
        qbert.prune(build("deberta-v2"), ffn=0.5)


def test_the_gpu_encoder_runs_layers_of_other_widths() -> None:
    """On CPU tensors, where its operators are their slow twins."""
    teacher = build("bert").eval()
    packed = qbert.pack(qbert.quantize_model(qbert.prune(teacher.bert, heads=0.25, ffn=0.5), 4))
    batch = inputs_for("bert", 3, 11)
    with torch.no_grad():
        expected = packed(**batch)[0]
        packed.forward = GpuEncoder(packed)
        got = packed(**batch)[0]
    keep = batch["attention_mask"].bool()
    assert float((got - expected)[keep].norm() / expected[keep].norm()) < 0.02


def test_the_gpu_encoder_leaves_layers_in_factors_alone() -> None:
    model = build("bert").eval()
    packed = qbert.pack(qbert.quantize_model(qbert.factorize(model, 8), 4))
    assert "factors" in reason_not_to_fuse_on_gpu(packed.bert.encoder.layer[0])


@pytest.mark.parametrize("how", [{"heads": 0.25}, {"ffn": [0.5, 0.25]}, {"heads": [0.5, 0.25], "ffn": 0.5}], ids=str)
def test_the_native_engine_takes_layers_of_any_heads_and_columns(how: dict[str, Any]) -> None:
    packed = qbert.pack(qbert.quantize_model(qbert.prune(build("bert").eval().bert, **how), 4))
    parts = [LayerParts.of(layer) for layer in packed.encoder.layer]
    assert reason_not_native_layers([p for p in parts if p is not None]) == ""
