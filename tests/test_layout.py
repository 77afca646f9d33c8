"""The layout that keeps transformers importable, and the one direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "distill"])
def test_folders_are_reached_through_links(folder: str) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "qbert" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


def test_transformers_works_from_the_repository_root() -> None:
    code = (
        "import sys; from transformers import BertConfig, BertModel;"
        "BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12));"
        "file = getattr(sys.modules.get('kernels'), '__file__', None); assert file is None or 'site-packages' in file"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_importing_qbert_loads_no_heavy_room() -> None:
    code = "import sys, qbert; assert not {'scipy', 'triton', 'matplotlib', 'sklearn', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def starts_with_any(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        (
            "kernels",
            ("transformers", "qbert.hessian", "qbert.modules", "qbert.quantize", "qbert.tasks", "qbert.distill"),
        ),
        ("qbert/hessian", ("qbert.kernels", "qbert.quantize", "qbert.packed", "qbert.distill", "qbert.tasks")),
        ("qbert/quantizers", ("qbert.modules", "qbert.quantize", "qbert.hessian", "qbert.tasks", "qbert.distill")),
        ("qbert", ("qbert.distill", "experiments")),
    ],
)
def test_imports_run_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    files = [
        f for f in (ROOT / room).rglob("*.py") if not {"kernels", "distill"} & set(f.relative_to(ROOT / room).parts)
    ]
    assert files
    wrong = {str(f): sorted(m for m in imported_modules(f) if starts_with_any(m, forbidden)) for f in files}
    assert not {f: m for f, m in wrong.items() if m}


def test_nothing_is_unpickled() -> None:
    for folder in ("qbert", "kernels", "distill", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not starts_with_any("pickle", tuple(imported_modules(file))), file
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), f"{file}:{node.lineno}"


def test_every_package_folder_is_shipped() -> None:
    tomllib = pytest.importorskip("tomllib")
    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {f.parent for top in ("qbert", "kernels", "distill") for f in (ROOT / top).rglob("*.py")}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders if "__pycache__" not in f.parts}
    expected = {
        n if n.startswith("qbert") else f"qbert.{n}"
        for n in names
        if not n.startswith(("qbert.kernels", "qbert.distill"))
    }
    assert shipped == expected
