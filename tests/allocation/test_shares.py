"""Allocations of resampled spectra: the same as allocating bits for each of them."""

from typing import Any

import numpy as np
import pytest
from encoders import build
from spectra import bits_by_block, spectrum_of

from qbert.allocation.allocate import allocate_bits, bit_shares
from qbert.hessian import HessianSpectrum


def spectrum(model: Any, eigenvalues: Any) -> HessianSpectrum:
    """A spectrum of the layers of `model` with these eigenvalues [R, L]."""
    blocks, values = spectrum_of(model), np.asarray(eigenvalues, dtype=float)
    zeros = np.zeros_like(values)
    return HessianSpectrum(
        names=blocks.names,
        members=blocks.members,
        parameters=dict.fromkeys(blocks.names, 1),
        eigenvalues=values,
        other_end=zeros,
        residuals=zeros,
        errors=zeros,
        upper_bounds=np.abs(values),
        products=zeros.astype(int),
        converged=zeros == 0,
        losses=np.zeros(len(values)),
        settings={},
    )


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize("arguments", [{}, {"average_bits": 2.9, "range_method": "minmax", "groups": 4}])
def test_every_draw_is_an_allocation_of_its_own(family: str, arguments: dict[str, Any]) -> None:
    model = build(family, num_hidden_layers=4).eval()
    count = len(spectrum_of(model).names)
    measured = spectrum(model, np.random.default_rng(1).lognormal(size=(5, count)))
    found = bit_shares(measured, (2, 3, 4), draws=12, seed=3, model=model, **arguments)
    drawn = []
    for sensitivity in measured.resampled(12, seed=3):
        one = spectrum_of(model)
        one.sensitivity = sensitivity
        drawn.append(bits_by_block(allocate_bits(one, (2, 3, 4), model=model, **arguments), model, one))
    chosen = bits_by_block(allocate_bits(measured, (2, 3, 4), model=model, **arguments), model, spectrum_of(model))
    assert found.names == measured.names and found.widths == (2, 3, 4) and found.chosen == chosen
    expected = [[np.mean([d[i] == w for d in drawn]) for w in (2, 3, 4)] for i in range(count)]
    np.testing.assert_allclose(found.shares, expected)
    assert found.same == pytest.approx(np.mean([d == chosen for d in drawn]))


def test_clear_spectra_are_sure_and_equal_ones_are_not() -> None:
    model = build("bert", num_hidden_layers=4)
    clear = bit_shares(spectrum(model, [[4, 3, 2, 1], [4.1, 3.1, 2.1, 1.1]]), (2, 4))
    assert clear.same == 1 and clear.chosen == [4, 4, 2, 2] and (clear.shares.max(axis=1) == 1).all()
    torn = bit_shares(spectrum(model, [[9, 1, 5, 0], [1, 9, 5, 0], [4, 5, 5, 0]]), (2, 4))
    assert torn.same < 1 and 0 < torn.shares[0, 1] < 1
    np.testing.assert_allclose(torn.shares.sum(axis=1), 1)
    assert "draws" in str(torn) and "encoder.layer.3" in str(torn)


def test_fixed_blocks_are_left_out() -> None:
    model = build("bert", num_hidden_layers=4)
    found = bit_shares(spectrum(model, [[4, 3, 2, 1], [1, 2, 3, 4]]), (2, 4), fixed={"encoder.layer.1": 8}, model=model)
    assert found.names == ["encoder.layer.0", "encoder.layer.2", "encoder.layer.3"]


def test_what_cannot_be_resampled_is_refused() -> None:
    model = build("bert", num_hidden_layers=4)
    two = spectrum(model, [[4, 3, 2, 1], [1, 2, 3, 4]])
    with pytest.raises(ValueError, match="runs=2 or more"):
        bit_shares(spectrum(model, [[4, 3, 2, 1]]))
    with pytest.raises(ValueError, match="draws: 0"):
        bit_shares(two, draws=0)
    with pytest.raises(TypeError, match=r"draws: 2\.5 .*a whole number"):
        bit_shares(two, draws=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="spectrum: expected a HessianSpectrum with its runs, got dict"):
        bit_shares({"encoder.layer.0": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damage"):
        bit_shares(two, damage={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 12}, "unknown setting 'size'"),
        ({"fixed": {"encoder.layer.0": 5}}, "bits=5"),
        ({"groups": 0}, "groups=0"),
    ],
)
def test_what_allocate_bits_refuses_is_refused(arguments, message: str) -> None:
    two = spectrum(build("bert", num_hidden_layers=4), [[4, 3, 2, 1], [1, 2, 3, 4]])
    for use in (allocate_bits, bit_shares):
        with pytest.raises(ValueError, match=message):
            use(two, **arguments)
