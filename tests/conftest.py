"""Shared fixtures: tests import the helper modules beside them, and find real weights and data where they are."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

# Tiny tensors gain nothing from threads, and test processes run side by side.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Half of the files for each process, and who is done early takes from the other: fixtures are made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets: QBERT_DATA_DIR, or shared/data beside the repository."""
    folder = Path(os.environ.get("QBERT_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set QBERT_DATA_DIR")
    return folder
