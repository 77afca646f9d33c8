"""Starts the tests of every Triton kernel in Triton's interpreter (`helpers/*_in_interpreter.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_INTERPRETED = (
    "kernels_in_interpreter.py",
    "asymmetric_in_interpreter.py",
    "e4m3_in_interpreter.py",
    "encoder_in_interpreter.py",
)


@pytest.mark.parametrize("name", _INTERPRETED)
def test_every_kernel_equals_its_reference_in_the_interpreter(name):
    pytest.importorskip("triton")
    # Threads of the linear algebra below numpy make the interpreter up to a hundred times slower.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).parents[1] / "helpers" / name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
