"""Eigenvalue iterations on operators whose spectra are known: right within the tolerance, or said not to be."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.hessian import Lanczos, PowerIteration, lanczos, power_iteration, top_eigenpairs
from qbert.hessian.vectors import dot, norm

RANDOM = np.random.default_rng(0)


def dense(eigenvalues: Any, seed: Any = 0) -> Any:
    """A symmetric float64 matrix with these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(torch.tensor(np.asarray(eigenvalues), dtype=torch.float64)) @ Q.T, Q


SPECTRA = {
    "indefinite": np.linspace(-3, 5, 60),
    "negative dominant": [-5.0, *np.linspace(-1, 4.9, 80)],
    "max equals min": [1.0, -1.0, *np.linspace(-0.9, 0.9, 98)],
    "nearly max equals min": [1.0, -0.999, *np.linspace(-0.5, 0.5, 60)],
    "two opposite": [3.0, -3.0],
    "clustered at the top": [1.0, 1 - 1e-6, 1 - 2e-6, *np.linspace(0, 0.5, 50)],
    "loose cluster": [1.0, 0.997, 0.994, 0.991, *np.linspace(-0.5, 0.5, 80)],
    "repeated": [2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "rank one": [2.0] + [0.0] * 50,
    "negative rank one": [-2.0] + [0.0] * 50,
    "zero": [0.0] * 30,
    "identity": [1.0] * 20,
    "one parameter": [3.0],
    "two parameters": [3.0, -3.1],
    "outliers over a bulk": [13.4, 5.0, 3.0, 2.0, 1.0, *RANDOM.normal(size=300) * 0.05],
    "hidden over a heavy bulk": [1.5, 1.0] + [0.1] * 500,
    "tiny": 1e-12 * np.linspace(-1, 2, 20),
    "power law": np.arange(1, 400) ** -1.0 * RANDOM.choice([-1, 1], 399),
}


def check(pair: Any, eigenvalues: Any, tol: Any) -> None:
    """The promise: a converged value is the largest in magnitude within `tol`; every bound holds."""
    magnitude = np.abs(eigenvalues).max()
    assert abs(pair.value) <= magnitude * (1 + 1e-9)
    nearest = np.abs(np.asarray(eigenvalues) - pair.value).min()
    assert nearest <= pair.residual * abs(pair.value) + 1e-12 * magnitude
    assert pair.upper_bound >= abs(pair.value)
    if pair.converged:
        assert magnitude - abs(pair.value) <= tol * magnitude


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("name", SPECTRA)
def test_no_eigenvalue_is_missed_silently(name: Any, tol: Any) -> None:
    eigenvalues = SPECTRA[name]
    A, _ = dense(eigenvalues)
    pair = lanczos(lambda v: A @ v, len(A), tol=tol)
    assert pair.converged
    check(pair, eigenvalues, tol)


@pytest.mark.parametrize("which", ["second", "opposite end", "a random vector", "the answer"])
@pytest.mark.parametrize("name", [n for n in SPECTRA if len(SPECTRA[n]) > 3 and n != "loose cluster"])
def test_a_warm_start_cannot_lock_onto_the_wrong_pair(name: Any, which: Any) -> None:
    eigenvalues = np.asarray(SPECTRA[name])
    A, Q = dense(eigenvalues)
    order = np.argsort(-np.abs(eigenvalues))
    opposite = np.argmin(eigenvalues) if eigenvalues[order[0]] > 0 else np.argmax(eigenvalues)
    start = {
        "second": Q[:, order[1]],
        "opposite end": Q[:, opposite],
        "a random vector": torch.ones(len(A)),
        "the answer": Q[:, order[0]],
    }[which]
    pair = lanczos(lambda v: A @ v, len(A), warm=[start], confidence=None)
    assert pair.converged
    check(pair, eigenvalues, 1e-3)


@pytest.mark.parametrize("bound", ["residual", "gap"])
@pytest.mark.parametrize(("second", "bulk"), [(0.5, 0.02), (0.6, 0.2), (0.8, 0.05)])
def test_a_warm_start_at_the_second_eigenvector_does_not_hide_the_first_in_millions_of_parameters(
    second: float, bulk: float, bound: str
) -> None:
    """The start holds 1 / sqrt(n) of the first: three products found the second, with an error of 1e-6."""
    size = 1_000_000
    eigenvalues = bulk * torch.rand(size, generator=torch.Generator().manual_seed(1))
    eigenvalues[:2] = torch.tensor([1.0, second])
    warm = torch.zeros(size)
    warm[1] = 1
    settings: dict[str, Any] = {"warm": [warm], "confidence": None, "bound": bound, "dtype": torch.float32}
    pair = lanczos(lambda v: eigenvalues * v, size, **settings)
    assert pair.converged and pair.value == pytest.approx(1, rel=1e-3)
    short = lanczos(lambda v: eigenvalues * v, size, max_products=3, **settings)
    assert not short.converged and short.upper_bound >= 1


def test_power_iteration_from_the_second_eigenvector_says_that_the_first_may_be_hidden() -> None:
    size = 4_000_000
    eigenvalues = 0.01 * torch.rand(size, generator=torch.Generator().manual_seed(1))
    eigenvalues[:2] = torch.tensor([1.0, 0.8])
    warm = torch.zeros(size)
    warm[1] = 1
    pair = power_iteration(lambda v: eigenvalues * v, size, warm=[warm], tol=1e-2, dtype=torch.float32)
    assert pair.value == pytest.approx(0.8, rel=1e-2) and pair.residual <= 1e-2
    assert not pair.converged and pair.upper_bound >= 1


def test_upper_bounds_hold_over_restarts() -> None:
    """The polynomial of a restart goes on in the proof: bounds get sharper, and stay above the truth."""
    eigenvalues = torch.linspace(-1, 1, 2000, dtype=torch.float64) ** 3
    eigenvalues[0] = 1.05
    for seed in range(3):
        bounds = [
            lanczos(lambda v: eigenvalues * v, 2000, seed=seed, basis_size=12, max_products=most, tol=1e-9).upper_bound
            for most in (11, 20, 60)
        ]
        assert bounds[0] > bounds[1] > bounds[2] >= 1.05 * (1 - 1e-9) and bounds[2] < 1.06


def test_what_only_proof_can_tell_is_left_open_by_the_upper_bound() -> None:
    """The exact second eigenvector of a loose cluster as a start: nothing but proof excludes the neighbour."""
    eigenvalues = SPECTRA["loose cluster"]
    A, Q = dense(eigenvalues)
    unproven = lanczos(lambda v: A @ v, len(A), warm=[Q[:, 1]], confidence=None)
    assert unproven.upper_bound >= 1
    proven = lanczos(lambda v: A @ v, len(A), warm=[Q[:, 1]])
    assert proven.converged and proven.products > unproven.products
    check(proven, eigenvalues, 1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    eigenvalues=st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=40),
    seed=st.integers(0, 2**20),
    tol=st.sampled_from([1e-1, 1e-3, 1e-8]),
)
def test_any_spectrum_is_found_or_said_not_to_be(eigenvalues: Any, seed: Any, tol: Any) -> None:
    A, _ = dense(eigenvalues, seed)
    check(lanczos(lambda v: A @ v, len(A), tol=tol, seed=seed), eigenvalues, tol)


