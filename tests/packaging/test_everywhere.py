"""The library works wherever it is: clones with and without links, a source archive, a wheel, editable installs.

Each is tried on a copy of this repository, from a foreign working directory, without the package index.
`lowest_versions.sh` beside this file tries the oldest versions of what the library needs.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("kernels", "distill")
HAS_LINKS = all((ROOT / "qbert" / name).is_symlink() for name in LINKS)
CORE = Path(__file__).parents[1] / "helpers" / "core.py"
_NOT_SOURCE = (".git", ".*_cache", ".venv", "venv", "__pycache__", "build", "dist", "outputs", "*.egg-info")

pytestmark = pytest.mark.slow


def run(*command: str | Path, where: Path, path: Path | None = None) -> str:
    """Output of a command in the folder `where`; `path` is what Python finds first. A failure shows all it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV_"))}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [str(part) for part in command], cwd=where, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_repository(target: Path, links: bool) -> Path:
    """The sources in `target`: with their links, or as git checks them out where it cannot make links."""
    shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_SOURCE))
    for name in LINKS:
        link = target / "qbert" / name
        if not links:
            link.unlink(missing_ok=True)
            link.write_text(f"../{name}")  # what git leaves there: a file that holds the link's target
    return target


def check(python: str | Path, installed: Path, where: Path, path: Path | None = None) -> None:
    """Every room comes from below `installed`, and a model goes the way from float to fast."""
    where.mkdir()
    assert "qbert works" in run(python, CORE, where / "model", installed, where=where, path=path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive, built as a frontend builds it."""
    folder = tmp_path_factory.mktemp("archive")
    source = copy_of_repository(folder / "source", links=HAS_LINKS)
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, where=source)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as file:
        file.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.mark.skipif(not HAS_LINKS, reason="this copy of the repository has no symbolic links")
def test_a_clone(tmp_path: Path) -> None:
    clone = copy_of_repository(tmp_path / "clone", links=True)
    check(sys.executable, clone, tmp_path / "elsewhere", path=clone)


def test_a_clone_without_symbolic_links(tmp_path: Path) -> None:
    clone = copy_of_repository(tmp_path / "clone", links=False)
    check(sys.executable, clone, tmp_path / "elsewhere", path=clone)


def test_the_source_archive(archive: Path, tmp_path: Path) -> None:
    check(sys.executable, archive, tmp_path / "elsewhere", path=archive)


def test_the_tests_in_the_source_archive(archive: Path) -> None:
    # All are collected, so that each file finds what it imports; those of one room and two of the layout also run.
    options = ("-q", "-p", "no:cacheprovider", "-k", "test_depth or test_folders or test_rooms")
    assert " passed" in run(sys.executable, "-m", "pytest", *options, where=archive, path=archive)


def test_a_wheel(archive: Path, tmp_path: Path) -> None:
    build = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, where=archive)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")} == {"qbert"}
    check(sys.executable, site, tmp_path / "elsewhere", path=site)


@pytest.mark.parametrize("links", [pytest.param(True, marks=pytest.mark.skipif(not HAS_LINKS, reason="none")), False])
def test_an_editable_install(links: bool, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    clone = copy_of_repository(tmp_path / "clone", links)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", where=tmp_path).strip()
    # The packages of this environment, without the .pth files in it, one of which may name another qbert.
    (Path(site) / "packages.pth").write_text(sysconfig.get_path("purelib"))
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", clone, where=tmp_path)
    check(python, clone, tmp_path / "elsewhere")
