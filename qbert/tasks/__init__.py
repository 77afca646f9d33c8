"""Data sets, metrics, heads and fine-tuning: everything a spectrum, a bit search or a distillation run is fed with.

    >>> from qbert.tasks import build_model, evaluate, fine_tune, load_task, prepare
    >>> task = load_task("sst2", data_dir="data")
    >>> tuned = fine_tune(task)
    >>> evaluate(tuned.model, task, tuned.tokenizer)["accuracy"]

Names are imported on first use, so that listing the tasks does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Evaluation": "qbert.tasks.evaluation",
    "FineTuned": "qbert.tasks.training",
    "Prepared": "qbert.tasks.encoding",
    "SentenceRegression": "qbert.tasks.heads",
    "TASK_NAMES": "qbert.tasks.registry",
    "Task": "qbert.tasks.task",
    "TrainingSettings": "qbert.tasks.training",
    "build_model": "qbert.tasks.heads",
    "build_sentence_model": "qbert.tasks.heads",
    "embedded_encoder": "qbert.tasks.embedded",
    "evaluate": "qbert.tasks.evaluation",
    "fine_tune": "qbert.tasks.training",
    "load_task": "qbert.tasks.registry",
    "prepare": "qbert.tasks.encoding",
    "seeded_split": "qbert.tasks.task",
    "sentence_similarity_score": "qbert.tasks.heads",
    "subset": "qbert.tasks.task",
}

__all__ = [
    "TASK_NAMES",
    "Evaluation",
    "FineTuned",
    "Prepared",
    "SentenceRegression",
    "Task",
    "TrainingSettings",
    "build_model",
    "build_sentence_model",
    "embedded_encoder",
    "evaluate",
    "fine_tune",
    "load_task",
    "prepare",
    "seeded_split",
    "sentence_similarity_score",
    "subset",
]

if TYPE_CHECKING:
    from qbert.tasks.embedded import embedded_encoder
    from qbert.tasks.encoding import Prepared, prepare
    from qbert.tasks.evaluation import Evaluation, evaluate
    from qbert.tasks.heads import SentenceRegression, build_model, build_sentence_model, sentence_similarity_score
    from qbert.tasks.registry import TASK_NAMES, load_task
    from qbert.tasks.task import Task, seeded_split, subset
    from qbert.tasks.training import FineTuned, TrainingSettings, fine_tune


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qbert.tasks' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
