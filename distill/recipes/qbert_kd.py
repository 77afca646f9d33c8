"""Our own recipe for low-bit encoders.

Source: this project; the losses of TernaryBERT (Zhang et al. 2020) as masked means on a normalised scale, with learned
step sizes (Esser et al. 2020).
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def qbert_kd(*, temperature: float = 1.0, hidden: float = 1.0, scores: float = 1.0) -> Recipe:
    """Logits, hidden states and attention scores in one stage; label-free.

    Args:
        temperature: of the soft targets.
        hidden, scores: weights of the hidden-state and attention-score terms.
    """
    matches = (
        Match("logits", options={"temperature": temperature}),
        Match("hidden", weight=hidden, options={"normalized": True}),
        Match("scores", weight=scores, options={"normalized": True}),
    )
    return Recipe(
        name="qbert_kd",
        source="this project",
        stages=(Stage("distillation", matches),),
        steps="learned",
        arguments={"learning_rate": 1e-4, "num_train_epochs": 3, "warmup_steps": 0.1},
    )
