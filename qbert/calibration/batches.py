"""Batches as calibration takes them: what is refused before any work, and how one is put through a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qbert.encoders.inputs import accepted_inputs, most_positions

Batch = Mapping[str, Tensor]
# What is looked up, in which tables: the word table's own name, and not those of the parts of a composed one.
_LOOKED_UP = {
    "input_ids": ("id", ("word_embeddings", "word_embeddings.table")),
    "token_type_ids": ("token type", ("token_type_embeddings",)),
    "position_ids": ("position", (".position_embeddings",)),
}
_MENDS = {
    "input_ids": "tokenize with the model's own tokenizer",
    "token_type_ids": "tokenize with the model's own tokenizer, or leave token_type_ids out",
    "position_ids": "leave position_ids out",
}


def check_batches(data: Any, name: str = "calibration_data") -> list[Batch] | None:
    """`data` as a list of batches (a single batch is accepted), or ``None`` if it is None.

    Args:
        data: what the caller was given.
        name: how the caller calls it.

    Raises:
        TypeError: if it is not an iterable of mappings; ValueError if it is empty.
    """
    if data is None:
        return None
    if isinstance(data, Mapping):
        data = [data] if data else []
    if not isinstance(data, Iterable):
        raise TypeError(f"{name}: expected batches (dicts of tensors), got {type(data).__name__}")
    batches = list(data)
    if not batches:
        raise ValueError(f"{name} is empty; pass at least one batch")
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError(
                f"{name}: every batch must be a dict of tensors, such as a tokenizer returns with "
                f"return_tensors='pt'; got a {type(batch).__name__}"
                + (f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
            )
    return batches


def check_readable(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse batches that lack what the model reads, or are longer, empty, of one row without a batch dimension, or of
    ids that it has no rows for.

    Raises:
        ValueError: naming both lengths, the shape, the id, or the argument.
    """
    for batch in batches:
        _check_arguments(model, batch)
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() < 2:
            raise ValueError(
                f"calibration_data: input_ids has the shape {list(ids.shape)} instead of [B, T]; put rows together, "
                "with DataCollatorWithPadding(tokenizer) for instance"
            )
        if isinstance(ids, Tensor) and not ids.numel():
            raise ValueError(f"calibration_data: a batch has input_ids {list(ids.shape)}; leave empty batches out")
    for key in _LOOKED_UP:
        _check_ids(model, [batch[key] for batch in batches if key in _taken(model, batch)], key)
    most = most_positions(model)
    longest = max((b["input_ids"].shape[-1] for b in batches if isinstance(b.get("input_ids"), Tensor)), default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"calibration_data: a batch has {longest} tokens a row, but the model reads at most {most}; tokenize with "
            f"truncation=True, max_length={most}"
        )


def _check_arguments(model: nn.Module, batch: Batch) -> None:
    if reads_mappings(model):
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, argument in inspect.signature(model.forward).parameters.items():
        if argument.kind in by_name and argument.default is argument.empty and name not in batch:
            raise ValueError(
                f"calibration_data: a batch has the keys {', '.join(map(str, batch))}, but the forward of "
                f"{type(model).__name__} needs {name!r}; name the batch's entries as that does"
            )


def _check_ids(model: nn.Module, given: Sequence[Any], key: str) -> None:
    what, names = _LOOKED_UP[key]
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and f".{n}".endswith(names)]
    rows = max((table.num_embeddings for table in tables), default=0)
    for ids in given:
        if not rows or not isinstance(ids, Tensor):
            continue
        least, most = int(ids.min()), int(ids.max())
        if not 0 <= least <= most < rows:
            raise ValueError(
                f"calibration_data: the {what} {most if most >= rows else least} is none of the model's {rows}; "
                f"{_MENDS[key]}"
            )


def reads_mappings(model: nn.Module) -> bool:
    """Whether the model's forward takes a batch as one mapping."""
    return type(model).__name__ == "SentenceTransformer"


def _taken(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries that the model's forward takes: all if it has a catch-all, else those that it names."""
    parameters = inspect.signature(model.forward).parameters.values()
    if reads_mappings(model) or any(p.kind == p.VAR_KEYWORD for p in parameters):
        return inputs
    return accepted_inputs(model, inputs)


def run_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `model` on a dict batch: by keyword, or as one mapping where that is the model's own convention.

    Entries that the model's forward neither names nor catches, such as the labels of a batch for another one, are left
    out.
    """
    return model(dict(inputs)) if reads_mappings(model) else model(**_taken(model, inputs))
