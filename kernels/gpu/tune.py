"""Times the candidate tiles of a matrix kernel on the GPU at hand and keeps the fastest (`tiles.measure`).

Each kernel is timed with the epilogue that it has in an encoder with static ranges, the costliest of its shapes: GELU
and 8-bit output where the weight has more rows than columns, a residual elsewhere. Weights are rotated through copies
larger than the L2 cache, and launches captured in a CUDA graph, so that neither a warm cache nor the launch overhead
decides. Set QBERT_TILES to a file name to keep the choices.

    tune("matmul_a8", tokens=4096, rows=3072, columns=768, bits=4)
    tune("matmul_a8_mixed_e4m3", tokens=4096, rows=768, columns=768, bits=4)        # query, key and value
    measure_unpacked(tokens=4096, rows=3 * 768, columns=768, bits=4)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from qbert.kernels import formats
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.products.matmul_a8_mixed import matmul_a8_mixed
from qbert.kernels.gpu.products.matmul_a16 import matmul_a16
from qbert.kernels.gpu.products.matmul_e4m3 import matmul_e4m3
from qbert.kernels.gpu.rows.layernorm_quant import layernorm_quantize
from qbert.kernels.gpu.rows.quantize_rows import quantize_rows
from qbert.kernels.gpu.tiles import E4M3, UNPACKED, Tile, choose_tile, measure, ways
from qbert.kernels.operands import E4m3Weight, InputGrid, ProductWeight

KERNELS = ("matmul_a8", f"matmul_a8{E4M3}", "matmul_a8_mixed", f"matmul_a8_mixed{E4M3}", "matmul_a16")

_COLD_BYTES = 128 << 20  # more than any L2 cache
_FLUSHING_TOKENS = 4096  # so many tokens flush the cache themselves
_BENCH_MS = 8.0  # a graph's length; ten of them are timed


def tune(kernel: str, *, tokens: int, rows: int, columns: int, bits: int) -> Tile:
    """The fastest tile for x [tokens, columns] and W [rows, columns], which later calls of the kernel will use.

    `kernel` is one of `KERNELS`; the mixed ones multiply three weights of these rows. Raises ValueError for another
    name, and for 8 bits with e4m3 activations, RuntimeError without a CUDA device.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}.")
    if kernel.endswith(E4M3) and bits > 4:
        raise ValueError(f"{kernel} takes weights of 2 to 4 bits, got {bits}.")
    if not torch.cuda.is_available():
        raise RuntimeError("tune times kernels on a CUDA device, and there is none.")
    weights = _packed(tokens, rows, columns, bits)
    launch = encoder_launch(kernel, tokens, rows, columns, bits, "cuda")

    def milliseconds(tile: Tile) -> float:
        def run() -> None:
            for weight in weights:
                launch(weight, tile)

        try:
            return _timed(run) / len(weights)
        except (OutOfResources, PTXASError, CompilationError):
            return float("inf")

    return measure(kernel, tokens, rows, columns, bits, torch.cuda.get_device_name(), milliseconds)


def measure_unpacked(*, tokens: int, rows: int, columns: int, bits: int, e4m3: bool = False) -> Tile:
    """Whether W [rows, columns] is multiplied faster unpacked, by int8 or e4m3 inputs: `UNPACKED`, or the packed tile.

    Each with all that it takes to the next product's input: GELU and codes where W has more rows than columns, the
    residual and LayerNorm elsewhere, nothing for query, key and value, 3 x `columns` rows. Tune the tiles before.
    Raises ValueError for bits above 4, RuntimeError without a CUDA device.
    """
    if bits > 4:
        raise ValueError(f"weights of 2 to 4 bits are unpacked, got {bits}.")
    if not torch.cuda.is_available():
        raise RuntimeError("measure_unpacked times kernels on a CUDA device, and there is none.")
    mixed, name, end = rows == 3 * columns, torch.cuda.get_device_name(), E4M3 if e4m3 else ""
    height = columns if mixed else rows
    kernel = f"matmul_a8_mixed{end}" if mixed else f"matmul_a8{end}"
    tile = choose_tile(kernel, tokens, height, columns, bits, name)
    packed = _packed(tokens, height, columns, bits)
    launch = encoder_launch(kernel, tokens, height, columns, bits, "cuda")
    grid = InputGrid(0.1, codes_dtype=torch.float8_e4m3fn if e4m3 else torch.int8)
    norm = torch.ones(rows, device="cuda", dtype=torch.float16)
    residual = torch.randn(tokens, rows, device="cuda", dtype=torch.float16)

    def normalized(y: Tensor, residual: Tensor | None = None) -> None:
        if rows <= columns:
            layernorm_quantize(y, residual, norm, norm, 1e-12, grid)

    def as_stored(copy: int) -> None:
        normalized(launch(packed[copy], tile))

    if e4m3:
        floats = torch.randint(-7, 8, (len(packed), rows, columns), device="cuda").to(torch.float8_e4m3fn)
        scale = torch.rand(rows, device="cuda") * 0.01
        x = torch.randn(tokens, columns, device="cuda").to(torch.float8_e4m3fn)

        def unpacked(copy: int) -> None:
            y = matmul_e4m3(x, None, E4m3Weight(floats[copy], scale, norm), torch.float16)
            if rows > columns and not mixed:
                quantize_rows(y, grid, gelu=True)
            normalized(y, residual)
    else:
        whole = torch.randint(0, 256, (len(packed), rows, columns), device="cuda", dtype=torch.uint8)
        bare = encoder_launch("matmul_a8", tokens, rows, columns, 8, "cuda", zeros=False)
        wide = choose_tile("matmul_a8", tokens, rows, columns, 8, name)

        def unpacked(copy: int) -> None:
            normalized(bare(whole[copy], wide))

    def milliseconds(way: Tile) -> float:
        one = unpacked if way == UNPACKED else as_stored

        def run() -> None:
            for copy in range(len(packed)):
                one(copy)

        return _timed(run) / len(packed)

    return measure(ways(e4m3), tokens, rows, columns, bits, name, milliseconds, [UNPACKED, tile])


