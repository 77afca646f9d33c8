"""Losses: equal to obvious loops over real positions, and blind to padding."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbert.distill import losses
from qbert.distill.mapping import layer_pairs, state_pairs

LENGTHS = (5, 3, 1)


def batch(width: int = 6, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(tokens) < torch.tensor(LENGTHS).unsqueeze(1)
    return torch.randn(3, tokens, width), torch.randn(3, tokens, width), mask


def test_masked_mean_is_a_loop_over_real_tokens() -> None:
    values, _, mask = batch()
    expected = [values[b, t].mean() for b, length in enumerate(LENGTHS) for t in range(length)]
    torch.testing.assert_close(losses.masked_mean(values, mask), torch.stack(expected).mean())


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("name", ["hidden_mse", "cosine", "normalized_mse"])
def test_state_losses_do_not_see_padding(name: str, junk: float) -> None:
    student, teacher, mask = batch()
    loss = losses.LOSSES[name]
    wider = [F.pad(x, (0, 0, 0, 7), value=junk) for x in (student, teacher)]
    torch.testing.assert_close(loss(*wider, F.pad(mask, (0, 7))), loss(student, teacher, mask))


@pytest.mark.parametrize("name", ["score_mse", "attention_kl"])
@pytest.mark.parametrize("options", [{}, {"normalized": True}])
def test_attention_losses_do_not_see_padding(name: str, options: dict[str, bool]) -> None:
    if options and name != "score_mse":
        pytest.skip("only the squared error of scores has a normalised form")
    _, _, mask = batch()
    student, teacher = torch.randn(2, 3, 4, 5, 5)
    wider = [F.pad(x, (0, 123, 0, 123), value=1e4) for x in (student, teacher)]
    torch.testing.assert_close(
        losses.LOSSES[name](*wider, F.pad(mask, (0, 123)), **options),
        losses.LOSSES[name](student, teacher, mask, **options),
    )


def test_span_and_token_losses_do_not_see_padding() -> None:
    _, _, mask = batch()
    student, teacher = torch.randn(2, 2, 3, 5)
    wider = [F.pad(x, (0, 9), value=50.0) for x in (student, teacher)]
    torch.testing.assert_close(
        losses.span_cross_entropy(*wider, F.pad(mask, (0, 9))), losses.span_cross_entropy(student, teacher, mask)
    )
    student, teacher, mask = batch(width=4)
    wider = [F.pad(x, (0, 0, 0, 9), value=50.0) for x in (student, teacher)]
    torch.testing.assert_close(
        losses.soft_cross_entropy(*wider, F.pad(mask, (0, 9))), losses.soft_cross_entropy(student, teacher, mask)
    )


def test_score_mse_is_a_loop_over_real_pairs() -> None:
    _, _, mask = batch()
    student, teacher = torch.randn(2, 3, 4, 5, 5)
    errors = [
        (student[b, :, q, k] - teacher[b, :, q, k]).square().mean()
        for b, length in enumerate(LENGTHS)
        for q in range(length)
        for k in range(length)
    ]
    torch.testing.assert_close(losses.score_mse(student, teacher, mask), torch.stack(errors).mean())


def test_normalised_score_mse_ignores_what_softmax_ignores() -> None:
    _, _, mask = batch()
    student, teacher = torch.randn(2, 3, 4, 5, 5)
    shifted = student + torch.randn(3, 4, 5, 1) * 10
    exact = losses.score_mse(student, teacher, mask, normalized=True)
    torch.testing.assert_close(losses.score_mse(shifted, teacher, mask, normalized=True), exact, rtol=1e-4, atol=1e-4)
    assert float(losses.score_mse(teacher + 3, teacher, mask, normalized=True)) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_cross_entropy_sums_classes_and_averages_rows(temperature: float) -> None:
    student, teacher = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(student / temperature, (teacher / temperature).softmax(-1))
    actual = losses.soft_cross_entropy(student, teacher, temperature=temperature)
    torch.testing.assert_close(actual.double(), expected * temperature**2, rtol=1e-5, atol=1e-5)


def test_kl_has_the_gradient_of_soft_cross_entropy_and_is_zero_at_the_teacher() -> None:
    student, teacher = torch.randn(2, 7, 3)
    student.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(student, teacher, temperature=3.0), student)[0]
        for loss in (losses.kl_divergence, losses.soft_cross_entropy)
    ]
    torch.testing.assert_close(*gradients)
    assert abs(float(losses.kl_divergence(teacher, teacher))) < 1e-6


@given(st.floats(0.01, 100.0))
def test_normalised_hidden_mse_has_no_unit(factor: float) -> None:
    torch.manual_seed(0)
    student, teacher, mask = batch()
    torch.testing.assert_close(
        losses.hidden_mse(student * factor, teacher * factor, mask, normalized=True),
        losses.hidden_mse(student, teacher, mask, normalized=True),
        rtol=1e-4,
        atol=1e-6,
    )


def test_an_empty_mask_gives_zero() -> None:
    assert float(losses.masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3))) == 0.0


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("uniform", [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("top", [(0, 8), (1, 9), (2, 10), (3, 11)]),
        ("bottom", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("skip", [(0, 2), (1, 5), (2, 8)]),
        ("last", [(3, 11)]),
        ([(0, 1), (-1, -1)], [(0, 1), (3, 11)]),
    ],
)
def test_layer_maps(layers: str | list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(layers, students=4, teachers=12) == expected


@given(st.integers(1, 24), st.integers(0, 24))
def test_uniform_maps_rise_and_end_at_the_last_layer(students: int, more: int) -> None:
    teachers = students + more
    pairs = layer_pairs("uniform", students=students, teachers=teachers)
    chosen = [t for _, t in pairs]
    assert chosen[-1] == teachers - 1 and chosen == sorted(set(chosen)) and [s for s, _ in pairs] == [*range(students)]


def test_state_pairs_add_the_embedding_output() -> None:
    assert state_pairs("uniform", students=2, teachers=4) == [(0, 0), (1, 2), (2, 4)]
    assert state_pairs("uniform", students=2, teachers=4, embedding=False) == [(1, 2), (2, 4)]


@pytest.mark.parametrize(
    ("layers", "students", "teachers", "message"),
    [
        ([(0, 12)], 4, 12, "no layer 12"),
        ([(4, 0)], 4, 12, "the student has no layer 4"),
        ("uniform", 5, 4, "explicit pairs"),
        ("middle", 4, 12, "'middle' is not known"),
    ],
)
def test_impossible_layer_maps_are_refused(
    layers: str | list[tuple[int, int]], students: int, teachers: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, students=students, teachers=teachers)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_decided_on_their_own_are_so_many_binary_problems(temperature: float) -> None:
    student, teacher = torch.randn(2, 7, 4)
    chances = (teacher / temperature).sigmoid()
    both = [torch.stack([p, 1 - p]) for p in (chances, (student / temperature).sigmoid())]
    expected = temperature**2 * -(both[0] * both[1].log()).sum(0).mean()
    torch.testing.assert_close(losses.sigmoid_cross_entropy(student, teacher, temperature=temperature), expected)
    divergence = temperature**2 * (both[0] * (both[0] / both[1]).log()).sum(0).mean()
    torch.testing.assert_close(
        losses.sigmoid_kl_divergence(student, teacher, temperature=temperature), divergence, rtol=1e-4, atol=1e-6
    )


def test_decisions_of_the_teacher_are_targets() -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 6, 3))
    logs = student - np.log(np.exp(student).sum(-1, keepdims=True))
    expected = -logs[np.arange(6), teacher.argmax(-1)].mean()
    tensors = torch.from_numpy(student), torch.from_numpy(teacher)
    assert float(losses.LOSSES["hard_ce"](*tensors)) == pytest.approx(expected, rel=1e-6)
    p = 1 / (1 + np.exp(-student))
    expected = -np.where(teacher > 0, np.log(p), np.log(1 - p)).mean()
    assert float(losses.LOSSES["sigmoid_hard_ce"](*tensors)) == pytest.approx(expected, rel=1e-6)


def test_decisions_of_spans_are_never_padding() -> None:
    generator = np.random.default_rng(1)
    student, teacher = generator.normal(size=(2, 2, 4, 5))
    teacher[..., 3:] += 100  # padding
    mask = np.arange(5) < 3
    kept = student[..., :3]
    logs = kept - np.log(np.exp(kept).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, teacher[..., :3].argmax(-1)[..., None], -1).mean()
    found = losses.LOSSES["span_hard_ce"](
        torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(np.tile(mask, (4, 1)))
    )
    assert float(found) == pytest.approx(expected, rel=1e-6)
