"""How many items a loss is a mean over, so that parts of a batch can be put together to the whole.

A mean over the n items of a micro-batch is n / N of the mean over all N items of a training step, whatever the lengths
of its texts and the number of processes. `Distillation` weighs each term by its own kind of item, which `ITEMS` lists;
it stands alone so that what is counted and what is averaged over (the masks here) cannot differ.

    >>> whole = sum(count_items(batch, outputs="tokens") for batch in batches)        # [len(ITEMS)]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Rows; real tokens; pairs of two real tokens; tokens whose outputs are compared; labels that the task's loss counts.
ITEMS = ("rows", "tokens", "pairs", "outputs", "labels")
_IGNORED = -100  # cross_entropy's ignore_index


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """bool [B, T]: real tokens; None where the inputs are no tokens and all of them count (images).

    Rows of several texts [B, N, T] (multiple choice) are [B * N, T], as their models see them.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if mask is not None:
        mask = mask.to(torch.bool)
        return mask.flatten(0, 1) if ids is not None and ids.dim() == 3 else mask
    tokens = ids if ids is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return None
    shape = tokens.shape[:2] if tokens is not ids else tokens.flatten(0, -2).shape
    return torch.ones(shape, dtype=torch.bool, device=tokens.device)


def output_mask(mask: Tensor | None, labels: Tensor | None, all_tokens: bool) -> Tensor | None:
    """bool [B, T]: the tokens whose outputs are compared.

    All real ones where `all_tokens` says so (a language model has something to say about each: Sanh et al. 2019);
    otherwise those that the task labels, in rows that have a label at all.
    """
    if all_tokens or mask is None or labels is None or labels.shape != mask.shape or labels.is_floating_point():
        return mask
    labelled = labels >= 0
    return torch.where(labelled.any(1, keepdim=True), labelled, mask)


def span_labels(inputs: Mapping[str, Any]) -> list[Tensor]:
    """[B] positions of start and end, -100 where they are outside of the real text; an empty list without them."""
    found = [inputs.get(name) for name in ("start_positions", "end_positions")]
    mask = token_mask(inputs)
    if mask is None or not all(isinstance(x, Tensor) for x in found):
        return []
    # As the models of transformers read them: before the text is its first token, behind it is no answer.
    flat = [x.reshape(-1).clamp_min(0) for x in found if isinstance(x, Tensor)]
    length = mask.shape[1]
    inside = [(x < length) & mask.gather(1, x.clamp_max(length - 1).unsqueeze(1)).squeeze(1) for x in flat]
    return [torch.where(i, x, x.new_tensor(_IGNORED)) for x, i in zip(flat, inside, strict=True)]


def count_labels(inputs: Mapping[str, Any], real_only: bool = False) -> Tensor:
    """Scalar: the labels that the task's own loss is a mean over.

    Args:
        real_only: the loss leaves out padding by the attention mask, and not by labels (ELECTRA's discriminator).
    """
    labels, spans = inputs.get("labels"), span_labels(inputs)
    if isinstance(labels, Tensor):
        if labels.is_floating_point():
            return labels.new_tensor(labels.numel())
        mask = token_mask(inputs) if real_only else None
        counted = labels != _IGNORED
        return (counted if mask is None or mask.shape != labels.shape else counted & mask).sum()
    if spans:
        return torch.stack([(x != _IGNORED).sum() for x in spans]).sum()
    return torch.tensor(_rows(inputs))


def count_items(inputs: Mapping[str, Any], *, all_tokens: bool = False, real_only: bool = False) -> Tensor:
    """float32 [len(ITEMS)]: how many of each there are in a batch; the arguments are those of the functions above."""
    mask, labels = token_mask(inputs), inputs.get("labels")
    rows = _rows(inputs)
    if mask is None:
        tokens: Any = torch.ones(rows)  # as many in every row, so that each row counts the same
        pairs = outputs = tokens
    else:
        tokens = mask.sum(-1)
        pairs = tokens.square()
        kept = output_mask(mask, labels, all_tokens)
        outputs = tokens if kept is None else kept
    found = [torch.tensor(rows), tokens.sum(), pairs.sum(), outputs.sum(), count_labels(inputs, real_only)]
    device = tokens.device
    return torch.stack([x.to(device, torch.float32) for x in found])


def _rows(inputs: Mapping[str, Any]) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0), 0)
