"""Error-compensated rounding against brute force, the textbook algorithm in float64, and its invariances."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbert.quantizers.grid import code_range, dequantize, quantize
from qbert.quantizers.groups import row_groups
from qbert.quantizers.ranges import GroupRanges, find_ranges
from qbert.quantizers.rounding import (
    Rounded,
    _Columns,
    bias_change,
    compensate,
    damped,
    output_error,
    round_compensated,
)

SCHEMES = ("asymmetric", "symmetric", "midrise", "offset")


def correlated(columns: int, seed: int, samples: int = 0) -> Tensor:
    """A second moment [I, I] float64 of correlated inputs with a mean and unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or 4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing / columns**0.5
    x = (x + 0.5) * torch.rand(columns, generator=generator, dtype=torch.float64).mul(2).exp()
    return x.T @ x / len(x)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)


def values(codes: Tensor, grids: Any, row_group: Tensor) -> Tensor:
    blocks = codes.unflatten(1, (grids.scale.shape[1], -1))
    return dequantize(blocks, grids.scale[row_group].unsqueeze(-1), grids.zero[row_group].unsqueeze(-1)).flatten(1)


def nearest_codes(w: Tensor, ranges: GroupRanges, row_group: Tensor, limits: tuple[int, int]) -> Tensor:
    blocks = w.unflatten(1, (ranges.scale.shape[1], -1))
    scale, zero = ranges.scale[row_group].unsqueeze(-1), ranges.zero[row_group].unsqueeze(-1)
    return quantize(blocks, scale, zero, *limits).flatten(1)