def _packed(tokens: int, rows: int, columns: int, bits: int) -> Tensor:
    """Weights uint8 [copies, rows, row bytes], so many copies that their rotation leaves the L2 cache cold."""
    copies = 2 if tokens >= _FLUSHING_TOKENS else min(64, _COLD_BYTES // formats.packed_nbytes(rows, columns, bits))
    row_bytes = formats.packed_row_nbytes(columns, bits)
    return torch.randint(0, 256, (max(2, copies), rows, row_bytes), dtype=torch.uint8, device="cuda")


def _timed(run: Callable[[], None]) -> float:
    """Milliseconds of a run as a CUDA graph."""
    if torch.cuda.is_initialized():
        # On the stream that will capture: counters of split products are made there, as in an encoder; made during
        # the capture they would be zeroed at every launch.
        if torch.cuda.graph.default_capture_stream is None:
            torch.cuda.graph.default_capture_stream = torch.cuda.Stream()
        with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
            run()
        torch.cuda.synchronize()
    return float(do_bench_cudagraph(run, rep=_BENCH_MS))


def encoder_launch(
    kernel: str, tokens: int, rows: int, columns: int, bits: int, device: str, zeros: bool = True
) -> Callable[[Tensor, Tile], Tensor]:
    """A launch of `kernel` with the operands and the epilogue of an encoder's product, on a weight and a tile.

    `zeros`: whether weights have zeros, and products take and make the sums that these need.
    """
    mixed = "mixed" in kernel
    scale, bias = (torch.rand(rows * (3 if mixed else 1), device=device) for _ in range(2))
    x = torch.randn(tokens, columns, device=device, dtype=torch.float16)
    if kernel == "matmul_a16":
        return lambda codes, tile: matmul_a16(x, ProductWeight([codes], [bits], scale, bias=bias), tile=tile)
    e4m3 = kernel.endswith(E4M3)
    codes_dtype = torch.float8_e4m3fn if e4m3 else torch.int8
    xq = (x * 16).to(codes_dtype)
    zero = torch.ones(len(scale), device=device, dtype=torch.float32 if e4m3 else torch.int32) if zeros else None
    sums = torch.zeros(tokens, device=device, dtype=torch.int32) if zeros else None
    x_scale = torch.rand(tokens, device=device)
    count = 3 if mixed else 1

    def weight(codes: Tensor) -> ProductWeight:
        return ProductWeight([codes] * count, [bits] * count, scale, zero, bias)

    if mixed:
        return lambda codes, tile: matmul_a8_mixed(xq, x_scale, weight(codes), row_sum=sums, tile=tile)
    if rows == 3 * columns:  # query, key and value as one weight
        return lambda codes, tile: matmul_a8(xq, x_scale, weight(codes), row_sum=sums, tile=tile)
    if rows > columns:
        out = InputGrid(0.1, codes_dtype=codes_dtype)
        return lambda codes, tile: matmul_a8(
            xq, x_scale, weight(codes), row_sum=sums, gelu=True, out=out, out_row_sum=sums, tile=tile
        )
    residual = torch.randn(tokens, rows, device=device, dtype=torch.float16)
    return lambda codes, tile: matmul_a8(xq, x_scale[:1], weight(codes), row_sum=sums, residual=residual, tile=tile)
