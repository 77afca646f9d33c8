"""The results page of GPU sessions, from the lines that they wrote.

python experiments/bench/gpu_page.py results.jsonl [more.jsonl ...] > experiments/results/gpu.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_encoders import BASE
from gpu_timing import table

Row = dict[str, Any]


def render(rows: Iterable[Row]) -> str:
    """Markdown: machine, peaks, whole encoders, products, where the time goes. Of equal shapes the last counts."""
    found = list(rows)
    machines = dict.fromkeys(
        f"{r['gpu']}, torch {r['torch']}, Triton {r['triton']}" for r in found if r["kind"] == "machine"
    )
    lines = ["# On a GPU", "", "; ".join(machines) + ".", "", "| peak | T/s |", "|---|---:|"]
    peaks = {r["what"]: r["tera_per_second"] for r in found if r["kind"] == "peak"}
    lines += [f"| {what} | {value:.4g} |" for what, value in peaks.items()]
    encoders = {(f"{r['model']} {r['shape']}", r["tokens"]): r["ms"] for r in found if r["kind"] == "encoder"}
    lines += [
        "",
        "## Whole encoders",
        "",
        f"Microseconds from token ids to the last hidden state, Python included; in brackets how many times as fast as "
        f'{BASE} (one layer compiled, the whole model in a CUDA graph). "graph alone" leaves out what is around it.',
        "",
        *table(encoders, BASE),
    ]
    products = {(r["shape"], r["tokens"]): r["ms"] for r in found if r["kind"] == "product"}
    lines += ["", "## Products of a layer", "", "Microseconds.", "", *table(products, "cuBLAS fp16")]
    lines += ["", "## Where the time goes", ""]
    for what, times in {r["what"]: r["us"] for r in found if r["kind"] == "profile"}.items():
        whole = sum(times.values()) or 1.0
        parts = sorted(times.items(), key=lambda item: -item[1])[:6]
        lines.append(f"- {what}: " + ", ".join(f"`{key[:60]}` {100 * value / whole:.0f} %" for key, value in parts))
    return "\n".join(lines) + "\n"


def read(paths: Iterable[str]) -> list[Row]:
    """The rows of all files, in order."""
    return [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    print(render(read(sys.argv[1:])), end="")
