"""How closely a student follows its teacher on held-out data: sharper than a score, which noise and luck move.

>>> fidelity(teacher_result.logits, student_result.logits)
Fidelity(agreement=93.8, divergence=0.039)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Fidelity(NamedTuple):
    """Likeness of two models' outputs.

    Attributes:
        agreement: percent of rows with the same most likely class (or position); for values, 100 x their Pearson
            correlation.
        divergence: mean KL(teacher || student) in nats; for values, the mean squared difference.
    """

    agreement: float
    divergence: float


def fidelity(teacher: Tensor, student: Tensor) -> Fidelity:
    """Compare outputs row by row.

    Args:
        teacher, student: logits [N, C] of classes, tokens or positions, or values [N]; in the same order.

    Raises:
        ValueError: if the shapes differ or are of another kind.
    """
    if teacher.shape != student.shape or teacher.dim() not in (1, 2) or len(teacher) == 0:
        raise ValueError(
            "fidelity compares outputs of one shape, [N, C] or [N], "
            f"got {list(teacher.shape)} and {list(student.shape)}"
        )
    teacher, student = teacher.double(), student.double()
    if teacher.dim() == 1 or teacher.shape[1] == 1:
        teacher, student = teacher.flatten(), student.flatten()
        correlation = torch.corrcoef(torch.stack([teacher, student]))[0, 1]
        return Fidelity(100 * float(correlation), float((teacher - student).square().mean()))
    agreement = 100 * float((teacher.argmax(1) == student.argmax(1)).double().mean())
    logs = [F.log_softmax(x, 1) for x in (teacher, student)]
    return Fidelity(agreement, float(F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")))
