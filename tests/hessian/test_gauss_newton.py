"""Gauss-Newton eigenpairs: against dense matrices from Jacobians, for every kind of head and loss."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from encoders import build, inputs_for
from torch.func import functional_call

from qbert.allocation.kronecker import kronecker_factors
from qbert.hessian import gauss_newton_top, hessian_spectrum, parameter_blocks
from qbert.hessian.gauss_newton.loss_factor import NoModelOutputError

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 100}


def head(kind: str) -> tuple[Any, list[dict[str, torch.Tensor]], Any]:
    """A model, two batches of unequal size, and the loss Hessian [d, d] at one sample's outputs."""
    config = tf.BertConfig(**SMALL, num_labels={"regression": 1, "spans": 2}.get(kind, 3))  # type: ignore
    classes = {
        "tokens": tf.BertForTokenClassification,
        "spans": tf.BertForQuestionAnswering,
    }
    model = classes.get(kind, tf.BertForSequenceClassification)(config).double()
    batches = [inputs_for("bert", batch=4, length=5), inputs_for("bert", batch=2, length=5)]
    for batch in batches:
        n = len(batch["input_ids"])
        if kind == "classes":
            batch["labels"] = torch.arange(n) % 3
        elif kind == "regression":
            batch["labels"] = torch.rand(n, dtype=torch.float64)
        elif kind == "tokens":
            batch["labels"] = torch.arange(5 * n).view(n, 5) % 3
            batch["labels"][:, 4] = -100
        else:
            batch |= {"start_positions": torch.arange(n) % 5, "end_positions": torch.full((n,), 4)}

    def softmax_hessian(z: torch.Tensor) -> torch.Tensor:
        p = z.softmax(-1)
        return torch.diag(p) - p[:, None] * p[None]

    def loss_hessian(outputs: list[torch.Tensor], sample: int) -> torch.Tensor:
        z = [o[sample] for o in outputs]
        if kind == "classes":
            return softmax_hessian(z[0])
        if kind == "regression":
            return 2 * torch.ones(1, 1, dtype=torch.float64)
        if kind == "tokens":
            zero = torch.zeros(3, 3, dtype=torch.float64)
            return torch.block_diag(*[softmax_hessian(t) / 4 for t in z[0][:4]], zero)
        return torch.block_diag(*[softmax_hessian(t) / 2 for t in z])

    return model, batches, loss_hessian


def dense_gauss_newton(model: Any, batches: Any, parameters: Any, loss_hessian: Any) -> torch.Tensor:
    names = [n for p in parameters for n, q in model.named_parameters() if q is p]
    sizes = [p.numel() for p in parameters]
    model.set_attn_implementation("eager")
    model.eval()
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    total, count = torch.zeros(len(flat), len(flat), dtype=torch.float64), 0
    for batch in batches:

        def outputs(flat: torch.Tensor, batch: Any = batch) -> tuple[torch.Tensor, ...]:
            parts = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
            out = functional_call(model, dict(zip(names, parts, strict=True)), kwargs=batch)
            return (out.logits,) if "logits" in out else (out.start_logits, out.end_logits)

        jacobians = torch.autograd.functional.jacobian(outputs, flat)
        values = list(outputs(flat))
        for sample in range(len(values[0])):
            J = torch.cat([j[sample].reshape(-1, len(flat)) for j in jacobians])
            total += J.T @ loss_hessian(values, sample) @ J
            count += 1
    return total.detach() / count


@pytest.mark.parametrize("kind", ["classes", "regression", "tokens", "spans"])
def test_eigenpairs_are_those_of_the_dense_gauss_newton_matrix(kind: str) -> None:
    model, batches, loss_hessian = head(kind)
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    found = gauss_newton_top(model, batches, blocks, rank=64)
    few = gauss_newton_top(model, batches, blocks, rank=3)
    sketched = gauss_newton_top(model, batches, blocks, rows_per_sample=1)
    assert model.training
    for name, parameters in blocks.items():
        values, vectors = torch.linalg.eigh(dense_gauss_newton(model, batches, parameters, loss_hessian))
        top = float(values[-1])
        assert found[name].converged and found[name].value == pytest.approx(top, rel=1e-9)
        assert abs(float(found[name].vector @ vectors[:, -1])) == pytest.approx(1, abs=1e-6)
        assert few[name].value <= top * (1 + 1e-9)
        assert few[name].value * (1 + few[name].error) >= top * (1 - 1e-9)
        # One random row in place of two or more: right on average, never called exact.
        assert sketched[name].converged == (kind == "regression")
        assert 0.2 * top < sketched[name].value < 5 * top