def test_the_upper_bound_holds_as_often_as_it_says_and_is_no_empty_number() -> None:
    """99 % by proof; over 400 start vectors on a hard spectrum, after few products, at most 2 % may be wrong."""
    eigenvalues = torch.linspace(-0.5, 0.5, 4000, dtype=torch.float64)
    eigenvalues[0], eigenvalues[1] = 0.9, -0.6
    bounds = [
        lanczos(lambda v: eigenvalues * v, 4000, seed=seed, max_products=6, confidence=None).upper_bound
        for seed in range(400)
    ]
    assert np.mean(np.array(bounds) < 0.9) <= 0.02
    assert np.median(bounds) < 1.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 40])
def test_rounding_does_not_bring_the_upper_bound_below_the_truth(rank: int, dtype: torch.dtype) -> None:
    for seed in range(40):
        factor = torch.randn(40, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        matrix = (factor @ factor.T).to(dtype)
        truth = float(torch.linalg.eigvalsh(matrix.double()).abs().max())
        found = lanczos(lambda v, matrix=matrix: matrix @ v, 40, seed=seed, dtype=dtype)
        assert truth <= found.upper_bound <= truth * (1 + 1e-3)


def test_proof_needs_no_more_products_than_it_takes_and_tells_when_they_run_out() -> None:
    eigenvalues = torch.linspace(-1, 1, 500, dtype=torch.float64)
    short = lanczos(lambda v: eigenvalues * v, 500, max_products=10)
    assert not short.converged and short.products == 10 and short.error > 1e-3
    proven = lanczos(lambda v: eigenvalues * v, 500, tol=0.05)
    assert proven.converged and abs(proven.value) >= 0.95 and proven.upper_bound <= abs(proven.value) * 1.05


def test_two_lanczos_steps_are_never_taken_for_an_answer() -> None:
    """hessian-eigenthings' default of two steps returned -0.0012 for a top eigenvalue of 0.0074."""
    A, Q = dense([7.4, -1.2, *np.linspace(-3, 3, 100)])
    for confidence in (None, 0.99):
        pair = lanczos(lambda v: A @ v, len(A), tol=0.5, warm=[Q[:, 0]], confidence=confidence)
        assert pair.products >= 3
        assert pair.value == pytest.approx(7.4, rel=0.5)


@pytest.mark.parametrize("basis_size", [8, 12, 40])
def test_restarts_bound_the_memory_and_change_no_answer(basis_size: Any) -> None:
    A, _ = dense(np.linspace(-1, 1, 300) ** 3 * 4)
    solver = Lanczos(300, tol=1e-6, basis_size=basis_size, max_products=500)
    while solver.query is not None:
        assert len(solver._basis) < basis_size
        solver.receive(A @ solver.query)
    assert solver.result is not None and solver.result.converged
    assert abs(solver.result.value) == pytest.approx(4, rel=1e-6)


def test_float32_products_are_good_for_small_tolerances() -> None:
    eigenvalues = torch.cat([torch.tensor([5.0, -3.0]), torch.linspace(-1, 1, 2000)])
    pair = lanczos(lambda v: eigenvalues * v, 2002, tol=1e-5, dtype=torch.float32)
    assert pair.converged and pair.value == pytest.approx(5, rel=1e-5) and pair.vector.dtype == torch.float32


@pytest.mark.parametrize("size", [7, 2**14, 2_000_001])
def test_inner_products_of_long_float32_vectors_are_those_of_float64(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    peaked = 1e-4 * torch.randn(size, generator=generator)
    peaked[0] = 1
    flat = torch.randn(size, generator=generator)
    for a, b in ((peaked, peaked), (flat, flat), (flat, peaked)):
        scale = float(norm(a.double()) * norm(b.double()))
        assert abs(float(dot(a, b)) - float(torch.dot(a.double(), b.double()))) <= 2e-5 * scale
    assert float(norm(peaked)) == pytest.approx(float(torch.linalg.vector_norm(peaked.double())), rel=2e-5)


def test_float32_iterations_on_a_layer_of_bert_base_are_right() -> None:
    """With float32 sums over 7 million entries, ten products from the answer itself gave 1.0001 and no convergence."""
    eigenvalues = torch.zeros(7_087_872)
    eigenvalues[:2000] = 0.05 * torch.rand(2000, generator=torch.Generator().manual_seed(1))
    eigenvalues[:4] = torch.tensor([1.0, 0.5, 0.3, 0.2])
    answer = torch.zeros_like(eigenvalues)
    answer[0] = 1
    pair = lanczos(
        lambda v: eigenvalues * v, len(eigenvalues), warm=[answer], confidence=None, dtype=torch.float32, seed=2
    )
    assert pair.converged and pair.value == pytest.approx(1, abs=1e-5) and pair.residual < 1e-3


def test_an_operator_that_is_not_symmetric_is_never_called_converged() -> None:
    A, _ = dense(np.linspace(-1, 1, 30))
    skewed = A + 0.05 * torch.triu(torch.ones(30, 30, dtype=torch.float64), 1)
    pair = lanczos(lambda v: skewed @ v, 30, max_products=60)
    assert not pair.converged and pair.products <= 10


def test_a_tolerance_below_the_noise_of_the_operator_is_given_up_early() -> None:
    eigenvalues = torch.cat([torch.tensor([5.0, -3.0]), torch.linspace(-1, 1, 2000)])
    noise = torch.Generator().manual_seed(0)

    def product(v: torch.Tensor) -> torch.Tensor:
        return eigenvalues * v + 1e-2 * torch.randn(2002, generator=noise) * v.norm() / 2002**0.5

    pair = lanczos(product, 2002, tol=1e-5, dtype=torch.float32)
    assert not pair.converged and pair.products <= 12 and pair.value == pytest.approx(5, rel=1e-3)


def test_both_ends_of_the_spectrum_are_reported() -> None:
    A, _ = dense([-3.0, *np.linspace(-1, 1, 100), 2.5])
    pair = lanczos(lambda v: A @ v, len(A), tol=1e-6)
    assert pair.value == pytest.approx(-3, rel=1e-6)
    assert pair.other_end == pytest.approx(2.5, rel=1e-3) and pair.other_end_residual < 0.1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_finds_multiplicities_and_orthonormal_vectors(k: Any) -> None:
    eigenvalues = [2.0, -2.0, 2.0, 1.5, 1.5, *np.linspace(-1, 1, 60)]
    A, _ = dense(eigenvalues)
    pairs = top_eigenpairs(lambda v: A @ v, len(A), k=k, tol=1e-8)
    expected = sorted(map(abs, eigenvalues), reverse=True)[:k]
    assert [abs(p.value) for p in pairs] == pytest.approx(expected, rel=1e-6)
    V = torch.stack([p.vector for p in pairs])
    torch.testing.assert_close(V @ V.T, torch.eye(k, dtype=torch.float64), atol=1e-7, rtol=0)
    for p in pairs:
        assert torch.linalg.vector_norm(A @ p.vector - p.value * p.vector) < 1e-3


def test_power_iteration_follows_the_papers_rule_and_tells_that_it_missed() -> None:
    eigenvalues = np.array([1.0, -0.98, *np.linspace(-0.5, 0.5, 98)])
    A, _ = dense(eigenvalues)
    values = []
    solver = PowerIteration(100, tol=1e-3, generator=torch.Generator().manual_seed(3))
    while solver.query is not None:
        values.append(float(solver.query @ (A @ solver.query)))
        solver.receive(A @ solver.query)
    changes = [abs(b - a) / abs(b) for a, b in itertools.pairwise(values)]
    assert changes[-1] < 1e-3 <= min(changes[:-1])
    assert solver.result is not None and not solver.result.converged
    assert solver.result.value == pytest.approx(values[-1], rel=1e-12)
    easy = power_iteration(lambda v: v * torch.tensor([4.0, 0.01, 0.0], dtype=torch.float64), 3)
    assert easy.converged and easy.value == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("solve", [lanczos, power_iteration])
def test_products_that_are_not_finite_are_an_error(solve: Any) -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        solve(lambda v: v * math.nan, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tol": 0.0}, "tol: 0.0"),
        ({"tol": 2.0}, "tol: 2.0"),
        ({"max_products": 0}, "max_products: 0"),
        ({"bound": "guess"}, "bound: 'guess'"),
        ({"confidence": 1.5}, "confidence: 1.5"),
        ({"basis_size": 3}, "basis_size: 3"),
    ],
)
def test_bad_arguments_are_named(changes: Any, message: Any) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, 5, **changes)


