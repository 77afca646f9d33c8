"""Pages and pictures of the sensitivity study: one section and one plot a task, and what all tasks say together.

study = Study.load(folder, "sst2")
print(section(study), summary([study]))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class Study:
    """What was found on one task.

    Attributes:
        task: its name.
        described: its data, in a line.
        made_by: command, machine and versions, in a line.
        metric: primary metric on held-out data.
        float: (loss, score) of the float model there.
        comparisons: allocations by pair of widths, see `allocation_compare.compare`.
        report: `Sensitivities`; in a file of its own.
    """

    task: str
    described: str
    made_by: str
    metric: str
    float: tuple[float, float]
    comparisons: list[dict[str, Any]]
    report: Any

    def save(self, folder: Path) -> None:
        """Write ``study-<task>.json``; the report is there already, as ``sensitivity-<task>.json``."""
        from qbert.files import write_json

        kept = {name: value for name, value in vars(self).items() if name != "report"}
        write_json(folder / f"study-{self.task}.json", kept)

    @classmethod
    def load(cls, folder: Path, task: str) -> Study:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no finished study of `task` in `folder`; ValueError: a damaged file.
        """
        from qbert.allocation.predictions import Sensitivities
        from qbert.files import read_json

        report = Sensitivities.load(folder / f"sensitivity-{task}.json")
        try:
            return cls(**read_json(folder / f"study-{task}.json"), report=report)
        except TypeError as error:
            raise ValueError(f"{folder}/study-{task}.json is not a study ({error}); run the study again") from error


def page(studies: Sequence[Study]) -> str:
    """The whole page in Markdown: the summary, then a section a task."""
    parts = ["# Which measure of sensitivity is right?", "", summary(studies)]
    for study in studies:
        parts += ["", f"## {study.task}", "", study.described, "", study.made_by, "", section(study)]
    return "\n".join(parts) + "\n"


