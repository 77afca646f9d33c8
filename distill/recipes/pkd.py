"""Patient knowledge distillation: hard labels, soft targets, and the normalised CLS vector of intermediate layers.

Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", eq. 7-8; authors' grid:
temperature 5, 10, 20; alpha 0.2, 0.5, 0.7; beta 10, 100, 500, 1000, of a mean over layers and width (their code,
intersun/PKD-for-BERT-Model-Compression). The student starts from the teacher's first layers. Difference: the divergence of
the soft targets is summed over the classes, as the paper has it; the code takes its mean.
"""

from __future__ import annotations

from typing import Literal

from qbert.distill.recipe import Match, Recipe, Stage


def pkd(
    *, temperature: float = 10.0, alpha: float = 0.5, beta: float = 100.0, layers: Literal["skip", "last"] = "skip"
) -> Recipe:
    """(1 - alpha) hard + alpha soft + beta patience.

    Args:
        temperature: of the soft targets.
        alpha: weight of the soft targets, in (0, 1).
        beta: weight of the patience term.
        layers: ``skip`` (every k-th teacher layer but the last) or ``last`` (the last layer).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not a share; use a number between 0 and 1")
    matches = (
        Match("labels", weight=1 - alpha),
        Match("logits", "kl", weight=alpha, options={"temperature": temperature}),
        Match("cls", "normalized_mse", weight=beta, layers=layers),
    )
    return Recipe(
        name="pkd",
        source="Sun et al. 2019",
        stages=(Stage("distillation", matches),),
        steps="fixed",
        arguments={
            "learning_rate": 5e-5,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 32,
            "warmup_steps": 0.1,
        },
    )
