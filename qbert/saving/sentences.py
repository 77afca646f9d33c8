"""SentenceTransformers with a quantized encoder: how `qbert.load` knows them, and what their model card says.

>>> qbert.pack(qbert.quantize_model(SentenceTransformer("name"), 4)).save("out")
>>> qbert.load("out").encode(["a sentence"])
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from qbert.files import read_json, write_whole
from qbert.saving.folder import notice
from qbert.saving.records import is_quantized
from qbert.tasks.pooling import sentence_parts

_BEGIN, _END = "<!-- qbert -->", "<!-- /qbert -->"


def is_sentence_model(path: str | os.PathLike[str], **hub: Any) -> bool:
    """Whether a folder or hub name holds a whole SentenceTransformer; keyword arguments say where on the hub."""
    return not hub.get("subfolder") and _file(path, "modules.json", **hub) is not None


def _file(path: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub)
    return Path(found) if found else None


def load_sentence_model(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The SentenceTransformer, CrossEncoder, ... at `path`; arguments that it does not have itself go to its encoder.

    Raises:
        ValueError: sentence-transformers is not installed, or has no class of that name; or modules.json names nothing.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise ValueError(
            f"{path} is a SentenceTransformer; pip install sentence-transformers, or load its encoder alone with "
            "transformers.AutoModel.from_pretrained"
        ) from error
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    sentence_parts(str(path), **hub)
    found = _file(path, "config_sentence_transformers.json", **hub)
    said = read_json(found) if found else {}
    saved = said.get("model_type", "SentenceTransformer") if isinstance(said, dict) else None
    kind: Any = getattr(sentence_transformers, saved, None) if isinstance(saved, str) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{path}: sentence-transformers {sentence_transformers.__version__} has no class {saved!r}")
    names = {"cache_dir": "cache_folder", "device_map": "device"}
    own = {
        names.get(k, k): kwargs.pop(k) for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs
    }
    if "device" not in kwargs and "device_map" not in kwargs:
        own["device"] = "cpu"  # where `qbert.load` leaves every model
    return kind(str(path), model_kwargs=kwargs, trust_remote_code=False, **own).eval()


def install(theirs: ModuleType) -> None:
    """Let every model card that sentence-transformers writes say of a quantized encoder what it is, once."""
    for name in ("BaseModel", "SentenceTransformer"):
        kind: Any = getattr(theirs, name, None)
        own = kind is not None and "_create_model_card" in vars(kind)
        if own and not hasattr(kind._create_model_card, "before_qbert"):
            kind._create_model_card = _with_notice(kind._create_model_card)


def _with_notice(plain: Callable[..., None]) -> Any:
    @functools.wraps(plain)
    def create_model_card(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        plain(self, path, *args, **kwargs)
        card = Path(path) / "README.md"
        if is_quantized(self) and card.is_file():
            text = note_in_card(self, card.read_text(encoding="utf-8"), Path(path).name)
            write_whole(card, lambda aside: aside.write_text(text, encoding="utf-8"))

    create_model_card.before_qbert = plain  # type: ignore[attr-defined]
    return create_model_card


def note_in_card(model: nn.Module, text: str, name: str) -> str:
    """The model card `text` of a sentence-transformers model with the notice of what its encoder is, once."""
    encoder = next((m for m in model.modules() if is_quantized(m) and hasattr(m, "base_model_prefix")), model)
    kind = type(model).__name__
    body = f"{_BEGIN}\n# Quantized\n\n{notice(encoder, name, 'sentence_transformers', kind)}\n{_END}\n"
    text = re.sub(rf"\n?{_BEGIN}.*?{_END}\n", "", text, flags=re.DOTALL)
    front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
    head = front.group() if front else ""
    return f"{head}\n{body}{text[len(head) :]}"
