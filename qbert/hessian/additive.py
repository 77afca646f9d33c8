"""Whether the loss of a subset is the mean of the losses of its micro-batches, and what to do where it is not.

A mean over labels can be cut: ``L = sum_b w_b L_b / sum_b w_b`` with the numbers of labels ``w_b`` (`loss_weight`).
Other losses cannot: sums of means over different things (masked words and next sentences), means with class weights,
spans that lie outside of the text, contrastive losses. No weights put these together again from the losses of the
parts, so that the subset has to go through the model at once.

    >>> batches = additive(model, parts, loss_fn)
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbert.hessian.batches import Batch, BatchSamples, batch_size, loss_weight
from qbert.hessian.losses import LossFunction, check_scalar, evaluating, masks_padding, model_loss, to_device

_log = logging.getLogger(__name__)


def additive(model: nn.Module, parts: Sequence[Batch], loss_fn: LossFunction | None) -> list[Batch]:
    """Batches whose losses, weighted by `loss_weight`, are the loss of all rows of `parts`.

    These are the parts that have labels, where that holds for every two neighbours of them put together (a forward
    pass for each part and each two); otherwise one batch of all rows, with a warning in the log.

    Raises:
        ValueError: where it does not hold and the rows do not fit into one batch.
    """
    kept = [part for part in parts if loss_weight(part) > 0]
    if len(parts) < 2 or adds_up(model, parts, loss_fn):
        return kept
    together = _together(model, parts)
    if len(together) > 1:
        raise ValueError(
            "batches: the loss of this model is not a mean over samples or labels, so that it cannot be measured part "
            "by part, and their rows do not fit into one batch; give one batch, with fraction=1, or another loss_fn"
        )
    _log.warning(
        "the loss of %d samples is not the mean of the losses of their micro-batches (several terms, class weights, "
        "labels outside of the text): they go through the model at once, whatever micro_batch_size is",
        batch_size(together[0]),
    )
    return together


def adds_up(model: nn.Module, parts: Sequence[Batch], loss_fn: LossFunction | None) -> bool:
    """Whether every two neighbours together have the mean loss of both, weighted by `loss_weight`."""
    loss = loss_fn or model_loss
    tolerance = 10 * torch.finfo(next(model.parameters()).dtype).eps ** 0.75
    padded = masks_padding(model, loss_fn)
    known: tuple[int, float] | None = None

    def value(batch: Batch) -> float:
        with evaluating(model, ()), torch.no_grad():
            found = loss(model, to_device(batch, model))
        check_scalar(found)
        return float(found)

    for first, second in itertools.pairwise(parts):
        both = _together(model, [first, second]) if padded and "labels" in first else _without_padding([first, second])
        if len(both) != 1:
            continue
        weights = loss_weight(first), loss_weight(second)
        before = known[1] if known is not None and known[0] == id(first) else value(first) if weights[0] else 0.0
        after = value(second) if weights[1] else 0.0
        known = id(second), after
        whole = value(both[0]) if sum(weights) else None
        if whole is None:
            continue
        mean = (weights[0] * before + weights[1] * after) / sum(weights)
        if not abs(whole - mean) <= tolerance * max(abs(before), abs(after), abs(whole)):
            return False
    return True


def _together(model: nn.Module, parts: Sequence[Batch]) -> list[Batch]:
    """The rows of several batches in as few as can be, padded to the longest."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    samples = BatchSamples(parts, pad or 0)
    return samples.collate(range(len(samples)))


def _without_padding(parts: Sequence[Batch]) -> list[Batch]:
    """The rows of two batches in one where all shapes agree; both as they are where they do not."""
    shapes = [{k: v.shape[1:] if isinstance(v, Tensor) else v for k, v in part.items()} for part in parts]
    if shapes[0] != shapes[1]:
        return list(parts)
    samples = BatchSamples(parts)
    return samples.collate(range(len(samples)))
