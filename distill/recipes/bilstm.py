"""The distilled BiLSTM: the squared distance of the logits, on the task's rows and many altered copies of them.

Source: Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.3:
the squared error of the logits alone was best, and beside it the labels have a weight; 30 epochs of batches of 50.
Differences: AdamW, since their Adadelta is none of the Trainer's; a mean over the classes where the paper has the sum.

    >>> student = students.bilstm(teacher, tokenizer=tokenizer)
    >>> more = augmented(task, Lexical(tokenizer.mask_token), copies=20)
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def bilstm(*, labels: float = 0.0) -> Recipe:
    """Logits as targets, also for students of other shapes.

    Args:
        labels: weight of the task's own loss; rows without a label (-100) then count for the logits alone.
    """
    if labels < 0:
        raise ValueError(f"labels={labels} is not a weight; use 0 to learn from the teacher alone, or more")
    matches = (Match("logits", "mse"), *([Match("labels", weight=labels)] if labels else []))
    return Recipe(
        name="bilstm",
        source="Tang et al. 2019",
        stages=(Stage("distillation", matches),),
        steps="fixed",
        arguments={
            "learning_rate": 1e-3,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 50,
            "weight_decay": 0.0,
        },
    )
