"""Speed of the matrix kernels on a GPU, against cuBLAS in fp16, torch's int8 product, gemlite and torchao.

Every engine multiplies the shapes of BERT-base, BERT-large and MiniLM layers by 1 to 16,384 tokens. Weights are rotated
through copies that exceed the L2 cache (gemlite and torchao: four copies, to their advantage), calls are captured in
CUDA graphs where the engine allows it, engines take turns, and the median of the rounds counts. Engines that are not
installed or refuse a shape are left out, and said to be.

    python experiments/bench/low_bit_products.py
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import COLD_BYTES, Bar, captured, check_bars, event_timer, interleaved_medians, plot, require_gpu, table
from torch import Tensor, nn

from qbert.cli.arguments import positive, run_script
from qbert.extras import require
from qbert.files import write_whole
from qbert.kernels import dispatch, formats, operators
from qbert.kernels.gpu import tune
from qbert.kernels.operands import FLOAT, PackedWeight, ProductWeight
from qbert.results import provenance

CUBLAS = "cuBLAS fp16"
INT_MM = "torch._int_mm"
MODELS = {"BERT-base": (768, 3072), "BERT-large": (1024, 4096), "MiniLM": (384, 1536)}
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096, 16384)
BARS = (
    *(Bar(f"W{bits}A8", CUBLAS, 1.6, 4096) for bits in (8, 4, 3, 2)),
    *(Bar(f"W{bits}A8", INT_MM, 0.9, 4096) for bits in (8, 4, 3, 2)),
    Bar("W4A8", "W8A8", 0.97),
    Bar("W2A8", "W8A8", 0.97),
    Bar("W3A8", "W8A8", 0.92),
    Bar("W4A16", CUBLAS, 1.5, 1, 16),
    Bar("W4A16", CUBLAS, 0.95),
)
_FEW_COPIES = 4
Call = Callable[[int], Any]  # takes the number of a weight copy


def main() -> None:
    """Parse the command line, measure, write the page and its plot."""
    arguments = parse_arguments()
    require("matplotlib", "the picture")
    device = require_gpu()
    times: dict[tuple[str, int], dict[str, float]] = {}
    missing: dict[str, str] = {}
    for name, rows, columns in layer_shapes(arguments.models):
        for tokens in arguments.tokens:
            if arguments.tune:
                for kernel, bits in [*(("matmul_a8", b) for b in formats.BITS), ("matmul_a16", 4)]:
                    if kernel == "matmul_a8" or tokens <= 64:
                        tune.tune(kernel, tokens=tokens, rows=rows, columns=columns, bits=bits)
            copies = copies_for(tokens, rows, columns)
            engines, left_out = build_engines(tokens, rows, columns, copies, device)
            missing |= left_out
            runs = {key: _over_copies(call, copies) for key, call in engines.items()}
            found = interleaved_medians(runs, arguments.rounds, event_timer)
            times[name, tokens] = {key: value / copies for key, value in found.items()}
            print(f"{name:28s} {tokens:6d}  " + "  ".join(f"{k} {1e3 * v:.1f}" for k, v in times[name, tokens].items()))
    page = render(times, missing, provenance())
    write_whole(arguments.output, lambda aside: aside.write_text(page, encoding="utf-8"))
    plot(times, CUBLAS, str(Path(arguments.output).with_suffix(".png")), "Matrix products")
    print(page)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--tokens", nargs="+", type=positive, default=list(TOKENS), help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=30, help="interleaved rounds; default: 30")
    parser.add_argument(
        "--tune", action="store_true", help="first time the candidate tiles of every shape; QBERT_TILES keeps them"
    )
    parser.add_argument("--output", default="outputs/kernels_gpu.md", help="page; default: %(default)s")
    return parser.parse_args()


def layer_shapes(models: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, rows O, columns I) of every different product of a layer, query, key and value as one."""
    shapes = []
    for model in models:
        width, inner = MODELS[model]
        shapes += [
            (f"{model} qkv", 3 * width, width),
            (f"{model} attention output", width, width),
            (f"{model} ffn in", inner, width),
            (f"{model} ffn out", width, inner),
        ]
    return shapes


