"""Rows from files: ``train.jsonl[.gz]`` and ``dev.jsonl[.gz]`` in a folder, or SQuAD's own JSON layout.

One JSON object a line; a file called .json may hold those too, or one array of them (as `datasets` writes either). The
held-out file is called dev, validation or dev_matched; dev_mismatched (or
validation_mismatched) becomes a second held-out split. A version or size may follow the name ("train-v1.1.json"), or a
number of several ("train-00000-of-00002.jsonl"), which are then read one behind the other.
It stands alone because it knows layouts of files only; which task has which, and what rows mean, is the registry's.

    >>> read_splits(Path("data/sst2"), "classification", ("sentence",))["train"][0]
    {'sentence': 'hide new secretions from the parental units ', 'label': 0}
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qbert.tasks.task import Kind, Row

_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation", "dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
}
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)


# Characters. A compressed file of a megabyte can hold a gigabyte, which must not be in memory before it is refused.
_LONGEST_LINE = 2**24
_LONGEST_FILE = 2**27


def find_folder(data_dir: Path, name: str) -> Path:
    """`data_dir`/`name`, or `data_dir` itself where it holds the training file; FileNotFoundError names the choice."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a folder; name one that holds the task's files")
    for folder in (data_dir / name, data_dir):
        if _candidates(folder, "train") and _candidates(folder, "validation"):
            return folder
    offered = sorted(d.name for d in data_dir.iterdir() if d.is_dir() and _candidates(d, "train"))
    raise FileNotFoundError(
        f"data_dir {str(data_dir)!r} has no task {name!r} (no {name}/train.jsonl[.gz] with {name}/dev.jsonl[.gz]); "
        + (f"it has: {', '.join(offered)}" if offered else "it has no task at all")
    )


def _candidates(folder: Path, split: str) -> list[re.Match[str]]:
    """The names of files in `folder` that may hold a split: those of the first stem that has any, sorted."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    for stem in _STEMS[split]:
        # a version, a size or a number may follow: train-v1.1.json.gz, dev_mismatched_1000.jsonl.gz, train-0-of-2.json
        pattern = re.compile(rf"{stem}(?P<more>[-_](?:(?P<part>\d+)-of-(?P<parts>\d+)|v?\d.*))?\.jsonl?(\.gz)?")
        found = [match for name in names if (match := pattern.fullmatch(name))]
        if found:
            return found
    return []


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in their order, if any: the one of the plain name, else all parts, else the only one.

    Raises:
        ValueError: where files are left to choose from, or a part is missing.
    """
    found = _candidates(folder, split)
    plain = [match for match in found if not match["more"]]
    chosen = plain or found
    parts = {int(match["part"]): match for match in chosen if match["part"]}
    if not plain and len(parts) == len(chosen) and parts:
        first, count = min(parts), len(parts)
        if first <= 1 and max(parts) == first + count - 1 and {int(m["parts"]) for m in chosen} == {count}:
            return [folder / parts[number].string for number in sorted(parts)]
        raise ValueError(
            f"{folder} has {', '.join(m.string for m in chosen)} for split {split!r}, which are not all parts of one "
            "set; bring the others, or take away those of another set"
        )
    if len(chosen) > 1:
        raise ValueError(
            f"{folder} has several files for split {split!r}: {', '.join(m.string for m in chosen)}; take away all but "
            "one, or give one the plain name, such as train.jsonl"
        )
    return [folder / match.string for match in chosen]


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON objects of a .jsonl or .jsonl.gz file; ValueError names file and line of the first that is none."""
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), ""), start=1):
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"line {number} of {path} is longer than {_LONGEST_LINE} characters; split it")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", str(error))
                    raise ValueError(f"line {number} of {path} is not JSON ({reason}); mend it") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {path} is no JSON object; expected one {{...}} a line")
                yield row
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from None


_HEAD = 1 << 16  # characters looked at to tell the layouts of a .json file apart


def _is_whole(path: Path) -> bool:
    """Whether a file is one JSON value, not one object a line."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return False
    with _open(path) as file:
        first, *others = file.read(_HEAD).lstrip().split("\n", 1)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True  # cut off, or laid out over several lines
    # A document in one line is SQuAD's, or a single row.
    return not isinstance(value, dict) or ("data" in value and not (others and others[0].strip()))


def _whole(path: Path) -> Any:
    """Rows, or the articles of SQuAD's layout, of a file that is one JSON value."""
    try:
        with _open(path) as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) <= _LONGEST_FILE:
            value = json.loads(text)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is neither one JSON object a line nor JSON as a whole, or is damaged ({error}); mend it or fetch "
            "it again"
        ) from None
    if len(text) > _LONGEST_FILE:
        raise ValueError(f"{path} is longer than {_LONGEST_FILE} characters; split it, or give one object a line")
    rows = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else value
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no JSON objects; expected one {{...}} a line, or a list of them")
    return rows


def read_objects(path: Path) -> Iterator[Any]:
    """The rows of a file, or its articles in SQuAD's layout; ValueError names the file where there are none."""
    try:
        whole = _is_whole(path)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from None
    return iter(_whole(path)) if whole else read_lines(path)


