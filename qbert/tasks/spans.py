"""Extractive question answering: windows over long contexts, answer positions in tokens, n-best decoding.

A context longer than the input is cut into overlapping windows (Devlin et al. 2019, run_squad): a window that does
not hold the answer is labelled with position 0, the first token. Decoding scores every span inside the context part
of every window of a question,

    score(i, j) = start_logit[i] + end_logit[j],   i <= j < i + max_answer_length,

and keeps the best n over all windows; no beam over single positions, so no span is missed.

    >>> decode_spans(start, end, spans, rows)[0]
    [('Denver Broncos', 14.2)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbert.tasks.task import Row

_MAX_QUESTION_TOKENS = 64  # as in run_squad: a longer question would leave no room for the context
_LEAST_CONTEXT = 8  # tokens of context in a window; fewer hold no answer


@dataclass(frozen=True)
class SpanFeature:
    """One window: the row it belongs to and, for every token, its characters [T, 2] in the context (-1 elsewhere)."""

    row: int
    offsets: np.ndarray
    max_answer_length: int


def span_examples(
    rows: Sequence[Row], tokenizer: Any, max_length: int, stride: int, max_answer_length: int
) -> tuple[list[dict[str, Any]], list[SpanFeature]]:
    """Tokenized windows with ``start_positions`` and ``end_positions`` (of the first answer), and their offsets.

    Args:
        rows: {"question", "context", "answers"}.
        max_length: tokens of question and window together.
        stride: tokens that neighbouring windows share, at most; fewer beside a question that leaves no more room.

    Raises:
        ValueError: `max_length` leaves hardly any context beside the longest question.
    """
    questions, longest = _shortened_questions(rows, tokenizer)
    taken = longest + tokenizer.num_special_tokens_to_add(pair=True)
    if max_length - taken < _LEAST_CONTEXT:
        raise ValueError(
            f"max_length={max_length} leaves {max(max_length - taken, 0)} tokens of context beside a question of "
            f"{longest}; use at least {taken + _LEAST_CONTEXT}"
        )
    stride = min(stride, max_length - taken - 1)
    encoded = tokenizer(
        questions,
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    offsets, owners = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
    examples, spans = [], []
    for i, owner in enumerate(owners):
        in_context = np.array([part == 1 for part in encoded.sequence_ids(i)])
        places = np.where(in_context[:, None], np.array(offsets[i]).reshape(-1, 2), -1)  # [T, 2]
        answers = rows[owner]["answers"]
        start, end = token_span(places, answers["answer_start"][0], len(answers["text"][0]))
        examples.append(
            {key: values[i] for key, values in encoded.items()} | {"start_positions": start, "end_positions": end}
        )
        spans.append(SpanFeature(owner, places.astype(np.int32), max_answer_length))
    return examples, spans


def _shortened_questions(rows: Sequence[Row], tokenizer: Any) -> tuple[list[str], int]:
    """The questions, cut where they are very long, and the number of tokens of the longest."""
    questions = [row["question"].strip() for row in rows]
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    shortened = [
        text[: places[_MAX_QUESTION_TOKENS - 1][1]] if len(places) > _MAX_QUESTION_TOKENS else text
        for text, places in zip(questions, offsets, strict=True)
    ]
    return shortened, max(min(len(places), _MAX_QUESTION_TOKENS) for places in offsets)


def token_span(places: np.ndarray, start: int, length: int) -> tuple[int, int]:
    """First and last token (inclusive) of characters [start, start + length); (0, 0) where the window lacks them."""
    inside = (places[:, 1] > start) & (places[:, 0] < start + length) & (places[:, 0] >= 0)
    tokens = np.flatnonzero(inside)
    if len(tokens) == 0 or places[tokens[0], 0] > start or places[tokens[-1], 1] < start + length:
        return 0, 0
    return int(tokens[0]), int(tokens[-1])


def decode_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    spans: Sequence[SpanFeature],
    rows: Sequence[Row],
    n_best: int = 1,
) -> list[list[tuple[str, float]]]:
    """The `n_best` (answer text, score) of every row, best first, over all of its windows.

    Args:
        start_logits, end_logits: [F, T] of the F windows, padded on the right to any T.
        spans: the windows.
        rows: the questions that the windows belong to.
    """
    found: list[list[tuple[float, int, int]]] = [[] for _ in rows]
    for first, last, span in zip(start_logits, end_logits, spans, strict=True):
        found[span.row] += _best_of_window(first, last, span, n_best)
    answers = []
    for row, candidates in zip(rows, found, strict=True):
        best = sorted(candidates, key=lambda item: -item[0])[:n_best]
        answers.append([(row["context"][begin:end], score) for score, begin, end in best] or [("", -np.inf)])
    return answers


def _best_of_window(first: np.ndarray, last: np.ndarray, span: SpanFeature, n: int) -> list[tuple[float, int, int]]:
    tokens = np.flatnonzero(span.offsets[:, 0] >= 0)  # the context's tokens stand in one run
    if len(tokens) == 0:
        return []
    reach = min(span.max_answer_length, len(tokens))
    begin, end = first[tokens].astype(np.float64), last[tokens].astype(np.float64)
    padded = np.concatenate([end, np.full(reach - 1, -np.inf)])
    scores = begin[:, None] + np.lib.stride_tricks.sliding_window_view(padded, reach)  # [tokens, reach]
    flat = scores.ravel()
    top = np.argpartition(-flat, min(n, len(flat)) - 1)[:n]
    return [
        (float(flat[k]), int(span.offsets[tokens[k // reach], 0]), int(span.offsets[tokens[k // reach + k % reach], 1]))
        for k in top
        if np.isfinite(flat[k])
    ]
