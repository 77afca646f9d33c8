"""Matrix products on a GPU: ours beside cuBLAS, torch._int_mm and torch._scaled_mm; and the tuning of their tiles.

python experiments/bench/gpu_products.py BERT-base 4096,128
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_timing
import low_bit_products
import torch
from gpu_checks import short
from gpu_machine import DEVICE, MODE, ON_GPU, brief, in_processes, left, pretending, record, say, stand_in
from torch import Tensor

from qbert.kernels import operators
from qbert.kernels.gpu import tune
from qbert.kernels.gpu.attention_ways import FLASH, SDPA, measure_attention
from qbert.kernels.gpu.rows.layernorm_quant import layernorm_candidates, layernorm_quantize, measure_layernorm
from qbert.kernels.gpu.tiles import E4M3, UNPACKED, Tile, candidates
from qbert.kernels.operands import E4m3Weight, InputGrid


def measure(models: Sequence[str], token_counts: Sequence[int], seconds: float = 60) -> int:
    """Times every product of a layer, each in a process of its own; the number of those that failed."""
    cases: dict[str, Callable[[], int]] = {
        f"{name} {tokens}": partial(measure_one, name, rows, columns, tokens)
        for tokens in ([16] if MODE == "dry" else token_counts)
        for name, rows, columns in low_bit_products.layer_shapes(models)
    }
    codes = in_processes(cases, 1, seconds)
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        say(f"products that failed or had no time: {failed}")
    return len(failed)


def measure_one(name: str, rows: int, columns: int, tokens: int) -> int:
    """Times one product with every engine and prints and records it; the number of engines that failed."""
    failures = 0
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
        floats: Any = operators.quantize_rows(x, InputGrid(codes_dtype=torch.float8_e4m3fn))
        build |= {f"W{b} e4m3": partial(_a8, floats, rows, b, copies) for b in (4, 3, 2)}
        build["e4m3 by cuBLAS"] = partial(_by_cublas, floats, rows, copies)
    if tokens <= 64:
        build["W4A16"] = partial(low_bit_products._ours_a16, x, rows, copies)
    runs = {}
    for key, make in build.items():
        try:
            engine = make()
            engine(0)
            torch.cuda.synchronize()
            run = low_bit_products._over_copies(engine, copies)
            run()
            torch.cuda.synchronize()
            runs[key] = run
        except Exception as error:
            failures += 1
            say(f"{name} {tokens} {key} FAILED: {brief(error)}")
            if "illegal" in str(error) or "CUDA error" in str(error):
                raise  # nothing runs in this process any more
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


def _by_cublas(x: Any, rows: int, copies: int) -> Callable[[int], Any]:
    weights = torch.randint(-7, 8, (copies, rows, x[0].shape[1]), device=DEVICE).to(torch.float8_e4m3fn)
    scale, bias = torch.rand(rows, device=DEVICE), torch.randn(rows, device=DEVICE, dtype=torch.float16)
    return lambda copy: operators.matmul_e4m3(x[0], x[1], E4m3Weight(weights[copy], scale, bias))


BASE_SHAPES = ((3072, 768), (768, 3072), (768, 768))
MINI_SHAPES = ((1536, 384), (384, 1536), (384, 384))


def work() -> list[dict[str, Any]]:
    """What is tuned, the most valuable first: BERT-base's products with many tokens, then with few, then MiniLM's."""
    engines = [("matmul_a8", 8), ("matmul_a8", 4), (f"matmul_a8{E4M3}", 4), (f"matmul_a8{E4M3}", 2), ("matmul_a8", 2)]
    if MODE == "dry":
        shape = {"tokens": 16, "rows": 64, "columns": 256, "bits": 4}
        return [{"kernel": name} | shape for name in ("matmul_a8", "weights", f"weights{E4M3}")]
    rounds = [(BASE_SHAPES, 49152, engines), (BASE_SHAPES, 4096, engines), (BASE_SHAPES, 128, engines[:3])]
    rounds.append((MINI_SHAPES, 4096, engines[:2]))
    found: list[dict[str, Any]] = []
    for shapes, tokens, kernels in rounds:
        for kernel, bits in kernels:
            ways = [(kernel, rows, columns) for rows, columns in shapes]
            ways += [(kernel.replace("matmul_a8", "matmul_a8_mixed"), rows, columns) for rows, columns in shapes[2:]]
            high = [(3 * rows, columns) for rows, columns in shapes[2:]]  # query, key and value as one weight
            if bits == 8:
                ways += [(kernel, rows, columns) for rows, columns in high]
            elif tokens > 128:
                ways += [("weights" + kernel.removeprefix("matmul_a8"), *shape) for shape in (*shapes, *high)]
            found += [
                {"kernel": name, "tokens": tokens, "rows": rows, "columns": columns, "bits": bits}
                for name, rows, columns in ways
            ]
    return found


def _compile_all(kernel: str, tokens: int, rows: int, columns: int, bits: int, *rest: Any) -> Tile:
    tiles = candidates(tokens, rows, columns, bits, kernel.endswith(E4M3))
    for tile in tiles:
        rest[-1](tile)
    return tiles[0]


def candidates_to_compile() -> dict[str, Callable[[], int]]:
    """Cases for `in_processes` that compile all candidates into Triton's cache, so that tuning only times."""

    def one(shape: dict[str, Any]) -> int:
        tune.do_bench_cudagraph = lambda run, **options: run() or 1.0  # a launch compiles
        tune.measure = _compile_all  # type: ignore[assignment]
        with pretending():
            tune.tune(**shape)
        return 0

    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for shape in (s for s in work() if not s["kernel"].startswith("weights")):
        rows, columns = shape["rows"], shape["columns"]
        # What a kernel is compiled for: from 1,025 tokens on all have the same candidates.
        same = shape["kernel"], shape["bits"], rows > columns, columns % 256, min(shape["tokens"], 4096)
        found.setdefault(same, shape)
    cases: dict[str, Callable[[], int]] = {
        f"candidates {list(shape.values())}": partial(one, shape) for shape in found.values()
    }
    for columns in (768, 384):
        cases[f"candidates LayerNorm {columns}"] = partial(_compile_layernorms, columns)
    return cases


