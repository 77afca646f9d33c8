"""Products of eight-bit floats by torch's own: what is launched."""

import pytest
import torch

pytest.importorskip("triton")

from qbert.kernels import reference
from qbert.kernels.gpu.products import matmul_e4m3 as module
from qbert.kernels.gpu.products.matmul_e4m3 import matmul_e4m3
from qbert.kernels.operands import E4m3Weight

E4M3 = torch.float8_e4m3fn


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
