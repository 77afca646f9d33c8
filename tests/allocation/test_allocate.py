"""Bit allocation: the ranking rule, exact budgets against brute force, ties, fixed blocks, refusals."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Spectrum, bits_by_block, spectrum_of

from qbert.allocation.allocate import allocate_bits
from qbert.allocation.blocks import free_targets, make_choices, measured_blocks
from qbert.allocation.budgets import Budget, make_budgets
from qbert.allocation.damage import weight_errors
from qbert.allocation.knapsack import choose, front, total
from qbert.bits import BitsConfig
from qbert.encoders import targets
from qbert.encoders.targets import find_targets
from qbert.hessian import parameter_blocks
from qbert.quantize import quantize_model
from qbert.sizes import model_size

MODEL = build("bert", num_hidden_layers=4).eval()
SETTINGS: dict[str, Any] = {"groups": 4, "range_method": "minmax"}


# --- by rank -----------------------------------------------------------------------------------------------------


def test_paper_rule_gives_the_upper_half_more_bits() -> None:
    names = [f"encoder.layer.{i}" for i in range(12)]
    values = [6.67, 9.38, 14.55, 18.26, 18.81, 21.75, 16.43, 15.37, 25.82, 1.71, 0.80, 1.01]  # Q-BERT's CoLA model
    config = allocate_bits(dict(zip(names, values, strict=True)), bits=(2, 3), groups=12)
    expected = {n: {"bits": 3 if 3 <= i <= 8 else 2} for i, n in enumerate(names)}
    assert config.rules == {**expected, "*": {"bits": 3}}
    assert config.defaults == {"groups": 12}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=24), st.sampled_from([(2, 3), (2, 4), (2, 3, 4), (2, 3, 4, 8)]))
def test_ranking_is_monotone_and_cut_into_equal_parts(values: list[float], widths: tuple[int, ...]) -> None:
    config = allocate_bits({f"layer.{i}": v for i, v in enumerate(values)}, bits=widths)
    got = [config.rules[f"layer.{i}"]["bits"] for i in range(len(values))]
    assert all(got[i] >= got[j] for i in range(len(values)) for j in range(len(values)) if values[i] > values[j])
    counts = [got.count(w) for w in sorted(widths, reverse=True)]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("share,high", [(0.0, 0), (0.25, 1), (0.3, 2), (1.0, 4)])
def test_share_of_the_larger_width(share: float, high: int) -> None:
    config = allocate_bits({f"layer.{i}": float(i) for i in range(4)}, bits=(2, 4), share=share)
    assert [config.rules[f"layer.{i}"]["bits"] for i in range(4)] == [2] * (4 - high) + [4] * high


@pytest.mark.parametrize("granularity", ["layer", "block", "matrix"])
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "deberta-v2", "modernbert", "mobilebert"])
def test_every_granularity_resolves_to_its_blocks(family: str, granularity: str) -> None:
    model = build(family)
    spectrum = spectrum_of(model, granularity)
    config = allocate_bits(spectrum, bits=(2, 4), model=model, groups=4)
    got = bits_by_block(config, model, spectrum)
    order = np.argsort(-spectrum.sensitivity, kind="stable")
    assert [got[i] for i in order] == sorted(got, reverse=True)
    assert got.count(4) == math.ceil(len(got) / 2)
    if granularity == "layer":
        assert set(config.rules) == {*spectrum.names, "*"}


def test_fixed_blocks_leave_the_ranking() -> None:
    spectrum = spectrum_of(MODEL)
    spectrum.sensitivity = np.array([4.0, 3.0, 2.0, 1.0])
    config = allocate_bits(spectrum, bits=(2, 4), fixed={"encoder.layer.0": 8}, model=MODEL, groups=4)
    assert bits_by_block(config, MODEL, spectrum) == [8, 4, 4, 2]
    one = allocate_bits(spectrum, bits=(2, 4), fixed={"*.query": 8, "pooler": 8, "embeddings": 4}, groups=4)
    specs = one.resolve(MODEL)
    for path, spec in specs.items():
        layer = next((i for i in range(4) if f"layer.{i}." in path), None)
        wanted = 8 if "query" in path or "pooler" in path else 4 if layer is None else [4, 4, 2, 2][layer]
        assert spec.bits == wanted, path


# --- under a budget ----------------------------------------------------------------------------------------------


def brute_force(spectrum: Spectrum, widths: tuple[int, ...], size_mb: float) -> float | None:
    """Least predicted damage over all allocations, each one really written down and measured."""
    errors = weight_errors(MODEL, widths, **SETTINGS)
    best = None
    for picked in itertools.product(widths, repeat=len(spectrum.names)):
        config = BitsConfig({**dict(zip(spectrum.names, picked, strict=True)), "*": max(widths)}, **SETTINGS)
        if model_size(MODEL, config).total <= size_mb * 1e6:
            harm = predicted(spectrum, picked, errors)
            best = harm if best is None else min(best, harm)
    return best


def predicted(spectrum: Spectrum, picked: Any, errors: dict[str, dict[int, float]]) -> float:
    return math.fsum(
        s * sum(errors[m][b] for m in spectrum.members[n])
        for n, b, s in zip(spectrum.names, picked, spectrum.sensitivity, strict=True)
    )


FLOOR = model_size(MODEL, BitsConfig(2, **SETTINGS)).mb
CEILING = model_size(MODEL, BitsConfig(8, **SETTINGS)).mb


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(FLOOR * 0.98, CEILING * 1.02),
    st.sampled_from([(2, 3), (2, 4), (2, 3, 8), (3, 4, 8)]),
)
def test_size_budget_against_brute_force(seed: int, size_mb: float, widths: tuple[int, ...]) -> None:
    spectrum = spectrum_of(MODEL, seed=seed)
    best = brute_force(spectrum, widths, size_mb)
    if best is None:
        with pytest.raises(ValueError, match="smallest possible is"):
            allocate_bits(spectrum, bits=widths, size_mb=size_mb, model=MODEL, **SETTINGS)
        return
    config = allocate_bits(spectrum, bits=widths, size_mb=size_mb, model=MODEL, **SETTINGS)
    assert model_size(MODEL, config).total <= size_mb * 1e6
    harm = predicted(spectrum, bits_by_block(config, MODEL, spectrum), weight_errors(MODEL, widths, **SETTINGS))
    assert harm == pytest.approx(best, rel=1e-12)


def test_the_named_smallest_size_is_feasible_and_hardly_less_is_not() -> None:
    spectrum = spectrum_of(MODEL, "matrix")
    with pytest.raises(ValueError, match=r"size_mb=0.01 is too small") as caught:
        allocate_bits(spectrum, bits=(3, 4), size_mb=0.01, model=MODEL, groups=4)
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    config = allocate_bits(spectrum, bits=(3, 4), size_mb=smallest, model=MODEL, groups=4)
    assert model_size(MODEL, config).total == model_size(MODEL, BitsConfig(3, groups=4)).total
    with pytest.raises(ValueError, match="too small"):
        allocate_bits(spectrum, bits=(3, 4), size_mb=smallest - 2e-4, model=MODEL, groups=4)


@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_budget_at_finer_granularity_is_kept_and_better(granularity: str) -> None:
    fine, coarse = spectrum_of(MODEL, granularity), spectrum_of(MODEL)
    coarse.sensitivity[:] = 1.0
    fine.sensitivity[:] = 1.0
    errors = weight_errors(MODEL, (2, 3, 4, 8), groups=4)
    size = (FLOOR + CEILING) / 2
    harms = []
    for spectrum in (coarse, fine):
        config = allocate_bits(spectrum, bits=(2, 3, 4, 8), size_mb=size, model=MODEL, groups=4)
        assert model_size(MODEL, config).mb <= size
        assert model_size(quantize_model(MODEL, config)).mb <= size
        harms.append(predicted(spectrum, bits_by_block(config, MODEL, spectrum), errors))
    assert harms[1] <= harms[0]


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.floats(-1, 1e4), min_size=1, max_size=3), min_size=n, max_size=n),
            st.lists(st.integers(0, 2), min_size=n, max_size=n),
        )
    ),
    st.integers(0, 10**6),
    st.floats(0, 30),
    st.floats(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_two_budgets_against_brute_force(
    tables: tuple[list[list[float]], list[int]], seed: int, first: float, second: float
) -> None:
    damage, _ = tables
    random = np.random.default_rng(seed)
    whole = [[float(random.integers(0, 12)) for _ in row] for row in damage]
    real = [[float(random.uniform(0, 12)) for _ in row] for row in damage]
    options = list(itertools.product(*(range(len(row)) for row in damage)))
    kept = [o for o in options if total(whole, o) <= first and total(real, o) <= second]
    picked = choose(damage, [whole, real], [first, second])
    if not kept:
        assert picked is None
        return
    assert picked is not None and tuple(picked) in kept
    best = min(total(damage, o) for o in kept)
    assert total(damage, picked) <= best + 1e-9 * max(1.0, max(max(map(abs, row)) for row in damage))


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_front_against_brute_force(seed: int, items: int) -> None:
    random = np.random.default_rng(seed)
    damage = [[float(d) for d in random.integers(0, 20, size=3)] for _ in range(items)]
    cost = [[float(c) for c in random.integers(0, 9, size=3)] for _ in range(items)]
    points = {(total(cost, o), total(damage, o)) for o in itertools.product(range(3), repeat=items)}
    optimal = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    found = front(damage, cost)
    assert [(c, d) for c, d, _ in found] == optimal
    assert all((total(cost, o), total(damage, o)) == (c, d) for c, d, o in found)


def test_average_bits_counts_weights_not_blocks() -> None:
    spectrum = spectrum_of(MODEL, "matrix")
    config = allocate_bits(spectrum, bits=(2, 3, 4, 8), average_bits=3.0, model=MODEL, groups=4)
    specs = config.resolve(MODEL)
    inside = [t for t in find_targets(MODEL) if t.layer is not None]
    weights = [t.shape[0] * t.shape[1] for t in inside]
    mean = sum(w * specs[t.path].bits for w, t in zip(weights, inside, strict=True)) / sum(weights)
    assert 2.9 < mean <= 3.0


def test_bit_operations_count_activation_bits() -> None:
    spectrum = spectrum_of(MODEL)
    macs = sum(t.shape[0] * t.shape[1] for t in find_targets(MODEL) if t.layer is not None)
    kwargs: Any = {"bits": (2, 4), "model": MODEL, "groups": 4}
    config = allocate_bits(spectrum, bit_operations=macs * 3 * 8, **kwargs)
    assert sorted(bits_by_block(config, MODEL, spectrum)) == [2, 2, 4, 4]
    full = allocate_bits(spectrum, bit_operations=macs * 3 * 32, activation_bits=None, **kwargs)
    assert sorted(bits_by_block(full, MODEL, spectrum)) == [2, 2, 4, 4]
    with pytest.raises(ValueError, match="bit_operations="):
        allocate_bits(spectrum, bit_operations=macs * 3 * 8, activation_bits=None, **kwargs)


def test_latency_table_by_block_and_by_matrix() -> None:
    spectrum = spectrum_of(MODEL)
    spectrum.sensitivity = np.array([1.0, 2.0, 3.0, 4.0])
    table: dict[str, dict[int, float]] = {n: {4: 1.0, 8: 1.5} for n in spectrum.names[:3]}
    table |= {m: {4: 1.0 / 6, 8: 0.3} for m in spectrum.members[spectrum.names[3]]}
    kwargs: Any = {"bits": (4, 8), "model": MODEL, "groups": 4}
    config = allocate_bits(spectrum, latency=table, max_latency=5.3 + 1e-9, **kwargs)
    assert bits_by_block(config, MODEL, spectrum) == [4, 4, 8, 8]
    with pytest.raises(ValueError, match=r"max_latency=3.9 is too small.*smallest possible is 4.0000"):
        allocate_bits(spectrum, latency=table, max_latency=3.9, **kwargs)
    del table[spectrum.names[0]][8]
    with pytest.raises(ValueError, match="has no time for 8 bits"):
        allocate_bits(spectrum, latency=table, max_latency=6, **kwargs)


def test_two_budgets_that_exclude_each_other_say_so() -> None:
    spectrum = spectrum_of(MODEL)
    backwards = {n: {2: 9.0, 4: 1.0} for n in spectrum.names}  # fewer bits are slower here
    kwargs: Any = {"bits": (2, 4), "model": MODEL, "groups": 4, "latency": backwards}
    with pytest.raises(ValueError, match=r"size_mb=.* together with max_latency: the smallest possible is") as caught:
        allocate_bits(spectrum, size_mb=FLOOR * 1.001, max_latency=5.0, **kwargs)
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    config = allocate_bits(spectrum, size_mb=smallest, max_latency=5.0, **kwargs)
    assert bits_by_block(config, MODEL, spectrum) == [4, 4, 4, 4]


def test_fixed_parts_are_paid_for_and_kept() -> None:
    spectrum = spectrum_of(MODEL)
    fixed = {"encoder.layer.3": 8, "*.intermediate.dense": 4, "embeddings": 4}
    kwargs: Any = {"bits": (2, 3), "fixed": fixed, "model": MODEL, "groups": 4}
    least = allocate_bits(spectrum, size_mb=1.0, **kwargs)
    specs = least.resolve(MODEL)
    for i in range(3):
        assert specs[f"bert.encoder.layer.{i}.intermediate.dense"].bits == 4
        assert specs[f"bert.encoder.layer.{i}.output.dense"].bits == 3
    assert specs["bert.encoder.layer.3.output.dense"].bits == 8
    # The longer pattern wins, as in every configuration.
    assert specs["bert.encoder.layer.3.intermediate.dense"].bits == 4
    with pytest.raises(ValueError, match="smallest possible is") as caught:
        allocate_bits(spectrum, size_mb=0.01, **kwargs)
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    tight = allocate_bits(spectrum, size_mb=smallest, **kwargs)
    assert model_size(MODEL, tight).total <= smallest * 1e6


def test_tied_blocks_get_equal_bits() -> None:
    spectrum = spectrum_of(MODEL)
    spectrum.sensitivity = np.array([1.0, 5.0, 2.0, 3.0])
    names = spectrum.names
    size = (FLOOR + model_size(MODEL, BitsConfig(4, groups=4)).mb) / 2
    kwargs: Any = {"bits": (2, 4), "model": MODEL, "groups": 4}
    free = bits_by_block(allocate_bits(spectrum, size_mb=size, **kwargs), MODEL, spectrum)
    assert free == [2, 4, 2, 4]
    tied = allocate_bits(spectrum, size_mb=size, tied=[(names[0], names[1])], **kwargs)
    assert bits_by_block(tied, MODEL, spectrum) == [4, 4, 2, 2]
    with pytest.raises(ValueError, match="tied: 'nowhere'"):
        allocate_bits(spectrum, tied=[("nowhere",)], **kwargs)


def test_shared_weights_are_tied_by_themselves() -> None:
    model = build("bert", num_hidden_layers=3).eval()
    layers: Any = model.bert.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    spectrum = spectrum_of(model)
    spectrum.sensitivity = np.array([9.0, 5.0, 1.0])
    config = allocate_bits(spectrum, bits=(2, 4), model=model, groups=4)
    got = bits_by_block(config, model, spectrum)
    assert got[0] == got[2]
    low, high = (model_size(model, BitsConfig(b, groups=4)).mb for b in (2, 4))
    sized = allocate_bits(spectrum, bits=(2, 4), size_mb=(low + high) / 2, model=model, groups=4)
    assert model_size(model, sized).mb <= (low + high) / 2
    quantize_model(model, sized)


def test_given_damage_replaces_the_prediction() -> None:
    spectrum = spectrum_of(MODEL)
    damage = {n: {2: 1.0 if i == 1 else 0.1, 4: 0.0} for i, n in enumerate(spectrum.names)}
    size = FLOOR + (model_size(MODEL, BitsConfig(4, groups=4)).mb - FLOOR) / 4 + 1e-6
    kwargs: Any = {"bits": (2, 4), "model": MODEL, "groups": 4, "size_mb": size}
    assert bits_by_block(allocate_bits(spectrum, damage=damage, **kwargs), MODEL, spectrum) == [2, 4, 2, 2]
    del damage[spectrum.names[2]][4]
    with pytest.raises(ValueError, match=r"damage: it has no finite number for 'encoder.layer.2' at 4 bits"):
        allocate_bits(spectrum, damage=damage, **kwargs)


def test_float_is_a_width_too() -> None:
    spectrum = spectrum_of(MODEL)
    config = allocate_bits(spectrum, bits=(8, 32), share=0.25, model=MODEL, groups=4)
    assert sorted(bits_by_block(config, MODEL, spectrum)) == [8, 8, 8, 32]
    size = model_size(MODEL, config).mb
    again = allocate_bits(spectrum, bits=(8, 32), size_mb=size, model=MODEL, groups=4)
    assert sorted(bits_by_block(again, MODEL, spectrum)) == [8, 8, 8, 32]


def test_weight_errors_are_those_of_the_quantized_model() -> None:
    errors = weight_errors(MODEL, (3,), groups=4, scheme="midrise")
    student = quantize_model(MODEL, BitsConfig({"*": 3}, groups=4, scheme="midrise"))
    for target in find_targets(MODEL):
        if target.layer is not None:
            moved = student.get_submodule(target.path).quantized_weight()
            expected = (moved.double() - target.module.get_parameter("weight").detach().double()).square().sum()
            assert errors[target.name][3] == pytest.approx(float(expected), rel=1e-6)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": (2, 5)}, r"bits=\(2, 5\)"),
        ({"bits": ()}, r"bits=\(\)"),
        ({"bits": (2, 2)}, r"different widths"),
        ({"bits": 4}, "bits=4 is one number"),
        ({"size_mb": 5}, "pass model="),
        ({"size_mb": -1, "model": MODEL}, "size_mb=-1"),
        ({"size_mb": "5", "model": MODEL}, "size_mb='5'"),
        ({"max_latency": 3, "model": MODEL}, "latency and max_latency go together"),
        ({"bits": (2, 3, 4), "share": 0.5}, "share: "),
        ({"share": 1.5}, "share=1.5"),
        ({"share": "half"}, "share: 'half' is not a number"),
        ({"bits": 2.5}, r"bits=2\.5 is one number"),
        ({"bits": (2.0, 3.0)}, r"bits=\(2\.0, 3\.0\)"),
        ({"fixed": "encoder.layer.0"}, "fixed: expected a mapping"),
        ({"tied": ["encoder.layer.0", "encoder.layer.1"]}, r"tied: .* such as \[\('encoder\.layer\.0', \.\.\.\)\]"),
        ({"model": "bert"}, "model: expected the float model"),
        ({"fixed": {"nowhere": 4}, "model": MODEL}, "pattern 'nowhere' matches no tensor"),
        ({"gruops": 4}, "unknown setting 'gruops'"),
        ({"groups": 5, "model": MODEL}, "groups=5 does not divide"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        allocate_bits(spectrum_of(MODEL), **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_spectra_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no block"):
        allocate_bits({})
    with pytest.raises(ValueError, match="sensitivity of a is nan"):
        allocate_bits({"a": math.nan})
    with pytest.raises(ValueError, match="measured"):
        allocate_bits(spectrum_of(build("bert", num_hidden_layers=5)), model=MODEL)
    with pytest.raises(ValueError, match=r"'encoder.layers.0'"):
        allocate_bits({"encoder.layers.0": 1.0}, model=MODEL)


@pytest.mark.parametrize("value", [None, "1", [1.0], True])
def test_sensitivities_that_are_no_numbers_are_refused(value) -> None:
    with pytest.raises(ValueError, match=r"sensitivity of encoder\.layer\.0 is .*; use a number"):
        allocate_bits({"encoder.layer.0": value})
    with pytest.raises(TypeError, match="spectrum: expected a HessianSpectrum"):
        allocate_bits(value)


def test_the_spectrum_of_a_quantized_model_is_refused() -> None:
    blocks = parameter_blocks(quantize_model(MODEL, BitsConfig(4, groups=4)))
    names, members = [b.name for b in blocks], {b.name: b.members for b in blocks}
    spectrum = Spectrum(names, members, np.ones(len(blocks)))
    for budget in ({}, {"average_bits": 2.5, "model": MODEL, "groups": 4}):
        with pytest.raises(ValueError, match=r"none of its blocks holds a matrix .*; measure the float model"):
            allocate_bits(spectrum, **budget)


def test_negative_sensitivities_rank_blocks_but_predict_no_damage() -> None:
    signed = {"encoder.layer.0": -5.0, "encoder.layer.1": 1.0, "encoder.layer.2": 2.0}
    assert allocate_bits(signed, model=MODEL, groups=4).rules["encoder.layer.0"] == {"bits": 2}
    with pytest.raises(ValueError, match=r"sensitivity of encoder\.layer\.0 is -5\.0, .*magnitudes"):
        allocate_bits(signed, average_bits=2.5, model=MODEL, groups=4)


def test_numpy_numbers_are_numbers(tmp_path) -> None:
    spectrum = spectrum_of(MODEL)
    config = allocate_bits(spectrum, bits=np.array([2, 4]), size_mb=np.float32(1.0), model=MODEL, groups=4)
    config.save(tmp_path / "bits.json")
    assert config == allocate_bits(spectrum, bits=(2, 4), size_mb=1.0, model=MODEL, groups=4)


@pytest.mark.parametrize("bits", [2.1, 7 / 3, 2.7])
def test_a_bound_that_was_read_off_admits_what_it_was_read_off(bits: float) -> None:
    # 1.000009 * 1e6 is 1000008.9999999999: the very size of a model must not be too small for it.
    for size in (1_000_009, 1_000_012, 16_077_004):
        assert budget_of(size_mb=size / 1e6).limit == size
    spectrum = spectrum_of(MODEL, "matrix")
    config = allocate_bits(spectrum, bits=(2, 3), average_bits=bits, model=MODEL, groups=4)
    targets = free_targets(MODEL)
    found = config.resolve(MODEL)
    weights = [targets[m].module.weight.numel() for n in spectrum.names for m in spectrum.members[n]]
    used = [found[targets[m].path].bits for n in spectrum.names for m in spectrum.members[n]]
    mean = sum(w * b for w, b in zip(weights, used, strict=True)) / sum(weights)
    assert allocate_bits(spectrum, bits=(2, 3), average_bits=mean, model=MODEL, groups=4) == config


def budget_of(**bounds: float) -> Budget:
    blocks = measured_blocks(spectrum_of(MODEL), MODEL)
    choices = make_choices(blocks, model=MODEL)
    (budget,) = make_budgets(blocks, choices, (2, 3), MODEL, BitsConfig(2, groups=4), {"groups": 4}, **bounds)
    return budget


def test_the_smallest_bound_is_named_in_any_unit() -> None:
    spectrum = spectrum_of(MODEL)
    times = {name: {2: 1.234e-5, 3: 2e-5} for name in spectrum.names}
    with pytest.raises(ValueError, match=r"max_latency=3e-05 is too small .* the smallest possible is 0\.0000493600$"):
        allocate_bits(spectrum, latency=times, max_latency=3e-5, model=MODEL, groups=4)
    allocate_bits(spectrum, latency=times, max_latency=0.0000493600, model=MODEL, groups=4)


def test_the_model_is_left_alone() -> None:
    before = {k: v.clone() for k, v in MODEL.state_dict().items()}
    flags = [p.requires_grad for p in MODEL.parameters()]
    allocate_bits(spectrum_of(MODEL), bits=(2, 4), average_bits=3, model=MODEL, groups=4)
    assert all(torch.equal(before[k], v) for k, v in MODEL.state_dict().items())
    assert flags == [p.requires_grad for p in MODEL.parameters()]


@pytest.mark.parametrize("granularity", ["layer", "matrix"])
def test_the_modules_of_the_model_are_walked_over_once(granularity: str, monkeypatch: Any) -> None:
    size = model_size(MODEL, 4).mb
    walks: list[Any] = []
    walk = targets._find_targets

    def counted(model: Any) -> Any:
        walks.append(model)
        return walk(model)

    monkeypatch.setattr(targets, "_find_targets", counted)
    spectrum = spectrum_of(MODEL, granularity)
    for measured in (spectrum, dict(zip(spectrum.names, spectrum.sensitivity.tolist(), strict=True))):
        walks.clear()
        allocate_bits(measured, bits=(2, 4), model=MODEL, size_mb=size, groups=4)
        assert walks == [MODEL]
    assert len(find_targets(MODEL)) > 0 and len(walks) == 2
