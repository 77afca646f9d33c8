"""Gauss-Newton rows: all samples in one pass against each sample by itself, and outer products against matrices."""

import logging
from typing import Any

import pytest
import torch
from encoders import FAMILIES, build, inputs_for
from torch import nn

from qbert.hessian import parameter_blocks
from qbert.hessian.gauss_newton.factor_rows import FactorRows, OuterProducts
from qbert.hessian.gauss_newton.sample_gradients import sample_rows
from qbert.hessian.losses import MeasuredLoss

ONE_BY_ONE = {"mobilebert", "deberta-v2"}  # norms of their own; position embeddings that go through query and key


def rows_of(model: Any, batches: Any, blocks: Any, together: bool, most: int = 8) -> Any:
    groups = sample_rows(MeasuredLoss(model, batches), blocks, rows_per_sample=most, seed=0, together=together)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}
    for group in groups:
        for name, rows in group.rows.items():
            found[name].append(rows.dense())
    return {name: torch.cat(rows) for name, rows in found.items()}


def assert_same_matrices(one: Any, other: Any) -> None:
    """A^T A is the same: the rows of a sample may differ by a rotation."""
    for name, rows in one.items():
        probe = torch.randn(rows.shape[1], dtype=rows.dtype)
        expected = other[name].T @ (other[name] @ probe)
        assert expected.norm() > 0
        torch.testing.assert_close(
            rows.T @ (rows @ probe), expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max())
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_together_are_samples_by_themselves(family: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    model = build(family).double()
    batches = [inputs_for(family, batch=size, length=7) for size in (5, 1)]
    for batch in batches:
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
        batch["labels"] = torch.arange(len(next(iter(batch.values())))) % 2
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    blocks |= {b.name: b.parameters for b in parameter_blocks(model, "group")[:5]}
    with caplog.at_level(logging.INFO, logger="qbert.hessian.gauss_newton.sample_gradients"):
        together = rows_of(model, batches, blocks, True)
    assert bool(caplog.records) == (family in ONE_BY_ONE)
    assert_same_matrices(together, rows_of(model, batches, blocks, False))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """A token model [B, T] -> classes with one habit that the quick way must not be taken in by."""

    def __init__(self, habit: str):
        super().__init__()
        self.habit = habit
        self.table = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.table(input_ids)
        h = self.inner(h.transpose(0, 1)).transpose(0, 1) if self.habit == "tokens first" else self.inner(h)
        if self.habit == "changed in place":
            h.mul_(3)
        if self.habit == "second use":
            h = nn.functional.linear(h.tanh(), self.inner.weight)
        if self.habit == "flat":
            h = self.inner(h.tanh().flatten(0, 1)).view(h.shape)
        logits = self.head(h.tanh().sum(dim=1))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.habit == "pairs":
            loss = loss + 3 * (logits.sum(dim=0) ** 2).sum()
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("habit", ["none", "tokens first", "changed in place", "second use", "flat", "pairs"])
def test_odd_models_are_noticed(habit: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Odd(habit).double()
    batch = {"input_ids": torch.randint(0, 11, (5, 5)), "labels": torch.tensor([-100, 1, 2, 0, 1])}
    blocks = {"inner": [model.inner.weight, model.inner.bias]}
    with caplog.at_level(logging.INFO, logger="qbert.hessian.gauss_newton.sample_gradients"):
        together = rows_of(model, [batch], blocks, True)
    assert bool(caplog.records) == (habit != "none")
    assert_same_matrices(together, rows_of(model, [batch], blocks, False))


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(3, 7, 5), (40, 3, 2)])
def test_outer_products_are_their_matrices(tokens: int, outputs: int, inputs: int) -> None:
    row = torch.arange(tokens) * 3 // tokens  # some 3 of 4 matrices; the last one is zero
    outer = OuterProducts(torch.randn(tokens, outputs).double(), torch.randn(tokens, inputs).double(), row, 4)
    matrices = torch.zeros(4, outputs, inputs, dtype=torch.float64)
    for t in range(tokens):
        matrices[row[t]] += torch.outer(outer.left[t], outer.right[t])
    flat = matrices.flatten(1)
    weights = torch.randn(4).double()
    torch.testing.assert_close(outer.dense(), flat)
    torch.testing.assert_close(outer.gram(), flat @ flat.T)
    torch.testing.assert_close(outer.combined(weights), weights @ flat)
    torch.testing.assert_close(outer.cut(1, 3).dense(), matrices[:, 1:3].flatten(1))
    torch.testing.assert_close(outer.matrices(1, 3).dense(), flat[1:3])


def test_rows_of_both_kinds_join_and_come_apart() -> None:
    torch.manual_seed(0)

    def outer(count: int) -> OuterProducts:
        return OuterProducts(torch.randn(9, 3).double(), torch.randn(9, 2).double(), torch.arange(9) % count, count)

    first, second = (
        FactorRows([outer(4), torch.randn(4, 5).double()]),
        FactorRows([outer(3), torch.randn(3, 5).double()]),
    )
    third = FactorRows([torch.randn(2, 6).double(), torch.randn(2, 5).double()])
    for pieces in ([first, second], [first, third, second]):
        joined = FactorRows.joined(pieces)
        dense = torch.cat([piece.dense() for piece in pieces])
        assert len(joined) == len(dense) and joined.sizes == [6, 5]
        torch.testing.assert_close(joined.dense(), dense)
        torch.testing.assert_close(joined.gram(), dense @ dense.T)
        weights = torch.randn(len(dense)).double()
        torch.testing.assert_close(joined.combined(weights), weights @ dense)
        torch.testing.assert_close(torch.cat([piece.dense() for piece in joined.slices(2)]), dense)
        assert max(len(piece) for piece in joined.slices(2)) == 2
