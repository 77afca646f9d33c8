"""Blocks of rows (one attention head's, say): their products, eigenvalues and Gauss-Newton matrices are slices."""

from typing import Any

import pytest
import torch
from encoders import build, inputs_for

from qbert import allocate_bits
from qbert.allocation.sensitivity import sensitivity
from qbert.hessian import HessianOperator, gauss_newton_top, hessian_spectrum, parameter_blocks
from qbert.hessian.blocks import Rows
from qbert.hessian.landscape import displaced


def tiny_bert() -> Any:
    torch.manual_seed(0)
    model = build("bert", hidden_size=8, num_attention_heads=2, intermediate_size=12).double().eval()
    for parameter in model.parameters():  # far from the tiny default initialization: an indefinite Hessian
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {**inputs_for("bert", batch=4, length=6), "labels": torch.tensor([0, 1, 1, 0])}


def test_groups_are_the_rows_of_heads_and_cover_every_matrix_once() -> None:
    model = tiny_bert()  # 2 heads of 4 rows; 12 rows in the feed-forward part
    by_matrix: dict[str, list[Any]] = {}
    for block in parameter_blocks(model, "group"):
        (rows,), (member,) = block.parameters, block.members
        assert isinstance(rows, Rows) and rows.parameter is model.bert.get_submodule(member).weight
        assert block.name == f"{member}.rows.{rows.start}-{rows.stop - 1}" and block.size == rows.numel()
        by_matrix.setdefault(member, []).append((rows.start, rows.stop))
    assert list(by_matrix) == [b.name for b in parameter_blocks(model, "matrix")]
    for member, runs in by_matrix.items():
        assert runs == ([(0, 6), (6, 12)] if member.endswith("intermediate.dense") else [(0, 4), (4, 8)]), member


@pytest.mark.parametrize("retain", [True, False])
def test_products_and_eigenvalues_are_those_of_the_diagonal_blocks_of_the_matrix(retain: bool) -> None:
    model, batches = tiny_bert(), [text_batch(seed=s) for s in range(2)]
    matrices = {b.name: b.parameters for b in parameter_blocks(model, "matrix")}
    groups = parameter_blocks(model, "group")
    whole = HessianOperator(model, batches, matrices)
    operator = HessianOperator(model, batches, {b.name: b.parameters for b in groups}, retain=retain)
    spectrum = hessian_spectrum(model, batches, runs=1, fraction=1.0, granularity="group", tol=1e-6, progress=False)
    assert spectrum.names == [b.name for b in groups] and spectrum.converged.all()
    assert spectrum.parameters == {b.name: b.size for b in groups}
    for name, matrix in [(n, m) for n, m in matrices.items() if n.endswith(("query", "intermediate.dense"))]:
        n = whole.size(name)
        H = torch.stack([whole.product(name, e) for e in torch.eye(n, dtype=torch.float64)])
        (weight,) = matrix
        for block in (b for b in groups if b.members == [name]):
            (rows,) = block.parameters
            assert isinstance(rows, Rows)
            entries = torch.arange(n).view(weight.shape)[rows.start : rows.stop].reshape(-1)
            sub = H[entries][:, entries]
            v = torch.randn(block.size, dtype=torch.float64)
            torch.testing.assert_close(operator.product(block.name, v), sub @ v, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(operator.gradient(block.name), whole.gradient(name)[entries])
            values = torch.linalg.eigvalsh((sub + sub.T) / 2)
            expected = float(values[values.abs().argmax()])
            assert spectrum.eigenvalues[0, spectrum.names.index(block.name)] == pytest.approx(expected, rel=1e-5)


def test_gauss_newton_of_rows_is_a_slice_too() -> None:
    model, batch = tiny_bert(), text_batch()
    groups = {b.name: b.parameters for b in parameter_blocks(model, "group")}
    tops = gauss_newton_top(model, [batch], groups)
    matrices = gauss_newton_top(model, [batch], {b.name: b.parameters for b in parameter_blocks(model, "matrix")})
    for name, matrix in matrices.items():
        parts = [tops[n].value for n in tops if n.startswith(name + ".rows.")]
        assert len(parts) == 2 and max(parts) <= matrix.value * (1 + 1e-9) <= sum(parts) * (1 + 1e-8)


def test_rows_move_alone_and_come_back() -> None:
    model = tiny_bert()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    before = weight.detach().clone()
    with displaced([Rows(weight, 4, 8)]) as move:
        move(torch.ones(32, dtype=torch.float64))
        assert torch.equal(weight[:4], before[:4]) and torch.equal(weight[4:], before[4:] + 1)
    assert torch.equal(weight, before)


def test_bits_go_to_whole_matrices_by_their_most_sensitive_group() -> None:
    model, batch = build("bert"), {**inputs_for("bert", batch=4), "labels": torch.tensor([0, 1, 1, 0])}
    settings: dict[str, Any] = {"runs": 1, "fraction": 1.0, "tol": 1e-2, "progress": False}
    spectrum = hessian_spectrum(model, [batch], granularity="group", method="ggn", **settings)
    worst = dict.fromkeys((m for ms in spectrum.members.values() for m in ms), 0.0)
    for name, value in zip(spectrum.names, spectrum.sensitivity, strict=True):
        (member,) = spectrum.members[name]
        worst[member] = max(worst[member], float(value))
    found, expected = (
        allocate_bits(measured, bits=(2, 4), average_bits=3.0, model=model, groups=4).resolve(model)
        for measured in (spectrum, worst)
    )
    assert {p: s.bits for p, s in found.items()} == {p: s.bits for p, s in expected.items()}
    with pytest.raises(ValueError, match="granularity: 'group' is finer"):
        sensitivity(model, [batch], granularity="group", progress=False)


def test_a_model_without_heads_has_one_group_a_matrix() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(3, 5)) for _ in range(2)])

    blocks = parameter_blocks(Plain(), "group")
    assert [b.name for b in blocks] == ["layers.0.0.rows.0-4", "layers.1.0.rows.0-4"]
    assert sum(b.size for b in blocks) == 30
