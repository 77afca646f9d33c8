"""Few labels and many rows without: the teacher labels them, the student learns from both.

Source: Wasserblat et al. 2020, "Exploring the Boundaries of Low-Resource BERT Distillation": labelled rows have their
label and the teacher's output, the others the teacher's alone, as soft targets or as pseudo-labels.
"""

from __future__ import annotations

from typing import Literal

from qbert.distill.recipe import Match, Recipe, Stage


def low_resource(
    *, targets: Literal["soft", "pseudo"] = "soft", labels: float = 1.0, temperature: float = 1.0
) -> Recipe:
    """The teacher's word on every row, and the label where there is one (-100 elsewhere).

    Args:
        targets: ``soft`` (the teacher's probabilities) or ``pseudo`` (its decision, as if it were a label).
        labels: weight of the task's own loss; 0 leaves the labels out.
        temperature: of soft targets.
    """
    if targets not in ("soft", "pseudo"):
        raise ValueError(f"targets={targets!r} is not possible; use 'soft' or 'pseudo'")
    if labels < 0:
        raise ValueError(f"labels={labels} is not a weight; use 0 to learn from the teacher alone, or more")
    soft = Match("logits", "soft_ce", options={"temperature": temperature})
    teacher = soft if targets == "soft" else Match("logits", "hard_ce")
    return Recipe(
        name="low_resource",
        source="Wasserblat et al. 2020",
        stages=(Stage("distillation", (teacher, *([Match("labels", weight=labels)] if labels else []))),),
        steps="fixed",
        arguments={
            "learning_rate": 1e-3,
            "num_train_epochs": 10,
            "per_device_train_batch_size": 32,
            "weight_decay": 0.0,
        },
    )
