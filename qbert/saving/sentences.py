"""SentenceTransformers with a quantized encoder: how `qbert.load` knows them, and what their model card says.

>>> qbert.pack(qbert.quantize_model(SentenceTransformer("name"), 4)).save("out")
>>> qbert.load("out").encode(["a sentence"])
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from qbert.saving.folder import notice

_BEGIN, _END = "<!-- qbert -->", "<!-- /qbert -->"


def is_sentence_model(path: str | os.PathLike[str], **hub: Any) -> bool:
    """Whether a folder or hub name holds a whole SentenceTransformer; keyword arguments say where on the hub."""
    if Path(path).is_dir():
        return (Path(path) / "modules.json").is_file() and not hub.get("subfolder")
    from transformers.utils import cached_file

    return cached_file(str(path), "modules.json", _raise_exceptions_for_missing_entries=False, **hub) is not None


def load_sentence_model(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The SentenceTransformer at `path`; arguments that it does not have itself go to its encoder.

    Raises:
        ValueError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"{path} is a SentenceTransformer; pip install sentence-transformers, or load its encoder alone with "
            "transformers.AutoModel.from_pretrained"
        ) from error
    names = {"cache_dir": "cache_folder", "device_map": "device"}
    own = {
        names.get(k, k): kwargs.pop(k) for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs
    }
    if "device" not in kwargs and "device_map" not in kwargs:
        own["device"] = "cpu"  # where `qbert.load` leaves every model
    return SentenceTransformer(str(path), model_kwargs=kwargs, trust_remote_code=False, **own).eval()


def note_in_card(model: nn.Module) -> None:
    """Let the card of a packed SentenceTransformer, which it keeps as text and writes itself, say what it is."""
    if type(model).__name__ != "SentenceTransformer" or not hasattr(model, "_model_card_text"):
        return
    encoder = next((m for m in model.modules() if hasattr(m, "base_model_prefix")), model)
    call = "SentenceTransformer"
    body = f"{_BEGIN}\n# Quantized\n\n{notice(encoder, 'this model', 'sentence_transformers', call)}\n{_END}\n"
    text = re.sub(rf"{_BEGIN}.*?{_END}\n", "", model._model_card_text or "", flags=re.DOTALL)  # type: ignore[arg-type]
    front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
    head = front.group() if front else "---\nlibrary_name: sentence-transformers\ntags:\n- qbert\n- quantized\n---\n"
    model._model_card_text = f"{head}\n{body}{text[len(front.group()) :] if front else text}"  # type: ignore[assignment]
