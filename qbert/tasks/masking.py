"""Unlabelled text for general stages: rows of tokens, and batches in which other words are masked every time.

    >>> rows = text_rows(texts, tokenizer)
    >>> collate = MaskWords(tokenizer, rows)
    >>> Distiller(teacher, student, recipes.distilbert(), train_dataset=rows, data_collator=collate, ...)

Text that memory does not hold is a `qbert.tasks.streams.TextStream` in the place of the rows.

Source: Devlin et al. 2019, BERT, section 3.1 (15 % of the tokens, of which 80 % are masked, 10 % exchanged and 10 %
left as they are); Liu et al. 2019, RoBERTa, section 4.1 (other ones each time); Sanh et al. 2019, DistilBERT, whose
training script draws tokens with a probability proportional to count^-0.7, so that rare words are asked for more often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qbert.tasks.candidates import MaskedWords

_IGNORED = -100
_LEAST_ROWS = 8
_TEXTS_AT_ONCE = 1000
_COUNTED = 20_000


def text_rows(texts: Iterable[str], tokenizer: Any, *, max_length: int = 128) -> list[dict[str, list[int]]]:
    """Rows {"input_ids", "attention_mask", ...} of texts, without labels; empty texts are left out.

    Args:
        texts: sentences or paragraphs.
        tokenizer: a fast transformers tokenizer.
        max_length: longest row in tokens; what is longer is cut into several rows.

    Raises:
        ValueError: fewer than eight rows, no room for text in `max_length`, or a slow tokenizer.
    """
    if max_length < 8:
        raise ValueError(f"max_length={max_length} leaves no room for text; use at least 8")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: long texts are cut by a fast one, got {type(tokenizer).__name__}; use that")
    rows: list[dict[str, list[int]]] = []
    kept = [text for text in texts if text.strip()]
    for at in range(0, len(kept), _TEXTS_AT_ONCE):
        part = kept[at : at + _TEXTS_AT_ONCE]
        encoded = tokenizer(part, truncation=True, max_length=max_length, return_overflowing_tokens=True)
        rows += [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in encoded["input_ids"]]
    if len(rows) < _LEAST_ROWS:
        raise ValueError(
            f"texts: {len(rows)} rows of text are too few for a general stage; give at least {_LEAST_ROWS}"
        )
    return rows


class MaskWords:
    """Pads rows and masks some of their tokens, others in every call; labels are the tokens that were there.

    Random numbers are torch's, so that a training is repeated by its seed.

    Args:
        tokenizer: with a mask token.
        rows: the rows that are trained on, whose tokens are counted: all of them, or the first 20,000 of a stream
            (`qbert.tasks.streams.TextStream`).
        share: of the real tokens that are asked for.
        smoothing: a token that occurs n times is drawn with a probability proportional to n^-smoothing; 0: all alike.

    Raises:
        ValueError: no mask token, no rows, rows that can be read only once, or a share outside of (0, 1).
    """

    def __init__(
        self, tokenizer: Any, rows: Iterable[dict[str, Any]], *, share: float = 0.15, smoothing: float = 0.7
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: it has no mask token, so no word can be masked; use another encoder")
        if not 0 < share < 1:
            raise ValueError(f"share={share} is not a share of the tokens; use a number such as 0.15")
        if isinstance(rows, Iterator):
            raise ValueError("rows can be read only once, and would be used up; give a list or a TextStream")
        self.tokenizer, self.share = tokenizer, share
        self.words = len(tokenizer)
        counts, at_hand = torch.zeros(self.words), iter(rows if hasattr(rows, "__len__") else islice(rows, _COUNTED))
        while part := list(islice(at_hand, 1000)):
            ids = torch.tensor([i for row in part for i in row["input_ids"]])
            counts += torch.bincount(ids, minlength=self.words)
        if not counts.any():
            raise ValueError("rows is empty; give the rows that are trained on")
        self.chance = counts.clamp_min(1).pow(-smoothing)  # [V], relative
        self.chance[tokenizer.all_special_ids] = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` with masks, ``attention_mask`` and ``labels`` (-100 where nothing is asked), each [B, T]."""
        kept = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
        batch = dict(self.tokenizer.pad(kept, return_tensors="pt"))
        ids = batch["input_ids"]
        chance = self.chance[ids] * batch["attention_mask"]
        wanted = min(round(self.share * int(batch["attention_mask"].sum())) or 1, int((chance > 0).sum()))
        asked = torch.zeros(ids.numel(), dtype=torch.bool)
        if wanted:
            asked[torch.multinomial(chance.flatten(), wanted)] = True
        asked = asked.view_as(ids)
        draw = torch.rand(ids.shape)
        others = torch.randint(self.words, ids.shape)
        replaced = torch.where(draw < 0.8, self.tokenizer.mask_token_id, torch.where(draw < 0.9, others, ids))
        batch["labels"] = torch.where(asked, ids, _IGNORED)
        batch["input_ids"] = torch.where(asked, replaced, ids)
        return batch


def language_model(encoder: Any, head: MaskedWords) -> Any:
    """A ``BertForMaskedLM`` of a BERT encoder and a head that was trained on it; it holds the very encoder.

    Args:
        encoder: a ``BertModel``; its pooler, if it has one, has no part in it.
        head: of `qbert.tasks.candidates.train_masked_words`.

    Raises:
        ValueError: an encoder of another class.
    """
    from transformers import BertForMaskedLM

    if type(encoder).__name__ != "BertModel":
        raise ValueError(f"encoder: a {type(encoder).__name__} is no BertModel; use a model that has a head of its own")
    model: Any = BertForMaskedLM(encoder.config).eval().to(next(encoder.parameters()).device)
    model.bert = encoder
    model.tie_weights()
    predictions = model.cls.predictions
    predictions.transform.dense.load_state_dict(head.dense.state_dict())
    predictions.transform.LayerNorm.load_state_dict(head.norm.state_dict())
    predictions.transform.LayerNorm.eps = head.norm.eps
    predictions.transform.transform_act_fn = torch.nn.GELU()
    with torch.no_grad():
        predictions.bias.copy_(head.bias)
    return model
