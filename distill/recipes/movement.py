"""Movement pruning: a student learns from its teacher while the weights that training drives to zero are taken out.

Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4 (scores, cubic schedule) and
appendix A (distillation). Difference: the losses are those of `qbert_kd`, masked means of logits, hidden states and
attention scores, instead of logits alone; scores are not learned by a rate of their own but summed, as in eq. 4.

    >>> Distiller(teacher=teacher, student=copy.deepcopy(teacher), recipe=movement(pattern="2:4"), ...).train()
"""

from __future__ import annotations

from dataclasses import replace

from qbert.distill.recipe import Recipe, Zeros
from qbert.distill.recipes.qbert_kd import qbert_kd


def movement(
    *, pattern: str | float = 0.5, begin: float = 0.1, end: float = 0.7, names: str | tuple[str, ...] = "*"
) -> Recipe:
    """`qbert_kd` with movement pruning.

    Args:
        pattern: "2:4" and the like, or the share of zeros at the end.
        begin, end: parts of the training between which the zeros come.
        names: patterns of the matrices that are pruned.
    """
    return replace(
        qbert_kd(),
        name="movement",
        source="Sanh et al. 2020",
        zeros=Zeros(pattern, begin, end, names),
        quantization={},
        arguments={"learning_rate": 5e-5, "num_train_epochs": 3, "warmup_steps": 0.1},
    )