def by_inverses(w: Tensor, metric: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
    """Codes by the formula of OBS itself: one inverse of the metric of the columns left, for each column and row."""
    w, codes = w.clone(), torch.empty(w.shape, dtype=torch.int8)
    run = w.shape[1] // scale.shape[1]
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(metric[j:, j:])
        s, z = scale[:, j // run], zero[:, j // run]
        codes[:, j] = quantize(w[:, j], s, z, *limits)
        error = (w[:, j] - dequantize(codes[:, j], s, z)) / inverse[0, 0]
        w[:, j:] -= error.unsqueeze(1) * inverse[0]
    return codes


@pytest.mark.parametrize(("columns", "input_groups"), [(7, 1), (150, 1), (150, 3)])
def test_compensation_is_that_of_the_textbook(columns: int, input_groups: int) -> None:
    # 150 columns are more than a block of the fast way.
    w, metric, groups = matrix(5, columns, 1), damped(correlated(columns, 1), 0.01), torch.arange(5)
    ranges = find_ranges(w, groups, bits=3, input_groups=input_groups)
    scale, zero = ranges.scale.double(), ranges.zero.double()
    limits = code_range(3)
    assert torch.equal(compensate(w, metric, scale, zero, *limits), by_inverses(w, metric, scale, zero, limits))


def test_the_error_of_a_pass_is_that_of_its_differences() -> None:
    w, metric = matrix(5, 150, 3), damped(correlated(150, 3), 0.01)
    ranges = find_ranges(w, torch.arange(5), bits=2)
    scale, zero = ranges.scale.double().T, ranges.zero.double().T
    _, difference, errors = _Columns.of(w, metric, None, 1).compensated(scale, zero, -2, 1)
    assert torch.allclose(errors, output_error(difference.T, metric), rtol=1e-9)


def test_an_order_of_columns_is_that_order_of_the_problem() -> None:
    w, metric, order = matrix(4, 9, 2), damped(correlated(9, 2), 0.01), torch.randperm(9)
    ranges = find_ranges(w, torch.arange(4), bits=2)
    scale, zero = ranges.scale.double(), ranges.zero.double()
    shuffled = compensate(w[:, order], metric[order][:, order], scale, zero, -2, 1)
    assert torch.equal(compensate(w, metric, scale, zero, -2, 1, order=order)[:, order], shuffled)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_brute_force_over_all_codes_of_a_small_matrix(scheme: Any) -> None:
    limits, groups = code_range(2, scheme), torch.arange(2)
    all_codes = torch.tensor(list(itertools.product(range(limits[0], limits[1] + 1), repeat=3)), dtype=torch.float64)
    reached = 0
    for seed in range(20):
        w, moment = matrix(2, 3, seed), correlated(3, seed)
        ranges = find_ranges(w, groups, bits=2, scheme=scheme)
        candidates = dequantize(all_codes, ranges.scale[:, :, None].double(), ranges.zero[:, :, None].double())
        best = torch.stack([output_error(w[r] - candidates[r], moment).min() for r in range(2)])
        found = round_compensated(w, moment, groups, ranges, bits=2, scheme=scheme, damping=1e-9, refits=0)
        ours = output_error(w - values(found.codes, found, groups).double(), moment)
        assert bool((ours >= best * (1 - 1e-5) - 1e-12).all())
        nearest = output_error(w - values(nearest_codes(w, ranges, groups, limits), ranges, groups).double(), moment)
        assert bool((ours <= nearest * (1 + 1e-5) + 1e-12).all())
        reached += int((ours <= best * 1.001 + 1e-12).sum())
    assert reached >= 20  # of 40 rows; nearest rounding finds the best codes of fewer


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    w, metric = matrix(3, 6, 3), damped(correlated(6, 3), 0.01)
    ranges = find_ranges(w, torch.arange(3), bits=3)
    scale, zero = ranges.scale.double(), ranges.zero.double()
    codes = compensate(w, metric, scale, zero, *code_range(3), sweeps=30)
    error = output_error(w - dequantize(codes, scale, zero), metric)
    for column, code in itertools.product(range(6), range(-4, 4)):
        other = codes.clone()
        other[:, column] = code
        assert bool((output_error(w - dequantize(other, scale, zero), metric) >= error * (1 - 1e-9)).all())


def test_each_sweep_of_descent_lowers_the_error() -> None:
    w, metric = matrix(8, 40, 4), damped(correlated(40, 4), 0.01)
    ranges = find_ranges(w, torch.arange(8), bits=2)
    scale, zero = ranges.scale.double(), ranges.zero.double()
    errors = [
        float(
            output_error(w - dequantize(compensate(w, metric, scale, zero, -2, 1, sweeps=n), scale, zero), metric).sum()
        )
        for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_uncorrelated_inputs_give_nearest_rounding(scheme: Any) -> None:
    w, groups, limits = matrix(6, 12, 5), row_groups(6, 3), code_range(3, scheme)
    moment = torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)
    ranges = find_ranges(w, groups, bits=3, scheme=scheme, input_groups=2)
    found = round_compensated(w, moment, groups, ranges, bits=3, scheme=scheme, refits=0)
    assert torch.equal(found.codes, nearest_codes(w, ranges, groups, limits))
    assert torch.equal(found.scale, ranges.scale)


def test_permuting_rows_permutes_the_codes() -> None:
    w, moment, order = matrix(10, 30, 6), correlated(30, 6), torch.randperm(10)
    groups = torch.arange(10)
    plain, shuffled = (
        round_compensated(x, moment, groups, find_ranges(x, groups, bits=2), bits=2) for x in (w, w[order])
    )
    assert torch.equal(plain.codes[order], shuffled.codes)
    assert torch.allclose(plain.scale[order], shuffled.scale, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from(SCHEMES),
    st.sampled_from(("mse", "minmax")),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 60),
    st.integers(0, 10_000),
)
def test_no_row_group_is_worse_than_nearest_rounding(
    bits: int, scheme: str, method: str, input_groups: int, groups: int, samples: int, seed: int
) -> None:
    w, moment = matrix(7, 6 * input_groups, seed).float(), correlated(6 * input_groups, seed, samples)
    index, limits = row_groups(7, groups), code_range(bits, scheme)  # type: ignore[arg-type]
    ranges = find_ranges(w, index, bits=bits, scheme=scheme, method=method, input_groups=input_groups)  # type: ignore[arg-type]
    found = round_compensated(w, moment, index, ranges, bits=bits, scheme=scheme)  # type: ignore[arg-type]
    assert limits[0] <= int(found.codes.min()) and int(found.codes.max()) <= limits[1]
    rounded = values(found.codes, found, index)
    plain = values(nearest_codes(w, ranges, index, limits), ranges, index)
    ours, theirs = (output_error(w.double() - x.double(), moment) for x in (rounded, plain))
    by_group = torch.zeros(2, int(index[-1]) + 1, dtype=torch.float64)
    by_group.index_add_(1, index, torch.stack([ours, theirs]))
    assert bool((by_group[0] <= by_group[1] * (1 + 1e-5) + 1e-12).all())
    # What is written back as a weight has the same codes again.
    assert torch.equal(nearest_codes(rounded, found, index, limits), found.codes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipped_ranges_of_several_rows_are_found_anew(bits: int, scheme: Any) -> None:
    # Compensated weights leave ranges that were shrunk for nearest rounding, and saturate there.
    w, moment, groups = matrix(12, 64, 7).float(), correlated(64, 7), row_groups(12, 4)
    ranges = find_ranges(w, groups, bits=bits, scheme=scheme)
    plain = values(nearest_codes(w, ranges, groups, code_range(bits, scheme)), ranges, groups)
    found = round_compensated(w, moment, groups, ranges, bits=bits, scheme=scheme)
    ours, theirs = (
        float(output_error(w.double() - x.double(), moment).sum()) for x in (values(found.codes, found, groups), plain)
    )
    assert ours < 0.6 * theirs


def test_columns_that_are_never_active_and_inputs_that_are_all_zero() -> None:
    w, moment, groups = matrix(4, 10, 8).float(), correlated(10, 8), torch.arange(4)
    moment[:, 3] = moment[3] = 0.0
    ranges = find_ranges(w, groups, bits=3)
    found = round_compensated(w, moment, groups, ranges, bits=3)
    assert bool(torch.isfinite(found.scale).all())
    nothing = round_compensated(w, torch.zeros(10, 10), groups, ranges, bits=3)
    assert torch.equal(nothing.codes, nearest_codes(w, ranges, groups, code_range(3))) and not nothing.compensated.any()


def test_what_cannot_be_used_is_named() -> None:
    w, groups = matrix(4, 10, 9), torch.arange(4)
    ranges = find_ranges(w, groups, bits=3)
    with pytest.raises(ValueError, match="NaN"):
        round_compensated(w, torch.full((10, 10), float("nan")), groups, ranges, bits=3)
    with pytest.raises(ValueError, match=r"\[10, 10\], got \[9, 9\]"):
        round_compensated(w, torch.eye(9), groups, ranges, bits=3)
    with pytest.raises(ValueError, match="damping=0"):
        round_compensated(w, torch.eye(10), groups, ranges, bits=3, damping=0)


def test_types_of_the_result() -> None:
    w, groups = matrix(4, 6, 10).half(), row_groups(4, 2)
    found = round_compensated(w, correlated(6, 10), groups, find_ranges(w, groups, bits=2), bits=2)
    assert isinstance(found, Rounded) and found.codes.dtype == torch.int8
    assert found.scale.dtype == found.zero.dtype == torch.float32 and found.compensated.shape == (2,)


def test_a_bias_that_may_move_leaves_the_error_in_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 4, dtype=torch.float64, generator=generator) + 2.0
    lost = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    moment, mean = torch.einsum("gni,gnj->gij", x, x) / 300, x.mean(1)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        change = bias_change(lost[rows], mean[group])
        off = x[group] @ lost[rows].T - change
        torch.testing.assert_close(off.mean(0), torch.zeros(3, dtype=torch.float64))
        covariance = moment[group] - torch.outer(mean[group], mean[group])
        expected = output_error(lost[rows], covariance)
        torch.testing.assert_close(off.square().mean(0), expected)
        torch.testing.assert_close(bias_change(lost, mean)[rows], change)
