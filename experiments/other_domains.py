"""Rows of other domains: held-out ones that a model of a task is scored on too, and unlabelled ones to distil on.

    for domain in other_domains(task, tokenizer, data_dir="DATA"):
        print(domain.name, domain.evaluate(model).primary)
    rows = unlabelled_rows(["wikitext2", "ag_news"], task, tokenizer, 800, data_dir="DATA")

A student is chosen and trained on rows of one domain; whether it still acts like its teacher elsewhere is another
question, and an easier one to lose. It stands alone because every table of students asks it.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbert.tasks import Evaluation, Task, load_task
from qbert.tasks.encoding import Prepared, prepare, resolve_max_length
from qbert.tasks.evaluation import evaluate_prepared

# Task -> (other task, split, class of the other task by class of the model; None where they are the same).
_ELSEWHERE: dict[str, tuple[tuple[str, str, tuple[int, ...] | None], ...]] = {
    "sst2": (("reviews", "validation", None),),
    "reviews": (("sst2", "validation", None),),
    "mnli": (("mnli", "validation_mismatched", None), ("rte", "validation", (0, 1, 1))),
    "mrpc": (("qqp", "validation", None),),
}
_WORDS = (8, 50)  # of a sentence that is cut out of plain text


@dataclass(frozen=True)
class OtherDomain:
    """Labelled rows that a model is scored on without having been made for them.

    Attributes:
        name: of the rows, for tables.
        data: the tokenized rows, with the model's classes.
        task: what scores the predictions.
        classes: class of `task` by class of the model; None where they are the same.
    """

    name: str
    data: Prepared
    task: Task
    classes: tuple[int, ...] | None

    def evaluate(self, model: Any) -> Evaluation:
        """The model's outputs on these rows, and as ``primary`` the score of the other task."""
        result = evaluate_prepared(model, self.data)
        if self.classes is not None:
            predictions = [self.classes[int(p)] for p in result.predictions]
            scores = self.task.score(predictions, [row["label"] for row in self.data.rows])
            result.primary = scores[self.task.primary_metric]
        return result


def other_domains(
    task: Task, tokenizer: Any, *, data_dir: str | None = None, limit: int | None = 1000, choosing: bool = False
) -> list[OtherDomain]:
    """The other domains of a task whose rows are at hand; says which are not.

    Args:
        limit: use at most this many rows of each.
        choosing: use training rows, and leave the held-out ones for the last.
    """
    found = []
    for name, split, classes in _ELSEWHERE.get(task.name, ()):
        if task.name == "reviews" and not data_dir:
            continue  # whoever stays with the embedded rows may have no network
        try:
            other = load_task(name, data_dir=None if name == "reviews" else data_dir)
        except (FileNotFoundError, ConnectionError) as error:
            print(f"nothing is scored on {name}, whose rows are not at hand: {error}")
            continue
        if choosing and name == task.name:
            continue  # its training rows are those of the task itself
        scorer = other
        if classes is not None:  # the model's head has other classes, among which the labels must be valid
            other = replace(other, label_names=task.label_names)
        data = prepare(other, tokenizer, "train" if choosing else split, limit=limit)
        label = name if name != task.name else split.removeprefix("validation_")
        found.append(OtherDomain(label, data, scorer, classes))
    return found


def other_domain(task: Task, tokenizer: Any, *, data_dir: str | None, limit: int | None) -> OtherDomain | None:
    """The first of `other_domains`, of at most `limit` rows (None: 1,000); None where no rows are at hand."""
    found = other_domains(task, tokenizer, data_dir=data_dir, limit=limit or 1000)
    return found[0] if found else None


def scores_elsewhere(domains: Sequence[OtherDomain], model: Any) -> dict[str, float]:
    """Score of a model by name of the other domain."""
    return {domain.name: domain.evaluate(model).primary for domain in domains}


def unlabelled_rows(
    names: Sequence[str], task: Task, tokenizer: Any, count: int, *, data_dir: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` tokenized rows without labels, as many of each source.

    Args:
        names: tasks (their training rows; of a pair each text is a row of its own where `task` has single texts), or
            folders of `data_dir` with plain text (``*.txt``, ``*.txt.gz``), which is cut into sentences.
        task: tells how many texts a row has and how long it may be.

    Raises:
        ValueError: a source has too few rows, or single texts where the task has pairs.
    """
    length = resolve_max_length(task, tokenizer, None)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        share = count * (number + 1) // len(names) - count * number // len(names)
        texts = list(_texts(name, len(task.text_fields), data_dir))
        if len(texts) < share:
            raise ValueError(
                f"{name} has {len(texts)} rows, fewer than the {share} that are asked for; name more sources"
            )
        columns = [list(column) for column in zip(*random.Random(seed).sample(texts, share), strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=length) if share else {"input_ids": []}
        rows += [{key: values[i] for key, values in encoded.items()} for i in range(len(encoded["input_ids"]))]
    random.Random(seed).shuffle(rows)
    return rows


def _texts(name: str, fields: int, data_dir: str | None) -> Iterator[tuple[str, ...]]:
    folder = Path(data_dir or ".") / name
    files = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")]) if data_dir else []
    if files:
        if fields > 1:
            raise ValueError(f"{name} holds plain text, and the task has pairs of texts; name a task of pairs")
        for file in files:
            yield from ((sentence,) for sentence in _sentences(file))
        return
    task = load_task(name, data_dir=None if name == "reviews" else data_dir)
    if task.kind not in ("classification", "regression") or len(task.text_fields) < fields:
        raise ValueError(f"{name} has no rows of {fields} texts; name a task that has")
    for row in task.rows("train"):
        texts = tuple(row[field] for field in task.text_fields)
        yield from ([texts] if len(texts) == fields else ((text,) for text in texts))


def _sentences(file: Path) -> Iterator[str]:
    """Sentences of a file, but for those with words left out (``<unk>``); WikiText's joining marks are undone."""
    with (
        gzip.open(file, "rt", encoding="utf-8") if file.name.endswith(".gz") else open(file, encoding="utf-8") as lines
    ):
        for line in lines:
            for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r" @(\W)@ ", r"\1", line.strip())):
                if _WORDS[0] <= len(sentence.split()) <= _WORDS[1] and "<unk>" not in sentence:
                    yield sentence
