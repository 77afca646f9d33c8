"""``qbert report``: a page to look at of what a command or script wrote."""

from __future__ import annotations

import click

from qbert.cli.options import as_json, check_writable, show


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="The HTML file; default: FOLDER/report.html.")
@as_json
def report(folder: str, out: str | None, as_json: bool) -> None:
    """Write one self-contained HTML page of the results in FOLDER: spectra, fronts, comparisons, trainings.

    Pictures can be hovered over, tables sorted by a click on a column. Nothing is loaded from elsewhere.
    """
    from pathlib import Path

    from qbert.report import write_report

    path = Path(out) if out else Path(folder) / "report.html"
    if path.is_file() and path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {path} is there and no page; name another file, with the ending .html")
    check_writable("--out", str(path))
    shown = write_report(folder, path)
    text = f"{path}: {len(shown)} result(s): {', '.join(shown)}"
    show({"out": str(path), "shown": shown}, text, as_json)
