"""Quantization-aware training without a teacher: the baseline that every recipe is compared with.

Source: Jacob et al. 2018; Zafrir et al. 2019, Q8BERT.
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def qat(*, learned_steps: bool = True) -> Recipe:
    """The task's own loss on the labels; the same quantizers, schedule and budget as `qbert_kd`."""
    return Recipe(
        name="qat",
        source="Jacob et al. 2018",
        stages=(Stage("training", (Match("labels"),)),),
        steps="learned" if learned_steps else "fixed",
        arguments={"learning_rate": 1e-4, "num_train_epochs": 3, "warmup_steps": 0.1},
    )
