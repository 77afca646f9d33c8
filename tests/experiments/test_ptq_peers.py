"""GPTQ as the table of post-training quantization compares it, against the library's own compensation."""

import runpy

import pytest
import torch
from scripts import EXPERIMENTS

from qbert.quantizers.rounding import compensate, damped


@pytest.mark.parametrize(("bits", "group"), [(2, None), (4, None), (3, 5)])
def test_gptq_rounds_as_the_librarys_compensation_on_its_grid(bits: int, group: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    x = torch.randn(80, 20, dtype=torch.float64, generator=generator) @ torch.randn(
        20, 20, dtype=torch.float64, generator=generator
    )
    moment = x.T @ x / len(x)
    blocks = weight.unflatten(1, (-1, group or 20))
    low, high = blocks.amin(2).clamp_max(0.0), blocks.amax(2).clamp_min(0.0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    order = torch.argsort(moment.diagonal(), descending=True)
    codes = compensate(weight, damped(moment, 0.01), scale, zero, 0, 2**bits - 1, order=order)
    gptq = runpy.run_path(str(EXPERIMENTS / "ptq_peers.py"))["gptq"]
    scale, zero = [x.repeat_interleave(blocks.shape[2], 1) for x in (scale, zero)]
    torch.testing.assert_close(gptq(weight, moment, bits, group), (codes - zero) * scale)
