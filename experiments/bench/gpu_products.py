"""Matrix products on a GPU: ours beside cuBLAS, torch._int_mm and torch._scaled_mm; and the tuning of their tiles.

python experiments/bench/gpu_products.py BERT-base 4096,128
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_timing
import low_bit_products
import torch
from gpu_machine import DEVICE, MODE, ON_GPU, brief, in_processes, left, pretending, record, say, stand_in
from torch import Tensor

from qbert.kernels import operators
from qbert.kernels.gpu import tune
from qbert.kernels.gpu.attention_ways import FLASH, measure_attention
from qbert.kernels.gpu.tiles import E4M3, Tile, candidates


def measure(models: Sequence[str], token_counts: Sequence[int]) -> int:
    """Times every product of a layer and prints and records it; the number of failures."""
    failures = 0
    token_counts = [16] if MODE == "dry" else token_counts
    for name, rows, columns in low_bit_products.layer_shapes(models):
        for tokens in token_counts:
            if left() < 8:
                say(f"{name} {tokens} left out: {left():.0f} s left")
                continue
            if MODE == "dry":
                rows, columns = 64, 256
            copies = min(64, low_bit_products.copies_for(tokens, rows, columns)) if ON_GPU else 2
            x = torch.randn(tokens, columns, device=DEVICE).half()
            codes: Any = operators.quantize_rows(x)
            build: dict[str, Callable[[], Callable[[int], Any]]] = {
                "cuBLAS fp16": partial(low_bit_products._cublas, x, rows, copies),
                "torch._int_mm": partial(low_bit_products._int_mm, codes[0], rows, copies),
                "torch._scaled_mm": partial(_scaled_mm, x, rows, copies),
            }
            build |= {f"W{b}A8": partial(_a8, codes, rows, b, copies) for b in (8, 4, 3, 2)}
            if MODE == "dry" or torch.cuda.get_device_capability() >= (8, 9):
                floats: Any = operators.quantize_rows(x, codes_dtype=torch.float8_e4m3fn)
                build |= {f"W{b} e4m3": partial(_a8, floats, rows, b, copies) for b in (4, 3, 2)}
            if tokens <= 64:
                build["W4A16"] = partial(low_bit_products._ours_a16, x, rows, copies)
            runs = {}
            for key, make in build.items():
                try:
                    engine = make()
                    engine(0)
                    torch.cuda.synchronize()
                    runs[key] = low_bit_products._over_copies(engine, copies)
                except Exception as error:
                    if "illegal" in str(error):
                        raise
                    failures += 1
                    say(f"{name} {tokens} {key} FAILED: {brief(error)}")
            found = gpu_timing.interleaved_medians(runs, 7 if ON_GPU else 1, gpu_timing.event_timer, warm_up=1)
            row = {key: value / copies for key, value in found.items()}
            work, base = 2 * tokens * rows * columns, row.get("cuBLAS fp16", 0.0)
            say(
                f"{name} {tokens}: "
                + "  ".join(f"{k} {1e3 * v:.1f} us {work / v / 1e9:.0f} T ({base / v:.2f})" for k, v in row.items())
            )
            record(kind="product", shape=name, tokens=tokens, rows=rows, columns=columns, ms=row)
    return failures


def _a8(codes: Any, rows: int, bits: int, copies: int) -> Callable[[int], Any]:
    return low_bit_products._ours_a8(codes[0], codes[1], codes[2], rows, bits, copies)


def _scaled_mm(x: Tensor, rows: int, copies: int) -> Callable[[int], Any]:
    weights = torch.randn(copies, rows, x.shape[1], device=DEVICE).to(torch.float8_e4m3fn)
    codes = x.to(torch.float8_e4m3fn)
    scales = torch.ones(len(x), 1, device=DEVICE), torch.ones(1, rows, device=DEVICE)
    return lambda copy: torch._scaled_mm(codes, weights[copy].T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def work(widths: Sequence[int] = (4, 8, 2), token_counts: Sequence[int] = (4096, 49152, 128)) -> list[dict[str, Any]]:
    """What is tuned, the most valuable first: BERT-base's products."""
    shapes = ((3072, 768), (768, 3072), (768, 768))
    if MODE == "dry":
        shapes, widths, token_counts = ((64, 256),), widths[:1], (16,)  # type: ignore[assignment]
    kernels = [("matmul_a8" if bits > 4 else f"matmul_a8{E4M3}", bits) for bits in widths]
    if MODE != "dry":
        kernels += [("matmul_a8", bits) for bits in widths if bits <= 4]
    return [
        {"kernel": name, "tokens": tokens, "rows": rows, "columns": columns, "bits": bits}
        for tokens in token_counts
        for kernel, bits in kernels
        for rows, columns in shapes
        for name in ([kernel] if rows != columns else [kernel, kernel.replace("matmul_a8", "matmul_a8_mixed")])
    ]


def _compile_all(kernel: str, tokens: int, rows: int, columns: int, bits: int, *rest: Any) -> Tile:
    tiles = candidates(tokens, rows, columns, bits, kernel.endswith(E4M3))
    for tile in tiles:
        rest[-1](tile)
    return tiles[0]


def compile_candidates(at_once: int = 14, seconds: float = 60) -> None:
    """Compiles all candidates into Triton's cache, side by side, so that tuning only times."""

    def one(shape: dict[str, Any]) -> int:
        tune.do_bench_cudagraph = lambda run, **options: run() or 1.0  # a launch compiles
        tune.measure = _compile_all  # type: ignore[assignment]
        with pretending():
            tune.tune(**shape)
        return 0

    cases: dict[str, Callable[[], int]] = {str(shape): partial(one, shape) for shape in work()}
    codes = in_processes(cases, at_once, seconds)
    say(f"candidate tiles: {sum(c == 0 for c in codes.values())} of {len(codes)} shapes compiled")


def tune_all() -> int:
    """Times attention's ways and the candidate tiles until the time is up; QBERT_TILES' file has the choices."""
    failures = _tune_attention() if ON_GPU else 0
    for shape in work():
        if left() < 5:
            say(f"not tuned: {shape}")
            continue
        start = time.time()
        try:
            with pretending():
                best = tune.tune(**shape)
            say(f"tile for {list(shape.values())}: {best} ({time.time() - start:.1f} s)")
        except Exception as error:
            failures += 1
            say(f"tile for {list(shape.values())} FAILED: {brief(error)}")
    return failures


def _tune_attention() -> int:
    failures = 0
    for sequences, longest in ((32, 128), (128, 384), (1, 128)):
        try:
            way = measure_attention(sequences=sequences, longest=longest, heads=12, head_dim=64)
            say(f"attention {sequences}x{longest}, 12 heads of 64: {'torch' if way == FLASH else way}")
        except Exception as error:
            failures += 1
            say(f"attention {sequences}x{longest} FAILED: {brief(error)}")
    return failures


if __name__ == "__main__":
    stand_in()
    sys.exit(measure(sys.argv[1].split(","), [int(n) for n in sys.argv[2].split(",")]))
