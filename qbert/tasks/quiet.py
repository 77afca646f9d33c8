"""Silence around loading and saving: one clear sentence of ours instead of reports, bars and retries of libraries.

>>> with quiet_libraries():
...     model = AutoModel.from_pretrained(folder)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings or bars of transformers, no retry messages of the hub client inside; restored afterwards."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