def section(study: Study) -> str:
    """Markdown of one task."""
    from qbert.results import markdown_table

    report, (loss, score) = study.report, study.float
    found = report.rank_correlations()
    header = ["rank correlation (tau / rho) with the true loss change", *(f"{b} bits" for b in report.bits)]
    rows = [[m, *(f"{c.kendall:+.2f} / {c.spearman:+.2f}" for c in by.values())] for m, by in found.items()]
    parts = [
        f"{len(report.names)} blocks ({report.settings['granularity']}), {report.settings['samples']} training rows"
        + (f", changes on {report.settings['held_out']} others" if "held_out" in report.settings else "")
        + f", training loss {report.loss:.4f}; float model on held-out data: loss {loss:.4f}, {study.metric} "
        f"{score:.2f}.",
        "",
        markdown_table(header, rows),
    ]
    for entry in study.comparisons:
        losses = sorted(other for other, _ in entry["others"])
        kind = "all" if entry["all"] else "random"
        others = f"{len(losses)} {kind} allocations of {'/'.join(map(str, entry['pair']))} bits"
        parts += [
            "",
            f"At {entry['average']:.2f} bits a weight; {others} have losses {losses[0]:.4f} to {losses[-1]:.4f}, "
            f"median {losses[len(losses) // 2]:.4f}:",
            "",
            markdown_table(
                ["measure", "rule", "bits of the blocks", "loss", study.metric, "others that do better"],
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


def plot(study: Study, path: Path) -> None:
    """Left: rank correlations by measure and width. Right: held-out loss of every measure's allocation."""
    from qbert.allocation.predictions import METRICS
    from qbert.files import write_whole
    from qbert.plots import new_figure

    report, comparisons = study.report, study.comparisons
    figure = new_figure(6 + 4.5 * len(comparisons), 4.8)
    axes = figure.subplots(1, 1 + len(comparisons), squeeze=False)[0]
    found = report.rank_correlations()
    width = 0.8 / len(report.bits)
    for i, bits in enumerate(report.bits):
        heights = [by[bits].kendall for by in found.values()]
        axes[0].bar([x + (i - (len(report.bits) - 1) / 2) * width for x in range(len(found))], heights, width)
    axes[0].legend([f"{b} bits" for b in report.bits], fontsize="small")
    axes[0].set_xticks(range(len(found)), list(found), rotation=40, ha="right")
    axes[0].set_ylabel("Kendall's tau with the true loss change")
    axes[0].axhline(0, color="0.6", linewidth=0.8)
    axes[0].set_title(f"{study.task}: agreement with the truth")
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


def summary(studies: Sequence[Study]) -> str:
    """Markdown over all tasks: agreement with the true loss change, and the allocation that each measure leads to."""
    from qbert.allocation.predictions import METRICS, TRUTH
    from qbert.results import markdown_table

    names = [study.task for study in studies]
    tau = {metric: [_mean_tau(study.report, metric) for study in studies] for metric in _measured(studies)[:-1]}
    parts = [
        "Kendall's tau of each measure's ranking of the blocks with that of the true loss change, mean over bits:",
        "",
        markdown_table(
            ["measure", *names, "mean"],
            [[m, *(f"{v:+.2f}" for v in values), f"{mean(values):+.2f}"] for m, values in tau.items()],
        ),
    ]
    entries = [study.comparisons for study in studies]
    for index, entry in enumerate(entries[0]):
        rules = list(dict.fromkeys(p["rule"] for found in entries for p in found[index]["picks"]))
        rows = []
        for metric, rule in itertools.product(METRICS, rules):
            picks = [pick for pick in (_pick(found[index], metric, rule) for found in entries) if pick is not None]
            if len(picks) == len(entries):
                cells = [f"{pick['score']:.2f} ({100 * pick['better']:.0f} %)" for pick in picks]
                label = f"{metric} (measured)" if metric == TRUTH else metric
                rows.append([label, rule, *cells, f"{100 * mean(pick['better'] for pick in picks):.0f} %"])
        typical = ", ".join(f"{study.task} {_median_score(study, index):.2f}" for study in studies)
        parts += [
            "",
            f"Held-out score of the allocation at {entry['average']:.2f} bits a weight that each measure leads to, and "
            f"the share of other allocations of that size with a smaller held-out loss (0 % is best; the median "
            f"allocation scores {typical}):",
            "",
            markdown_table(["measure", "rule", *names, "mean share"], rows),
        ]
    return "\n".join(parts)


def _measured(studies: Sequence[Study]) -> list[str]:
    """The measures that every study has, the truth last; Kronecker factors need logits of samples."""
    from qbert.allocation.predictions import METRICS, TRUTH

    return [m for m in METRICS if m == TRUTH or all(m in study.report.rank_correlations() for study in studies)]


def _mean_tau(report: Any, metric: str) -> float:
    return mean(found.kendall for found in report.rank_correlations()[metric].values())


def _pick(entry: dict[str, Any], metric: str, rule: str) -> dict[str, Any] | None:
    return next((p for p in entry["picks"] if (p["metric"], p["rule"]) == (metric, rule)), None)


def _median_score(study: Study, index: int) -> float:
    """Median score of the other allocations."""
    scores = sorted(score for _, score in study.comparisons[index]["others"])
    return float(scores[len(scores) // 2])


def plot_summary(studies: Sequence[Study], path: Path) -> None:
    """Left: mean rank correlation by measure, a bar a task. Others: share of allocations better than the chosen one."""
    from qbert.files import write_whole
    from qbert.plots import new_figure

    metrics, entries = _measured(studies), studies[0].comparisons
    figure = new_figure(6 + 5 * len(entries), 4.8)
    axes = figure.subplots(1, 1 + len(entries), squeeze=False)[0]
    width = 0.8 / len(studies)
    for i, study in enumerate(studies):
        shift = (i - (len(studies) - 1) / 2) * width
        places = [x + shift for x in range(len(metrics))]
        heights = [_mean_tau(study.report, m) for m in metrics[:-1]]
        axes[0].bar(places[:-1], heights, width, label=study.task, color=f"C{i}")
        for axis, entry in zip(axes[1:], study.comparisons, strict=True):
            for rule, marker in zip(dict.fromkeys(p["rule"] for p in entry["picks"]), "o_x", strict=False):
                shares = [100 * p["better"] for p in entry["picks"] if p["rule"] == rule and p["metric"] in metrics]
                label = rule if i == 0 else None  # colours are the tasks', as in the first panel
                axis.plot(places, shares, marker, color=f"C{i}", markersize=8, markerfacecolor="none", label=label)
    axes[0].axhline(0, color="0.6", linewidth=0.8)
    axes[0].set_ylabel("Kendall's tau with the true loss change, mean over bits")
    axes[0].set_xticks(range(len(metrics) - 1), metrics[:-1], rotation=40, ha="right")
    axes[0].legend(fontsize="small")
    for axis, entry in zip(axes[1:], entries, strict=True):
        axis.set_ylabel("other allocations that do better, %")
        axis.set_xticks(range(len(metrics)), metrics, rotation=40, ha="right")
        axis.set_title(f"{entry['average']:.2f} bits a weight on average")
        axis.grid(axis="y", color="0.9")
        rules = axis.legend(title="rule", fontsize="small", loc="upper left")
        for handle in rules.legend_handles:
            handle.set_color("0.3")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))
