"""Sensitivity measures against dense Hessians, exact losses and a model left as it was."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for
from scipy.stats import kendalltau

from qbert.allocation.allocate import allocate_bits
from qbert.allocation.predictions import METRICS, Sensitivities
from qbert.allocation.sensitivity import LossChanges, sensitivity
from qbert.bits import BitsConfig
from qbert.encoders.targets import find_targets
from qbert.hessian import hessian_spectrum, parameter_blocks
from qbert.quantize import quantize_model
from qbert.sizes import model_size

FAST: dict[str, Any] = {"probes": 4, "runs": 2, "fraction": 0.5, "progress": False, "groups": 2}


def tiny(family: str = "bert", **overrides: Any) -> Any:
    """A model whose layers have a few hundred parameters, in float64, with weights large enough to curve the loss."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 3}
    model = build(family, **{**sizes, **overrides}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def labelled(family: str = "bert", count: int = 3, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    batches = []
    for _ in range(count):
        batch = inputs_for(family, rows)
        batches.append(batch | {"labels": torch.arange(rows) % 2})
    return batches


def dense(model: Any, batches: Any, weights: list[torch.nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [n] and Hessian [n, n] of the mean loss in some weights, by plain double backward."""
    model.config._attn_implementation = "eager"
    loss = torch.stack([model(**b).loss * len(b["labels"]) for b in batches]).sum() / sum(
        len(b["labels"]) for b in batches
    )
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient[i], weights, retain_graph=True)])
        for i in range(len(gradient))
    ]
    return gradient.detach(), torch.stack(rows)


def test_quadratic_form_trace_and_gradient_against_a_dense_hessian() -> None:
    model, batches = tiny(), labelled()
    report = sensitivity(model, batches, bits=(2, 4), samples=None, **(FAST | {"probes": 60}))
    students = {b: quantize_model(model, BitsConfig({"*": b}, groups=2, embedding_bits=32)) for b in (2, 4)}
    for i, name in enumerate(report.names):
        paths = [t.path for t in find_targets(model) if t.name in report.members[name]]
        weights = [model.get_submodule(p).weight for p in paths]
        gradient, hessian = dense(model, batches, weights)
        mean = float(hessian.diagonal().mean())
        assert abs(report.trace[i] - mean) <= 4 * report.trace_error[i]
        assert report.trace_error[i] < 0.5 * float(hessian.square().mean().sqrt()) * math.sqrt(len(hessian))
        for j, b in enumerate((2, 4)):
            moved = torch.cat(
                [
                    (students[b].get_submodule(p).quantized_weight() - w.detach()).reshape(-1)
                    for p, w in zip(paths, weights, strict=True)
                ]
            )
            assert report.weight_error[i, j] == pytest.approx(float(moved.square().sum()), rel=1e-9)
            assert report.curvature[i, j] == pytest.approx(float(moved @ hessian @ moved), rel=1e-6, abs=1e-12)
            assert report.gradient[i, j] == pytest.approx(float(gradient @ moved), rel=1e-6, abs=1e-12)


def test_loss_change_is_that_of_quantizing_the_block_alone() -> None:
    model, batches = tiny(), labelled()
    report = sensitivity(model, batches, bits=(2, 3), samples=None, **FAST)
    rows = sum(len(b["labels"]) for b in batches)

    def mean_loss(m: Any) -> float:
        with torch.no_grad():
            return sum(float(m(**b).loss) * len(b["labels"]) for b in batches) / rows

    assert report.loss == pytest.approx(mean_loss(model), rel=1e-9)
    for i, name in enumerate(report.names):
        for j, b in enumerate((2, 3)):
            alone = BitsConfig({name: b}, groups=2, embedding_bits=32, activation_bits=None)
            expected = mean_loss(quantize_model(model, alone)) - mean_loss(model)
            assert report.loss_change[i, j] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_taylor_tends_to_the_loss_change_for_small_changes() -> None:
    model, batches = tiny(), labelled()
    report = sensitivity(model, batches, bits=(8,), samples=None, **FAST)
    assert report.table("taylor") == pytest.approx(report.loss_change, rel=0.1, abs=1e-7)


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2", "modernbert", "mobilebert", "vit", "distilbert"])
def test_cached_prefix_gives_the_losses_of_the_whole_model(family: str) -> None:
    model, batches = build(family).double().eval(), labelled(family, count=2)
    if family == "vit":
        batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    cached, plain = LossChanges(model, batches), LossChanges(model, batches, cache_prefix=False)
    assert cached.loss == plain.loss
    targets = [t for t in find_targets(model) if t.layer is not None]
    for target in [*targets, targets[0]]:
        moved = {target.name: target.module.weight.detach() * 1.5}  # type: ignore[operator]
        assert cached.of(moved) == pytest.approx(plain.of(moved), rel=1e-9, abs=1e-12)
    assert cached._cache.usable == (family != "albert")  # ALBERT applies one layer twice: nothing to cache
    assert not plain._cache.usable


def test_cached_prefix_saves_layer_calls() -> None:
    model, batches = build("bert", num_hidden_layers=4).eval(), labelled(count=1)
    changes = LossChanges(model, batches)
    calls = []
    for index, layer in enumerate(model.bert.encoder.layer):
        original = layer.attention.register_forward_hook(lambda *_, index=index: calls.append(index))
        assert original is not None
    weight = model.bert.encoder.layer[3].output.dense.weight.detach()
    changes.of({"encoder.layer.3.output.dense": weight * 2})
    calls.clear()
    changes.of({"encoder.layer.3.output.dense": weight * 3})
    assert calls == [3]


def test_a_model_that_changes_what_it_computes_is_run_whole() -> None:
    """A layer whose output does not determine what follows must not be cached."""

    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers: Any = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            first = self.layers[0][0](x)
            return {"loss": (self.layers[1][0](first) - labels).square().mean()}

    model = Leaky()
    batches = [{"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}]
    changes = LossChanges(model, batches)
    before = changes.loss
    assert changes.of({"layers.1.0": torch.zeros(4, 4)}) != 0
    assert not changes._cache.usable and before == LossChanges(model, batches, cache_prefix=False).loss


def test_model_is_left_as_it_was_also_when_interrupted() -> None:
    model, batches = tiny().train(), labelled()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {n: (id(p), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()}
    random = torch.random.get_rng_state()

    def check() -> None:
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert identities == {n: (id(p), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()}
        assert model.training and all(p.grad is None for p in model.parameters())
        assert all("forward" not in m.__dict__ for m in model.modules())
        assert torch.equal(random, torch.random.get_rng_state())

    sensitivity(model, batches, bits=(2, 3), **FAST)
    check()

    def interrupting(m: Any, batch: Any) -> torch.Tensor:
        if any("forward" in layer.__dict__ for layer in m.modules()):  # weights replaced and a prefix cached
            raise KeyboardInterrupt
        return m(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, batches, bits=(2, 3), loss_fn=interrupting, **FAST)
    check()


@pytest.mark.parametrize("granularity", ["layer", "block", "matrix"])
def test_granularities_and_a_given_spectrum(granularity: str) -> None:
    model, batches = tiny(), labelled()
    spectrum = hessian_spectrum(model, batches, runs=2, fraction=0.5, granularity=granularity, progress=False)
    report = sensitivity(model, batches, bits=(2, 4), spectrum=spectrum, probes=4, progress=False, groups=2)
    assert report.names == [b.name for b in parameter_blocks(model, granularity)]
    assert report.omega.tolist() == spectrum.sensitivity.tolist()
    assert report.table("omega") == pytest.approx(spectrum.sensitivity[:, None] * report.weight_error)
    again = sensitivity(model, batches, bits=(2, 4), spectrum=spectrum, probes=4, progress=False, groups=2)
    assert all(np.array_equal(report.table(m), again.table(m)) for m in METRICS)


def test_rank_correlations_are_those_of_scipy_and_the_truth_agrees_with_itself() -> None:
    report = sensitivity(tiny(), labelled(), bits=(2, 3), **FAST)
    found = report.rank_correlations()
    assert set(found) == set(METRICS) - {"loss_change"}
    expected = kendalltau(report.table("trace")[:, 1], report.loss_change[:, 1]).statistic
    assert found["trace"][3].kendall == pytest.approx(expected)
    same = Sensitivities(**{**report.__dict__, "weight_error": report.loss_change}).rank_correlations()
    assert same["weight_error"][2] == (1.0, 1.0)
    with pytest.raises(ValueError, match="metric: 'nonsense' is unknown"):
        report.using("nonsense")
    text = str(report)
    assert "rank correlation with loss_change" in text and all(m in text for m in METRICS)


def test_report_feeds_the_allocation() -> None:
    model = tiny()
    report = sensitivity(model, labelled(), bits=(2, 4, 8), **FAST)
    low, high = (model_size(model, BitsConfig(b, embedding_bits=8, groups=2)).mb for b in (2, 4))
    kwargs: Any = {"bits": (2, 4, 8), "size_mb": (low + high) / 2, "model": model, "groups": 2}
    for metric in METRICS:
        own = allocate_bits(report.using(metric), **kwargs)
        assert own == allocate_bits(report, damage=report.damage(metric), **kwargs)
        assert model_size(model, own).mb <= kwargs["size_mb"]
    paper = allocate_bits(report.using("omega"), bits=(2, 4))
    assert [n for n in report.names if paper.rules[n]["bits"] == 4] == sorted(report.ranking("omega")[:2])
    spectrum_only = dict(zip(report.names, report.omega, strict=True))
    assert allocate_bits(spectrum_only, **kwargs) == allocate_bits(report.using("omega"), **kwargs)


def test_save_and_load(tmp_path: Path) -> None:
    report = sensitivity(tiny(), labelled(), bits=(2, 3), **FAST).using("trace")
    report.save(tmp_path / "report.json")
    again = Sensitivities.load(tmp_path / "report.json")
    assert str(again) == str(report) and again.metric == "trace" and again.settings == report.settings
    assert all(np.array_equal(again.table(m), report.table(m)) for m in METRICS)
    text = (tmp_path / "report.json").read_text()
    for damaged, message in (
        (text[: len(text) // 2], "not valid JSON"),
        ("{}", "not a saved Sensitivities"),
        (text.replace('"omega"', '"omage"'), "damaged sensitivity file"),
        (text.replace('"trace": [', '"trace": [1.0, '), "another shape"),
        (json.dumps({**json.loads(text), "omega": report.weight_error.tolist()}), "omega has another shape"),
        (json.dumps({**json.loads(text), "gradient": report.omega.tolist()}), "gradient has another shape"),
    ):
        (tmp_path / "report.json").write_text(damaged)
        with pytest.raises(ValueError, match=message):
            Sensitivities.load(tmp_path / "report.json")


def test_a_model_that_breaks_at_few_bits_can_be_saved_and_is_not_allocated(tmp_path: Path) -> None:
    report = sensitivity(tiny(), labelled(), bits=(2, 3), **FAST)
    report.loss_change[0] = [np.inf, np.nan]
    report.save(tmp_path / "report.json")
    again = Sensitivities.load(tmp_path / "report.json")
    assert np.array_equal(again.loss_change, report.loss_change, equal_nan=True)
    with pytest.raises(ValueError, match=r"sensitivity of encoder\.layer\.0 is inf"):
        allocate_bits(again, bits=(2, 3), average_bits=2.5, model=tiny(), groups=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": (2, 32)}, "16 and 32 bits"),
        ({"bits": (2, 7)}, r"bits=\(2, 7\)"),
        ({"probes": 3}, "probes=3"),
        ({"samples": 0}, "samples=0"),
        ({"granularity": "head"}, "granularity"),
        ({"groups": 7}, "groups=7"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity(tiny(), labelled(), **(FAST | kwargs))


def test_compensated_rounding_is_refused_since_its_codes_hang_on_data() -> None:
    with pytest.raises(ValueError, match="rounding='compensated' depends on calibration data"):
        sensitivity(tiny(), labelled(), bits=(2,), **{**FAST, "rounding": "compensated"})


def test_a_foreign_spectrum_is_refused() -> None:
    batches = labelled()
    spectrum = hessian_spectrum(tiny(num_hidden_layers=2), batches, runs=1, fraction=1.0, progress=False)
    with pytest.raises(ValueError, match="its blocks are not those of the model"):
        sensitivity(tiny(), batches, spectrum=spectrum, **FAST)