def test_the_fast_mode_of_a_spectrum_is_the_gauss_newton_matrix() -> None:
    model, batches, loss_hessian = head("classes")
    spectrum = hessian_spectrum(model, batches, runs=1, fraction=1.0, method="ggn", progress=False)
    for name, value in zip(spectrum.names, spectrum.eigenvalues[0], strict=True):
        parameters = {b.name: b.parameters for b in parameter_blocks(model, "layer")}[name]
        expected = torch.linalg.eigvalsh(dense_gauss_newton(model, batches, parameters, loss_hessian))[-1]
        assert value == pytest.approx(float(expected), rel=1e-3)
    assert spectrum.converged.all() and (spectrum.products == 0).all()


def test_samples_without_labels_have_no_share() -> None:
    model, batches, _ = head("classes")
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    expected = gauss_newton_top(model, [{k: v[:2] for k, v in batches[0].items()}], blocks)
    batches[0]["labels"][2:] = -100
    found = gauss_newton_top(model, batches[:1], blocks)
    for name in blocks:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-9)


def test_a_loss_without_visible_outputs_is_refused_by_name_and_left_out_as_a_start() -> None:
    model = build("bert").base_model
    batch = {**inputs_for("bert", batch=4), "labels": torch.rand(4)}

    def loss_fn(model: Any, batch: Any) -> Any:
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return (hidden.mean((1, 2)) - batch["labels"]).square().mean()

    with pytest.raises(NoModelOutputError, match="shows no logits"):
        hessian_spectrum(model, [batch], runs=1, fraction=1.0, method="ggn", loss_fn=loss_fn, progress=False)
    spectrum = hessian_spectrum(model, [batch], runs=1, fraction=1.0, loss_fn=loss_fn, tol=0.1, progress=False)
    assert np.isfinite(spectrum.eigenvalues).all()


class TwoHeads(torch.nn.Module):
    """A BERT whose loss adds `share` of that of a second head, which no `logits` show."""

    def __init__(self, share: float):
        super().__init__()
        config = tf.BertConfig(**SMALL)  # type: ignore
        self.bert, self.share = tf.BertModel(config), share
        self.first, self.second = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        a, c = self.first(hidden), self.second(hidden)
        losses = [torch.nn.functional.cross_entropy(z, labels) for z in (a, c)]
        return {"loss": losses[0] + self.share * losses[1], "logits": a, "logits2": c}


@pytest.mark.parametrize("elsewhere", ["nowhere", "a second head", "the weights themselves"])
def test_a_loss_that_comes_not_through_the_logits_alone_has_no_gauss_newton_matrix(elsewhere: str) -> None:
    model = TwoHeads(1.0 if elsewhere == "a second head" else 0.0).double()
    batch = {**inputs_for("bert", batch=4), "labels": torch.tensor([0, 1, 1, 0])}
    batch.pop("token_type_ids", None)
    layer = model.bert.encoder.layer[0]

    def loss_fn(model: Any, batch: Any) -> Any:
        loss = model(**batch)["loss"]
        return loss + 0.1 * layer.output.dense.weight.square().sum() if elsewhere == "the weights themselves" else loss

    blocks = {"layer": list(layer.parameters())}
    measurements: list[Any] = [
        lambda: gauss_newton_top(model, [batch], blocks, loss_fn=loss_fn),
        lambda: kronecker_factors(model, [batch], [layer.output.dense], loss_fn),
    ]
    for measure in measurements:
        if elsewhere == "nowhere":
            measure()
        else:
            with pytest.raises(NoModelOutputError, match="other ways than through its logits"):
                measure()
    spectrum = hessian_spectrum(model, [batch], runs=1, fraction=1.0, loss_fn=loss_fn, tol=0.1, progress=False)
    assert spectrum.converged.all()
