"""From a model and some hundred sentences to a model whose file has a given size: `shrink`.

    >>> qbert.shrink(model, texts, 10, tokenizer=tokenizer).save_pretrained("out")

It stands alone because it joins rooms of three floors: what to store how, quantizing, and packing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from qbert.allocation.allocate import allocate_bits
from qbert.allocation.blocks import Fixed
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
        data: some hundred unlabelled sentences like those to come, as strings (with `tokenizer`) or as batches (dicts
            of tensors).
        size_mb: largest size of the safetensors file in MB of 10^6 bytes, everything included.
        tokenizer: the model's own, where `data` are strings.
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
    """Batches of tensors: of strings by `tokenizer`, sorted by length so that little is padded; others as they are.

    Raises:
        ValueError: strings without a tokenizer; TypeError: one string, or data that cannot be iterated over.
    """
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(f"data: expected sentences or batches, got one {type(data).__name__}; pass a list of them")
    if hasattr(data, "keys"):
        return [data]
    rows = list(data)
    if not rows or not all(isinstance(row, str) for row in rows):
        return rows
    if tokenizer is None:
        raise ValueError("tokenizer: data are strings; pass the model's tokenizer, or batches of tensors")
    rows.sort(key=len)
    parts = (rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS))
    return [dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]
