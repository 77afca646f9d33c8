"""Which tasks there are, and where their rows come from: the embedded corpus, a local folder, or the hub.

    >>> load_task()                                   # the embedded corpus
    >>> load_task("mnli", data_dir="data")            # data/mnli/train.jsonl.gz, dev_matched.jsonl.gz, ...
    >>> load_task("my_tickets", data_dir="my_data")   # any folder with train.jsonl and dev.jsonl
    >>> load_task("sst2")                             # from the Hugging Face hub

GLUE: Wang et al. 2019; SQuAD v1.1: Rajpurkar et al. 2016; CoNLL-2003: Tjong Kim Sang and De Meulder 2003;
W-NUT 2017: Derczynski et al. 2017; AG News: Zhang et al. 2015. Labels and field names follow ``datasets``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbert.tasks import local
from qbert.tasks.embedded import read_reviews
from qbert.tasks.heads import quiet_libraries
from qbert.tasks.metrics import entity_tags
from qbert.tasks.task import Kind, Row, Task, check_rows

_CONLL_HUB_ORDER = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_WNUT_HUB_ORDER = (
    "O",
    *(
        f"{prefix}-{name}"
        for name in ("corporation", "creative-work", "group", "location", "person", "product")
        for prefix in "BI"
    ),
)
_HUB_TAGS = {
    "conll2003": _CONLL_HUB_ORDER,
    "wnut17": _WNUT_HUB_ORDER,
    "wnut17_fine": _WNUT_HUB_ORDER,
}
_COARSE = {
    "corporation": "ORG",
    "group": "ORG",
    "creative-work": "MISC",
    "product": "MISC",
    "location": "LOC",
    "person": "PER",
}


def read_hub_splits(
    name: str,
    hub: tuple[str, str | None, str | None],
    hub_splits: Mapping[str, str],
    kind: Kind,
    label_names: tuple[str, ...],
) -> tuple[dict[str, list[Row]], str]:
    """(rows by split, where they came from); ConnectionError with one sentence where the hub cannot be reached."""
    import datasets

    repository, config, revision = hub
    try:
        with quiet_libraries():
            data = datasets.load_dataset(repository, config, revision=revision)
    except Exception as error:
        raise ConnectionError(
            f"task {name!r} could not be fetched from the hub ({repository}: {str(error).splitlines()[0][:120]}); "
            "give its local folder with --data-dir (data_dir=...) or go online once"
        ) from error
    splits = {
        ours: [to_row(name, kind, raw, label_names) for raw in data[theirs]] for ours, theirs in hub_splits.items()
    }
    return splits, f"the hub ({repository}{' ' + config if config else ''})"


def to_row(name: str, kind: Kind, raw: Mapping[str, Any], label_names: tuple[str, ...]) -> Row:
    """One row of `datasets` in our layout (see `qbert.tasks.task`)."""
    if kind == "span":
        answers = dict(raw["answers"])
        answers["start_exact"] = [True] * len(answers["text"])
        return {key: raw[key] for key in ("id", "question", "context")} | {"answers": answers}
    if kind == "token":
        order = _HUB_TAGS[name]
        tags = [tag if isinstance(tag, str) else order[tag] for tag in raw["ner_tags"]]
        if name == "wnut17":
            tags = [tag if tag == "O" else f"{tag[:2]}{_COARSE[tag[2:]]}" for tag in tags]
        return {"tokens": list(raw["tokens"]), "tags": tags}
    return {key: value for key, value in raw.items() if key not in ("idx", "label")} | {"label": raw["label"]}


@dataclass(frozen=True)
class TaskSpec:
    """What is known about a task before its rows are read.

    Attributes:
        kind, text_fields, label_names, metric_names, primary_metric, label_range: as in `Task`.
        hub: (repository, configuration, revision) for ``datasets.load_dataset``; None where there is none.
        hub_splits: our split name -> the hub's.
        tag_field: the field of a local token row that holds the tags.
    """

    kind: Kind
    text_fields: tuple[str, ...]
    label_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    primary_metric: str
    hub: tuple[str, str | None, str | None] | None
    hub_splits: Mapping[str, str]
    label_range: tuple[float, float] | None = None
    tag_field: str = "ner_tags"


def _bio(*types: str) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{name}" for name in types for prefix in "BI"))


_TWO = {"train": "train", "validation": "validation"}
_NEWS = ("World", "Sports", "Business", "Sci/Tech")
_ENTAILMENT = ("entailment", "not_entailment")
_CONLL = _bio("PER", "ORG", "LOC", "MISC")
_WNUT = _bio("corporation", "creative-work", "group", "location", "person", "product")
# Both only exist on the hub as loading scripts, which `datasets` no longer runs; these are their parquet copies.
_WNUT_HUB = ("leondz/wnut_17", None, "refs/convert/parquet")
_ENTITY = ("f1", "precision", "recall")


def _glue(
    config: str, fields: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...], primary: str
) -> TaskSpec:
    return TaskSpec("classification", fields, labels, metrics, primary, ("nyu-mll/glue", config, None), _TWO)


SPECS: dict[str, TaskSpec] = {
    "reviews": TaskSpec("classification", ("text",), ("negative", "positive"), ("accuracy",), "accuracy", None, _TWO),
    "sst2": _glue("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "accuracy"),
    "mrpc": _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1"), "f1"),
    "cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "matthews"),
    "stsb": TaskSpec(
        "regression",
        ("sentence1", "sentence2"),
        (),
        ("pearson", "spearman"),
        "spearman",
        ("nyu-mll/glue", "stsb", None),
        _TWO,
        label_range=(0.0, 5.0),
    ),
    "rte": _glue("rte", ("sentence1", "sentence2"), _ENTAILMENT, ("accuracy",), "accuracy"),
    "qnli": _glue("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), "accuracy"),
    "mnli": TaskSpec(
        "classification",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "accuracy",
        ("nyu-mll/glue", "mnli", None),
        {
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
    ),
    "qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "f1"),
    "ag_news": TaskSpec(
        "classification",
        ("text",),
        _NEWS,
        ("accuracy",),
        "accuracy",
        ("fancyzhx/ag_news", None, None),
        {"train": "train", "validation": "test"},
    ),
    "wnut17": TaskSpec("token", ("tokens",), _CONLL, _ENTITY, "f1", _WNUT_HUB, _TWO),
    "wnut17_fine": TaskSpec("token", ("tokens",), _WNUT, _ENTITY, "f1", _WNUT_HUB, _TWO, tag_field="wnut_tags"),
    "conll2003": TaskSpec("token", ("tokens",), _CONLL, _ENTITY, "f1", ("lhoestq/conll2003", None, None), _TWO),
    "squad": TaskSpec(
        "span",
        ("question", "context"),
        (),
        ("exact_match", "f1"),
        "f1",
        ("rajpurkar/squad", None, None),
        _TWO,
    ),
}
# A data folder shared by two tasks (the same tweets with four coarse or six fine entity types).
_FOLDERS = {"wnut17_fine": "wnut17"}
TASK_NAMES: tuple[str, ...] = tuple(SPECS)


def load_task(name: str = "reviews", *, data_dir: str | Path | None = None, drop_inexact_spans: bool = False) -> Task:
    """Read a task: the embedded corpus ("reviews"), a local folder (`data_dir`), or the hub.

    Args:
        name: one of `TASK_NAMES`, or with `data_dir` the name of any folder in it. A folder of an unknown name is
            read by its fields: `text` (after its `title`, where it has one) or `sentence` or a pair of them with
            `label` (int or name: classification; float: regression), `tokens` with `tags` or `ner_tags` (names),
            `question` and `context` with `answers`, or SQuAD's JSON layout.
        data_dir: folder with one folder a task (``sst2/train.jsonl.gz``), or itself the folder of the task.
        drop_inexact_spans: leave out training questions whose answer position is marked as a guess
            (``start_exact`` false).

    Raises:
        ValueError: unknown task, missing or empty split, missing field, label out of range; names file and row.
        FileNotFoundError: `data_dir` has no such task.
        ConnectionError: the hub cannot be reached.
    """
    if data_dir is not None:
        return _local_task(name, Path(data_dir), drop_inexact_spans)
    if name not in SPECS:
        raise ValueError(
            f"unknown task {name!r}; known: {', '.join(TASK_NAMES)}; "
            "for your own data name its folder with --data-dir (data_dir=...)"
        )
    if name == "reviews":
        return _task(name, SPECS[name], read_reviews(), "the embedded corpus (qbert/tasks/reviews.jsonl)")
    spec = SPECS[name]
    assert spec.hub is not None
    splits, source = read_hub_splits(name, spec.hub, spec.hub_splits, spec.kind, spec.label_names)
    return _task(name, spec, splits, source)


def _local_task(name: str, data_dir: Path, drop_inexact_spans: bool) -> Task:
    folder = local.find_folder(data_dir, _FOLDERS.get(name, name))
    known = SPECS.get(name) if name != "reviews" else None
    if known is not None:
        splits = local.read_splits(folder, known.kind, known.text_fields, known.tag_field)
        spec = known
    else:
        name = folder.resolve().name
        kind, fields, tag_field = local.infer_layout(folder)
        splits = local.read_splits(folder, kind, fields, tag_field)
        try:
            spec = _inferred_spec(kind, fields, splits)
        except ValueError as error:
            raise ValueError(f"task {name!r} ({folder}): {error}") from None
        splits = local.encode_labels(splits, spec.label_names) if kind == "classification" else splits
    if drop_inexact_spans and spec.kind == "span":
        exact = [row for row in splits["train"] if all(row["answers"]["start_exact"])]
        return _task(name, spec, {**splits, "train": exact}, f"{folder}, exact answer positions only")
    return _task(name, spec, splits, str(folder))


def _inferred_spec(kind: Kind, fields: tuple[str, ...], splits: Mapping[str, Sequence[Row]]) -> TaskSpec:
    names: tuple[str, ...] = ()
    if kind == "classification":
        names = local.infer_label_names(splits)
    elif kind == "token":
        # What is no list of names is left for the check of the rows, which names it.
        lists = [row["tags"] for rows in splits.values() for row in rows if isinstance(row["tags"], list)]
        tags = {tag for tags in lists for tag in tags if isinstance(tag, str)}
        names = tuple(sorted(tags - {"O"}, key=lambda tag: (tag[2:], tag)))
        if "O" in tags or entity_tags(names) is not None:
            names = ("O", *names)
    scores: tuple[str, ...] = {
        "classification": ("accuracy", "f1"),
        "regression": ("pearson", "spearman"),
        "token": ("accuracy", "f1") if kind == "token" and entity_tags(names) is None else _ENTITY,
        "span": ("exact_match", "f1"),
    }[kind]
    primary = {"regression": "spearman", "span": "f1"}.get(kind, "f1" if scores == _ENTITY else "accuracy")
    return TaskSpec(kind, fields, names, scores, primary, None, _TWO)


def _task(name: str, spec: TaskSpec, splits: Mapping[str, Sequence[Row]], source: str) -> Task:
    task = Task(
        name=name,
        kind=spec.kind,
        text_fields=spec.text_fields,
        label_names=spec.label_names,
        splits=dict(splits),
        metric_names=spec.metric_names,
        primary_metric=spec.primary_metric,
        source=source,
        label_range=spec.label_range,
    )
    check_rows(task)
    return task
