"""Speed of whole packed encoders on a GPU, against fp16 compiled by torch (max-autotune, SDPA, CUDA graphs).

Randomly initialised BERT-base, BERT-large and MiniLM take batches of 1 to 256 sequences of 16 to 512 tokens: full ones,
and one of mixed lengths, padded for all alike. The L2 cache is overwritten before every call, engines take turns, and
the median of the rounds counts; a call includes everything from token ids to the last hidden state.

    python experiments/bench/inference_gpu.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Bar, ColdTimer, check_bars, interleaved_medians, plot, require_gpu, table
from torch import Tensor, nn

import qbert
from qbert.cli.arguments import positive, run_script
from qbert.extras import require
from qbert.files import write_whole
from qbert.results import provenance

BASE = "fp16 compiled"
# layers, width, heads, inner width
MODELS = {"BERT-base": (12, 768, 12, 3072), "BERT-large": (24, 1024, 16, 4096), "MiniLM": (6, 384, 12, 1536)}
SHAPES = ("1x16", "1x128", "1x512", "8x128", "8x384", "32x128", "128x128", "32x512", "256x128", "256x512")
MIXED = "mixed"
BITS = {"W8A8": 8, "W4A8": 4, "W2A8": 2}
BARS = tuple(
    bar
    for name in BITS
    for bar in (Bar(name, BASE, 1.5, 1, 1024), Bar(name, BASE, 1.6, 1025, 8192), Bar(name, BASE, 1.7, 8193))
)
ABSOLUTE = {("BERT-base length 128", 128): 0.170, ("BERT-large length 128", 16384): 10.05}  # milliseconds
Batch = dict[str, Tensor]


def main() -> None:
    """Parse the command line, measure, write the page and its plot."""
    arguments = parse_arguments()
    require("matplotlib", "the picture")
    shapes = {text: parse_shape(text) for text in arguments.shapes}
    device = require_gpu()
    torch.set_float32_matmul_precision("high")
    timer = ColdTimer(device)
    times: dict[tuple[str, int], dict[str, float]] = {}
    for name in arguments.models:
        engines = build_engines(name, arguments.activations, device)
        for text, (size, length, mixed) in shapes.items():
            batch = make_batch(size, length, mixed, device)
            runs = {key: _call(model, batch) for key, model in engines.items()}
            row = interleaved_medians(runs, arguments.rounds, timer)
            times[f"{name} {f'{MIXED} ' * mixed}length {length}", size * length] = row
            print(f"{name:12s} {text:>14s}  " + "  ".join(f"{k} {v:.3f} ms" for k, v in row.items()), flush=True)
        del engines
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    page = render(times, provenance(), arguments.activations)
    write_whole(arguments.output, lambda aside: aside.write_text(page, encoding="utf-8"))
    plot(times, BASE, str(Path(arguments.output).with_suffix(".png")), "Whole encoders")
    print(page)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument(
        "--shapes", nargs="+", default=[*SHAPES, f"32x128{MIXED}"], help=f"batch x length, or with {MIXED} behind it"
    )
    parser.add_argument("--rounds", type=positive, default=30, help="interleaved rounds; default: 30")
    parser.add_argument(
        "--activations",
        choices=("static", "dynamic", "asymmetric"),
        default="static",
        help="ranges of 8-bit activations: calibrated, or per token, symmetric or asymmetric; default: static",
    )
    parser.add_argument("--output", default="outputs/inference_gpu.md", help="page; default: %(default)s")
    return parser.parse_args()


def parse_shape(text: str) -> tuple[int, int, bool]:
    """(batch, length, mixed lengths) of "32x128" or "32x128mixed". Raises ValueError for anything else."""
    mixed = text.endswith(MIXED)
    parts = text.removesuffix(MIXED).split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts) or int(parts[1]) > 512:
        raise ValueError(f"--shapes {text} is not batch x length with a length up to 512; write for instance 32x128")
    return int(parts[0]), int(parts[1]), mixed


def make_batch(size: int, length: int, mixed: bool, device: torch.device) -> Batch:
    """Random token ids; mixed lengths are spread evenly from 1/16 of `length` to all of it, in random order."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (size, length), generator=draw)
    if not mixed:
        return {"input_ids": ids.to(device)}
    lengths = torch.linspace(max(length // 16, 1), length, size).round()[torch.randperm(size, generator=draw)]
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def build_engines(name: str, ranges: str, device: torch.device) -> dict[str, nn.Module]:
    """The compiled fp16 model and the packed ones, in fp16, by name; `ranges` are those of the activations."""
    from transformers import BertConfig, BertModel

    layers, width, heads, inner = MODELS[name]
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    plain = copy.deepcopy(model).half().to(device)
    engines: dict[str, nn.Module] = {BASE: torch.compile(plain, mode="max-autotune")}  # type: ignore[dict-item]
    model = model.to(device)
    data = [make_batch(8, 128, False, device) for _ in range(2)] if ranges == "static" else None
    for key, bits in BITS.items():
        bits_config = qbert.BitsConfig(bits, activation_range=ranges)
        packed = qbert.pack(qbert.quantize_model(model, bits_config, calibration_data=data)).to(torch.float16)
        engines[key] = qbert.optimize_for_inference(packed, inplace=True)
    return engines


def _call(model: Callable[..., Any], batch: Batch) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(**batch)[0]

    return run


def render(times: dict[tuple[str, int], dict[str, float]], made_by: str, ranges: str) -> str:
    """The results page in Markdown."""
    lines = [
        "# Whole encoders on a GPU",
        "",
        made_by,
        "",
        f"Microseconds, in brackets how many times as fast as {BASE} (torch.compile max-autotune, SDPA, CUDA graphs). "
        f"Activations have {ranges} ranges. Tokens count padding, which mixed lengths have.",
        "",
        "Bars:",
        "",
        *check_bars(times, BARS),
        *absolute_bars(times),
        "",
        *table(times, BASE),
    ]
    return "\n".join(lines).rstrip() + "\n"


def absolute_bars(times: dict[tuple[str, int], dict[str, float]], engine: str = "W4A8") -> list[str]:
    """One line for every time that is promised for one model and shape."""
    lines = []
    for key, wanted in ABSOLUTE.items():
        what = f"- {engine}, {key[0]}, {key[1]} tokens: at most {1e3 * wanted:.0f} us"
        found = times.get(key, {}).get(engine)
        verdict = "not measured" if found is None else "reached" if found <= wanted else "MISSED"
        lines.append(f"{what}: {verdict}" + ("" if found is None else f", {1e3 * found:.0f} us"))
    return lines


if __name__ == "__main__":
    run_script(main)