def copies_for(tokens: int, rows: int, columns: int) -> int:
    """Copies of a weight that even in 2 bits exceed the L2 cache; fewer for many tokens, which flush it themselves."""
    return max(4, min(2048, (1 << 19) // tokens, COLD_BYTES // formats.packed_nbytes(rows, columns, 2)))


def _over_copies(call: Call, copies: int) -> Callable[[], Any]:
    def run() -> None:
        for copy in range(copies):
            call(copy)

    try:
        return captured(run)
    except RuntimeError:
        return run


def build_engines(
    tokens: int, rows: int, columns: int, copies: int, device: torch.device
) -> tuple[dict[str, Call], dict[str, str]]:
    """Engines by name, and the reason for each that is left out."""
    x = torch.randn(tokens, columns, device=device, dtype=torch.float16)
    xq, x_scale, row_sum = operators.quantize_rows(x)
    engines: dict[str, Call] = {}
    missing: dict[str, str] = {}
    builders: dict[str, Callable[[], Call]] = {
        CUBLAS: lambda: _cublas(x, rows, copies),
        INT_MM: lambda: _int_mm(xq, rows, copies),
        **{
            f"W{bits}A8": lambda bits=bits: _ours_a8(xq, x_scale, row_sum, rows, bits, copies)  # type: ignore[misc]
            for bits in (8, 4, 3, 2)
        },
        "W4A16": lambda: _ours_a16(x, rows, copies),
        "gemlite W4A16": lambda: _gemlite(x, rows),
        "torchao int8": lambda: _torchao(x, rows),
    }
    for name, build in builders.items():
        try:
            engine = build()
            engine(0)
            torch.cuda.synchronize()
            engines[name] = engine
        except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            if name.startswith("W") or name == CUBLAS:
                raise
            missing[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return engines, missing


def _cublas(x: Tensor, rows: int, copies: int) -> Call:
    weights = torch.randn(copies, rows, x.shape[1], device=x.device, dtype=x.dtype)
    bias = torch.randn(rows, device=x.device, dtype=x.dtype)
    return lambda copy: nn.functional.linear(x, weights[copy], bias)


def _int_mm(xq: Tensor, rows: int, copies: int) -> Call:
    weights = torch.randint(-128, 128, (copies, rows, xq.shape[1]), dtype=torch.int8, device=xq.device)
    return lambda copy: torch._int_mm(xq, weights[copy].T)


def _packed(rows: int, columns: int, bits: int, copies: int, device: torch.device) -> Tensor:
    size = (copies, rows, formats.packed_row_nbytes(columns, bits))
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device)


def _ours_a8(xq: Tensor, x_scale: Tensor, row_sum: Tensor, rows: int, bits: int, copies: int) -> Call:
    weights = _packed(rows, xq.shape[1], bits, copies, xq.device)
    scale, bias = torch.rand(rows, device=xq.device), torch.rand(rows, device=xq.device)
    zero = torch.randint(-2, 2, (rows,), device=xq.device, dtype=torch.int32)
    zero = zero << (8 - bits) if xq.dtype == torch.int8 else zero.float()
    return lambda copy: operators.matmul_a8(
        xq, x_scale, row_sum, ProductWeight([weights[copy]], [bits], scale, zero, bias)
    )


def _ours_a16(x: Tensor, rows: int, copies: int) -> Call:
    """As a layer runs it: dequantized and multiplied by cuBLAS where that is faster."""
    weights = list(_packed(rows, x.shape[1], 4, copies, x.device))
    scale, zero = torch.rand(rows, 1, device=x.device), torch.zeros(rows, 1, device=x.device)
    columns = x.shape[1]
    return lambda copy: dispatch.linear(x, PackedWeight(weights[copy], scale, zero, None, 4, columns), grid=FLOAT)


def _gemlite(x: Tensor, rows: int) -> Call:
    if importlib.util.find_spec("gemlite") is None:
        raise ImportError("not installed: pip install gemlite")
    from gemlite.core import DType, GemLiteLinear

    columns, group = x.shape[1], 128
    layers = []
    for _ in range(_FEW_COPIES):
        layer = GemLiteLinear(
            4, group_size=group, in_features=columns, out_features=rows, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=x.device)
        grids = [torch.rand(rows, columns // group, device=x.device, dtype=x.dtype) for _ in range(2)]
        layer.pack(codes, *grids, None)
        layers.append(layer)
    return lambda copy: layers[copy % _FEW_COPIES](x)


def _torchao(x: Tensor, rows: int) -> Call:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("not installed: pip install torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = nn.ModuleList(nn.Linear(x.shape[1], rows, device=x.device, dtype=x.dtype) for _ in range(_FEW_COPIES))
    quantize_(layers, Int8DynamicActivationInt8WeightConfig())
    compiled = [torch.compile(layer) for layer in layers]
    return lambda copy: compiled[copy % _FEW_COPIES](x)


def render(times: dict[tuple[str, int], dict[str, float]], missing: dict[str, str], made_by: str) -> str:
    """The results page in Markdown."""
    lines = [
        "# Matrix products on a GPU",
        "",
        made_by,
        "",
        f"Microseconds, in brackets how many times as fast as {CUBLAS}. WbA8: b-bit weights, int8 activations "
        "quantized beforehand, bias, scales and zeros applied, fp16 out; torch._int_mm gives bare int32 sums. W4A16 "
        "includes its fallback to dequantization beyond 64 tokens; torchao quantizes its activations inside the call.",
        "",
        "Bars:",
        "",
        *check_bars(times, BARS),
        "",
        *table(times, CUBLAS),
        "",
        *(f"Left out, for some shape at least: {name} ({reason})." for name, reason in missing.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    run_script(main)
