"""The tables of students: each beside its controls, with score, likeness and speed; and in few bits, by size.

    python experiments/compress_table.py outputs/compress-*/results.json --report experiments/results/students.md

Mean and standard deviation are over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from compress_bench import SHAPES
from qat_table import spread

from qbert.cli.arguments import run_script
from qbert.students.depth import DepthTable

# What a row says of its quality: (key, what the header says, digits, unit).
_QUALITY = (
    ("score", "score", 2, ""),
    ("retention", "of teacher", 1, " %"),
    ("agreement", "agreement", 1, " %"),
    ("divergence", "KL", 4, ""),
    ("other domain", "other domain", 2, ""),
)


def students_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of one result: the teacher, then every student and control, mean and spread over the seeds."""
    rows = {"teacher": [content["teacher"]], **content["rows"]}
    shown = [part for part in _QUALITY if any(row.get(part[0]) is not None for found in rows.values() for row in found)]
    header = ["", *(name for _, name, _, _ in shown), "parameters, M", "MB float"]
    header += [f"ms {batch}x{length} (fused)" for batch, length in SHAPES] + ["minutes", "seeds"]
    lines = []
    for title, found in rows.items():
        cells = [title]
        for key, _, digits, unit in shown:
            values = [row[key] for row in found if row.get(key) is not None]
            cells.append(spread(values, digits) + unit if values else "")
        shape = found[0]
        cells.append(_number(shape.get("parameters"), 1e6, 2))
        cells.append(_number(shape.get("float bytes"), 1e6, 1))
        cells += [_milliseconds(shape, f"{batch}x{length}") for batch, length in SHAPES]
        minutes = [row["minutes"] for row in found if row.get("minutes")]
        lines.append([*cells, f"{fmean(minutes):.1f}" if minutes else "", str(len(found)) if minutes else ""])
    return header, lines


def forms_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of all that was stored in few bits, from the largest file to the smallest."""
    kinds = [part for part in _QUALITY if part[0] != "other domain"]
    header = ["", "form", *(name for _, name, _, _ in kinds), "MB", "seeds"]
    sized: list[tuple[float, list[str]]] = []
    for title, rows in {"teacher": [content["teacher"]], **content["rows"]}.items():
        for form in rows[0].get("stored", {}):
            found = [row["stored"][form] for row in rows]
            size = fmean(row["bytes"] for row in found)
            quality = [spread([row[key] for row in found], digits) + unit for key, _, digits, unit in kinds]
            sized.append((-size, [title, form, *quality, f"{size / 1e6:.2f}", str(len(rows))]))
    return header, [line for _, line in sorted(sized, key=lambda item: item[0])]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _milliseconds(row: dict[str, Any], shape: str) -> str:
    plain, fused = row.get(f"ms {shape}"), row.get(f"fused ms {shape}")
    text = "" if plain is None else f"{plain:.1f}"
    return text if fused is None else f"{text} ({fused:.1f})".strip()


def report_text(content: dict[str, Any]) -> str:
    """One result as a section of a page."""
    from qbert.results import markdown_table

    header, lines = students_table(content)
    ways = content.get("depths searched", {})
    search = "".join(
        f"\nKeeping {count} layers, before any training:\n\n```\n{DepthTable.from_list(rows, ways.get(count))}\n```\n"
        for count, rows in content["depths"].items()
    )
    return f"""## {content["task"]}

{markdown_table(header, lines)}

Stored in few bits, rounded after training (W: encoder, E: tables), by size:

{markdown_table(*forms_table(content))}

{content["data"]}. Score: {content["metric"]}{content["elsewhere"]}. Students: {content["budget"]}. {content["made by"]}
{search}"""


def main() -> None:
    """Read results and write the page."""
    from qbert.files import read_json, write_whole
    from qbert.results import text_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="results.json files of compress.py")
    parser.add_argument("--report", default="students.md", help="Markdown file to write; default: students.md")
    arguments = parser.parse_args()
    contents = [read_json(path) for path in arguments.results]
    for path, content in zip(arguments.results, contents, strict=True):
        if not isinstance(content, dict) or not {"rows", "task", "teacher", "budget", "depths"} <= set(content):
            raise ValueError(f"{path} is no results file of compress.py; name its results.json")
    for content in contents:
        print(f"{content['task']}\n{text_table(*students_table(content))}\n\n{text_table(*forms_table(content))}\n")
    text = "# Students\n\n" + "\n".join(report_text(content) for content in contents)
    write_whole(Path(arguments.report), lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written: {arguments.report}")


if __name__ == "__main__":
    run_script(main)
