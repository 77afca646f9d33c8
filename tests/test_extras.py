"""Optional packages: serving needs none, and what needs one says so in one sentence before it starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qbert
from qbert import export_onnx, export_openvino
from qbert.distill import Distiller, progress, recipes
from qbert.extras import MissingPackageError
from qbert.plots import new_figure
from qbert.report import write_report
from qbert.tasks import metrics
from qbert.tasks.evaluation import evaluate_prepared

_HELPERS = Path(__file__).parent / "helpers"


def packed_pair() -> torch.nn.Module:
    return qbert.pack(qbert.quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), 8))


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Nobody finds `package`, whether or not it is installed."""
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "command", "call"),
    [
        ("sklearn", "pip install scikit-learn", lambda: metrics.classification_scores([0, 1], [0, 1])),
        ("sklearn", "pip install scikit-learn", lambda: metrics.tag_scores([["noun"]], [["noun"]], ["noun", "verb"])),
        ("seqeval", "pip install seqeval", lambda: metrics.tag_scores([["B-X"]], [["B-X"]], ["O", "B-X", "I-X"])),
        ("matplotlib", "pip install matplotlib", lambda: new_figure(4, 3)),
        ("plotly", "pip install plotly", lambda: write_report(".", "report.html")),
        ("onnx", "pip install onnx", lambda: export_onnx(packed_pair(), "model.onnx")),
        ("openvino", "pip install openvino", lambda: export_openvino(packed_pair(), "model.xml")),
        ("accelerate", "pip install accelerate", lambda: Distiller(None, None, recipes.qat())),  # type: ignore[arg-type]
    ],
)
def test_a_missing_package_is_one_sentence_with_the_command(
    package: str, command: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, package)
    with pytest.raises(MissingPackageError, match=f"{command} .*extra") as caught:
        call()
    assert caught.value.name == package and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "kind", "names"),
    [
        ("sklearn", "classification", ("bad", "good")),
        ("sklearn", "token", ("noun", "verb")),
        ("seqeval", "token", ("O", "B-X", "I-X")),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_the_model_runs(
    package: str, kind: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unittest.mock import Mock

    from qbert.tasks.task import Task

    task = Task("mine", kind, ("sentence",), names, {"validation": []}, ("f1",), "f1", "here")
    hide(monkeypatch, package)
    model = Mock(spec=torch.nn.Module)
    with pytest.raises(MissingPackageError, match="pip install"):
        evaluate_prepared(model, Mock(task=task))
    assert not model.mock_calls


@pytest.mark.parametrize("kind", ["regression", "span"])
def test_correlations_and_answers_need_no_optional_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sklearn", "seqeval"):
        hide(monkeypatch, package)
    metrics.check_scorer(kind, ())
    assert metrics.squad_scores(["a tower"], [["tower"]])["f1"] == 100.0
    assert metrics.correlation_scores([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])["pearson"] == pytest.approx(100.0)


def test_a_finished_training_keeps_its_numbers_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "matplotlib")
    with pytest.warns(UserWarning, match="pip install matplotlib"):
        written = progress.save_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path)
    assert written == [tmp_path / "curves.csv"] and "loss,1.0" in written[0].read_text()


def test_quantizing_and_serving_load_no_optional_package(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('accelerate', 'matplotlib', 'seqeval', 'sklearn')));"
        f"sys.path.insert(0, {str(_HELPERS)!r}); import core; core.use_everything({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
