"""Where fine-tuned models are kept, and under which key.

The folder is ``$QBERT_CACHE``, or the platform's cache folder (``~/.cache/qbert`` on Linux). A key is a hash over all
that a result depends on: weights, data, settings, versions. Two runs with the same key are the same run.

    >>> entry = cache_folder() / run_key({"model": weights_id(path), "data": task.fingerprint("train")})
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbert.tasks.embedded import file_sha256

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer_config.json")


def cache_folder(folder: str | Path | None = None) -> Path:
    """The cache folder, made if need be and found writable.

    Raises:
        PermissionError: the folder cannot be made or written to; names QBERT_CACHE as the mend.
    """
    chosen = Path(folder or os.environ.get("QBERT_CACHE") or _platform_cache() / "qbert").expanduser()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            pass
    except OSError as error:
        raise PermissionError(
            f"the cache folder {str(chosen)!r} cannot be written ({error.strerror}); "
            "set QBERT_CACHE (or cache_dir=...) to a folder of yours"
        ) from error
    return chosen


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def weights_id(model_name_or_path: str | Path) -> str:
    """What identifies a model's weights and tokenizer: hashes of a folder's files, or a hub name with its commit."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        from transformers import AutoConfig

        from qbert.tasks.heads import load_quietly

        commit = getattr(load_quietly(AutoConfig, str(model_name_or_path)), "_commit_hash", None)
        return f"{model_name_or_path}@{commit}"
    files = [file for pattern in (*_WEIGHTS, *_TOKENIZERS, "config.json") for file in sorted(folder.glob(pattern))]
    return run_key({file.name: file_sha256(file) for file in files})


def run_key(parts: Mapping[str, Any]) -> str:
    """24 hex digits over JSON-able parts, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
