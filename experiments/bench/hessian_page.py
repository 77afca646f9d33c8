"""The results page of bench_hessian.py: the tools side by side, later subsets, and whether the bars are met.

page(found, arguments, data, made_by)
"""

from __future__ import annotations

import argparse
from statistics import mean, median
from typing import Any

from hessian_peers import INSTALL, TOOLS

OWN, PEER = ("qbert", "qbert, gap", "qbert, gap 1e-4"), "PyHessian"


def page(found: dict[str, Any], arguments: argparse.Namespace, data: str, made_by: str) -> str:
    """Markdown of everything measured (see ``bench_hessian.measure_all``)."""
    first = found["references"][0]
    missing = [f"{name} ({TOOLS[name].package})" for name in arguments.tools if TOOLS[name].missing]
    parts = [
        "# Top Hessian eigenvalue of every layer",
        "",
        made_by,
        "",
        f"{data} ({arguments.train_limit:,} training rows, {arguments.epochs} epochs)",
        "",
        f"{arguments.sentences} sentences of the training data ({found['tokens'][0]} tokens), tolerance "
        f"{arguments.tol:g}, {len(first)} layers. Eigenvalues, lowest layer first: "
        f"{', '.join(f'{value:.4g}' for value in first)} (float64, relative residual below 1e-4).",
        "",
        _tools_table(found["tools"], first),
        "",
        f"F: matrix-product FLOPs of one forward pass. CPU s: best of {arguments.rounds} round(s) in which the tools "
        f"took turns, {arguments.threads or 'all'} thread(s). Error: against the float64 values, relative. MiB: peak "
        "of the process less what was resident before.",
        "",
        *[f"- {name}: {TOOLS[name].note}." for name in found["tools"]],
        "- The others are given eager attention and gradients for one layer's parameters; none of them works with the "
        "model as transformers loads it.",
        *([f"- Not installed, left out: {', '.join(missing)}. {INSTALL}"] if missing else []),
        "",
        "## Later subsets",
        "",
        f"`hessian_spectrum` over {arguments.subsets} random subsets; from the second on, the eigenvector of "
        "the subset before is in the start:",
        "",
        _subsets_table(found),
        "",
        *bars(found),
    ]
    return "\n".join(parts) + "\n"


def errors(values: list[float], references: list[float]) -> list[float]:
    """Relative error of every value."""
    return [abs(value - true) / abs(true) for value, true in zip(values, references, strict=True)]


def _tools_table(tools: dict[str, list[Any]], references: list[float]) -> str:
    from qbert.results import markdown_table

    header = ["tool", "products by layer", "all", "F", "CPU s", "largest error", "median error", "says", "MiB"]
    rows = []
    for name, (counted, *timed) in tools.items():
        off = errors(counted["value"], references)
        words = {(True,): "converged", (False,): "not converged", (None,): "nothing"}
        said = words.get(tuple(set(counted["converged"])), f"{sum(map(bool, counted['converged']))} converged")
        resident = [r["mebibytes"] for r in timed if r["mebibytes"] is not None]
        rows.append(
            [
                name,
                " ".join(map(str, counted["products"])),
                sum(counted["products"]),
                f"{counted['forwards']:.1f}",
                f"{min(r['seconds'] for r in timed):.1f}",
                f"{max(off):.1e}" if TOOLS[name].exact else "-",
                f"{median(off):.1e}" if TOOLS[name].exact else "-",
                said,
                f"{min(resident):.0f}" if resident else "-",
            ]
        )
    return markdown_table(header, rows)


def _subsets_table(found: dict[str, Any]) -> str:
    from qbert.results import markdown_table

    header = ["bound", "products a layer, by subset", "later subsets", "largest error", "all converged", "CPU s"]
    rows = []
    for bound, record in found["subsets"].items():
        off = [
            e for values, true in zip(record["values"], found["references"], strict=True) for e in errors(values, true)
        ]
        by_subset = [mean(products) for products in record["products"]]
        rows.append(
            [
                bound,
                " ".join(f"{m:.1f}" for m in by_subset),
                f"{mean(by_subset[1:]):.2f}" if len(by_subset) > 1 else "-",
                f"{max(off):.1e}",
                "yes" if record["converged"] else "no",
                f"{record['seconds']:.1f}",
            ]
        )
    return markdown_table(header, rows)


def bars(found: dict[str, Any]) -> list[str]:
    """What the library promises, alone and against PyHessian, and whether it is kept; one line each."""
    tools, references = found["tools"], found["references"][0]
    own = [name for name in OWN if name in tools]
    if not own:
        return []
    lines = []
    later = [n for products in found["subsets"]["gap"]["products"][1:] for n in products]
    if later:
        lines.append(_bar("products a layer on later subsets, gap bound", mean(later), 3, at_most=True))
    for name in own:
        counted, *timed = tools[name]
        lines.append(_bar(f"{name}: FLOPs of all layers, in forward passes", counted["forwards"], 60, at_most=True))
        if PEER in tools:
            peer, *peer_timed = tools[PEER]
            seconds = [min(r["seconds"] for r in rounds) for rounds in (peer_timed, timed)]
            worst = [max(errors(t["value"], references)) for t in (peer, counted)]
            lines += [
                _bar(f"{name}: times fewer FLOPs than {PEER}", peer["forwards"] / counted["forwards"], 3),
                _bar(f"{name}: times fewer CPU seconds than {PEER}", seconds[0] / seconds[1], 2.5),
                _bar(f"{name}: times smaller largest error than {PEER}", worst[0] / max(worst[1], 1e-12), 10),
            ]
    return ["## Bars", "", *lines]


def _bar(what: str, value: float, bar: float, at_most: bool = False) -> str:
    kept = value <= bar if at_most else value >= bar
    return f"- {what}: {value:.3g} ({'at most' if at_most else 'at least'} {bar:g}): {'kept' if kept else '**missed**'}"
