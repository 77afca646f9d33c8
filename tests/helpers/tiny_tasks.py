"""Small data folders and a small encoder for the tests of the tasks room."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel, BertTokenizer

_GOOD = ("lovely", "superb", "bright", "kind", "delightful")
_BAD = ("awful", "dull", "broken", "rude", "dreadful")
_THINGS = ("film", "meal", "hotel", "book", "drill", "guide", "song", "lamp")
_WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the was a and . , in paris rome anna smith ##son visited works for acme who where "
    "wrote it lived city "
)


def sentiment_rows(count: int) -> list[dict[str, Any]]:
    """Sentences whose adjective decides the label; every third names a second thing."""
    rows = []
    for i in range(count):
        label = i % 2
        adjective = (_GOOD if label else _BAD)[i // 2 % 5]
        thing, other = _THINGS[i % 8], _THINGS[(i // 3) % 8]
        text = f"the {thing} was {adjective}" + (f" and the {other} was {adjective} , a {adjective} {thing}" * (i % 3))
        rows.append({"sentence": text + " .", "label": label, "idx": i})
    return rows


def write_task(folder: Path, name: str, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write {"train.jsonl.gz": rows, ...} below folder/name; returns `folder`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file_name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name / file_name).write_bytes(gzip.compress(text) if file_name.endswith(".gz") else text)
    return folder


def tiny_encoder(folder: Path) -> Path:
    """A random two-layer BERT of width 32 with a tokenizer that knows the words above, saved to `folder`."""
    vocabulary = list(dict.fromkeys([*_WORDS.split(), *_GOOD, *_BAD, *_THINGS, *list("abcdefghijklmnopqrstuvwxyz?")]))
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, model_max_length=128)
    tokenizer.save_pretrained(folder)
    return folder
