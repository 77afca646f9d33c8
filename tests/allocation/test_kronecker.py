"""Kronecker factors: exact for one input, and a prediction of the damage like the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import build, inputs_for
from torch import Tensor, nn

import qbert
from qbert.allocation.damage import quantized_weight, target_specs
from qbert.allocation.kronecker import kronecker_factors
from qbert.allocation.predictions import Sensitivities
from qbert.encoders.targets import find_targets
from qbert.hessian.losses import MeasuredLoss


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def test_damage_of_one_input_is_the_gauss_newton_term_itself() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, first = torch.randn(1, 5, dtype=torch.float64), model[0]
    change = torch.randn(4, 5, dtype=torch.float64)
    factors = kronecker_factors(model, [{"x": x, "labels": torch.tensor([1])}], [first], loss)[first]  # type: ignore[list-item, index]

    def logits(weight: Tensor) -> Tensor:
        return model[2](torch.tanh(F.linear(x, weight, first.bias)))[0]  # type: ignore[no-any-return, arg-type]

    _, moved = torch.autograd.functional.jvp(logits, first.weight, change)  # J dW
    p = logits(first.weight).softmax(0)  # type: ignore[arg-type]
    expected = 0.5 * (p @ moved.square() - (p @ moved) ** 2)
    assert factors.damage(change) == pytest.approx(float(expected.detach()), rel=1e-9)


def test_factors_are_means_over_samples_and_tokens_without_padding() -> None:
    model, batch = build("bert").eval().requires_grad_(False), inputs_for("bert", batch=4, length=8)
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    layer = model.bert.encoder.layer[0].output.dense
    whole = kronecker_factors(model, [batch], [layer])[layer]
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    apart = [kronecker_factors(model, [single], [layer])[layer] for single in singles]
    tokens = batch["attention_mask"].sum(1).double()
    gradients = torch.stack([f.gradients for f in apart]).mean(0)
    inputs = sum(f.inputs * n for f, n in zip(apart, tokens, strict=True)) / tokens.sum()
    assert torch.allclose(whole.gradients, gradients, rtol=1e-3, atol=1e-9)
    assert torch.allclose(whole.inputs, inputs, rtol=1e-4)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_prediction_beside_the_others_that_older_files_lack(tmp_path: Path) -> None:
    model = build("bert").eval()
    data = [{**inputs_for("bert", batch=8), "labels": torch.randint(0, 2, (8,))} for _ in range(2)]
    report = qbert.sensitivity(
        model, data, (2, 4), granularity="matrix", runs=1, fraction=1.0, probes=4, progress=False, groups=4
    )
    table = report.table("kronecker")
    assert table.shape == (12, 2) and bool((table >= 0).all()) and bool((table[:, 0] > table[:, 1]).all())
    report.save(tmp_path / "new.json")
    assert (Sensitivities.load(tmp_path / "new.json").table("kronecker") == table).all()
    content = json.loads((tmp_path / "new.json").read_text())
    del content["kronecker"], content["file_sha256"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = Sensitivities.load(tmp_path / "old.json")
    assert "kronecker" not in old.metrics and "kronecker" not in old.rank_correlations() and "kronecker" not in str(old)
    with pytest.raises(ValueError, match="'kronecker' was not measured"):
        old.table("kronecker")
    bits = qbert.allocate_bits(report.using("kronecker"), bits=(2, 4), average_bits=3, model=model)
    assert bits.rules


def test_predictions_on_some_samples_and_the_truth_on_others() -> None:
    model = build("bert").eval()
    data = [{**inputs_for("bert", batch=8), "labels": torch.randint(0, 2, (8,))} for _ in range(3)]
    how: dict[str, Any] = {"micro_batch_size": 4, "seed": 3}
    report = qbert.sensitivity(
        model, data, (2,), granularity="matrix", runs=1, samples=8, probes=4, held_out=True, progress=False, **how
    )
    drawn = MeasuredLoss.on_random_samples(model, data, None, samples=16, **how).batches
    assert len(drawn) == 4 and report.settings["samples"] == report.settings["held_out"] == 8
    with torch.no_grad():
        assert report.loss == pytest.approx(sum(float(model(**b).loss) for b in drawn[1::2]) / 2, rel=1e-5)
    target = next(t for t in find_targets(model) if t.name == report.names[0])
    module: Any = target.module
    change = quantized_weight(target, target_specs(model, 2)[target.path]) - module.weight.detach()
    expected = kronecker_factors(model, drawn[::2], [module])[module].damage(change)
    assert report.table("kronecker")[0, 0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="held_out: there is one micro-batch"):
        qbert.sensitivity(model, data[:1], (2,), spectrum=None, runs=1, fraction=1.0, held_out=True, progress=False)
