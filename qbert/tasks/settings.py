"""Hyper-parameters of fine-tuning and their defaults by task.

    >>> default_settings(task, hidden_size=384)
    TrainingSettings(epochs=3, learning_rate=0.0001, batch_size=16, ...)

Small encoders (MiniLM, width 384) want a rate of about 1e-4; for wider ones the BERT paper's 2e-5 to 5e-5 holds
(Devlin et al. 2019, appendix A.3). Small data sets get more epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qbert.tasks.task import Task


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a fine-tuning run, apart from model and data.

    Attributes:
        epochs: passes over the training rows.
        learning_rate: peak rate of AdamW, reached after the warm-up, then down to 0 linearly.
        batch_size: examples a step.
        warmup: share of the steps with a rising rate.
        weight_decay: of matrices; biases and normalization weights are not decayed.
        clip: largest norm of the gradient.
        max_length: longest input in tokens; by task where None.
        train_limit: rows to train on, drawn by `seed`; all where None.
        seed: of new head, data order and dropout.
        bf16: matrix products in bfloat16 (autocast) on a CPU that computes it natively; CUDA devices that have it
            always use it.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int | None = None
    train_limit: int | None = None
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("train_limit", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
                raise ValueError(f"{name}={value!r} is not an integer of at least {lowest}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r} is not a share of the steps from 0 to below 1")
        if not math.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} is not a number of at least 0")


# (epochs, batch size) for MiniLM; those of reviews were compared on its held-out rows, the others follow their sizes
_BY_TASK = {
    "reviews": (3, 16),
    "sst2": (3, 32),
    "mrpc": (5, 16),
    "cola": (5, 32),
    "stsb": (4, 16),
    "rte": (8, 16),
    "qnli": (3, 32),
    "mnli": (3, 32),
    "qqp": (3, 32),
    "ag_news": (2, 32),
    "wnut17": (6, 16),
    "wnut17_fine": (6, 16),
    "conll2003": (3, 16),
    "squad": (2, 16),
}
_NARROW = 512


def default_settings(task: Task, hidden_size: int, **changes: int | float | None) -> TrainingSettings:
    """The settings for a task and a width; `changes` that are None leave the default.

    Raises:
        TypeError: a change that is no setting.
        ValueError: an impossible value.
    """
    known = {item.name for item in fields(TrainingSettings)}
    for name in changes:
        if name not in known:
            raise TypeError(f"{name!r} is no training setting; the settings are {', '.join(sorted(known))}")
    epochs, batch_size = _BY_TASK.get(task.name, (3, 32))
    values: dict[str, int | float | None] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": 1e-4 if hidden_size <= _NARROW else 3e-5,
    }
    values.update({name: value for name, value in changes.items() if value is not None})
    return TrainingSettings(**values)  # type: ignore[arg-type]
