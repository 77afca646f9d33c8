"""Times the candidate tiles of a matrix kernel on the GPU at hand and keeps the fastest (`tiles.measure`).

Weights are rotated through copies larger than the L2 cache, and launches captured in a CUDA graph, so that neither a
warm cache nor the launch overhead decides. Set QBERT_TILES to a file name to keep the choices.

    tune("matmul_a8", tokens=4096, rows=3072, columns=768, bits=4)
"""

from __future__ import annotations

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from qbert.kernels import formats
from qbert.kernels.gpu.matmul_a8 import matmul_a8
from qbert.kernels.gpu.matmul_a16 import matmul_a16
from qbert.kernels.gpu.tiles import Tile, measure

_COLD_BYTES = 128 << 20  # more than any L2 cache


def tune(kernel: str, *, tokens: int, rows: int, columns: int, bits: int) -> Tile:
    """The fastest tile for x [tokens, columns] and W [rows, columns], which later calls of the kernel will use.

    `kernel` is "matmul_a8" or "matmul_a16". Raises ValueError for another name, RuntimeError without a CUDA device.
    """
    if kernel not in ("matmul_a8", "matmul_a16"):
        raise ValueError(f"kernel must be 'matmul_a8' or 'matmul_a16', got {kernel!r}.")
    if not torch.cuda.is_available():
        raise RuntimeError("tune times kernels on a CUDA device, and there is none.")
    copies = max(2, min(64, _COLD_BYTES // formats.packed_nbytes(rows, columns, bits)))
    row_bytes = formats.packed_row_nbytes(columns, bits)
    weights = torch.randint(0, 256, (copies, rows, row_bytes), dtype=torch.uint8, device="cuda")
    scale, bias = torch.rand(rows, device="cuda"), torch.rand(rows, device="cuda")
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    xq = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    x_scale = torch.rand(tokens, device="cuda")

    def milliseconds(tile: Tile) -> float:
        def run() -> None:
            for weight in weights:
                if kernel == "matmul_a8":
                    matmul_a8(xq, x_scale, weight, scale, bits=bits, bias=bias, tile=tile)
                else:
                    matmul_a16(x, weight, scale, bits=bits, bias=bias, tile=tile)

        try:
            return float(do_bench_cudagraph(run)) / copies
        except (OutOfResources, PTXASError, CompilationError):
            return float("inf")

    return measure(kernel, tokens, rows, columns, bits, torch.cuda.get_device_name(), milliseconds)
