"""The results page of GPU sessions, from what they wrote: results.jsonl and, for exactness and dates, session.log.

export PYTHONPATH=.:experiments:experiments/bench
python experiments/bench/gpu_page.py FOLDER/results.jsonl FOLDER/session.log [more ...] > PAGE
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_encoders import BASE, FP8
from gpu_timing import Bar, check_bars
from inference_gpu import ABSOLUTE
from inference_gpu import BARS as ENCODER_BARS
from low_bit_products import BARS as PRODUCT_BARS
from low_bit_products import CUBLAS

Row = dict[str, Any]
Times = dict[tuple[str, int], dict[str, float]]
OURS = ("W8A8", "W4A8", "W2A8", "W4 e4m3", "W2 e4m3")
COMMANDS = """\
OUT=outputs/gpu_session CALL=2 SECONDS_LEFT=420 bash experiments/bench/gpu_session.sh
export PYTHONPATH=.:experiments:experiments/bench
python experiments/bench/gpu_page.py outputs/gpu_session/{results.jsonl,session.log} > kernels_gpu.md"""
_CHECK = re.compile(r"^(?:ok  |(\d+) FAILED of) (.+?): (\d+) comparisons, (.*)$", re.M)
_DATE = re.compile(r"^\w{3} \w{3} +\d+ [\d:]+ (?:[AP]M )?UTC \d{4}$", re.M)


def render(rows: Sequence[Row], logs: Iterable[str] = ()) -> str:
    """Markdown: machine, exactness, whole encoders, products, tiles, where the time goes.

    Of equal shapes the last counts. `logs` are the texts of session logs in order; of a check that several logs have,
    the last log counts, and there all its runs.
    """
    logs = list(logs)
    dates = [date for log in logs for date in _DATE.findall(log)]
    machines = dict.fromkeys(
        f"{r['gpu']}, torch {r['torch']}, Triton {r['triton']}, Python {r['python']}"
        for r in rows
        if r["kind"] == "machine"
    )
    encoders = _times(rows, "encoder", lambda r: f"{r['model']} {r['shape']}")
    products = _times(rows, "product", lambda r: r["shape"])
    lines = ["# Speed and exactness on a GPU", "", "; ".join(machines) + "." + "".join(f" {d}." for d in dates), ""]
    lines += [
        "Measured, and written from what the session wrote, with",
        "",
        "```bash",
        COMMANDS,
        "```",
        "",
        *_exactness(logs),
        "## Whole encoders",
        "",
        "Microseconds from token ids to the last hidden state, cold caches, medians of interleaved rounds. In brackets "
        f"how many times as fast as {BASE} and as {FP8}, both compiled by torch, each layer, and captured as one CUDA "
        'graph. Ours includes the Python around its graph; "graph alone" leaves that out. W4A8: 4-bit weights, int8 '
        "activations; e4m3: eight-bit floats as activations. Static activation ranges, no padding.",
        "",
        *_table(encoders, [BASE, FP8]),
        "",
        *_bars(encoders),
        "",
        *_around(rows),
        "## Products of a layer",
        "",
        f"Microseconds; in brackets how many times as fast as {CUBLAS}. Ours applies bias, scales and zeros and gives "
        "fp16; torch._int_mm gives bare int32 sums, torch._scaled_mm bfloat16.",
        "",
        *(_table(products, [CUBLAS]) if products else ["Not measured."]),
        "",
        *([*check_bars(products, PRODUCT_BARS), ""] if products else []),
    ]
    peaks = {r["what"]: r["tera_per_second"] for r in rows if r["kind"] == "peak"}
    lines += ["## The machine's peaks", "", "| what | 10^12 a second |", "|---|---:|"]
    lines += [f"| {what} | {value:.4g} |" for what, value in peaks.items()]
    tiles = [r for r in rows if r["kind"] == "tile"]
    if tiles:
        lines += ["", "## Tiles that tuning chose", "", "| kernel | tokens | rows | columns | bits | tile |"]
        lines.append("|---|---:|---:|---:|---:|---|")
        chosen = {tuple(r[k] for k in ("kernel", "tokens", "rows", "columns", "bits")): r["tile"] for r in tiles}
        lines += [f"| {' | '.join(map(str, key))} | {tile} |" for key, tile in chosen.items()]
        ways = {r["what"]: r["way"] for r in rows if r["kind"] == "way"}
        lines += ["", *(f"- {what}: {way}" for what, way in ways.items())]
    lines += ["", "## Where the time goes", ""]
    for what, times in {r["what"]: r["us"] for r in rows if r["kind"] == "profile"}.items():
        whole = sum(times.values()) or 1.0
        parts = sorted(times.items(), key=lambda item: -item[1])[:6]
        shares = ", ".join(f"`{key[:60]}` {100 * value / whole:.0f} %" for key, value in parts)
        lines.append(f"- {what}, {whole:.0f} us of kernels: {shares}")
    return "\n".join(lines) + "\n"


def _times(rows: Iterable[Row], kind: str, name: Any) -> Times:
    return {(name(r), r["tokens"]): r["ms"] for r in rows if r["kind"] == kind}


def _table(times: Mapping[tuple[str, int], Mapping[str, float]], bases: Sequence[str]) -> list[str]:
    """A row an engine, a column a shape: microseconds and the ratios to the bases."""
    shapes = list(times)
    engines = list(dict.fromkeys(name for row in times.values() for name in row))
    lines = ["| engine | " + " | ".join(f"{shape}, {tokens} tokens" for shape, tokens in shapes) + " |"]
    lines.append("|---|" + "---:|" * len(shapes))
    for engine in engines:
        cells = []
        for shape in shapes:
            row = times[shape]
            ratios = "/".join(f"{row[base] / row[engine]:.2f}" for base in bases if base in row and engine in row)
            cells.append(f"{1e3 * row[engine]:.1f} ({ratios})" if engine in row else "-")
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return lines


def _around(rows: Iterable[Row]) -> list[str]:
    found = {f"{r['model']} {r['shape']}": r["ms"] for r in rows if r["kind"] == "around"}
    if not found:
        return []
    lines = ["The host's time of a call whose graph is left out, what it launches and waits for included:", ""]
    for what, times in found.items():
        lines.append(f"- {what}: " + ", ".join(f"{name} {1e3 * value:.0f} us" for name, value in times.items()))
    return [*lines, ""]


def _bars(encoders: Times) -> list[str]:
    lines = ["Bars:", ""]
    wanted = {(bar.wanted, bar.fewest, bar.most) for bar in ENCODER_BARS}
    bars = [Bar(name, BASE, *one) for one in sorted(wanted) for name in OURS]
    lines += [line for line in check_bars(encoders, bars) if "not measured" not in line]
    for (_, tokens), limit in ABSOLUTE.items():
        for key, row in encoders.items():
            if key == ("BERT-base 1x128", tokens):
                fastest = min(row.get(name, float("inf")) for name in OURS)
                verdict = "reached" if fastest <= limit else "MISSED"
                lines.append(f"- {key[0]}: at most {1e3 * limit:.0f} us: {verdict}, {1e3 * fastest:.0f} us")
    return lines


def _exactness(logs: Sequence[str]) -> list[str]:
    """A table of the checks, and what failed."""
    found: dict[str, tuple[int, int, str]] = {}
    for log in logs:
        here: dict[str, tuple[int, int, str]] = {}
        for failed, name, count, worst in _CHECK.findall(log.split("-- summary")[0]):
            before = here.get(name, (0, 0, ""))
            here[name] = (before[0] + int(count), before[1] + int(failed or 0), worst)
        found |= here
    if not found:
        return []
    lines = ["## Exactness", "", "Every kernel beside its slow twin. Integer products must be equal. Floats may differ"]
    lines[-1] += (
        " by rounding: relative to the largest result; of eight-bit floats as a share of what sm_90 allows, whose"
        " tensor cores keep 13 bits after the point of a sum of e4m3 products (arXiv 2412.19437, section 3.3.2)."
    )
    lines += ["", "| check | comparisons | failed | worst |", "|---|---:|---:|---|"]
    lines += [f"| {name} | {count} | {failed} | {worst} |" for name, (count, failed, worst) in sorted(found.items())]
    whole, failed = len(found), sum(failed > 0 for _, failed, _ in found.values())
    return [*lines, "", f"{whole - failed} of {whole} checks hold.", ""]


def main(paths: Sequence[str]) -> None:
    """Print the page of these files."""
    texts = {path: Path(path).read_text(encoding="utf-8") for path in paths}
    rows = [json.loads(line) for path, text in texts.items() if path.endswith(".jsonl") for line in text.splitlines()]
    print(render(rows, [text for path, text in texts.items() if not path.endswith(".jsonl")]), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
