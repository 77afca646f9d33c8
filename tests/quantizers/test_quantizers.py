"""Groups, grids and ranges against brute force and by property."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbert.quantizers.activations import ActivationObserver, ActivationQuantizer
from qbert.quantizers.grid import code_range, dequantize, fake_quantize, quantize
from qbert.quantizers.groups import row_groups
from qbert.quantizers.ranges import find_ranges

BITS = (2, 3, 4, 8)
SCHEMES = ("asymmetric", "symmetric", "midrise", "offset")
METHODS = ("minmax", "percentile", "mse")


def quantized(w: Tensor, groups: Tensor, bits: int, scheme: str, method: str, input_groups: int = 1) -> Tensor:
    ranges = find_ranges(w, groups, bits=bits, scheme=scheme, method=method, input_groups=input_groups)  # type: ignore[arg-type]
    blocks = w.unflatten(1, (input_groups, -1))
    scale, zero = ranges.scale[groups].unsqueeze(-1), ranges.zero[groups].unsqueeze(-1)
    return fake_quantize(blocks, scale, zero, *code_range(bits, scheme)).flatten(1)  # type: ignore[arg-type]


@given(st.integers(1, 12), st.integers(1, 16), st.integers(1, 300))
def test_row_groups_are_near_equal_and_never_cross_a_head(heads: int, head_rows: int, groups: int) -> None:
    rows = heads * head_rows
    if groups < heads and heads % groups:
        groups = heads
    index = row_groups(rows, groups, heads)
    assert index.shape == (rows,) and bool((index.diff() >= 0).all())
    assert index.unique().tolist() == list(range(min(groups, rows)))
    if groups >= heads:
        head_of_group = [set((torch.nonzero(index == g).flatten() // head_rows).tolist()) for g in index.unique()]
        assert all(len(h) == 1 for h in head_of_group)
        per_head = [len(index[h * head_rows : (h + 1) * head_rows].unique()) for h in range(heads)]
        assert max(per_head) - min(per_head) <= 1
    sizes = torch.bincount(row_groups(rows, groups))
    assert sizes.max() - sizes.min() <= 1


def test_paper_group_counts() -> None:
    assert torch.bincount(row_groups(768, 128)).unique().tolist() == [6]
    assert torch.bincount(row_groups(768, 12, heads=12)).unique().tolist() == [64]
    assert len(row_groups(768, 128, heads=12).unique()) == 128
    assert row_groups(768, 1, heads=12).unique().tolist() == [0]
    assert len(row_groups(384, 768, heads=12).unique()) == 384


@pytest.mark.parametrize("groups", [1, 12, 24, 96, 384])
@pytest.mark.parametrize("method", METHODS)
def test_permuting_heads_permutes_the_quantized_weight(groups: int, method: str) -> None:
    # Groups that were cut along inputs, or across heads, would not survive this.
    heads, head_rows = 12, 32
    w = torch.randn(heads * head_rows, 40) * torch.rand(heads * head_rows, 1)
    order = torch.randperm(heads)
    rows = (order[:, None] * head_rows + torch.arange(head_rows)).flatten()
    index = row_groups(len(w), groups, heads)
    assert torch.allclose(
        quantized(w[rows], index, 3, "asymmetric", method), quantized(w, index, 3, "asymmetric", method)[rows]
    )


@pytest.mark.parametrize("groups", [12, 48])
def test_a_head_of_large_weights_leaves_the_others_alone(groups: int) -> None:
    w = torch.randn(48, 16)
    index = row_groups(48, groups, heads=12)
    before = quantized(w, index, 4, "asymmetric", "minmax")
    w[:4] *= 100
    assert torch.equal(quantized(w, index, 4, "asymmetric", "minmax")[4:], before[4:])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(BITS),
    st.sampled_from(SCHEMES),
    st.sampled_from(METHODS),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 10_000),
)
def test_values_lie_on_the_grid_and_quantizing_again_changes_nothing(
    bits: int, scheme: str, method: str, input_groups: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(9, 6 * input_groups, generator=generator) * 10 ** (torch.rand(1, generator=generator) * 6 - 3)
    index = row_groups(9, groups)
    ranges = find_ranges(w, index, bits=bits, scheme=scheme, method=method, input_groups=input_groups)  # type: ignore[arg-type]
    qmin, qmax = code_range(bits, scheme)  # type: ignore[arg-type]
    scale, zero = ranges.scale[index].unsqueeze(-1), ranges.zero[index].unsqueeze(-1)
    codes = quantize(w.unflatten(1, (input_groups, -1)), scale, zero, qmin, qmax)
    assert codes.dtype == torch.int8 and qmin <= int(codes.min()) and int(codes.max()) <= qmax
    values = dequantize(codes, scale, zero)
    assert torch.equal(quantize(values, scale, zero, qmin, qmax), codes)
    fake = fake_quantize(w.unflatten(1, (input_groups, -1)), scale, zero, qmin, qmax)
    assert torch.equal(fake, values)
    if scheme == "asymmetric":
        assert torch.equal(zero, zero.round()) and bool(((zero >= qmin) & (zero <= qmax)).all())
    if method == "minmax" and scheme == "asymmetric":
        assert bool(((values - w.unflatten(1, (input_groups, -1))).abs() <= scale * 1.01).all())


@pytest.mark.parametrize(("bits", "scheme", "levels"), [(2, "symmetric", 3), (2, "midrise", 4), (3, "symmetric", 7)])
def test_number_of_levels(bits: int, scheme: str, levels: int) -> None:
    w = torch.linspace(-1, 1, 400).reshape(1, -1)
    values = quantized(w, torch.zeros(1, dtype=torch.long), bits, scheme, "minmax").unique()
    assert len(values) == levels and torch.allclose(values, -values.flip(0), atol=1e-6)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_zero_is_always_a_level(scheme: str) -> None:
    w = torch.rand(4, 64) + 3.0
    w[:, 0] = 0.0
    for method in METHODS:
        assert bool((quantized(w, row_groups(4, 2), 3, scheme, method)[:, 0] == 0).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mse_is_never_worse_than_minmax(bits: int, scheme: str) -> None:
    w = torch.randn(24, 64) ** 3
    index = row_groups(24, 5)
    errors = {m: (quantized(w, index, bits, scheme, m) - w).square().sum() for m in METHODS}
    # Where both find the same range, the order of the sums decides the last digits.
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-5) and errors["mse"] <= errors["percentile"] * 1.001


def test_mse_is_close_to_brute_force() -> None:
    # Exhaustive search over a fine grid of scales and every integer zero point.
    for trial in range(10):
        w = torch.randn(1, 40, generator=torch.Generator().manual_seed(trial)) ** (1 if trial % 2 else 3)
        group = torch.zeros(1, dtype=torch.long)
        ours = (quantized(w, group, 2, "asymmetric", "mse") - w).square().sum()
        best = min(
            (fake_quantize(w, torch.tensor(float(s)), torch.tensor(float(z)), -2, 1) - w).square().sum()
            for s, z in itertools.product(torch.linspace(0.02, float(w.abs().max()) * 1.2, 400), range(-2, 2))
        )
        assert ours <= best * 1.10


def test_percentile_100_is_minmax_and_lower_clips_outliers() -> None:
    w = torch.randn(4, 2000)
    w[:, 0] = 50.0
    index = row_groups(4, 2)
    whole = find_ranges(w, index, bits=4, method="percentile", percentile=100.0)
    assert torch.equal(whole.scale, find_ranges(w, index, bits=4, method="minmax").scale)
    assert bool((find_ranges(w, index, bits=4, method="percentile", percentile=99.0).scale < whole.scale / 5).all())


def test_constant_and_zero_weights_are_exact() -> None:
    for value in (0.0, 2.5, -3.0):
        w = torch.full((4, 8), value)
        assert torch.allclose(quantized(w, row_groups(4, 2), 4, "asymmetric", "mse"), w, rtol=1e-6)


def test_gradients_of_the_straight_through_estimator() -> None:
    w = torch.tensor([[-9.0, -0.2, 0.3, 0.6, 9.0]], requires_grad=True)
    scale = torch.tensor([[1.0]], requires_grad=True)
    fake_quantize(w, scale, torch.tensor([[0.0]]), -2, 1).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    # LSQ: clamped codes outside, rounding residue inside.
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(-2 + (0 + 0.2) + (0 - 0.3) + (1 - 0.6) + 1, abs=1e-6)


def test_scale_gradient_matches_finite_differences_where_codes_are_clamped() -> None:
    w = torch.full((1, 4), 7.0, dtype=torch.float64)
    scale = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, z: fake_quantize(w, s, z, -2, 1), (scale, zero))


@given(st.integers(1, 5), st.integers(1, 40))
def test_dynamic_activations_err_by_half_a_step_per_token(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width) * torch.logspace(-3, 3, tokens).unsqueeze(1)
    error = (ActivationQuantizer(8, "dynamic")(x) - x).abs()
    assert bool((error <= x.abs().amax(1, keepdim=True) / 127 * 0.5001 + 1e-9).all())


@given(st.integers(1, 5), st.integers(1, 40), st.floats(-20, 20))
def test_asymmetric_activations_err_by_half_a_step_per_token(tokens: int, width: int, offset: float) -> None:
    x = (torch.randn(tokens, width) + offset) * torch.logspace(-3, 3, tokens).unsqueeze(1)
    got = ActivationQuantizer(8, "asymmetric")(x)
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
    assert bool(((got - x).abs() <= step * 0.501 + x.abs().amax(1, keepdim=True) * 1e-6 + 1e-7).all())
    assert torch.equal(got.amin(1), x.amin(1))


def test_asymmetric_activations_pass_gradients_and_have_nothing_to_learn() -> None:
    quantizer, x = ActivationQuantizer(8, "asymmetric"), torch.randn(3, 7, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 7))
    with pytest.raises(ValueError, match="'asymmetric'"):
        quantizer.learn()


@pytest.mark.parametrize("mode", ["dynamic", "asymmetric"])
def test_activations_of_one_token_do_not_depend_on_the_others(mode: Any) -> None:
    quantizer, x = ActivationQuantizer(8, mode), torch.randn(2, 5, 16)
    alone = quantizer(x[1:, 2:3])
    x[0] *= 1000
    assert torch.equal(quantizer(x)[1:, 2:3], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scalar", [False, True], ids=["weights", "static activations"])
def test_half_precision_is_quantized_as_float32_is_and_rounded_once(scalar: bool, dtype: torch.dtype) -> None:
    w, towards = torch.randn(6, 1, 64).to(dtype), torch.randn(6, 1, 64).to(dtype)
    ranges = find_ranges(w.flatten(1), torch.arange(6), bits=8, scheme="offset")
    found, expected = [], []
    for into, x in ((found, w), (expected, w.float())):
        grids = (r[0, 0] if scalar else r.unsqueeze(1) for r in ranges)
        leaves = [t.clone().requires_grad_() for t in (x, *grids)]
        y = fake_quantize(*leaves, *code_range(8))
        into += [y, *torch.autograd.grad(y, leaves, towards.to(x.dtype))]
        assert [t.dtype for t in into] == [x.dtype, x.dtype, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], expected[0].to(dtype)) and torch.equal(found[1], expected[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static"])
def test_tokens_without_any_range_stay_what_they_are(mode: Any, dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(8, mode)
    if mode == "static":
        quantizer.set_range(0.0, 0.0)
    assert torch.equal(quantizer(torch.zeros(2, 3, dtype=dtype)), torch.zeros(2, 3, dtype=dtype))
    if mode == "asymmetric":
        constant = torch.full((2, 3), 1.5, dtype=dtype)
        assert torch.equal(quantizer(constant), constant)


def test_static_activations_need_calibration_and_then_hold_zero() -> None:
    quantizer = ActivationQuantizer(8, "static")
    with pytest.raises(RuntimeError, match="calibration_data"):
        quantizer(torch.ones(2))
    for wrong in (5.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="is no share of the old range"):
            quantizer.follow(wrong)
    quantizer.set_range(-0.17, 6.0)
    x = torch.tensor([0.0, -0.17, 6.0, 100.0])
    assert quantizer(x)[0] == 0 and torch.allclose(quantizer(x)[1:3], x[1:3], atol=6.2 / 255)
    assert float(quantizer(x)[3]) == pytest.approx(6.0, abs=0.05)


def test_observer_clips_a_lone_outlier() -> None:
    observer, x = ActivationObserver(), torch.randn(100_000)
    x[0] = 200.0
    observer.see_extent(x)
    observer.see_values(x)
    low, high = observer.best_range(4)
    assert high < 100 and low < 0
    with pytest.raises(RuntimeError, match="no activation"):
        ActivationObserver().best_range(8)


@pytest.mark.parametrize("mode", ["dynamic", "asymmetric"])
def test_a_tensor_that_several_layers_read_is_quantized_once(mode: str) -> None:
    query, key = ActivationQuantizer(8, mode), ActivationQuantizer(8, mode)
    leaf = torch.randn(3, 5, requires_grad=True)
    x = leaf * 2
    first = query(x)
    assert key(x) is first
    (key(x) * torch.arange(5.0)).sum().backward()
    assert torch.equal(leaf.grad, (2 * torch.arange(5.0)).expand(3, 5))  # type: ignore[arg-type]
    with torch.no_grad():
        plain = leaf * 2
        before = query(plain)
        plain.mul_(3)
        after = query(plain)
        assert after is not before and torch.equal(after, ActivationQuantizer(8, mode)(plain.clone()))
        alive = weakref.ref(after)
    del plain, after
    assert alive() is None


def test_an_empty_batch_passes_a_learned_and_a_moving_range() -> None:
    quantizer = ActivationQuantizer(8, "static").train()
    quantizer.set_range(-1, 1)
    quantizer.follow(0.9)
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)
    quantizer.follow(None)
    quantizer.learn()
    quantizer(torch.zeros(0, 4, requires_grad=True)).sum().backward()
    assert float(quantizer.scale.grad) == 0  # type: ignore[arg-type]
