"""One self-contained HTML page of a folder of results: pictures to hover over, tables to sort, commands that made them.

It stands alone because it reads files only: `qbert report` is one way to call it.

    >>> write_report("outputs/hessian_spectrum-reviews", "report.html")

What is found below the folder is shown: spectra, allocation fronts, post-training comparisons, trainings and their
curves, tables of compressed models, and what the commands of ``qbert`` keep beside what they write
(`qbert.results.write_command`). Other JSON and CSV files are passed over, and counted in the page's foot. The page
loads nothing from elsewhere; the script that draws (plotly.js) is in it.
"""

from __future__ import annotations

import csv
import html
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qbert.allocation.front import FORMAT as FRONT
from qbert.allocation.front import ParetoFront
from qbert.extras import require
from qbert.files import SEAL, AlteredFileError, read_json, write_whole
from qbert.hessian.spectrum import FORMAT as SPECTRUM
from qbert.hessian.spectrum import HessianSpectrum
from qbert.results import COMMAND_FORMAT
from qbert.version import __version__

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } code { background: #f4f4f4; padding: .1em .3em }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tbody tr:nth-child(odd) { background: #f7f7f9 }
th { cursor: pointer; border-bottom: 2px solid #999 } th::after { content: " \\2195"; color: #aaa }
p.made { color: #666; font-size: 13px; overflow-wrap: anywhere }
"""
# A click on a head sorts its column, by number where every cell is one; a second click turns the order round.
_SORT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
  const down = head.dataset.order === "up"; head.dataset.order = down ? "down" : "up";
  const key = row => row.cells[at].textContent.trim(), rows = [...body.rows];
  const numeric = rows.every(row => key(row) === "" || !isNaN(parseFloat(key(row))));
  const value = row => numeric ? (parseFloat(key(row)) || 0) : key(row);
  rows.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (down ? -1 : 1));
  rows.forEach(row => body.append(row));
});
"""
# In a file that cannot be read: it was written by qbert, and is damaged.
_WRITTEN_HERE = re.compile(rf'"{SEAL}"|"format": "qbert\.|"made by": |\A\{{\s*"asked": '.encode())
_PTQ_COLUMNS = ("label", "score", "retention", "agreement", "divergence", "megabytes", "ratio", "seconds")


@dataclass(frozen=True)
class _Section:
    """A heading with figures (as plotly JSON objects), a table and the line that says where it is from."""

    title: str
    figures: tuple[Any, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    made_by: str = ""
    notes: tuple[str, ...] = ()


def write_report(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> list[str]:
    """Write the page of all results below `folder` (aside first, then renamed).

    Args:
        folder: what the scripts of `experiments/`, `HessianSpectrum.save` and `ParetoFront.save` wrote into.
        path: the HTML file.

    Returns:
        The files that are shown, relative to `folder`.

    Raises:
        ValueError: `folder` holds no result, or a damaged one (its file is named); NotADirectoryError: no folder.
        MissingPackageError: plotly is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; name the one that results were written to")
    require("plotly", "a report")
    found: list[tuple[str, _Section]] = []
    passed_over = 0
    for name, file in _candidates(folder):
        section = _section(name, file)
        if section is None:
            passed_over += 1
        else:
            found.append((name, section))
    if not found:
        raise ValueError(
            f"{folder} holds no results (spectra, fronts, ptq.json, results.json, curves.csv, qbert_record.json); name "
            "the --output-dir of a script, or the folder of what a command or .save() wrote"
        )
    text = _page(folder.resolve().name, [section for _, section in found], passed_over)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return [name for name, _ in found]


def _candidates(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that may hold a result, by their names relative to `folder`."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") or part.endswith(".partial") for part in inside.parts)
        if not hidden and file.is_file() and (file.name == "curves.csv" or file.suffix == ".json"):
            yield inside.as_posix(), file


def _section(name: str, file: Path) -> _Section | None:
    """What a file says; None where it is no result of qbert.

    Raises:
        ValueError: it is one, and damaged.
    """
    if file.suffix == ".csv":
        return _curves(name, file) if _is_of_curves(file) else None
    try:
        content = read_json(file)
    except AlteredFileError:
        raise
    except ValueError:
        if _WRITTEN_HERE.search(file.read_bytes()):
            raise
        return None
    if not isinstance(content, dict):
        return None
    if content.get("format") == SPECTRUM:
        return _spectrum(name, HessianSpectrum.load(file))
    if content.get("format") == FRONT:
        return _front(name, ParetoFront.load(file))
    if content.get("format") == COMMAND_FORMAT:
        try:
            return _command(name, content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); remove it, or run its command again") from error
    rows = content.get("rows")
    if _are_scored(rows):
        return _comparison(name, content)
    if isinstance(rows, dict) and "asked" in content and all(isinstance(kept, list) for kept in rows.values()):
        return _record(name, content)
    return None


def _are_scored(rows: Any) -> bool:
    """Whether these are rows of a comparison: a label each, and a score, which may be missing."""
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, dict) and "label" in row and "score" in row for row in rows)
        and all(isinstance(row["score"], int | float | None) for row in rows)
    )


def _is_of_curves(file: Path) -> bool:
    with open(file, encoding="utf-8", errors="replace", newline="") as opened:
        return {"step", "name", "value"} <= set(next(csv.reader(opened), ()))


def _go() -> Any:
    return importlib.import_module("plotly.graph_objects")


def _figure(traces: Sequence[Any], **layout: Any) -> Any:
    return _go().Figure(list(traces), {"template": "plotly_white", "height": 420, "margin": {"t": 30}, **layout})


def _spectrum(name: str, spectrum: HessianSpectrum) -> _Section:
    go, runs = _go(), np.arange(len(spectrum.losses))
    spread = [
        go.Box(y=spectrum.eigenvalues[:, i].tolist(), name=block, boxpoints="all", jitter=0.4, pointpos=0, text=[
            f"run {run + 1}, residual {spectrum.residuals[run, i]:.1e}, {spectrum.products[run, i]} products"
            for run in runs
        ])
        for i, block in enumerate(spectrum.names)
    ]  # fmt: skip
    rank = {block: place for place, block in enumerate(spectrum.ranking(), 1)}
    rows = tuple(
        (block, *(f"{values[i]:.4g}" for values in (spectrum.mean, spectrum.std, spectrum.sensitivity)), rank[block],
         f"{spectrum.products[:, i].mean():.1f}", f"{spectrum.converged[:, i].sum()} of {len(runs)}")
        for i, block in enumerate(spectrum.names)
    )  # fmt: skip
    figure = _figure(spread, yaxis={"title": "top Hessian eigenvalue"}, showlegend=False)
    header = ("block", "mean", "std", "|mean|+std", "rank", "products", "converged")
    settings = dict(spectrum.settings)
    made = settings.pop("made by", None)
    line = " - ".join(filter(None, (_listed(settings), made)))
    return _Section(f"Hessian spectrum: {name}", (figure,), header, rows, line, tuple(spectrum.notes()))


def _listed(settings: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{key} {value}" for key, value in plain.items())


def _command(name: str, content: Mapping[str, Any]) -> _Section:
    """What a command of ``qbert`` was asked and found (`qbert.results.write_command`)."""
    rows, metric, curves = content["rows"], content["metric"], content["curves"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    figures = []
    points = [(next(iter(row.values())), row.get("MB"), row.get(metric)) for row in rows]
    if metric is not None and (figure := _size_against_score(points, metric)) is not None:
        figures.append(figure)
    if curves is not None:
        lines = {label: ([x for x, _ in pairs], [y for _, y in pairs]) for label, pairs in curves["lines"].items()}
        positive = all(y > 0 for _, values in lines.values() for y in values)
        axis = {"title": curves["y"], "type": "log" if positive else "linear"}
        figures.append(_figure(_lines(lines), xaxis={"title": curves["x"]}, yaxis=axis))
    cells = tuple(tuple(_cell(row.get(key)) for key in keys) for row in rows)
    notes = tuple(filter(None, (content["about"], _listed(content["settings"]))))
    title = f"qbert {content['command']}: {name}"
    return _Section(title, tuple(figures), tuple(keys), cells, content["made_by"], notes)


def _front(name: str, front: ParetoFront) -> _Section:
    go = _go()
    bits = [" ".join(str(rule.get("bits", "-")) for rule in point.config.rules.values()) for point in front.points]
    sizes, harms = [point.mb for point in front.points], [point.damage for point in front.points]
    line = go.Scatter(x=sizes, y=harms, mode="lines+markers", line={"shape": "hv"}, text=bits, name="front")
    wide = min(harms) > 0 and max(harms) > 30 * min(harms)
    figure = _figure(
        [line],
        xaxis={"title": "model size [MB = 10⁶ bytes]"},
        yaxis={"title": "predicted damage", "type": "log" if wide else "linear"},
    )
    rows = tuple((f"{s:.3f}", f"{h:.5g}", b) for s, h, b in zip(sizes, harms, bits, strict=True))
    return _Section(f"Allocation front: {name}", (figure,), ("MB", "damage", "bits of the blocks"), rows)


def _comparison(name: str, content: Mapping[str, Any]) -> _Section:
    rows = content["rows"]
    metric = str(content.get("metric", "score"))
    figure = _size_against_score([(r["label"], r.get("megabytes"), r["score"]) for r in rows], metric)
    columns = [c for c in _PTQ_COLUMNS if any(r.get(c) is not None for r in rows)]
    lines = tuple(tuple(_cell(r.get(c)) for c in columns) for r in rows)
    header = tuple(
        {"label": "weights", "score": metric, "megabytes": "MB", "ratio": "smaller"}.get(c, c) for c in columns
    )
    made = " - ".join(str(content[key]) for key in ("task", "made by") if content.get(key))
    return _Section(f"Post-training quantization: {name}", (figure,) if figure else (), header, lines, made)


def _record(name: str, content: Mapping[str, Any]) -> _Section:
    """Any resumable record: its numbers by method, every row of a method (one a seed) on a line of its own."""
    flat = [(method, row) for method, rows in content["rows"].items() for row in rows if isinstance(row, dict)]
    keys = list(dict.fromkeys(key for _, row in flat for key, v in row.items() if isinstance(v, int | float | str)))
    lines = tuple((method, *(_cell(row.get(key)) for key in keys)) for method, row in flat)
    score = next((key for key in ("score", str(content.get("metric"))) if key in keys), None)
    size = next((key for key in ("megabytes", "MB") if key in keys), None)
    figure = None
    if score is not None and size is not None:
        figure = _size_against_score([(m, row.get(size), row.get(score)) for m, row in flat], score)
    elif score is not None:
        go = _go()
        methods = list(dict.fromkeys(method for method, _ in flat))
        points = [[row[score] for m, row in flat if m == method and row.get(score) is not None] for method in methods]
        boxes = [go.Box(y=p, name=m, boxpoints="all") for m, p in zip(methods, points, strict=True)]
        figure = _figure(boxes, yaxis={"title": str(content.get("metric", score))}, showlegend=False)
    notes = tuple(f"{key}: {content[key]}" for key in ("data", "budget", "teacher") if content.get(key) is not None)
    title = f"{content.get('task', 'Results')}: {name}"
    return _Section(
        title, (figure,) if figure else (), ("method", *keys), lines, str(content.get("made by", "")), notes
    )


def _curves(name: str, file: Path) -> _Section:
    series: dict[str, tuple[list[float], list[float]]] = {}
    with open(file, encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            try:
                at, value = float(row["step"]), float(row["value"])
                steps, values = series.setdefault(row["name"], ([], []))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is no table of step, name and value ({error!r}); remove it") from error
            steps.append(at)
            values.append(value)
    losses = {label: points for label, points in series.items() if "loss" in label}
    scores = {label: points for label, points in series.items() if label.startswith("held-out")}
    others = {label: points for label, points in series.items() if label not in losses and label not in scores}
    positive = all(value > 0 for _, values in losses.values() for value in values)
    figures = []
    if losses or others:
        lines = [*_lines(losses), *_lines(others, visible="legendonly")]
        axis = {"title": "loss", "type": "log" if losses and positive else "linear"}
        figures.append(_figure(lines, xaxis={"title": "step"}, yaxis=axis))
    if scores:
        figures.append(_figure(_lines(scores), xaxis={"title": "step"}, yaxis={"title": "score"}, showlegend=True))
    return _Section(f"Training curves: {name}", tuple(figures))


def _lines(series: Mapping[str, tuple[list[float], list[float]]], **options: Any) -> list[Any]:
    go = _go()
    return [go.Scatter(x=x, y=y, mode="lines+markers", name=label, **options) for label, (x, y) in series.items()]


def _size_against_score(points: Sequence[tuple[str, Any, Any]], metric: str) -> Any:
    known = [(label, x, y) for label, x, y in points if isinstance(x, int | float) and isinstance(y, int | float)]
    if not known:
        return None
    labels, sizes, scores = zip(*known, strict=True)
    dots = _go().Scatter(
        x=sizes, y=scores, text=labels, mode="markers+text", textposition="top center", marker={"size": 10}
    )
    return _figure([dots], xaxis={"title": "MB = 10⁶ bytes", "type": "log"}, yaxis={"title": metric})


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _page(title: str, sections: Sequence[_Section], passed_over: int) -> str:
    script = importlib.import_module("plotly.offline").get_plotlyjs()
    escaped: Callable[[Any], str] = lambda text: html.escape(str(text))  # noqa: E731
    body = []
    for number, section in enumerate(sections):
        body.append(f"<h2>{escaped(section.title)}</h2>")
        for place, figure in enumerate(section.figures):
            name = f"figure-{number}-{place}"
            body.append(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name))
        if section.header:
            head = "".join(f"<th>{escaped(cell)}</th>" for cell in section.header)
            lines = ["<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in section.rows]
            body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")
        body += [f"<p>{escaped(note)}</p>" for note in section.notes]
        if section.made_by:
            body.append(f'<p class="made">{escaped(section.made_by)}</p>')
    others = f"; files passed over that hold no result of qbert: {passed_over}" if passed_over else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f"<style>{_STYLE}</style><script>{script}</script></head><body><h1>{escaped(title)}</h1>\n"
        + "\n".join(body)
        + f'\n<p class="made">qbert {__version__}{others}</p><script>{_SORT}</script></body></html>\n'
    )
