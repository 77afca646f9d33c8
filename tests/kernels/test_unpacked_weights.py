"""When products take unpacked weights instead of stored ones, and what is timed to find out."""

import pytest
import torch

pytest.importorskip("triton")

from qbert.kernels import dispatch
from qbert.kernels.gpu import tiles, tune
from qbert.kernels.gpu.tiles import UNPACKED, Tile, ways

SHAPE = (4096, 768, 768, 4)


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.delenv("QBERT_TILES", raising=False)
    monkeypatch.delenv("QBERT_WEIGHTS", raising=False)
    return torch.device("cuda")


@pytest.mark.parametrize("e4m3", [False, True])
def test_many_tokens_take_them_unless_something_else_is_measured_or_forced(e4m3, monkeypatch):
    device = on_a_gpu(monkeypatch, (9, 0))
    takes = dispatch.takes_unpacked
    assert takes(device, *SHAPE, e4m3) and not takes(device, 1024, *SHAPE[1:], e4m3)
    assert takes(device, 1024, 768, 768, 3, e4m3) and not takes(device, 512, 768, 768, 3, e4m3)
    tiles.measure(ways(e4m3), *SHAPE, "some GPU", lambda way: float(way == UNPACKED), [UNPACKED, Tile(128, 128, 128)])
    assert not takes(device, *SHAPE, e4m3) and takes(device, 8192, *SHAPE[1:], e4m3)
    assert takes(device, *SHAPE, not e4m3)
    for forced in ("unpacked", "packed"):
        monkeypatch.setenv("QBERT_WEIGHTS", forced)
        assert takes(device, *SHAPE, e4m3) == takes(torch.device("cpu"), 1, *SHAPE[1:]) == (forced == "unpacked")
    monkeypatch.delenv("QBERT_WEIGHTS")
    assert takes(on_a_gpu(monkeypatch, (8, 9)), *SHAPE, e4m3) == (not e4m3)


def test_a_cpu_takes_them_where_they_are_forced_alone(monkeypatch):
    monkeypatch.delenv("QBERT_WEIGHTS", raising=False)
    assert not dispatch.takes_unpacked(torch.device("cpu"), *SHAPE)
    monkeypatch.setenv("QBERT_WEIGHTS", "zipped")
    with pytest.raises(ValueError, match="QBERT_WEIGHTS must be 'packed', 'unpacked' or not set, got 'zipped'"):
        dispatch.takes_unpacked(torch.device("cpu"), *SHAPE)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("rows", [2304, 3072, 768])
def test_both_products_are_timed_with_all_that_follows_them(rows, e4m3, monkeypatch):
    """On CPU tensors, with launches that only note their names."""
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    launched: list[str] = []

    def note(name):
        return lambda *given, **options: launched.append(name) or torch.zeros(1)

    for name in ("matmul_e4m3", "layernorm_quantize", "quantize_rows", "matmul_a8", "matmul_a8_mixed"):
        monkeypatch.setattr(tune, name, note(name))
    monkeypatch.setattr(tune, "do_bench_cudagraph", lambda run, rep: run() or 1.0)
    for name in ("randint", "randn", "rand", "ones", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **(k | {"device": "cpu"})))
    assert tune.measure_unpacked(tokens=64, rows=rows, columns=768, bits=4, e4m3=e4m3) == UNPACKED
    normed = ["layernorm_quantize"] if rows == 768 else []
    first = ["matmul_e4m3" if e4m3 else "matmul_a8"] + ["quantize_rows"] * (e4m3 and rows == 3072) + normed
    last = ["matmul_a8_mixed" if rows == 2304 else "matmul_a8", *normed]
    assert launched[: len(first)] == first and launched[-len(last) :] == last
    with pytest.raises(ValueError, match="weights of 2 to 4 bits are unpacked, got 8"):
        tune.measure_unpacked(tokens=64, rows=rows, columns=768, bits=8)
