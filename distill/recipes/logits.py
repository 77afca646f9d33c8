"""The teacher's outputs alone: what every further term of a recipe is compared with.

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; Turc et al. 2019, "Well-Read
Students Learn Better", section 2, distil their compact models so, without hard labels.
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def logits(*, temperature: float = 1.0) -> Recipe:
    """Soft cross-entropy of the outputs; label-free.

    Args:
        temperature: of the soft targets.
    """
    return Recipe(
        name="logits",
        source="Hinton et al. 2015",
        stages=(Stage("distillation", (Match("logits", options={"temperature": temperature}),)),),
        steps="fixed",
        arguments={"learning_rate": 1e-4, "num_train_epochs": 3, "warmup_steps": 0.1},
    )
