"""Products of eight-bit floats by torch's own: what is launched, and when it is taken instead of the packed ones."""

import pytest
import torch

pytest.importorskip("triton")

from qbert.kernels import dispatch, reference
from qbert.kernels.gpu import tiles, tune
from qbert.kernels.gpu.products import matmul_e4m3 as module
from qbert.kernels.gpu.products.matmul_e4m3 import CUBLAS, WAYS, is_faster, matmul_e4m3
from qbert.kernels.gpu.tiles import Tile
from qbert.kernels.operands import E4m3Weight

E4M3 = torch.float8_e4m3fn
SHAPE = (4096, 768, 768, 4)


def problem(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, E4m3Weight]:
    x, codes = torch.randn(tokens, 64).to(E4M3), (torch.randint(-15, 16, (48, 64)) / 2).to(E4M3)
    return x, torch.rand(tokens), E4m3Weight(codes, torch.rand(48), torch.randn(48).to(dtype))


@pytest.mark.parametrize("tokens", [0, 1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_launcher_gives_the_reference(dtype, tokens, monkeypatch):
    x, x_scale, weight = problem(tokens, dtype)
    if not module._makes(torch.device("cpu"), torch.float16):
        pytest.skip("torch's own product on CPUs takes no scale a row before 2.12")
    monkeypatch.setattr(module, "_steps", {})
    for steps in (x_scale, None):
        y = matmul_e4m3(x, steps, weight, dtype)
        expected = reference.matmul_e4m3(x, steps, weight)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0.05)


def test_a_torch_that_gives_bfloat16_only_is_converted_from(monkeypatch):
    x, x_scale, weight = problem(5, torch.float16)
    asked = []

    def scaled(a, b, *scales, out_dtype, use_fast_accum, bias=None):
        asked.append(out_dtype)
        if out_dtype != torch.bfloat16:
            raise RuntimeError("Only bf16 high precision output types are supported for row-wise scaling.")
        assert bias is None or bias.dtype == torch.bfloat16
        return torch.zeros(len(a), b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    module._makes.cache_clear()
    assert matmul_e4m3(x, x_scale, weight, torch.float16).dtype == torch.float16
    assert matmul_e4m3(x, x_scale, weight, torch.float16).dtype == torch.float16
    assert asked == [torch.float16, torch.bfloat16, torch.bfloat16]
    module._makes.cache_clear()


def test_steps_of_one_are_made_once_and_kept(monkeypatch):
    monkeypatch.setattr(module, "_steps", {})
    first = module._ones(torch.device("cpu"), 100)
    assert len(first) == 100 and bool((first == 1).all())
    assert module._ones(torch.device("cpu"), 128).data_ptr() == first.data_ptr()
    assert len(module._ones(torch.device("cpu"), 129)) == 129
    assert [len(t) for t in module._steps[torch.device("cpu")]] == [128, 256]


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.delenv("QBERT_TILES", raising=False)
    monkeypatch.delenv("QBERT_E4M3", raising=False)
    return torch.device("cuda")


def test_many_tokens_on_new_gpus_take_it_unless_something_else_is_measured_or_forced(monkeypatch):
    device = on_a_gpu(monkeypatch, (9, 0))
    assert is_faster(device, *SHAPE) and not is_faster(device, 128, *SHAPE[1:])
    tiles.measure(WAYS, *SHAPE, "some GPU", lambda way: float(way == CUBLAS), [CUBLAS, Tile(128, 128, 128)])
    assert not is_faster(device, *SHAPE) and is_faster(device, 2048, *SHAPE[1:])
    assert dispatch.e4m3_by_cublas(device, 2048, *SHAPE[1:]) and not dispatch.e4m3_by_cublas(device, *SHAPE)
    for forced in ("cublas", "triton"):
        monkeypatch.setenv("QBERT_E4M3", forced)
        assert dispatch.e4m3_by_cublas(device, *SHAPE) == (forced == "cublas")
    monkeypatch.delenv("QBERT_E4M3")
    assert not is_faster(on_a_gpu(monkeypatch, (8, 9)), *SHAPE)


@pytest.mark.parametrize("rows", [2304, 3072, 768])
def test_both_products_are_timed_with_all_that_follows_them(rows, monkeypatch):
    """On CPU tensors, with launches that only note their names."""
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    launched: list[str] = []

    def note(name):
        return lambda *a, **k: launched.append(name) or torch.zeros(1)

    for name in ("matmul_e4m3", "layernorm_quantize", "quantize_rows", "matmul_a8", "matmul_a8_mixed"):
        monkeypatch.setattr(tune, name, note(name))
    monkeypatch.setattr(tune, "do_bench_cudagraph", lambda run, rep: run() or 1.0)
    for name in ("randint", "randn", "rand", "ones", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **(k | {"device": "cpu"})))
    assert tune.measure_e4m3(tokens=64, rows=rows, columns=768, bits=4) == CUBLAS
    behind = {2304: (["matmul_a8_mixed"], []), 3072: (["matmul_a8"], ["quantize_rows"]), 768: (["matmul_a8"], [])}
    normed = ["layernorm_quantize"] if rows == 768 else []
    ours, extra = behind[rows]
    assert launched[: len(extra) + 1 + len(normed)] == ["matmul_e4m3", *extra, *normed]
    assert launched[-len(ours + normed) :] == ours + normed
    with pytest.raises(ValueError, match="weights of 2 to 4 bits, got 8"):
        tune.measure_e4m3(tokens=64, rows=rows, columns=768, bits=8)
