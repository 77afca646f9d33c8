"""DistilBERT: half of the layers, soft targets, and hidden states that point the same way.

Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3; training script of
huggingface/transformers-research-projects, distillation: weights 5 (soft targets, T = 2), 2 (the data's own loss),
1 (cosine of the last hidden state), started from the teacher's layers 0, 2, 4, 7, 9, 11.

    >>> student = student_with_layers(teacher, DISTILBERT_LAYERS)
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage

DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)


def distilbert(*, temperature: float = 2.0) -> Recipe:
    """The triple loss; the labels are masked words in pre-training, and the task's own in fine-tuning."""
    matches = (
        Match("logits", weight=5.0, options={"temperature": temperature}),
        Match("labels", weight=2.0),
        Match("hidden", "cosine", layers="last"),
    )
    return Recipe(
        name="distilbert",
        source="Sanh et al. 2019",
        stages=(Stage("distillation", matches),),
        steps="fixed",
        arguments={
            "learning_rate": 5e-4,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 5,
            "gradient_accumulation_steps": 50,
            "warmup_steps": 0.05,
            "max_grad_norm": 5.0,
        },
    )
