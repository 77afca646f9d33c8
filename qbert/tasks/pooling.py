"""How token states become the vector of a sentence, as the folder of a SentenceTransformer says it.

Apart from `heads`, because it is the file format of another package, which is read and written without that package.

    >>> read_pooling("my-encoder")[0].kind
    'cls'
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import cached_file

from qbert.files import read_json, write_whole

Kind = Literal["mean", "cls"]
_MODULES, _ENCODER, _PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The sum over another root of the length is longer or shorter; its unit vector is that of the mean.
_KINDS: dict[Any, Kind] = {"mean": "mean", "mean_sqrt_len_tokens": "mean", "cls": "cls"}
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")  # since sentence-transformers 5.4, and before


@dataclass(frozen=True)
class Pooling:
    """The way from states of tokens to the vector of a sentence.

    Attributes:
        kind: the mean over the tokens, or the state of the first one (cls).
        files: what a SentenceTransformer keeps beside its encoder, name -> JSON values; empty where it came from none.

    Raises:
        ValueError: another kind.
    """

    kind: Kind = "mean"
    files: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "cls"):
            raise ValueError(f"pooling={self.kind!r} is not known; use 'mean', or 'cls' for the first token's state")

    def __call__(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [N, D] of states [N, T, D] under a mask [N, T] that is 1 on tokens and 0 on padding."""
        if self.kind == "cls":  # padding may stand before it
            first = attention_mask.to(torch.int32).argmax(1)
            return F.normalize(hidden[torch.arange(len(hidden), device=hidden.device), first], dim=-1)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)

    def save(self, folder: str | os.PathLike[str], width: int) -> None:
        """Make the folder of an encoder of this width that of a SentenceTransformer, if it was one, or pools by cls."""
        files = self.files or ({} if self.kind == "mean" else _files_of(self.kind))
        for name, content in files.items():
            if any(key in content for key in _WIDTHS):
                content = {key: width if key in _WIDTHS else value for key, value in content.items()}
            text = json.dumps(content, indent=2) + "\n"
            write_whole(Path(folder) / name, partial(Path.write_text, data=text, encoding="utf-8"))


def _files_of(kind: Kind) -> dict[str, Any]:
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    return {
        _MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(kinds.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 0, **{key: m == kind for key, m in _LEGACY.items()}},
    }


def read_pooling(source: str) -> tuple[Pooling, str]:
    """(pooling, sub-folder of the encoder) of a model in a folder or on the hub: the mean where nothing else is said.

    Raises:
        ValueError: the folder of a SentenceTransformer whose vectors are made in another way, which is named, or that
            is damaged.
    """
    try:
        parts = sentence_parts(source)
    except OSError as error:  # no way to the hub
        warnings.warn(
            f"whether {source!r} says how it pools cannot be looked up ({str(error).splitlines()[0]}); the mean over "
            "tokens is taken",
            stacklevel=3,
        )
        return Pooling(), ""
    if parts is None:
        return Pooling(), ""
    names = [str(part["type"]).rpartition(".")[2] for part in parts]
    own = [part["type"] for part in parts if not str(part["type"]).startswith("sentence_transformers.")]
    if own or names[:2] != ["Transformer", "Pooling"] or set(names[2:]) - {"Normalize"}:
        raise ValueError(
            f"{source!r} makes its vectors by {', '.join(own or names)}; only Transformer, Pooling and Normalize are "
            "read here; score it with sentence-transformers"
        )
    encoder = str(parts[0]["path"])
    places = ["", *(f"{i}_{name}" for i, name in enumerate(names[1:], 1))]  # what is saved has its encoder above
    files: dict[str, Any] = {
        _MODULES: [
            {"idx": i, "name": str(i), "path": place, "type": part["type"]}
            for i, (part, place) in enumerate(zip(parts, places, strict=True))
        ]
    }
    read = {_PROMPTS: _PROMPTS, _ENCODER: f"{encoder}/{_ENCODER}".lstrip("/")}
    read |= {f"{places[i]}/config.json": f"{parts[i]['path']}/config.json" for i in range(1, len(parts))}
    for name, there in read.items():
        content = _json(source, there)
        if isinstance(content, dict):
            files[name] = content
    _check_prompt(source, files.get(_PROMPTS, {}))
    return Pooling(_kind(source, files.get(f"{places[1]}/config.json", {})), files), encoder


def sentence_parts(source: str, **hub: Any) -> list[dict[str, Any]] | None:
    """The entries of ``modules.json``, each with ``type`` and ``path``; None where there is no such file.

    Raises:
        ValueError: the file is damaged, or names nothing; OSError: the hub cannot be asked.
    """
    listed = _json(source, _MODULES, **hub)
    if listed is None:
        return None
    parts = listed if isinstance(listed, list) else []
    if not parts or not all(isinstance(part, dict) and {"type", "path"} <= part.keys() for part in parts):
        raise ValueError(f"{_MODULES} of {source!r} names no parts of a SentenceTransformer; save the model again")
    return parts


def as_read(tokenizer: Any, pooling: Pooling) -> Any:
    """The tokenizer with the longest row, and the lower case, that a SentenceTransformer's files ask for."""
    said = pooling.files.get(_ENCODER, {})
    if said.get("max_seq_length"):
        tokenizer.model_max_length = int(said["max_seq_length"])
    if said.get("do_lower_case") and tokenizer("A").input_ids != tokenizer("a").input_ids:
        from tokenizers.normalizers import Lowercase, Sequence

        backend = tokenizer.backend_tokenizer
        backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


def _json(source: str, name: str, **hub: Any) -> Any:
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else read_json(found)


def _kind(source: str, config: Mapping[str, Any]) -> Kind:
    said = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean"
    modes = [said] if isinstance(said, str) else list(said)
    if len(modes) != 1 or modes[0] not in _KINDS:
        raise ValueError(
            f"{source!r} pools by {' and '.join(map(str, modes))}; only mean and cls are known here; score it with "
            "sentence-transformers"
        )
    return _KINDS[modes[0]]


def _check_prompt(source: str, config: Mapping[str, Any]) -> None:
    prompt = (config.get("prompts") or {}).get(config.get("default_prompt_name"))
    if prompt:
        raise ValueError(
            f"{source!r} puts {prompt!r} before every sentence, which is not done here; score it with "
            "sentence-transformers, or set default_prompt_name to null in its " + _PROMPTS
        )
