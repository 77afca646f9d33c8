"""Compiled layers beside the very same layers uncompiled."""

import torch

from qbert.inference.cpu_layers import FusedLayers
from qbert.kernels.cpu.chains import compiled


def assert_compiled_is_uncompiled(layers: FusedLayers) -> None:
    """The program of `layers`, 48 wide, gives their bits: three calls of each shape, for compiling takes two."""
    program = compiled(layers)
    assert isinstance(program, torch.ScriptMethod)
    with torch.inference_mode():
        for shape in ((1, 7, 48), (3, 5, 48), (1, 1, 48)):
            x, mask = torch.randn(shape), torch.rand(shape[0], 1, 1, shape[1]) > 0.3
            mask[..., 0] = True
            for _ in range(3):
                assert torch.equal(program(x, None), layers(x, None))
                assert torch.equal(program(x, mask), layers(x, mask))