def _open(path: Path) -> Any:
    # "-sig" passes over the byte order mark that some editors put first.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def read_splits(
    folder: Path, kind: Kind, text_fields: tuple[str, ...], tag_field: str = "ner_tags"
) -> dict[str, list[Row]]:
    """All splits of a folder, each row cut to the fields that the task needs (see `qbert.tasks.task`)."""
    splits: dict[str, list[Row]] = {}
    for split in _STEMS:
        for path in _split_files(folder, split):
            rows = _read_spans(path) if kind == "span" else _read_rows(path, kind, text_fields, tag_field)
            if not rows:
                raise ValueError(f"{path} is empty; expected one JSON object a line")
            splits.setdefault(split, []).extend(rows)
    return splits


def _read_rows(path: Path, kind: Kind, text_fields: tuple[str, ...], tag_field: str) -> list[Row]:
    label_field = tag_field if kind == "token" else "label"
    rows = []
    for i, raw in enumerate(read_objects(path)):
        for field in (*text_fields, label_field):
            if field not in raw:
                raise ValueError(f"row {i} of {path} has no field {field!r}; it has {', '.join(raw)}")
        row = {field: raw[field] for field in text_fields}
        row["tags" if kind == "token" else "label"] = raw[label_field]
        if text_fields == ("text",) and isinstance(raw.get("title"), str):  # AG News: the headline is part of the text
            row["text"] = f"{raw['title']} {raw['text']}"
        rows.append(row)
    return rows


def _read_spans(path: Path) -> list[Row]:
    """Questions of a file in SQuAD's layout, or with one question a row as the hub gives them."""
    rows: list[Row] = []
    for i, part in enumerate(read_objects(path)):
        try:
            rows += _article_rows(part) if "paragraphs" in part else [_span_row(part, part["context"])]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not in the SQuAD v1.1 layout (missing {error}); see its data sheet") from None
        except _BadAnswersError as error:
            raise ValueError(f"row {i} of {path}: {error}") from None
    return rows


class _BadAnswersError(Exception):
    """Answers that are no list of texts and places."""


def _article_rows(article: Mapping[str, Any]) -> list[Row]:
    return [
        _span_row(question, paragraph["context"])
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _span_row(question: Mapping[str, Any], context: str) -> Row:
    """One question; its answers are dicts, or lists of texts and of starts."""
    answers = question["answers"]
    if isinstance(answers, Mapping):
        texts, starts = answers["text"], answers["answer_start"]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise _BadAnswersError(
                f"answers of question {question['id']!r} have text {texts!r} and answer_start {starts!r}; expected two "
                "lists of one length"
            )
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise _BadAnswersError(
            f"answers of question {question['id']!r} are {answers!r}; expected a list of objects with text and "
            "answer_start, or an object of two lists"
        )
    return {
        "id": question["id"],
        "question": question["question"],
        "context": context,
        "answers": {
            "text": [answer["text"] for answer in answers],
            "answer_start": [answer["answer_start"] for answer in answers],
            "start_exact": [answer.get("start_exact", True) for answer in answers],
        },
    }


def infer_layout(folder: Path) -> tuple[Kind, tuple[str, ...], str]:
    """(kind, text fields, tag field) of an unknown folder, from its first training row."""
    path = _split_files(folder, "train")[0]  # find_folder has seen it
    first = next(read_objects(path), None)
    if first is None:
        raise ValueError(f"{path} is empty; expected one JSON object a line")
    if "paragraphs" in first or {"question", "context", "answers"} <= set(first):
        return "span", ("question", "context"), ""
    for tag_field in ("tags", "ner_tags"):
        if "tokens" in first and tag_field in first:
            return "token", ("tokens",), tag_field
    if "label" in first:
        kind: Kind = "regression" if isinstance(first["label"], float) else "classification"
        for fields in (*_PAIRS, ("text",), ("sentence",)):
            if all(field in first for field in fields):
                return kind, fields, ""
    raise ValueError(
        f"{path} has the fields {', '.join(first)}; expected text (or sentence, or a pair such as sentence1 and "
        "sentence2) with label, tokens with tags, question and context with answers, or SQuAD's layout"
    )


def infer_label_names(splits: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """Class names from the labels of all splits: sorted names, or "0" ... up to the largest integer."""
    labels = [row["label"] for rows in splits.values() for row in rows]
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(set(labels)))
    largest = max((label for label in labels if isinstance(label, int)), default=-1)
    if largest > 1000:
        raise ValueError(f"labels go up to {largest}; for more than 1,000 classes or for ids give names or 0, 1, 2 ...")
    return tuple(str(i) for i in range(largest + 1))


def encode_labels(splits: Mapping[str, list[Row]], label_names: tuple[str, ...]) -> dict[str, list[Row]]:
    """Label names replaced by their index; integer labels are left for the range check."""
    index = {name: i for i, name in enumerate(label_names)}
    return {
        split: [
            {**row, "label": index[row["label"]]} if isinstance(row["label"], str) and row["label"] in index else row
            for row in rows
        ]
        for split, rows in splits.items()
    }
