"""Rows to batches: tokenization once, padding a batch at a time, rows of like length together.

    >>> data = prepare(task, tokenizer, "train", limit=512)
    >>> batch = data.batches(16)[0]      # {"input_ids": [16, T], "attention_mask": [16, T], ..., "labels": [16]}

``Prepared`` is a map-style ``torch.utils.data.Dataset`` of dicts, so a ``DataLoader`` or a ``transformers.Trainer``
takes it too, with ``data.collate`` as the collator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from qbert.tasks.task import Row, Task, check_split, subset

Batch = dict[str, torch.Tensor]
# Tokens kept by default: long enough that under 1 % of the rows are cut, short enough for attention to stay cheap.
_MAX_LENGTH = {"reviews": 64, "sst2": 72, "cola": 64, "qqp": 128, "rte": 288, "squad": 384}
_DEFAULT_MAX_LENGTH = 128
DOC_STRIDE = 128


@dataclass
class Prepared(Dataset):
    """Tokenized rows of one split.

    Attributes:
        examples: one dict of lists an example (for a span task: a window of a context), without padding.
        rows: the rows they were made of; `row_of[i]` is the row of example i.
        words: for token tasks, the word index of every labelled position of each example.
        spans: for span tasks, where the tokens of each window stand in its context.
    """

    task: Task
    rows: Sequence[Row]
    examples: list[dict[str, Any]]
    collate: Any
    row_of: list[int]
    words: list[list[int]] = field(default_factory=list)
    spans: list[SpanFeature] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every example [N]; of a pair that is encoded apart, those of the longer sentence."""
        inputs = (example["input_ids"] for example in self.examples)
        return np.array([max(map(len, ids)) if self._paired else len(ids) for ids in inputs])

    @property
    def _paired(self) -> bool:
        return isinstance(self.collate, PairCollator)

    def own_positions(self, index: int, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs [T, ...] of example `index` in a batch, cut to its own tokens: padding may stand on the left."""
        length = len(self.examples[index]["input_ids"])
        first = len(outputs) - length if self.collate.tokenizer.padding_side == "left" else 0
        return outputs[first : first + length]

    def with_labels(self) -> Prepared:
        """Without the examples of a token task in which no word has a tag: the mean over their words is NaN."""
        if self.task.kind != "token":
            return self
        kept = [i for i, words in enumerate(self.words) if words]
        return replace(
            self,
            examples=[self.examples[i] for i in kept],
            row_of=[self.row_of[i] for i in kept],
            words=[self.words[i] for i in kept],
        )

    def batches(self, batch_size: int = 32, *, seed: int | None = 0) -> list[Batch]:
        """All examples as padded batches, in an order drawn by `seed`; in the order of the rows for None.

        Raises ValueError for a batch size below 1.
        """
        _check_batch_size(batch_size)
        count = len(self)
        order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        return [
            self.collate([self.examples[i] for i in order[at : at + batch_size]]) for at in range(0, count, batch_size)
        ]

    def by_length(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """(example indices, batch) over all examples, longest first: least padding, and memory peaks at once.

        Raises ValueError for a batch size below 1.
        """
        _check_batch_size(batch_size)
        order = np.argsort(-self.lengths, kind="stable").tolist()
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            yield chosen, self.collate([self.examples[i] for i in chosen])


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not an integer of at least 1")


def training_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as lists of example indices: shuffled, yet of like length inside a batch.

    Shuffle, cut into pools of 32 batches, sort each pool by length, cut into batches, shuffle the batches. A function
    of (seed, epoch) alone, so a resumed run sees what an uninterrupted one would have seen.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    pool = batch_size * 32
    batches = []
    for at in range(0, len(order), pool):
        members = order[at : at + pool]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [members[i : i + batch_size].tolist() for i in range(0, len(members), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def prepare(
    task: Task,
    tokenizer: Any,
    split: str = "train",
    *,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    as_pairs: bool = False,
    max_answer_length: int = 30,
) -> Prepared:
    """Tokenize a split.

    Args:
        task: what to tokenize; its first or both text fields, words, or question and context.
        tokenizer: a transformers tokenizer; token and span tasks need a fast one.
        split: "train", "validation", ...
        max_length: longest input in tokens, longer ones are cut (contexts are windowed); by task where None.
        limit: use at most this many rows, drawn by `seed`.
        as_pairs: encode the two texts of a pair apart, for a sentence encoder: input_ids [B, 2, T].
        max_answer_length: longest answer in tokens that decoding will consider (span tasks).

    Raises:
        ValueError: no such split, a row that cannot be learned or scored (such as one without its label, which the hub
            marks with -1), a limit below 1, a tokenizer that cannot serve the task, `as_pairs` on single texts.
    """
    rows = subset(task.rows(split), limit, seed)
    check_split(task, split, rows)
    max_length = resolve_max_length(task, tokenizer, max_length)
    if as_pairs:
        return _pairs(task, tokenizer, rows, max_length)
    if task.kind in ("token", "span") and not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"task {task.name!r} needs a fast tokenizer (offsets), got {type(tokenizer).__name__}")
    if task.kind == "token":
        return _words(task, tokenizer, rows, max_length)
    if task.kind == "span":
        examples, spans = span_examples(
            rows, tokenizer, max_length, min(DOC_STRIDE, max_length // 3), max_answer_length
        )
        return Prepared(task, rows, examples, SpanCollator(tokenizer), [span.row for span in spans], spans=spans)
    encoded = tokenizer(*_texts(task, rows), truncation=True, max_length=max_length)
    cast = float if task.kind == "regression" else int
    examples = [
        {key: values[i] for key, values in encoded.items()} | {"labels": cast(row["label"])}
        for i, row in enumerate(rows)
    ]
    return Prepared(task, rows, examples, DataCollatorWithPadding(tokenizer), list(range(len(rows))))


def resolve_max_length(task: Task, tokenizer: Any, max_length: int | None) -> int:
    """The cut in tokens that `prepare` uses: the argument, or the task's default, within what the tokenizer allows."""
    if max_length is not None and max_length < 8:
        raise ValueError(f"max_length={max_length} leaves no room for text; use at least 8")
    wanted = max_length or _MAX_LENGTH.get(task.name, 384 if task.kind == "span" else _DEFAULT_MAX_LENGTH)
    return min(wanted, int(min(tokenizer.model_max_length, 1 << 20)))


def _texts(task: Task, rows: Sequence[Row]) -> list[list[str]]:
    return [[row[name] for row in rows] for name in task.text_fields]


def _words(task: Task, tokenizer: Any, rows: Sequence[Row], max_length: int) -> Prepared:
    """The first piece of a word carries its tag, the others -100 (Devlin et al. 2019, section 5.3)."""
    index = {name: i for i, name in enumerate(task.label_names)}
    texts = [row["tokens"] for row in rows]
    if _loses_spaces(tokenizer, texts):
        texts = [[f" {word}" if i and word.strip() else word for i, word in enumerate(words)] for words in texts]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    examples, words = [], []
    for i, row in enumerate(rows):
        labels, labelled, previous = [], [], None
        for word in encoded.word_ids(i):
            first = word is not None and word != previous
            labels.append(index[row["tags"][word]] if first else -100)
            if first:
                labelled.append(word)
            previous = word
        examples.append({key: values[i] for key, values in encoded.items()} | {"labels": labels})
        words.append(labelled)
    collate = DataCollatorForTokenClassification(tokenizer)
    return Prepared(task, rows, examples, collate, list(range(len(rows))), words=words)


_PROBED_WORDS = 64


def _loses_spaces(tokenizer: Any, texts: Sequence[Sequence[str]]) -> bool:
    """Whether lists of words are encoded unlike running text, and no longer so if words bring the space before them.

    A byte-level BPE writes the space into the piece, which is another one without it; others drop all spaces.
    """
    words = itertools.islice((word for words in texts for word in words if word.strip()), _PROBED_WORDS)
    for word in dict.fromkeys(words):
        pieces = tokenizer.tokenize(f"{word} {word}")
        listed, spaced = (
            tokenizer([word, second], is_split_into_words=True, add_special_tokens=False).tokens()
            for second in (word, f" {word}")
        )
        if listed != pieces and spaced == pieces:
            return True
    return False


@dataclass
class SpanCollator:
    """Pads windows of a span task; where that shifts the tokens (padding on the left), it shifts their answers too."""

    tokenizer: Any

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Batch of examples {"input_ids": ..., "start_positions": int, "end_positions": int}."""
        batch = DataCollatorWithPadding(self.tokenizer)(list(examples))
        if self.tokenizer.padding_side == "left":
            shift = batch["input_ids"].shape[1] - torch.tensor([len(example["input_ids"]) for example in examples])
            for name in ("start_positions", "end_positions"):
                batch[name] = batch[name] + shift
        return dict(batch)


@dataclass
class PairCollator:
    """Pads pairs of sentences to [B, 2, T]; the leading dimension is the pair, so batches can be cut anywhere."""

    tokenizer: Any

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Batch of examples {"input_ids": [first, second], ..., "labels": float}."""
        keys = [key for key in examples[0] if key != "labels"]
        flat = [{key: example[key][side] for key in keys} for example in examples for side in (0, 1)]
        padded = DataCollatorWithPadding(self.tokenizer)(flat)
        batch = {key: padded[key].view(len(examples), 2, -1) for key in keys}
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


def _pairs(task: Task, tokenizer: Any, rows: Sequence[Row], max_length: int) -> Prepared:
    if len(task.text_fields) != 2 or task.kind not in ("regression", "classification"):
        raise ValueError(
            f"task {task.name!r} has no pairs of sentences ({', '.join(task.text_fields)}); a sentence model needs "
            "them, for instance stsb"
        )
    sides = [tokenizer(texts, truncation=True, max_length=max_length) for texts in _texts(task, rows)]
    examples = [
        {key: [side[key][i] for side in sides] for key in sides[0]} | {"labels": float(row["label"])}
        for i, row in enumerate(rows)
    ]
    return Prepared(task, rows, examples, PairCollator(tokenizer), list(range(len(rows))))


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
        ValueError: `max_length` leaves hardly any context beside the longest question, or the tokenizer has no token
            for anything in an answer.
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
    examples, spans, windows = [], [], []
    held = [np.zeros(len(row["context"]), dtype=bool) for row in rows]
    for i, owner in enumerate(owners):
        in_context = np.array([part == 1 for part in encoded.sequence_ids(i)])
        places = np.where(in_context[:, None], np.array(offsets[i]).reshape(-1, 2), -1)  # [T, 2]
        windows.append(places)
        for first, last in places[in_context]:
            held[owner][first:last] = True
    answers = [_held_answer(row, characters) for row, characters in zip(rows, held, strict=True)]
    for i, (owner, places) in enumerate(zip(owners, windows, strict=True)):
        start, end = token_span(places, *answers[owner])
        examples.append(
            {key: values[i] for key, values in encoded.items()} | {"start_positions": start, "end_positions": end}
        )
        spans.append(SpanFeature(owner, places.astype(np.int32), max_answer_length))
    return examples, spans


def _held_answer(row: Row, held: np.ndarray) -> tuple[int, int]:
    """First character and length of a row's first answer without what no token stands for at its ends: white space.

    `held` [characters of the context] says which ones a token stands for.
    """
    start, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
    characters = np.flatnonzero(held[start : start + len(text)])
    if len(characters) == 0:
        raise ValueError(
            f"the tokenizer has no token for the answer {text!r} of question {row.get('id')!r}; leave the question out"
        )
    return start + int(characters[0]), int(characters[-1] - characters[0]) + 1


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
        start_logits, end_logits: [F, T] of the F windows' own tokens, padded on the right to any T.
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
