"""From a model and some hundred sentences to a model whose file has a given size: `shrink`.

    >>> qbert.shrink(model, texts, 10, tokenizer=tokenizer).save_pretrained("out")

It stands alone because it joins rooms of three floors: what to store how, quantizing, and packing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from qbert.allocation.allocate import allocate_bits
from qbert.allocation.blocks import Fixed
from qbert.calibration.batches import check_batches
from qbert.packing import pack
from qbert.quantize import quantize_model

Model = TypeVar("Model", bound=nn.Module)
_ROWS = 32  # of a batch


def shrink(
    model: Model,
    data: Any,
    size_mb: float,
    *,
    tokenizer: Any = None,
    bits: Sequence[int] = (2, 3, 4, 8),
    fixed: Fixed | None = None,
    progress: bool = False,
    **settings: Any,
) -> Model:
    """The packed model of the least predicted damage whose file has at most `size_mb` MB, without training.

    `qbert.allocate_bits`, `qbert.quantize_model` and `qbert.pack` with one and the same data.

    Args:
        model: a float encoder, with or without a head; it is left as it was.
        data: some hundred unlabelled sentences like those to come, as strings (with `tokenizer`), as pairs of strings
            for a model that reads both in one row, or as batches (dicts of tensors).
        size_mb: largest size of the safetensors file in MB of 10^6 bytes, everything included.
        tokenizer: the model's own, where `data` are strings or pairs of them.
        bits: the widths to choose from, out of 2, 3, 4, 8 and 16 or 32 (float).
        fixed: pattern -> bits, or a mapping of `TensorSpec` fields, for what is not to be decided.
        progress: show bars.
        **settings: further defaults of the `BitsConfig` (``groups``, ``scheme``, ``activation_bits``, ...).

    Returns:
        What `qbert.pack` returns: ``save_pretrained`` writes it, `qbert.optimize_for_inference` makes it fast.

    Raises:
        ValueError: a size that no file can keep (the sentence names the smallest), strings without a tokenizer, no
            data; and as `allocate_bits` and `quantize_model`. TypeError: data or a model of another type.
    """
    batches = as_batches(data, tokenizer)
    config = allocate_bits(
        model, bits, size_mb=size_mb, calibration_data=batches, fixed=fixed, progress=progress, **settings
    )
    return pack(quantize_model(model, config, calibration_data=batches, progress=progress))


def as_batches(data: Any, tokenizer: Any) -> list[Any]:
    """Batches of tensors: of strings, or pairs of them, by `tokenizer`, sorted by length so that little is padded;
    others as they are.

    Raises:
        ValueError: strings without a tokenizer, or nothing; TypeError: one string, a whole table of columns, or what
            else is neither strings nor batches.
    """
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(f"data: expected sentences or batches, got one {type(data).__name__}; pass a list of them")
    if hasattr(data, "columns"):  # a data frame, whose iteration gives the names of its columns
        raise TypeError(f"data: got a whole {type(data).__name__}; pass the column that holds the sentences")
    rows = [data] if isinstance(data, Mapping) else list(data)
    texts = [(row,) if isinstance(row, str) else row for row in rows]
    if not rows or not all(map(_is_text, texts)):
        return check_batches(rows, "data") or []
    if len({len(text) for text in texts}) > 1:
        raise TypeError("data: some rows are one sentence and some are pairs; pass rows of one kind")
    if tokenizer is None:
        raise ValueError("tokenizer: data are strings; pass the model's tokenizer, or batches of tensors")
    texts.sort(key=lambda text: sum(map(len, text)))
    parts = (zip(*texts[i : i + _ROWS], strict=True) for i in range(0, len(texts), _ROWS))
    return [dict(tokenizer(*map(list, part), padding=True, truncation=True, return_tensors="pt")) for part in parts]


def _is_text(row: Any) -> bool:
    return isinstance(row, tuple | list) and len(row) in (1, 2) and all(isinstance(part, str) for part in row)
