"""The layout that keeps transformers importable, and the one direction of imports."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "distill"])
def test_folders_are_reached_through_links(folder: str) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "qbert" / folder
    if not link.is_symlink():
        assert not link.is_dir(), f"{link} is a second copy of {ROOT / folder}"
        pytest.skip("this copy of the repository has no symbolic links; the folders are found beside qbert/")
    assert link.resolve() == ROOT / folder


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


# From the bottom: a room imports rooms of lower floors only.
FLOORS = (
    ("version", "moved", "files", "progress", "arguments", "extras", "encoders"),
    ("kernels",),
    ("bits", "tasks", "plots", "results"),
    ("quantizers",),
    ("layers", "hessian"),
    ("calibration", "sizes", "runtimes"),
    ("inference",),
    ("outputs", "rounded"),
    ("usage",),
    ("quantize", "distill"),
    ("allocation", "saving", "onnx", "openvino"),
    ("packing", "report", "students"),
    ("pipeline", "shrinking"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name, each once."""
    files = [f for f in (ROOT / "qbert").rglob("*.py") if not {"kernels", "distill"} & set(f.relative_to(ROOT).parts)]
    files += [f for folder in ("kernels", "distill") for f in (ROOT / folder).rglob("*.py")]
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return {name if name.startswith("qbert") else f"qbert.{name}": file for name, file in dotted.items()}


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_rooms_import_lower_floors_only() -> None:
    wrong = []
    for name, file in modules().items():
        room = room_of(name)
        if not room:
            continue
        assert room in FLOOR_OF, f"{file}: a new room needs a floor"
        for imported in imported_modules(file):
            if starts_with_any(imported, ("experiments",)):
                wrong.append(f"{name} imports {imported}")
            if not imported.startswith("qbert.") or room_of(imported) == room:
                continue
            if FLOOR_OF.get(room_of(imported), len(FLOORS)) >= FLOOR_OF[room]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_modules_import_each_other() -> None:
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        imported = imported_modules(file)
        # `from package import module` names the module, not the package's face.
        faces = {m.rpartition(".")[0] for m in imported if m in files}
        graph[name] = {m for m in imported if m in files and m != name and m not in faces}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names a circle


def test_the_kernels_know_torch_only() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not [m for m in imported_modules(file) if starts_with_any(m, ("transformers", "datasets", "sklearn"))]


def test_nothing_is_unpickled() -> None:
    for folder in ("qbert", "kernels", "distill", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not starts_with_any("pickle", tuple(imported_modules(file))), file
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), f"{file}:{node.lineno}"


def test_every_package_folder_is_shipped() -> None:
    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {f.parent for top in ("qbert", "kernels", "distill") for f in (ROOT / top).rglob("*.py")}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders if "__pycache__" not in f.parts}
    expected = {
        n if n.startswith("qbert") else f"qbert.{n}"
        for n in names
        if not n.startswith(("qbert.kernels", "qbert.distill"))
    }
    assert shipped == expected