def _compile_layernorms(columns: int) -> int:
    x, (weight, bias) = torch.randn(16, columns, device=DEVICE).half(), torch.randn(2, columns, device=DEVICE).half()
    for tile in dict.fromkeys(t for tokens in (128, 4096, 49152) for t in layernorm_candidates(tokens, columns)):
        layernorm_quantize(x, None, weight, bias, 1e-12, InputGrid(0.02), tile=tile)
    return 0


def tune_all() -> int:
    """Times attention's ways, LayerNorm's and the candidate tiles until the time is up; QBERT_TILES has the choices."""
    # Every captured graph collects garbage: without all that was imported.
    gc.collect()
    gc.freeze()
    failures = _tune_the_rest() if ON_GPU else 0
    for shape in work():
        if left() < 5:
            say(f"not tuned: {list(shape.values())}")
            continue
        start = time.time()
        try:
            with pretending():
                best = _best(shape)
            found = "unpacked" if best == UNPACKED else short(best)
            say(f"tile for {list(shape.values())}: {found} ({time.time() - start:.1f} s)")
            record(kind="tile", **shape, tile=found)
        except Exception as error:
            failures += 1
            say(f"tile for {list(shape.values())} FAILED: {brief(error)}")
    return failures


def _best(shape: dict[str, Any]) -> Tile:
    if shape["kernel"].startswith("weights"):
        sizes = {key: value for key, value in shape.items() if key != "kernel"}
        return tune.measure_unpacked(**sizes, e4m3=shape["kernel"].endswith(E4M3))
    return tune.tune(**shape)


def _tune_the_rest() -> int:
    failures = 0
    shapes = [(128, 384, 12, 64), (32, 128, 12, 64), (1, 128, 12, 64), (32, 128, 12, 32)]
    ways: dict[str, Callable[[], Tile]] = {
        f"attention {size}x{length}, {heads} heads of {width}": partial(
            measure_attention, sequences=size, longest=length, heads=heads, head_dim=width
        )
        for size, length, heads, width in shapes
    }
    ways |= {
        f"attention {size}x{length} of one length, 12 heads of 64": partial(
            measure_attention, sequences=size, longest=length, heads=12, head_dim=64, uniform=True
        )
        for size, length in ((128, 384), (8, 384), (1, 384))
    }
    ways |= {
        f"LayerNorm {tokens}x{columns}": partial(measure_layernorm, tokens=tokens, columns=columns)
        for tokens, columns in ((49152, 768), (4096, 768), (128, 768), (4096, 384))
    }
    for what, find in ways.items():
        try:
            way = find()
            name = {FLASH: "torch's for packed sequences", SDPA: "torch's SDPA"}.get(way) or short(way)
            say(f"{what}: {name}")
            record(kind="way", what=what, way=name)
        except Exception as error:
            failures += 1
            say(f"{what} FAILED: {brief(error)}")
    return failures


if __name__ == "__main__":
    stand_in()
    sys.exit(measure(sys.argv[1].split(","), [int(n) for n in sys.argv[2].split(",")]))