@pytest.mark.parametrize("solve", [lanczos, power_iteration])
def test_an_operator_has_a_size(solve: Any) -> None:
    for size, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=f"size: {size} is not possible; use a whole number of at least 1"):
            solve(lambda v: v, size)


def test_more_eigenpairs_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="k: 6"):
        top_eigenpairs(lambda v: v, 5, k=6)


def test_the_gap_is_trusted_only_while_no_other_ritz_value_is_near() -> None:
    """With a rival at the other end, the residual itself has to be within the tolerance."""
    for rival, near in ((-0.95, True), (0.93, True), (-0.6, False)):
        A, _ = dense([1.0, rival, *np.linspace(-0.4, 0.4, 80)])
        pair = lanczos(lambda v, A=A: A @ v, len(A), tol=1e-3, bound="gap", confidence=None)
        assert pair.converged and pair.value == pytest.approx(1, rel=1e-3)
        assert (pair.residual <= 1e-3) == near


@pytest.mark.parametrize("tol", [1e-3, 1e-4])
def test_the_gap_bound_may_take_a_close_pair_for_one_and_a_proof_never_does(tol: float) -> None:
    """What the gap bound assumes is an assumption: its error can reach the distance of the pair, and no more."""
    surprised = 0
    for seed in range(40):
        second = float(np.random.default_rng(seed).uniform(0.9, 1))
        A, _ = dense([1.0, second, *np.linspace(-0.3, 0.3, 58)], seed)
        settings: dict[str, Any] = {"tol": tol, "seed": seed}
        quick = lanczos(lambda v, A=A: A @ v, len(A), bound="gap", confidence=None, **settings)
        proven = lanczos(lambda v, A=A: A @ v, len(A), **settings)
        assert proven.converged and proven.value == pytest.approx(1, rel=tol)
        assert second - 1e-3 <= quick.value <= 1 + 1e-12
        surprised += quick.value < 1 - tol
    assert 10 <= surprised <= 20  # a quarter to a half, as its documentation says
