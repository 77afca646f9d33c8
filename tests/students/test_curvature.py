"""The moments that prune and factorise weigh by, for every kind of head."""

from typing import Any

import pytest
import torch
from encoders import HEADS, head
from torch import Tensor, nn

import qbert
from qbert.allocation.kronecker import kronecker_factors
from qbert.hessian.losses import model_loss
from qbert.students.curvature import second_moments
from qbert.students.lowrank import quantize_with_correction


def padded_batch(rows: int = 4, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor([length - i % 4 for i in range(rows)]).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def rows_alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": ids[: int(mask.sum())].unsqueeze(0), "attention_mask": mask[: int(mask.sum())].unsqueeze(0)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def dense_moment(model: Any, linear: nn.Linear, rows: list[dict[str, Tensor]], kind: str) -> Tensor:
    """G of `linear`, a row and an output after the other: the sum over tokens of J_t^T H J_t, a mean over labels."""
    total, count = torch.zeros(linear.out_features, linear.out_features, dtype=torch.float64), 0
    for row in rows:
        seen: list[Tensor] = []
        handle = linear.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        output = model(**row)
        handle.remove()
        groups = [output.start_logits[0], output.end_logits[0]] if kind == "spans" else [output.logits[0]]
        if kind == "tags":
            groups = list(groups[0])
        count += len(groups) if kind == "tags" else 1
        for z in groups:
            p = z.detach()
            if kind in ("one value", "values"):
                metric = 2 / len(z) * torch.eye(len(z))
            elif kind == "several labels":
                metric = (p.sigmoid() * (1 - p.sigmoid()) / len(z)).diag()
            else:
                metric = p.softmax(0).diag() - torch.outer(p.softmax(0), p.softmax(0))
            if kind == "spans":
                metric = metric / 2
            jacobian = torch.stack([torch.autograd.grad(one, seen[0], retain_graph=True)[0][0] for one in z])
            total += torch.einsum("cto,cd,dtp->op", jacobian, metric, jacobian).double()
    return total / count


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_moments_are_those_of_the_rows_without_padding(kind: str) -> None:
    model, batch = head(kind), padded_batch()
    linear = model.bert.encoder.layer[0].output.dense
    config = model.config.to_dict()
    found = second_moments(model, [batch], [linear], gradients=True)[linear].gradients
    assert found is not None
    expected = dense_moment(model, linear, rows_alone(batch), kind)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert model.config.to_dict() == config  # transformers writes what it takes labels for into it


def test_random_sums_of_columns_estimate_the_same_moment() -> None:
    """Spans have two columns a token, and a backward pass each would take hours on long rows."""
    model = head("classes")
    linear = model.bert.encoder.layer[0].output.dense
    rows = {"input_ids": torch.randint(5, 100, (1, 6)).expand(300, -1), "labels": torch.zeros(300, dtype=torch.long)}
    exact = kronecker_factors(model, [rows], [linear], model_loss)[linear].gradients
    many = kronecker_factors(model, [rows], [linear], model_loss, most_columns=1)[linear].gradients
    assert float((many - exact).norm()) < 0.2 * float(exact.norm())


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_can_be_pruned_factorized_and_corrected_on_data(kind: str) -> None:
    model = head(kind)
    data = [{**padded_batch(), "row": torch.arange(4)}]  # with a column that no forward takes
    for student in (
        qbert.prune(model, ffn=0.5, data=data),
        qbert.factorize(model, 0.5, data=data),
        quantize_with_correction(model, 4, 2, data=data),
    ):
        assert type(student).__name__ == type(model).__name__


def test_outputs_of_unknown_loss_are_weighed_by_inputs_and_it_is_said() -> None:
    model = head("classes")
    model.bert.classifier, encoder = model.classifier, model.bert  # a head that gives no logits
    with pytest.warns(UserWarning, match=r"no logits whose loss is known.*weighed by their inputs only"):
        student = qbert.factorize(encoder, 0.5, data=[padded_batch()])
    plain = qbert.factorize(encoder, 0.5, weighting="activations", data=[padded_batch()])
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), plain.parameters(), strict=True))
    with pytest.warns(UserWarning, match="weighed by their inputs only"):
        qbert.prune(encoder, ffn=0.5, data=[padded_batch()])
    with pytest.raises(ValueError, match=r"no logits whose loss is known.*weigh by activations only"):
        qbert.factorize(encoder, 0.5, weighting="both", data=[padded_batch()])
