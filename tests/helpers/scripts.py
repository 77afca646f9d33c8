"""Runs a script of `experiments/` in this process: to start another and import torch takes longer than the work."""

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run_here(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Exit code and output of `python experiments/SCRIPT ARGUMENTS` with these variables added to the environment."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    path = str(EXPERIMENTS / script)
    with (
        mock.patch.object(sys, "argv", [path, *arguments]),
        mock.patch.object(sys, "path", [str(Path(path).parent), *sys.path]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess([path, *arguments], code, out.getvalue(), err.getvalue())


def load_bench(name: str) -> ModuleType:
    """The script or module `experiments/bench/NAME.py`, imported by its place."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", EXPERIMENTS / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
