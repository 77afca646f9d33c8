"""Checks of a task's rows, made once before any work: each failure is one sentence with split, row, value and mend.

>>> check_rows(task)   # returns nothing, or raises ValueError
"""

from __future__ import annotations

import math
from typing import Any

from qbert.tasks.task import Row, Task


def check_rows(task: Task) -> None:
    """Raise ValueError at the first split that is empty or row that the task's head could not be trained on."""
    if task.kind == "classification" and len(task.label_names) < 2:
        raise ValueError(
            f"task {task.name!r} ({task.source}) has {len(task.label_names)} class(es) in its data; "
            "classification needs at least two"
        )
    check = {
        "classification": _check_class,
        "regression": _check_number,
        "token": _check_tags,
        "span": _check_span,
    }[task.kind]
    for split, rows in task.splits.items():
        if len(rows) == 0:
            raise ValueError(f"split {split!r} of task {task.name!r} ({task.source}) is empty; give it rows")
        for i, row in enumerate(rows):
            for field in task.text_fields:
                if field != "tokens" and not isinstance(row[field], str):
                    raise ValueError(_message(task, split, i, f"{field} is {row[field]!r}, expected text"))
            problem = check(row, task)
            if problem:
                raise ValueError(_message(task, split, i, problem))


def _message(task: Task, split: str, index: int, problem: str) -> str:
    return f"row {index} of split {split!r} of task {task.name!r} ({task.source}): {problem}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_class(row: Row, task: Task) -> str:
    label, last = row["label"], len(task.label_names) - 1
    if isinstance(label, bool) or not isinstance(label, int):
        return f"label is {label!r}, expected an integer from 0 to {last} ({', '.join(task.label_names)})"
    if not 0 <= label <= last:
        return f"label {label} is out of range, expected 0 to {last} ({', '.join(task.label_names)})"
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
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if row["context"][start : start + len(text)] != text:
            return f"answer {text!r} of question {row['id']!r} does not stand at answer_start={start} of its context"
    return ""
