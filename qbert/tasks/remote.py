"""Rows from the Hugging Face hub through ``datasets``.

>>> read_splits("sst2", ("nyu-mll/glue", "sst2", None), {"train": "train"}, "classification", names)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbert.tasks.quiet import quiet_libraries
from qbert.tasks.task import Kind, Row

_CONLL_HUB_ORDER = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_WNUT_HUB_ORDER = (
    "O",
    *(
        f"{prefix}-{name}"
        for name in ("corporation", "creative-work", "group", "location", "person", "product")
        for prefix in "BI"
    ),
)
_HUB_TAGS = {
    "conll2003": _CONLL_HUB_ORDER,
    "wnut17": _WNUT_HUB_ORDER,
    "wnut17_fine": _WNUT_HUB_ORDER,
}
_COARSE = {
    "corporation": "ORG",
    "group": "ORG",
    "creative-work": "MISC",
    "product": "MISC",
    "location": "LOC",
    "person": "PER",
}


def read_splits(
    name: str,
    hub: tuple[str, str | None, str | None],
    hub_splits: Mapping[str, str],
    kind: Kind,
    label_names: tuple[str, ...],
) -> tuple[dict[str, list[Row]], str]:
    """(rows by split, where they came from); ConnectionError with one sentence where the hub cannot be reached."""
    import datasets

    repository, config, revision = hub
    try:
        with quiet_libraries():
            data = datasets.load_dataset(repository, config, revision=revision)
    except Exception as error:
        raise ConnectionError(
            f"task {name!r} could not be fetched from the hub ({repository}: {str(error).splitlines()[0][:120]}); "
            "give its local folder with --data-dir (data_dir=...) or go online once"
        ) from error
    splits = {
        ours: [to_row(name, kind, raw, label_names) for raw in data[theirs]] for ours, theirs in hub_splits.items()
    }
    return splits, f"the hub ({repository}{' ' + config if config else ''})"


def to_row(name: str, kind: Kind, raw: Mapping[str, Any], label_names: tuple[str, ...]) -> Row:
    """One row of `datasets` in our layout (see `qbert.tasks.task`)."""
    if kind == "span":
        answers = dict(raw["answers"])
        answers["start_exact"] = [True] * len(answers["text"])
        return {key: raw[key] for key in ("id", "question", "context")} | {"answers": answers}
    if kind == "token":
        order = _HUB_TAGS[name]
        tags = [tag if isinstance(tag, str) else order[tag] for tag in raw["ner_tags"]]
        if name == "wnut17":
            tags = [tag if tag == "O" else f"{tag[:2]}{_COARSE[tag[2:]]}" for tag in tags]
        return {"tokens": list(raw["tokens"]), "tags": tags}
    return {key: value for key, value in raw.items() if key not in ("idx", "label")} | {"label": raw["label"]}
