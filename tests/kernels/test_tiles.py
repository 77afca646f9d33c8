"""The choice of tiles: few candidates, a rule for every shape, measured choices that are kept."""

import json

import pytest

pytest.importorskip("triton")

from qbert.kernels.gpu import tiles
from qbert.kernels.gpu.tiles import Tile


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.setattr(tiles, "_loaded", [])
    monkeypatch.delenv("QBERT_TILES", raising=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 129, 1024, 5000])
@pytest.mark.parametrize("columns", [40, 384, 768, 4096])
def test_every_shape_has_a_rule_and_few_candidates(tokens, columns, bits):
    shape = (tokens, 768, columns, bits)
    found = tiles.candidates(*shape)
    assert tiles.rule(*shape) in found and tiles.rule(*shape, e4m3=True) in tiles.candidates(*shape, e4m3=True)
    assert 1 <= len(found) <= 12 and len(set(found)) == len(found)
    for tile in [tiles.rule(*shape), *found]:
        assert tile.bk in (128, 256) and tile.bm >= 16 and tile.split <= max(1, columns // 256)


def test_measured_choices_are_used_and_kept_in_the_file(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("QBERT_TILES", str(path))
    shape = ("matmul_a8", 100, 768, 768, 4, "some GPU")
    wanted = tiles.candidates(*shape[1:5])[-1]
    assert tiles.measure(*shape, lambda tile: 1.0 if tile == wanted else 2.0) == wanted
    assert tiles.choose_tile(*shape) == wanted
    assert tiles.choose_tile("matmul_a8", 128, 768, 768, 4, "some GPU") == wanted  # the same bucket
    assert tiles.choose_tile("matmul_a8", 100, 768, 768, 2, "some GPU") == tiles.rule(100, 768, 768, 2)
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.setattr(tiles, "_loaded", [])
    assert tiles.choose_tile(*shape) == wanted
    assert Tile(**next(iter(json.loads(path.read_text()).values()))) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


def test_no_tile_that_runs_is_an_error():
    with pytest.raises(RuntimeError, match="no tile of matmul_a8 runs"):
        tiles.measure("matmul_a8", 100, 768, 768, 4, "some GPU", lambda tile: float("inf"))
