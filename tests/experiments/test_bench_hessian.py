"""The Hessian benchmark: each tool against dense Hessians, and the script's page and parts."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task

from qbert.hessian import HessianOperator, parameter_blocks

NAMES = (
    "qbert",
    "qbert, gap",
    "qbert, gap 1e-4",
    "Q-BERT's rule",
    "PyHessian",
    "curvlinops",
    "SciPy by hand",
    "eigenthings",
    "eigenthings, default",
)


def case() -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny float32 classifier with eigenvalues that stand out, and a batch."""
    torch.manual_seed(0)
    model = build("bert", hidden_size=8, num_attention_heads=2, intermediate_size=12).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model, {**inputs_for("bert", batch=6), "labels": torch.tensor([0, 1, 1, 0, 1, 1])}


@pytest.fixture(scope="module")
def dense_tops() -> list[float]:
    model, batch = case()
    tops = []
    for block in parameter_blocks(model.double(), "layer"):
        operator = HessianOperator(model, [batch], {"x": block.parameters})
        H = torch.stack([operator.product("x", e) for e in torch.eye(operator.size("x"), dtype=torch.float64)])
        values = torch.linalg.eigvalsh((H + H.T) / 2)
        tops.append(float(values[values.abs().argmax()]))
    return tops


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_measures_the_same_hessian(name: str, dense_tops: list[float], monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "bench"))
    peers = importlib.import_module("hessian_peers")
    assert set(NAMES) == {n for n, t in peers.TOOLS.items() if t.exact}
    tool = peers.TOOLS[name]
    if tool.missing:
        pytest.skip(f"{tool.package} is not installed")
    model, batch = case()
    model.classifier.bias.requires_grad_(False)
    torch.manual_seed(0)
    found = tool.measure(model, batch, 1e-3)
    # Only this library's own and SciPy's answers are certain to a tolerance; the others are of the right size.
    within = {
        "qbert": 1e-3,
        "qbert, gap": 1e-3,
        "qbert, gap 1e-4": 1e-4,
        "curvlinops": 1e-2,
        "eigenthings, default": 2.0,
    }.get(name, 0.3)
    for layer, true in zip(found, dense_tops, strict=True):
        assert layer.value == pytest.approx(true, rel=within) and layer.products >= 2
    assert all(f.converged for f in found) or name not in ("qbert", "qbert, gap", "qbert, gap 1e-4", "curvlinops")
    assert model.config._attn_implementation == "sdpa"  # everything is as it was
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_missing_tools_are_named_with_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "bench"))
    peers = importlib.import_module("hessian_peers")
    assert peers.Tool(peers.pyhessian, "", "no_such_package_here").missing and "--no-deps pyhessian" in peers.INSTALL


def test_the_script_writes_its_page_and_goes_on_from_its_parts(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = {"train.jsonl.gz": sentiment_rows(64), "dev.jsonl.gz": sentiment_rows(16)}
    write_task(tmp_path / "data", "sst2", rows)
    arguments = [
        *("--model", str(tmp_path / "encoder"), "--task", "sst2", "--data-dir", str(tmp_path / "data")),
        *("--output-dir", str(tmp_path / "out"), "--quick", "--epochs", "1", "--tools", "qbert", "--resume"),
    ]
    environment = {"QBERT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = run_here("bench/hessian.py", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "hessian.md").read_text()
    kept = json.loads((tmp_path / "out" / "parts.json").read_text())["rows"]
    parts = {name: found for name, (found,) in kept.items()}
    assert set(parts) == {
        "qbert-0",
        "qbert-1",
        "subsets-residual",
        "subsets-gap",
        "reference-0",
        "reference-1",
    }
    products = parts["qbert-1"]["products"]
    assert products == parts["qbert-0"]["products"] and f"| qbert | {' '.join(map(str, products))} |" in page
    for value, true in zip(parts["qbert-1"]["value"], parts["reference-0"], strict=True):
        assert value == pytest.approx(true, rel=1e-3)
    assert parts["subsets-residual"]["values"][0] == pytest.approx(parts["qbert-1"]["value"], rel=1e-3)
    assert "FLOPs of all layers, in forward passes" in page
    (tmp_path / "out" / "hessian.md").unlink()
    done = run_here("bench/hessian.py", *arguments, "--tol", "0.1", **environment)
    assert done.returncode == 2 and "parts.json was made with another tol" in done.stderr
