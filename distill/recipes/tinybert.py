"""TinyBERT: a small student learns the teacher's embeddings, hidden states and attention, then its predictions.

Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", eq. 5-11 and section 4.2;
huawei-noah/Pretrained-Language-Model, TinyBERT: one projection for all layers, uniform map, sums over the layers (eq.
11: M + 1 states, M matrices of scores), temperature 1, the intermediate stage at a constant rate for 10 epochs, the
prediction stage for 3. Difference: means over real tokens.
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def tinybert(*, general: bool = False, projection: bool = True) -> Recipe:
    """Task distillation, or general distillation (the intermediate stage alone, on unlabelled text).

    Args:
        general: first phase of TinyBERT, with a pre-trained teacher that was not fine-tuned.
        projection: map the student's hidden states to the teacher's width; not needed where the widths agree.
    """
    intermediate = Stage(
        "intermediate",
        (
            Match("hidden", projection="shared" if projection else None, reduction="sum"),
            Match("scores", reduction="sum"),
        ),
        share=10,
        schedule="constant",
    )
    prediction = Stage("prediction", (Match("logits"),), share=3, rate=0.6)
    return Recipe(
        name="tinybert",
        source="Jiao et al. 2020",
        stages=(intermediate,) if general else (intermediate, prediction),
        steps="fixed",
        arguments={
            "learning_rate": 5e-5,
            "num_train_epochs": 3 if general else 13,
            "per_device_train_batch_size": 32,
            "warmup_steps": 0.1,
        },
    )
