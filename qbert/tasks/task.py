"""A task: labelled rows, the names of its labels and its official metrics, wherever the rows came from.

    >>> task = load_task("mrpc", data_dir="data")
    >>> task.score(predicted_classes, [row["label"] for row in task.splits["validation"]])
    {'accuracy': 86.3, 'f1': 90.2}

Rows are plain dicts, one list a split:

==================  ==========================================================================================
kind                row
==================  ==========================================================================================
``classification``  one or two text fields, ``label``: int, an index into ``label_names``
``regression``      one or two text fields, ``label``: float
``token``           ``tokens``: list of words, ``tags``: list of tag names of the same length (`metrics.entity_tags`)
``span``            ``id``, ``question``, ``context``, ``answers``: {``text``, ``answer_start``, ``start_exact``}
==================  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from qbert.tasks import metrics

Row = dict[str, Any]
Kind = Literal["classification", "regression", "token", "span"]


@dataclass(frozen=True)
class Task:
    """Labelled data with its labels and metrics.

    Attributes:
        name: registry name ("sst2") or the name of the user's folder.
        kind: what is predicted; decides head, loss and metric.
        text_fields: the row fields that the tokenizer reads, one or two, in order.
        label_names: classes or tags in the order of the head's outputs; empty for regression and span.
        splits: rows by split: "train", "validation" and, for MNLI, "validation_mismatched".
        metric_names: official metrics, in reporting order.
        primary_metric: the one number to compare models by.
        source: where the rows came from, in words.
        label_range: smallest and largest label of a regression.
    """

    name: str
    kind: Kind
    text_fields: tuple[str, ...]
    label_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Row]]
    metric_names: tuple[str, ...]
    primary_metric: str
    source: str
    label_range: tuple[float, float] | None = field(default=None)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """Every held-out split, the main one first."""
        return tuple(name for name in self.splits if name != "train")

    def references(self, split: str = "validation") -> list[Any]:
        """What `score` compares with: classes, floats, tag lists, or lists of accepted answer texts."""
        rows = self.rows(split)
        if self.kind == "token":
            return [row["tags"] for row in rows]
        if self.kind == "span":
            return [row["answers"]["text"] for row in rows]
        return [row["label"] for row in rows]

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of one split; ValueError where there is no such split."""
        if split not in self.splits:
            raise ValueError(f"task {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Official metrics, each 0 to 100 (correlations and Matthews -100 to 100), as GLUE and SQuAD print them.

        Args:
            predictions: classes [N] (or scores [N, C], then the largest counts), floats [N], tag lists, or texts.
            references: what `references()` gives, in the same order.

        Raises:
            ValueError: nothing to score, or a different number of predictions and references.
        """
        if len(predictions) != len(references) or len(references) == 0:
            raise ValueError(
                f"score of {self.name!r} needs as many predictions as references and at least one of each, "
                f"got {len(predictions)} and {len(references)}"
            )
        # What F1 means follows from the task's labels, not from those that happen to occur in these rows.
        scorers: dict[str, Callable[..., dict[str, float]]] = {
            "classification": partial(metrics.classification_scores, classes=len(self.label_names)),
            "regression": metrics.correlation_scores,
            "token": partial(metrics.tag_scores, label_names=self.label_names),
            "span": metrics.squad_scores,
        }
        scores = scorers[self.kind](predictions, references)
        return {name: scores[name] for name in self.metric_names}

    def check_scorer(self) -> None:
        """Raise MissingPackageError where `score` needs a package that is not installed."""
        metrics.check_scorer(self.kind, self.label_names)

    def subset(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> Task:
        """The same task on at most `train` and `validation` rows of each split, drawn by `seed` (see `subset`)."""
        limits = {name: train if name == "train" else validation for name in self.splits}
        cut = {name: subset(rows, limits[name], seed) for name, rows in self.splits.items()}
        if all(len(cut[name]) == len(rows) for name, rows in self.splits.items()):
            return self
        counts = ", ".join(f"{len(rows):,} {name}" for name, rows in cut.items())
        return replace(self, splits=cut, source=f"{self.source}; random subset: {counts}, seed {seed}")

    def describe(self) -> str:
        """One line that tells which data are used."""
        counts = ", ".join(f"{len(rows):,} {name}" for name, rows in self.splits.items())
        return f"{self.name} ({self.kind}, {'/'.join(self.metric_names)}): {counts} rows from {self.source}"

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the rows of one split and of the label names: the same data give the same text anywhere."""
        digest = hashlib.sha256(json.dumps([self.kind, self.text_fields, self.label_names]).encode())
        for row in self.rows(split):
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode())
        return digest.hexdigest()


def subset(rows: Sequence[Row], size: int | None, seed: int = 0) -> Sequence[Row]:
    """At most `size` of the rows, drawn without replacement, in their original order; all of them for None.

    The rows for a smaller `size` are contained in those for a larger one (same seed), so curves over the amount of
    data are nested.
    """
    if size is None or size >= len(rows):
        return rows
    if size < 1:
        raise ValueError(f"a subset needs at least one row, got size={size}")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in sorted(order[:size])]


