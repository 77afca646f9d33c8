"""The page of a folder of results: whole, self-contained, sortable, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qbert.allocation.front import ParetoFront, ParetoPoint
from qbert.bits import BitsConfig
from qbert.files import write_json
from qbert.hessian.spectrum import HessianSpectrum
from qbert.report import write_report

pytest.importorskip("plotly")
_BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_ROWS = [
    {"label": "float", "score": 79.6, "megabytes": 90.9, "divergence": 0.0, "agreement": None},
    {"label": "2 bits <b>", "score": 72.0, "megabytes": 15.5, "divergence": 0.28, "agreement": 79.2},
]


def make_spectrum() -> HessianSpectrum:
    """Three runs of two blocks."""
    values = np.array([[3.0, 1.0], [-2.0, 1.5], [4.0, 0.5]])
    same = np.full((3, 2), 1e-3)
    return HessianSpectrum(
        names=["layer.0", "layer.1"],
        members={"layer.0": ["layer.0.a"], "layer.1": ["layer.1.a"]},
        parameters={"layer.0": 10, "layer.1": 20},
        eigenvalues=values,
        other_end=values / 2,
        residuals=same,
        errors=same,
        upper_bounds=values + 5,
        products=np.full((3, 2), 5),
        converged=np.ones((3, 2), dtype=bool),
        losses=np.array([0.1, 0.2, 0.3]),
        settings={"runs": 3, "granularity": "layer", "confidence": None},
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as the scripts leave it."""
    make_spectrum().save(tmp_path / "spectrum.json")
    points = tuple(ParetoPoint(10**6 * (i + 1), 1.0 / (i + 1), BitsConfig({"a": 2 + i, "*": 8})) for i in range(2))
    ParetoFront(points).save(tmp_path / "front.json")
    write_json(tmp_path / "ptq.json", {"task": "reviews", "metric": "accuracy", "made by": "python it", "rows": _ROWS})
    (tmp_path / "kd-0").mkdir()
    (tmp_path / "kd-0" / "curves.csv").write_text("step,name,value\n5,loss,2.5\n10,loss,1.5\n10,held-out accuracy,81\n")
    record = {
        "asked": {"task": "sst2"},
        "rows": {"QAT": [{"seed": 0, "score": 80.0}], "KD": [{"seed": 0, "score": 81.0}]},
    }
    write_json(tmp_path / "results.json", {**record, "task": "sst2", "metric": "accuracy"})
    write_json(tmp_path / "bits.json", {"bits": {"*": 4}})
    return tmp_path


class Tables(HTMLParser):
    """Cells of the tables of a page, a list of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._cell = False


def test_everything_in_the_folder_is_on_the_page(results: Path, tmp_path: Path) -> None:
    shown = write_report(results, tmp_path / "page.html")
    assert shown == ["front.json", "kd-0/curves.csv", "ptq.json", "results.json", "spectrum.json"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Tables()
    page.feed(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    assert page.loaded == []
    assert ["2 bits <b>", "72", "79.2", "0.28", "15.5"] in page.rows
    assert ["KD", "0", "81"] in page.rows
    spectrum = make_spectrum()
    assert [spectrum.names[0], f"{spectrum.mean[0]:.4g}"] in [row[:2] for row in page.rows]
    assert "python it" in text


def test_the_same_folder_gives_the_same_page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pages = [tmp_path_factory.mktemp("pages") / f"{i}.html" for i in range(2)]
    for page in pages:
        write_report(results, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_spectrum_names_its_model_and_command_and_a_damaged_record_its_file(tmp_path: Path) -> None:
    spectrum = make_spectrum()
    spectrum.settings.update({"model": "my-model", "made by": "`qbert spectrum my-model`"})
    spectrum.save(tmp_path / "spectrum.json")
    write_report(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "model my-model - `qbert spectrum my-model`" in page
    write_json(tmp_path / "other.json", {"format": "qbert.command/1", "command": "quantize", "rows": 3})
    with pytest.raises(ValueError, match=r"other\.json is damaged"):
        write_report(tmp_path, tmp_path / "page.html")


def test_files_of_others_are_passed_over_and_counted(results: Path, tmp_path: Path) -> None:
    wanted = write_report(results, tmp_path / "page.html")
    (results / "train.json").write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 0}\n')
    (results / "list.json").write_text("[1, 2]")
    (results / "rows.json").write_text('{"asked": "how", "rows": {"a": 3}}')
    (results / "scored.json").write_text('{"rows": [{"label": "good", "score": "high"}]}')
    (results / "latin.json").write_bytes(b'{"caf\xe9": 1}')
    (results / "other").mkdir()
    (results / "other" / "curves.csv").write_text("x,y\n1,2\n")
    assert write_report(results, tmp_path / "page.html") == wanted
    foot = (tmp_path / "page.html").read_text(encoding="utf-8").rpartition('<p class="made">')[2]
    assert "files passed over that hold no result of qbert: 7" in foot  # bits.json of the fixture too


@pytest.mark.parametrize("name", ["spectrum.json", "ptq.json", "results.json"])
def test_a_result_that_was_cut_off_is_named(results: Path, tmp_path: Path, name: str) -> None:
    file = results / name
    file.write_text(file.read_text()[:-100])
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        write_report(results, tmp_path / "page.html")


@pytest.mark.skipif(_BROWSER is None, reason="no headless browser (chromium) on this machine")
def test_a_browser_draws_the_figures_and_sorts_the_tables(results: Path, tmp_path: Path) -> None:
    write_report(results, tmp_path / "page.html")
    click = (
        "<script>for (const h of document.querySelectorAll('th')) if (h.textContent == 'accuracy') h.click()</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", click + "</body>"), encoding="utf-8")
    command = [str(_BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert dom.count('class="main-svg"') >= 6
    tables = Tables()
    tables.feed(re.sub(r"<script>.*?</script>", "", dom, flags=re.DOTALL))
    names = [row[0] for row in tables.rows if row and row[0] in ("float", "2 bits <b>")]
    assert names == ["2 bits <b>", "float"], "sorted by accuracy, smallest first"


def test_an_empty_folder_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path, tmp_path / "page.html")
    make_spectrum().save(tmp_path / "spectrum.json")
    content = json.loads((tmp_path / "spectrum.json").read_text())
    content["losses"] = content["losses"][:-1]
    (tmp_path / "spectrum.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"spectrum\.json is damaged"):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(NotADirectoryError, match="name the one that results were written to"):
        write_report(tmp_path / "nothing", tmp_path / "page.html")
