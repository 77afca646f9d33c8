"""The Pareto front agrees with the allocation under every budget, and with model_size."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from encoders import build
from spectra import Spectrum, bits_by_block, spectrum_of

from qbert.allocation.allocate import allocate_bits
from qbert.allocation.damage import weight_errors
from qbert.allocation.front import ParetoFront, pareto
from qbert.sizes import model_size

MODEL = build("bert", num_hidden_layers=3).eval()
KWARGS: dict[str, Any] = {"bits": (2, 4, 8), "groups": 4, "range_method": "minmax"}


def harm(spectrum: Spectrum, config: Any) -> float:
    errors = weight_errors(MODEL, (2, 4, 8), groups=4, range_method="minmax")
    bits = bits_by_block(config, MODEL, spectrum)
    rows = zip(spectrum.names, bits, spectrum.sensitivity, strict=True)
    return math.fsum(s * errors[m][b] for n, b, s in rows for m in spectrum.members[n])


@pytest.mark.parametrize("granularity", ["layer", "matrix"])
def test_front_is_what_budgets_give(granularity: str) -> None:
    spectrum = spectrum_of(MODEL, granularity)
    front = pareto(spectrum, MODEL, **KWARGS)
    sizes, harms = [p.bytes for p in front.points], [p.damage for p in front.points]
    assert sizes == sorted(set(sizes)) and harms == sorted(set(harms), reverse=True)
    assert set(bits_by_block(front.points[0].config, MODEL, spectrum)) == {2}
    assert set(bits_by_block(front.points[-1].config, MODEL, spectrum)) == {8}
    for point in front.points[:: max(1, len(front.points) // 12)]:
        assert model_size(MODEL, point.config).total == point.bytes
        assert harm(spectrum, point.config) == pytest.approx(point.damage, rel=1e-12)
        budget = allocate_bits(spectrum, size_mb=point.mb, model=MODEL, **KWARGS)
        assert harm(spectrum, budget) == pytest.approx(point.damage, rel=1e-9)


def test_config_by_size_and_refusal() -> None:
    spectrum = spectrum_of(MODEL)
    front = pareto(spectrum, MODEL, **KWARGS)
    middle = front.points[len(front.points) // 2]
    assert front.config(middle.mb) == middle.config
    assert front.config(1e9) == front.points[-1].config
    with pytest.raises(ValueError, match=r"size_mb=0\.001 is too small: the smallest allocation takes") as caught:
        front.config(0.001)
    assert front.config(float(str(caught.value).rsplit(" ", 1)[1])) == front.points[0].config


def test_fixed_and_tied_blocks() -> None:
    spectrum = spectrum_of(MODEL)
    first, second, third = spectrum.names
    front = pareto(spectrum, MODEL, fixed={first: 4}, tied=[(second, third)], **KWARGS)
    assert [bits_by_block(p.config, MODEL, spectrum) for p in front.points] == [[4, 2, 2], [4, 4, 4], [4, 8, 8]]
    assert [model_size(MODEL, p.config).total for p in front.points] == [p.bytes for p in front.points]


def test_save_load_print_plot(tmp_path: Path) -> None:
    front = pareto(spectrum_of(MODEL), MODEL, **KWARGS)
    front.save(tmp_path / "front.json")
    again = ParetoFront.load(tmp_path / "front.json")
    assert again == front
    assert len(str(front).splitlines()) == len(front.points) + 1
    paper = allocate_bits(spectrum_of(MODEL), bits=(2, 4), model=MODEL, groups=4)
    front.plot(tmp_path / "front.png", marks={"by rank": (model_size(MODEL, paper).mb, 1.0)})
    assert (tmp_path / "front.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "front.json").read_text())
    spoiled = [content | {"points": points} for points in (None, [], content["points"][::-1], [{"bytes": 3}])]
    for damaged in (*spoiled, {"format": "qbert.pareto/1"}):
        (tmp_path / "front.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="damaged front"):
            ParetoFront.load(tmp_path / "front.json")
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(ValueError, match="not a saved ParetoFront"):
        ParetoFront.load(tmp_path / "front.json")
