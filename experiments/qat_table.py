"""Put results of ``qat_distill.py`` together: one table, the paired gains of distillation, one picture.

    python experiments/qat_table.py outputs/qat-*/results.json --report experiments/results/qat.md

Mean and standard deviation are over seeds. A gain is the mean over seeds of the difference between two methods of the
same seed (same data order), with its standard error; that over post-training quantization is over the compensated one
where it was scored. Elsewhere: percent of the teacher's score on rows of another domain.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qat_comparison import METHODS, POST_TRAINING

from qbert.cli.arguments import run_script

_COLUMNS = (("score", 2, ""), ("retention", 1, " %"), ("agreement", 1, " %"), ("divergence", 4, ""))
_ELSEWHERE = [column for column in _COLUMNS if column[0] != "agreement"]
_METHODS = (*POST_TRAINING.values(), "QAT", "KD-QAT")
_LAST = ("PTQ, compensated", "QAT", "KD-QAT")
_SUMMARY = ("task", "bits", "start", "teacher", *_METHODS, "KD retention", "KD - QAT", "KD - PTQ")
_COMPARED = ("divergence", "elsewhere")  # of the three last methods
_PANELS_A_ROW = 3
_DEPTH = 12  # % of the teacher's score that a panel shows below the worst trained student


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several values."""
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def paired(rows: dict[str, list[dict[str, float]]], better: str, than: str, key: str = "score") -> str:
    """Mean difference of a column between two methods, seed by seed, and its standard error; empty where one lacks."""
    if not rows.get(better) or not rows.get(than):
        return ""
    base = {row.get("seed"): row[key] for row in rows[than]}
    # Post-training quantization has no seed: one row for all.
    known = [(row[key], base.get(row["seed"], base.get(None))) for row in rows[better]]
    differences = [ours - theirs for ours, theirs in known if theirs is not None]
    if not differences:
        return ""
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{fmean(differences):+.2f}{error}"


def comparison_table(contents: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): teacher and every method of each result, mean and spread over the seeds."""
    names = list(dict.fromkeys(f"{c['task']} {c['metric']}" for c in contents))
    header = ["" if len(names) == 1 else "method", names[0] if len(names) == 1 else "score"]
    header += ["retention", "agreement", "divergence"]
    others = list(dict.fromkeys(name for c in contents for name in c.get("elsewhere", ())))
    for name in others:
        header += [name, f"{name}: retention", f"{name}: divergence"]
    header += ["MB", "seconds", "seeds"]
    lines = []
    for content in contents:
        known = content.get("elsewhere", {})
        line = ["teacher", f"{content['teacher']:.2f}", "100 %", "100 %", "0"]
        for other in others:
            line += [f"{known[other]:.2f}", "100 %", "0"] if other in known else [""] * 3
        lines.append([*line, f"{content['float MB']:.1f}", "", ""])
        for name in (*POST_TRAINING.values(), *METHODS.values()):
            rows = content["rows"].get(name)
            if not rows:
                continue
            size = content["float MB"] if name == METHODS["float"] else content.get("packed MB")
            cells = [spread([r[key] for r in rows], digits) + unit for key, digits, unit in _COLUMNS]
            for other in others:
                there = [r["elsewhere"][other] for r in rows if other in r.get("elsewhere", ())]
                cells += [spread([r[key] for r in there], d) + unit if there else "" for key, d, unit in _ELSEWHERE]
            seconds = f"{fmean(r['seconds'] for r in rows):.0f}"
            seeds = "" if name in POST_TRAINING.values() else str(len(rows))
            lines.append([name, *cells, f"{size:.1f}" if size else "", seconds, seeds])
    return header, lines


def summary_table(contents: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): one line a result."""
    lines = []
    for content in contents:
        rows = content["rows"]
        scores = [spread([r["score"] for r in rows[name]], 2) if rows.get(name) else "" for name in _METHODS]
        off = [f"{fmean(r['divergence'] for r in rows[name]):.3f}" if rows.get(name) else "-" for name in _LAST]
        retention = spread([r["retention"] for r in rows["KD-QAT"]], 1) + " %" if rows.get("KD-QAT") else ""
        size = f"{content['packed MB']:.1f}" if "packed MB" in content else ""
        task = f"{content['task']} ({content['metric']})"
        untrained = next((name for name in reversed(POST_TRAINING.values()) if rows.get(name)), "PTQ")
        gains = [paired(rows, "KD-QAT", "QAT"), paired(rows, "KD-QAT", untrained)]
        line = [task, content["widths"], _start(content), f"{content['teacher']:.2f}", *scores, retention, *gains]
        lines.append([*line, " / ".join(off), _retained_elsewhere(content), size])
    return [*_SUMMARY, *(f"{name}: {' / '.join(_LAST)}" for name in _COMPARED), "MB"], lines


