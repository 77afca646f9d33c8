"""One page and one picture of several tasks under budgets.

    python experiments/compress_page.py outputs/compress-*/budget.json --report experiments/results/combined.md

Reads the records that ``compress.py`` keeps, whole or not yet. The picture beside the page has a row a task: score in
percent of the float model against bytes of the file, and against milliseconds on one core.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from compress_budget import budget_table

from qbert.cli.arguments import run_script
from qbert.plots import new_figure
from qbert.results import markdown_table

# How a kind of row is drawn: (label, marker, colour, size). What is not named is one kind of structure alone.
_STYLES = {
    "plan": ("plan", "*", "tab:red", 13),
    "trained plan": ("plan and distillation", "D", "darkred", 7),
    "plan, trimmed vocabulary": ("plan, trimmed vocabulary", "*", "tab:orange", 11),
    "trained plan, trimmed vocabulary": ("the same and distillation", "D", "goldenrod", 6),
    "uniform bits": ("uniform bits", "s", "tab:blue", 6),
    "paper's ranking": ("ranking by eigenvalues", "^", "tab:cyan", 6),
    "chance": ("chance", ".", "0.6", 5),
}
_OTHERS = ("o", "P", "X", "v", "<", ">", "p", "h")
_COLOURS = ("tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:pink", "black", "teal")
_LOWEST = 75.0  # percent of float; what is below is not worth a place


def families_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): percent of the float score by kind of choice and size, and times the speed of float."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for rows in content["rows"].values():
        for row in rows:
            found.setdefault(_label(row["group"]), {}).setdefault(row["size"], []).append(row)
    sizes = sorted({size for by_size in found.values() for size in by_size}, reverse=True)
    header = ["of float's score", *(f"{size:g} MB" for size in sizes), "times float's speed"]
    lines = []
    for name, by_size in found.items():
        cells = [f"{_mean(by_size[s], 'retention'):.1f} %" if s in by_size else "" for s in sizes]
        lines.append([name, *cells, f"{fmean(_mean(rows, 'times') for rows in by_size.values()):.1f}"])
    return header, lines


def section(content: dict[str, Any]) -> str:
    """Markdown of one task."""
    plans = "\n".join(f"{name}:\n\n```text\n{plan['text']}\n```\n" for name, plan in content["plans"].items())
    rows = content["float"]["rows"]
    there = f"; other domain: {content['other domain']}" if "other domain" in content else ""
    saw = f"plans and roundings saw {content['asked']['rows']} training rows without labels"
    return "\n\n".join(
        [
            f"## {content['task']}",
            "Files of equal size, mean over seeds:",
            markdown_table(*families_table(content)),
            "Every model:",
            markdown_table(*budget_table(content)),
            f"{content['data']}. Scores are of {rows:,} held-out rows{there}; {saw}. {content['made by']}",
            plans,
        ]
    )


def draw(contents: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Score against bytes and against milliseconds, a row of two panels a task."""
    from qbert.files import write_whole

    figure = new_figure(11.0, 4.3 * len(contents))
    others = sorted(
        {row["group"] for content in contents for rows in content["rows"].values() for row in rows} - set(_STYLES)
    )
    styles = dict(_STYLES)
    for i, group in enumerate(others):
        styles[group] = (f"{group} and bits", _OTHERS[i % len(_OTHERS)], _COLOURS[i % len(_COLOURS)], 6)
    for i, content in enumerate(contents):
        panels = [figure.add_subplot(len(contents), 2, 2 * i + j + 1) for j in (0, 1)]
        _draw_task(panels, content, styles)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    bars = "bars: standard deviation over seeds; no bar: one model"
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize="small", title=bars)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=130))


def _draw_task(panels: Sequence[Any], content: dict[str, Any], styles: dict[str, Any]) -> None:
    lowest = 100.0
    plain = None
    for group, (label, marker, colour, size) in styles.items():
        kept = [rows for rows in content["rows"].values() if rows and rows[0]["group"] == group]
        points = [[*(_mean(rows, key) for key in ("megabytes", "ms", "retention")), _deviation(rows)] for rows in kept]
        points = sorted(point for point in points if point[2] >= _LOWEST)
        if not points:
            continue
        lowest = min(lowest, *(point[2] for point in points))
        plain = plain or max(_mean(rows, "ms") * _mean(rows, "times") for rows in kept)
        line = "-" if group.startswith(("plan", "trained plan", "uniform")) else "none"
        for axes, place, joined in zip(panels, (0, 1), (line, "none"), strict=True):
            axes.errorbar(
                [p[place] for p in points],
                [p[2] for p in points],
                yerr=[p[3] for p in points] if any(p[3] for p in points) else None,
                capsize=3,
                linestyle=joined,
                marker=marker,
                color=colour,
                markersize=size,
                label=label,
            )
    megabytes = content["float"]["megabytes"]
    panels[0].set(xlabel="file [MB = 10⁶ bytes]", ylabel="score [% of the float model's]")
    panels[1].set(xlabel="one call of 1x128 tokens on one core [ms]")
    for axes in panels:
        axes.axhline(100, color="0.4", linewidth=1, linestyle="--")
        axes.set_ylim(lowest - 1, 101.5)
        axes.grid(alpha=0.25)
        axes.annotate(
            "\N{NORTH WEST ARROW} better",
            (0.02, 0.97),
            xycoords="axes fraction",
            va="top",
            fontsize="small",
            color="0.4",
        )
    note = f"dashed: float, {megabytes:.0f} MB" + (f" and {plain:.0f} ms" if plain else "")
    panels[0].set_title(f"{content['task']}: {content['metric']} by size", fontsize="medium")
    panels[1].set_title(f"by time ({note})", fontsize="medium")


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return fmean(float(row[key]) for row in rows)


def _deviation(rows: Sequence[dict[str, Any]]) -> float:
    """Standard deviation over seeds; 0 for one, which has no bar."""
    return stdev(row["retention"] for row in rows) if len(rows) > 1 else 0.0


def _label(group: str) -> str:
    return _STYLES[group][0] if group in _STYLES else f"{group} and bits"


def main() -> None:
    """Read records, write page and picture."""
    from qbert.files import read_json, write_whole

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="budget.json files of compress.py")
    parser.add_argument("--report", default="combined.md", help="Markdown file to write; default: combined.md")
    arguments = parser.parse_args()
    contents = [read_json(path) for path in arguments.records]
    for path, content in zip(arguments.records, contents, strict=True):
        if not isinstance(content, dict) or not {"rows", "task", "float", "plans"} <= set(content):
            raise ValueError(f"{path} is no record of compress.py under a budget; name its budget.json")
    target = Path(arguments.report)
    picture = target.with_suffix(".png")
    draw(contents, picture)
    parts = [f"# Models under a budget\n\n![Score by size and by time]({picture.name})\n", *map(section, contents)]
    write_whole(target, lambda aside: aside.write_text("\n".join(parts), encoding="utf-8"))
    print(f"written: {target} and {picture}")


if __name__ == "__main__":
    run_script(main)
