"""MiniLMv2: the self-attention relations of one teacher layer, for a student of any depth, width and number of heads.

Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers", section 3.1, eq. 4-7: Q-Q, K-K and V-V, each over `relation_heads` heads that both widths are cut into,
the divergences averaged over heads and real tokens and added up with weight 1; the student's last layer learns from one
layer of the teacher, the last one of a base model, an upper middle one of a large. MiniLM (Wang et al. 2020) is the
same idea with the attention map itself in the place of Q-Q and K-K.
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def minilm(*, teacher_layer: int = -1, relation_heads: int = 12, prediction: float = 0.0) -> Recipe:
    """Relations of one layer; label-free.

    Args:
        teacher_layer: the layer to learn from, from 0; negative numbers count from the end.
        relation_heads: heads of the relations; must divide the widths of student and teacher.
        prediction: part of all steps, at the end, in which the student learns the teacher's outputs instead, as a
            student of one task has to; 0 leaves that to a training of its own, as the paper does.

    Raises:
        ValueError: no heads, or a `prediction` that is no share below 1.
    """
    if relation_heads < 1:
        raise ValueError(f"relation_heads={relation_heads} is not possible; use a number that divides both widths")
    if not 0 <= prediction < 1:
        raise ValueError(f"prediction={prediction} is not a share of the steps; use a number from 0 to below 1")
    relations = tuple(
        Match(f"relations.{part}", layers=[(-1, teacher_layer)], options={"heads": relation_heads})
        for part in ("query", "key", "value")
    )
    stages = [Stage("relations", relations, share=1 - prediction)]
    if prediction:
        stages.append(Stage("prediction", (Match("logits"),), share=prediction))
    return Recipe(
        name="minilm",
        source="Wang et al. 2021",
        stages=tuple(stages),
        steps="fixed",
        arguments={
            "learning_rate": 6e-4,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 256,
            "warmup_steps": 0.01,
        },
    )