def _start(content: dict[str, Any]) -> str:
    """The codes that its trainings started from; results of before there was a choice started from nearest ones."""
    return str(content.get("start", "nearest"))


def _retained_elsewhere(content: dict[str, Any]) -> str:
    """Percent of the teacher's score of the last three methods on each other domain."""
    parts = []
    for other in content.get("elsewhere", ()):
        kept = [[r["elsewhere"][other]["retention"] for r in content["rows"].get(name, ())] for name in _LAST]
        parts.append(f"{other} " + " / ".join(f"{fmean(values):.1f}" if values else "-" for values in kept))
    return "; ".join(parts)


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    """Retention by bits, one panel a task, one line a method, bars for the spread over seeds."""
    from qbert.files import write_whole
    from qbert.plots import new_figure

    tasks = list(dict.fromkeys(c["task"] for c in contents))
    columns = min(len(tasks), _PANELS_A_ROW)
    rows = -(-len(tasks) // columns)
    figure = new_figure(4 * columns, 3.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        chosen = sorted((c for c in contents if c["task"] == task), key=lambda c: _order(c["widths"]))
        _panel(axis, chosen)
        axis.set_title(f"{task} ({chosen[0]['metric']} {chosen[0]['teacher']:.1f})")
        axis.set_xlabel("bits, and the codes that training starts from")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("% of the teacher's score")
    handles, labels = axes[0][0].get_legend_handles_labels()
    bars = "bars: standard deviation over seeds; no bar: one seed, or none"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", title=bars)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=130))


def _panel(axis: Any, contents: list[dict[str, Any]]) -> None:
    """One task; what has collapsed is written at the bottom instead of flattening all else."""
    trained = [100.0]
    collapsed = []
    joined = "-" if len({_start(c) for c in contents}) == 1 else "none"  # points of different starts are no curve
    axis.axhline(100, color="gray", linewidth=0.8, linestyle="--")
    for shift, name in zip((-0.12, -0.04, 0.04, 0.12), _METHODS, strict=True):
        values = [[r["retention"] for r in c["rows"].get(name, [])] for c in contents]
        x = [i + shift for i, v in enumerate(values) if v]
        y = [fmean(v) for v in values if v]
        error = [stdev(v) if len(v) > 1 else 0.0 for v in values if v]
        line = axis.errorbar(x, y, yerr=error, marker="o", linestyle=joined, capsize=3, label=name)[0]
        if name not in POST_TRAINING.values():
            trained += y
            continue
        collapsed += [(place, share, line.get_color()) for place, share in zip(x, y, strict=True)]
    bottom, top = axis.get_ylim()
    bottom = max(bottom, min(trained) - _DEPTH)
    axis.set_ylim(bottom, top)
    for place, share, color in collapsed:
        if share < bottom:
            axis.annotate(
                f"{share:.0f} %", (place, bottom), (0, 4), textcoords="offset points", color=color, ha="center"
            )
    widths = [f"{c['widths'].replace(' mixed', '')}\n{_start(c)}" for c in contents]
    axis.set_xticks(range(len(widths)), widths)
    axis.set_xlim(-0.5, len(widths) - 0.5)


def _order(widths: str) -> float:
    values = [int(w) for w in widths.removesuffix(" mixed").split("/")]
    return sum(values) / len(values)


def report_text(contents: list[dict[str, Any]]) -> str:
    """The page: the summary, then every result with its budget and command."""
    from qbert.results import markdown_table

    parts = [
        "# KD-aware QAT\n",
        __doc__.split("\n\n")[2].strip() + "\n" if __doc__ else "",
        markdown_table(*summary_table(contents)),
    ]
    for content in contents:
        parts.append(f"\n## {content['task']}, {content['widths']} bits, from {_start(content)} codes\n")
        parts.append(markdown_table(*comparison_table([content])))
        parts.append(f"\n{content['data']}. Students: {content['budget']}. {content['made by']}")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Read results and write the page and its picture."""
    from qbert.extras import require
    from qbert.files import read_json, write_whole
    from qbert.results import text_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="results.json files of qat_distill.py")
    parser.add_argument("--report", default="qat.md", help="Markdown file to write, a .png beside it; default: qat.md")
    arguments = parser.parse_args()
    require("matplotlib", "the picture")
    contents = [read_json(path) for path in arguments.results]
    for path, content in zip(arguments.results, contents, strict=True):
        if not isinstance(content, dict) or not {"rows", "task", "teacher", "widths"} <= set(content):
            raise ValueError(f"{path} is no results file of qat_distill.py; name its results.json")
    contents.sort(key=lambda c: (c["task"], -_order(c["widths"])))
    print(text_table(*summary_table(contents)))
    target = Path(arguments.report)
    text = report_text(contents)
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    plot(contents, target.with_suffix(".png"))
    print(f"\nwritten: {target}, {target.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
