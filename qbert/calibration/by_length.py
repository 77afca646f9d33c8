"""Calibration rows in batches of like length, since padding costs a model as much as tokens do.

It stands alone because rounding, planning and pruning all put the same rows through a model many times.

    >>> batches = by_length(model, batches)          # the same rows, in an order of their own
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbert.calibration.batches import Batch, check_readable, run_batch
from qbert.calibration.outputs import model_outputs
from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode

_ENTRIES = frozenset({"input_ids", "attention_mask", "token_type_ids"})
_WORTH = 0.9  # share of real tokens above which nothing is to be gained
_SAME = 1e-3  # of the largest output


def by_length(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The rows of `batches` from the shortest to the longest, in batches of as many rows, cut to their longest.

    Batches come back as they are where they hold anything but ids, masks and token types of rows that are padded on the
    right, where there is little padding, or where `model` computes something else of a row that is cut.

    Raises:
        ValueError: batches that are longer than the model can read.
    """
    check_readable(model, batches)
    lengths = [_lengths(batch) for batch in batches]
    known = [n for n in lengths if n is not None]
    if len(known) < len(batches) or len({frozenset(batch) for batch in batches}) > 1:
        return list(batches)
    rows = [(n, b, row) for b, of in enumerate(known) for row, n in enumerate(of.tolist())]
    size = sum(len(batch["input_ids"]) * batch["input_ids"].shape[-1] for batch in batches)
    if sum(n for n, _, _ in rows) > _WORTH * size or not _can_be_cut(model, batches, rows):
        return list(batches)
    rows.sort()
    together = max(map(len, known))
    return [_joined(batches, rows[at : at + together]) for at in range(0, len(rows), together)]


def _lengths(batch: Batch) -> Tensor | None:
    """Tokens of every row of a batch; ``None`` where it is another kind of batch."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None or not set(batch) <= _ENTRIES or ids.dim() < 2:
        return None
    if any(not isinstance(value, Tensor) or value.shape != ids.shape for value in batch.values()):
        return None
    lengths = (mask != 0).sum(-1)
    before = torch.arange(ids.shape[-1], device=mask.device) < lengths.unsqueeze(-1)
    whole = bool((lengths > 0).all()) and torch.equal(mask != 0, before)
    return lengths.view(len(lengths), -1).amax(1) if whole else None  # a row may be a pair of texts


@torch.no_grad()
def _can_be_cut(model: nn.Module, batches: Sequence[Batch], rows: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the row with the most padding gives the same outputs without it."""
    length, b, row = max(rows, key=lambda r: batches[r[1]]["input_ids"].shape[-1] - r[0])
    whole = {name: value[row : row + 1] for name, value in batches[b].items()}
    cut = {name: value[..., :length] for name, value in whole.items()}
    with evaluation_mode(model):
        pairs = [model_outputs(run_batch(model, to_device(batch, model))) for batch in (whole, cut)]
    for padded, plain in zip(*pairs, strict=True):
        near = padded[:, : plain.shape[1]] if padded.dim() > 1 else padded
        if near.shape != plain.shape or not bool((near - plain).abs().max() <= _SAME * plain.abs().max()):
            return False
    return True


def _joined(batches: Sequence[Batch], rows: Sequence[tuple[int, int, int]]) -> Batch:
    """One batch of these rows (tokens, batch, place in it)."""
    longest = max(length for length, _, _ in rows)
    made = {}
    for name, like in batches[0].items():
        filler = 0
        if name == "input_ids":  # whatever id the tokenizer pads with
            filler = next((int(batch[name][batch["attention_mask"] == 0][0]) for batch in batches if _pads(batch)), 0)
        made[name] = like.new_full((len(rows), *like.shape[1:-1], longest), filler)
        for place, (length, b, row) in enumerate(rows):
            made[name][place, ..., :length] = batches[b][name][row, ..., :length]
    return made


def _pads(batch: Batch) -> bool:
    return not bool(batch["attention_mask"].all())
