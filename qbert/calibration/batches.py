"""Batches as calibration takes them: what is refused before any work, and how one is put through a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qbert.encoders.inputs import most_positions

Batch = Mapping[str, Tensor]


def check_batches(data: Any) -> list[Batch] | None:
    """`data` as a list of batches (a single batch is accepted), or ``None`` if it is None.

    Raises:
        TypeError: if it is not an iterable of mappings; ValueError if it is empty.
    """
    if data is None:
        return None
    if isinstance(data, Mapping):
        data = [data] if data else []
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration_data: expected batches (dicts of tensors), got {type(data).__name__}")
    batches = list(data)
    if not batches:
        raise ValueError("calibration_data is empty; pass at least one batch")
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError(
                "calibration_data: every batch must be a dict of tensors, such as a tokenizer returns with "
                f"return_tensors='pt'; got a {type(batch).__name__}"
                + (f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
            )
    return batches


def check_readable(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse batches that are longer than the model's positions, empty, or of ids that it has no rows for.

    Raises:
        ValueError: naming both lengths, or the id.
    """
    for batch in batches:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and not ids.numel():
            raise ValueError(f"calibration_data: a batch has input_ids {list(ids.shape)}; leave empty batches out")
    _check_ids(model, batches)
    most = most_positions(model)
    longest = max((b["input_ids"].shape[-1] for b in batches if isinstance(b.get("input_ids"), Tensor)), default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"calibration_data: a batch has {longest} tokens a row, but the model reads at most {most}; tokenize with "
            f"truncation=True, max_length={most}"
        )


def _check_ids(model: nn.Module, batches: Sequence[Batch]) -> None:
    whole = ("word_embeddings", "word_embeddings.table")  # and no part of a composed one
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith(whole)]
    rows = max((table.num_embeddings for table in tables), default=0)
    for ids in (b["input_ids"] for b in batches if isinstance(b.get("input_ids"), Tensor)):
        least, most = int(ids.min()), int(ids.max())
        if rows and not 0 <= least <= most < rows:
            raise ValueError(
                f"calibration_data: the id {most if most >= rows else least} is none of the model's {rows}; tokenize "
                "with the model's own tokenizer"
            )


def run_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `model` on a dict batch: by keyword, or as one mapping where that is the model's own convention."""
    if type(model).__name__ == "SentenceTransformer":
        return model(dict(inputs))
    return model(**inputs)