def seeded_split(rows: Sequence[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Cut rows into (kept, held out), `fraction` of every label held out, at least one row on either side.

    Rows without a hashable ``label`` (tags, spans) count as one group.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or there are fewer than two rows.
    """
    if not 0 < fraction < 1 or len(rows) < 2:
        raise ValueError(
            f"a split needs two rows and a fraction between 0 and 1, got {len(rows)} rows and fraction={fraction}"
        )
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        label = row.get("label")
        groups.setdefault(label if isinstance(label, int | str) else None, []).append(i)
    generator = random.Random(seed)
    held: set[int] = set()
    for _, members in sorted(groups.items(), key=lambda item: str(item[0])):
        held.update(generator.sample(members, math.floor(fraction * len(members) + 0.5)))
    if not held:
        held.add(generator.randrange(len(rows)))
    elif len(held) == len(rows):
        held.remove(min(held))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def check_rows(task: Task) -> None:
    """Raise ValueError at the first split that is empty or row that the task's head could not be trained on."""
    if task.kind == "classification" and len(task.label_names) < 2:
        raise ValueError(
            f"task {task.name!r} ({task.source}) has {len(task.label_names)} class(es) in its data; "
            "classification needs at least two"
        )
    if task.kind == "token":
        try:
            metrics.entity_tags(task.label_names)
        except ValueError as error:
            raise ValueError(f"task {task.name!r} ({task.source}): {error}") from None
    for split, rows in task.splits.items():
        if len(rows) == 0:
            raise ValueError(f"split {split!r} of task {task.name!r} ({task.source}) is empty; give it rows")
        check_split(task, split, rows)


def check_split(task: Task, split: str, rows: Sequence[Row]) -> None:
    """Raise ValueError at the first of `rows`, which are rows of `split`, that the head could not be trained on."""
    check = {
        "classification": _check_class,
        "regression": _check_number,
        "token": _check_tags,
        "span": _check_span,
    }[task.kind]
    for row in rows:
        wrong = [name for name in task.text_fields if name != "tokens" and not isinstance(row[name], str)]
        problem = (
            f"{wrong[0]} is {row[wrong[0]]!r}, expected text" if wrong else check(row, task) or _check_text(row, task)
        )
        if problem:
            index = next(i for i, other in enumerate(task.rows(split)) if other is row)
            raise ValueError(f"row {index} of split {split!r} of task {task.name!r} ({task.source}): {problem}")


def _check_text(row: Row, task: Task) -> str:
    """Tokenizers take no text with half of a surrogate pair, which JSON can hold."""
    for name in task.text_fields:
        for text in row[name] if name == "tokens" else [row[name]]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start : error.end]
                return f"{name} holds {half!r}, half of a character (an emoji that was cut?); mend or leave out the row"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


_UNLABELLED = (-1, -100)  # as the hub and the loss functions mark it


def _check_class(row: Row, task: Task) -> str:
    label, last = row["label"], len(task.label_names) - 1
    classes = f"0 to {last} ({', '.join(task.label_names)})"
    if isinstance(label, bool) or not isinstance(label, Integral):
        mend = ""
        if _is_number(label):
            mend = "; for a regression write every label with a point (5.0), or name a task of numbers"
        return f"label is {label!r}, expected an integer from {classes}{mend}"
    if not 0 <= int(label) <= last:
        mend = "; it marks a row without a label: leave such rows out" if label in _UNLABELLED else ""
        return f"label {label} is out of range, expected {classes}{mend}"
    return ""


def _check_number(row: Row, task: Task) -> str:
    label = row["label"]
    if not _is_number(label):
        return f"label is {label!r}, expected a finite number"
    if task.label_range is not None and not task.label_range[0] <= label <= task.label_range[1]:
        return f"label {label} is out of range, expected {task.label_range[0]:g} to {task.label_range[1]:g}"
    return ""


def _check_tags(row: Row, task: Task) -> str:
    tokens, tags = row["tokens"], row["tags"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return f"tokens is {str(tokens)[:60]!r}, expected a list of words"
    if not isinstance(tags, list) or len(tags) != len(tokens):
        return f"{len(tokens)} tokens but {len(tags) if isinstance(tags, list) else tags!r} tags, expected one a token"
    for tag in tags:
        if not isinstance(tag, str):
            return f"tag {tag!r} is no name; write tags as text, such as O and B-PER"
        if tag not in task.label_names:
            return f"unknown tag {tag!r}, expected one of {', '.join(task.label_names)}"
    return ""


def _check_span(row: Row, task: Task) -> str:
    answers = row["answers"]
    if not answers["text"]:
        return f"question {row['id']!r} has no answer (SQuAD v1.1 has at least one; v2 is not supported)"
    for text in answers["text"]:
        if not isinstance(text, str):
            return f"an answer of question {row['id']!r} is {text!r}, expected text"
    for start in answers["answer_start"]:
        if isinstance(start, bool) or not isinstance(start, Integral) or start < 0:
            return (
                f"answer_start of question {row['id']!r} is {start!r}, expected a character's place, an integer from 0"
            )
    if not all(text.strip() for text in answers["text"]):
        return f"an answer of question {row['id']!r} is empty; give it words, or leave the question out"
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if row["context"][start : start + len(text)] != text:
            return f"answer {text!r} of question {row['id']!r} does not stand at answer_start={start} of its context"
    return ""
