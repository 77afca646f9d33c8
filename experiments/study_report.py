"""Pages and pictures of the sensitivity study: one section and one plot a task, and what all tasks say together.

section(report, scores, comparisons, task)
summary({"sst2": (report, comparisons)})
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean
from typing import Any

from allocation_compare import Scores

Studied = dict[str, tuple[Any, list[dict[str, Any]]]]  # task name -> its `Sensitivities` and its comparisons


def section(report: Any, scores: Scores, comparisons: list[dict[str, Any]], task: Any) -> str:
    """Markdown of one task."""
    from qbert.report import markdown_table

    loss, score = scores.float
    found = report.rank_correlations()
    header = ["rank correlation (tau / rho) with the true loss change", *(f"{b} bits" for b in report.bits)]
    rows = [[m, *(f"{c.kendall:+.2f} / {c.spearman:+.2f}" for c in by.values())] for m, by in found.items()]
    parts = [
        f"{len(report.names)} blocks ({report.settings['granularity']}), {report.settings['samples']} training rows, "
        f"training loss {report.loss:.4f}; float model on held-out data: loss {loss:.4f}, {task.primary_metric} "
        f"{score:.2f}.",
        "",
        markdown_table(header, rows),
    ]
    for entry in comparisons:
        losses = sorted(other for other, _ in entry["others"])
        kind = "all" if entry["all"] else "random"
        others = f"{len(losses)} {kind} allocations of {'/'.join(map(str, entry['pair']))} bits"
        parts += [
            "",
            f"At {entry['average']:.2f} bits a weight; {others} have losses {losses[0]:.4f} to {losses[-1]:.4f}, "
            f"median {losses[len(losses) // 2]:.4f}:",
            "",
            markdown_table(
                ["measure", "rule", "bits of the blocks", "loss", task.primary_metric, "others that do better"],
                [
                    (
                        p["metric"],
                        p["rule"],
                        "".join(map(str, p["bits"])),
                        f"{p['loss']:.4f}",
                        f"{p['score']:.2f}",
                        f"{100 * p['better']:.0f} %",
                    )
                    for p in entry["picks"]
                ],
            ),
        ]
    return "\n".join(parts)


def plot(report: Any, comparisons: list[dict[str, Any]], title: str, path: Path) -> None:
    """Left: rank correlations by measure and width. Right: held-out loss of every measure's allocation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from qbert.files import write_whole
    from qbert.sensitivity_report import METRICS

    figure = Figure(figsize=(6 + 4.5 * len(comparisons), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(comparisons))
    found = report.rank_correlations()
    width = 0.8 / len(report.bits)
    for i, bits in enumerate(report.bits):
        heights = [by[bits].kendall for by in found.values()]
        axes[0].bar([x + (i - (len(report.bits) - 1) / 2) * width for x in range(len(found))], heights, width)
    axes[0].legend([f"{b} bits" for b in report.bits], fontsize="small")
    axes[0].set_xticks(range(len(found)), list(found), rotation=40, ha="right")
    axes[0].set_ylabel("Kendall's tau with the true loss change")
    axes[0].axhline(0, color="0.6", linewidth=0.8)
    axes[0].set_title(title)
    for axis, entry in zip(axes[1:], comparisons, strict=True):
        losses = [loss for loss, _ in entry["others"]]
        for loss in losses:
            axis.axhline(loss, color="0.85", linewidth=0.8, zorder=0)
        for marker, rule in zip("oxs", dict.fromkeys(p["rule"] for p in entry["picks"]), strict=False):
            chosen = [p for p in entry["picks"] if p["rule"] == rule]
            axis.plot([METRICS.index(p["metric"]) for p in chosen], [p["loss"] for p in chosen], marker, label=rule)
        axis.set_xticks(range(len(METRICS)), METRICS, rotation=40, ha="right")
        axis.set_ylabel("held-out loss (grey: other allocations)")
        axis.set_title(f"{entry['average']:.2f} bits a weight")
        axis.legend(fontsize="small")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def summary(studied: Studied) -> str:
    """Markdown over all tasks: agreement with the true loss change, and the allocation that each measure leads to."""
    from qbert.report import markdown_table
    from qbert.sensitivity_report import METRICS, TRUTH

    tau = {metric: [_mean_tau(report, metric) for report, _ in studied.values()] for metric in METRICS[:-1]}
    parts = [
        "Kendall's tau of each measure's ranking of the blocks with that of the true loss change, mean over bits:",
        "",
        markdown_table(
            ["measure", *studied, "mean"],
            [[m, *(f"{v:+.2f}" for v in values), f"{mean(values):+.2f}"] for m, values in tau.items()],
        ),
    ]
    entries = [comparisons for _, comparisons in studied.values()]
    for index, entry in enumerate(entries[0]):
        rules = list(dict.fromkeys(p["rule"] for found in entries for p in found[index]["picks"]))
        rows = []
        for metric, rule in itertools.product(METRICS, rules):
            picks = [pick for pick in (_pick(found[index], metric, rule) for found in entries) if pick is not None]
            if len(picks) == len(entries):
                cells = [f"{pick['score']:.2f} ({100 * pick['better']:.0f} %)" for pick in picks]
                label = f"{metric} (measured)" if metric == TRUTH else metric
                rows.append([label, rule, *cells, f"{100 * mean(pick['better'] for pick in picks):.0f} %"])
        floats = ", ".join(f"{name} {score:.2f}" for name, score in _medians(studied, index).items())
        parts += [
            "",
            f"Held-out score of the allocation at {entry['average']:.2f} bits a weight that each measure leads to, and "
            f"the share of other allocations of that size with a smaller held-out loss (0 % is best; the median "
            f"allocation scores {floats}):",
            "",
            markdown_table(["measure", "rule", *studied, "mean share"], rows),
        ]
    return "\n".join(parts)


def _mean_tau(report: Any, metric: str) -> float:
    return mean(found.kendall for found in report.rank_correlations()[metric].values())


def _pick(entry: dict[str, Any], metric: str, rule: str) -> dict[str, Any] | None:
    return next((p for p in entry["picks"] if (p["metric"], p["rule"]) == (metric, rule)), None)


def _medians(studied: Studied, index: int) -> dict[str, float]:
    """Task -> median score of the other allocations."""
    scores = {name: sorted(s for _, s in comparisons[index]["others"]) for name, (_, comparisons) in studied.items()}
    return {name: found[len(found) // 2] for name, found in scores.items()}


def plot_summary(studied: Studied, path: Path) -> None:
    """Left: mean rank correlation by measure, a bar a task. Others: share of allocations better than the chosen one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from qbert.files import write_whole
    from qbert.sensitivity_report import METRICS

    entries = next(iter(studied.values()))[1]
    figure = Figure(figsize=(6 + 5 * len(entries), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(entries))
    width = 0.8 / len(studied)
    for i, (name, (report, comparisons)) in enumerate(studied.items()):
        shift = (i - (len(studied) - 1) / 2) * width
        places = [x + shift for x in range(len(METRICS))]
        axes[0].bar(places[:-1], [_mean_tau(report, m) for m in METRICS[:-1]], width, label=name, color=f"C{i}")
        for axis, entry in zip(axes[1:], comparisons, strict=True):
            for rule, marker in zip(dict.fromkeys(p["rule"] for p in entry["picks"]), "o_x", strict=False):
                shares = [100 * p["better"] for p in entry["picks"] if p["rule"] == rule]
                label = f"{name}, {rule}"
                axis.plot(places, shares, marker, color=f"C{i}", markersize=8, markerfacecolor="none", label=label)
    axes[0].axhline(0, color="0.6", linewidth=0.8)
    axes[0].set_ylabel("Kendall's tau with the true loss change, mean over bits")
    axes[0].set_xticks(range(len(METRICS) - 1), METRICS[:-1], rotation=40, ha="right")
    axes[0].legend(fontsize="small")
    for axis, entry in zip(axes[1:], entries, strict=True):
        axis.set_ylabel("other allocations that do better, %")
        axis.set_xticks(range(len(METRICS)), METRICS, rotation=40, ha="right")
        axis.set_title(f"{'/'.join(map(str, entry['pair']))}: {entry['average']:.2f} bits a weight")
        axis.grid(axis="y", color="0.9")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="x-small")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))
