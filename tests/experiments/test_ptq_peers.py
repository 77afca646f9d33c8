"""GPTQ as the table of post-training quantization compares it, against the library's own compensation."""

import runpy

import pytest
import torch
from scripts import EXPERIMENTS

from qbert.quantizers.rounding import compensate, damped


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_rounds_as_the_librarys_compensation_on_its_grid(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    x = torch.randn(80, 20, dtype=torch.float64, generator=generator) @ torch.randn(
        20, 20, dtype=torch.float64, generator=generator
    )
    moment = x.T @ x / len(x)
    low, high = weight.amin(1), weight.amax(1)
    scale = ((high - low) / (2**bits - 1)).unsqueeze(1)
    zero = (-low.unsqueeze(1) / scale).round()
    order = torch.argsort(moment.diagonal(), descending=True)
    codes = compensate(weight, damped(moment, 0.01), scale, zero, 0, 2**bits - 1, order=order)
    gptq = runpy.run_path(str(EXPERIMENTS / "ptq_peers.py"))["gptq"]
    torch.testing.assert_close(gptq(weight, moment, bits), (codes - zero) * scale)
