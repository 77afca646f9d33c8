r"""Losses between a student's and a teacher's features, as means over what is not padding.

Every loss takes (student, teacher, mask) and returns a scalar. With a mask m over tokens,

.. math:: \overline{x} = \frac{\sum_{b,t} m_{bt}\, x_{bt}}{\sum_{b,t} m_{bt}},

so the same batch padded further has the same loss. A plain mean over padded tensors instead shrinks with the padding
(by 20x for nine tokens padded to 128), which silently reweighs the terms of a sum.

References: Hinton et al. 2015 (soft targets); Jiao et al. 2020, TinyBERT, eq. 7-10 (hidden states, attention scores);
Sun et al. 2019, patient distillation, eq. 7 (normalised CLS); Wang et al. 2021, MiniLMv2, section 3.1 (relations);
Sanh et al. 2019, DistilBERT (cosine).

    >>> hidden_mse(student_states, teacher_states, attention_mask)

What a mean is over is counted here too, so that parts of a batch can be put together to the whole: a mean over the n
items of a micro-batch is n / N of the mean over all N items of a training step, whatever the lengths of its texts and
the number of processes. `Distillation` weighs each term by its own kind of item, which `ITEMS` lists.

    >>> whole = sum(count_items(batch, all_tokens=True) for batch in batches)         # [len(ITEMS)]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]

_SMALLEST = 1e-12
_CERTAIN = 1e4  # a logit whose probability is exactly 1 in float32

# Rows; real tokens; pairs of two real tokens; tokens whose outputs are compared; labels that the task's loss counts.
ITEMS = ("rows", "tokens", "pairs", "outputs", "labels")
_IGNORED = -100  # cross_entropy's ignore_index


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` [..., *rest] where `mask` [...] is true; over everything for None.

    Args:
        values: float [B, T, ...] (or any shape that begins with the mask's).
        mask: bool or 0/1 [B, T]; the trailing dimensions of `values` are averaged plainly.

    Returns:
        A scalar; 0 where the mask is empty.
    """
    if mask is None:
        return values.mean()
    per_position = values.flatten(mask.dim()).mean(-1) if values.dim() > mask.dim() else values
    keep = mask.to(torch.bool)
    # `where` rather than a product: padded positions may hold infinities, and 0 * inf is NaN.
    total = torch.where(keep, per_position, per_position.new_zeros(())).sum()
    return total / keep.sum().clamp_min(1)


def pair_mask(mask: Tensor) -> Tensor:
    """[B, T] tokens -> bool [B, T, T]: pairs of a query and a key that are both real."""
    keep = mask.to(torch.bool)
    return keep.unsqueeze(2) & keep.unsqueeze(1)


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy to the teacher's softened classes, :math:`-T^2 \sum_c p_c \log q_c`, summed over classes.

    Args:
        student, teacher: logits [B, C], or [B, T, C] with a mask over tokens.
        mask: [B] or [B, T]; None for all.
        temperature: T; the factor T^2 keeps the size of the gradient (Hinton et al. 2015, section 2.1).
    """
    target = F.softmax(teacher.float() / temperature, -1)
    log_student = F.log_softmax(student.float() / temperature, -1)
    return masked_mean(-(target * log_student).sum(-1), mask) * temperature**2


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """`soft_cross_entropy` less the teacher's entropy: the same gradient, and 0 where the two agree."""
    log_target = F.log_softmax(teacher.float() / temperature, -1)
    log_student = F.log_softmax(student.float() / temperature, -1)
    divergence = (log_target.exp() * (log_target - log_student)).sum(-1)
    return masked_mean(divergence, mask) * temperature**2


def sigmoid_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy to the teacher's softened yes or no of each label: :math:`-T^2 (p \log q + (1-p) \log(1-q))`.

    The mean over labels, as the multi-label loss of transformers is (`torch.nn.BCEWithLogitsLoss`).

    Args:
        student, teacher: logits [B, C], or [B, T, C] with a mask over tokens; every label is decided on its own.
        temperature: T, as in `soft_cross_entropy`.
    """
    target = torch.sigmoid(teacher.float() / temperature)
    loss = F.binary_cross_entropy_with_logits(student.float() / temperature, target, reduction="none")
    return masked_mean(loss, mask) * temperature**2


def sigmoid_kl_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """`sigmoid_cross_entropy` less the teacher's entropy: the same gradient, and 0 where the two agree."""
    entropy = sigmoid_cross_entropy(teacher, teacher, mask, temperature=temperature)
    return sigmoid_cross_entropy(student, teacher, mask, temperature=temperature) - entropy


def hard_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy to the teacher's decision, a pseudo-label; shapes as of `soft_cross_entropy`.

    Reference: Lee 2013, "Pseudo-Label", eq. 14.
    """
    return soft_cross_entropy(student, _decision(teacher), mask)


def sigmoid_hard_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`hard_cross_entropy` where every label is decided on its own: yes for a logit above 0."""
    return sigmoid_cross_entropy(student, torch.where(teacher > 0, _CERTAIN, -_CERTAIN), mask)


def _decision(teacher: Tensor) -> Tensor:
    """Logits whose softmax is 1 at the largest of `teacher` [..., C] and 0 elsewhere."""
    best = teacher.argmax(-1, keepdim=True)
    return torch.full_like(teacher, -_CERTAIN, dtype=torch.float32).scatter(-1, best, 0.0)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    normalized: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """Mean squared error of hidden states [B, T, D] over real tokens.

    Args:
        normalized: divide by the teacher's mean square, so that 1 means "as far away as 0 is" whatever the layer's
            scale, and one weight suits every layer and model.
        scale: what to divide by instead of this batch's `teacher_scale`: that of a whole step.
    """
    error = masked_mean((student - teacher).square(), mask)
    if not normalized:
        return error
    return error / (teacher_scale(hidden_mse, teacher, mask) if scale is None else scale).clamp_min(_SMALLEST)


def score_mse(
    student: Tensor, teacher: Tensor, mask: Tensor, *, normalized: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Mean squared error of attention scores before the softmax, [B, H, T, T], over real (query, key) pairs.

    A softmax does not see a constant added to a row, and neither does the normalised loss: it compares each row
    after its mean over real keys is taken away.
    """
    pairs = pair_mask(mask)
    if not normalized:
        return masked_mean((student - teacher).square().mean(1), pairs)
    centred_student, centred_teacher = (_centre_rows(x, pairs) for x in (student, teacher))
    error = masked_mean((centred_student - centred_teacher).square().mean(1), pairs)
    return error / (teacher_scale(score_mse, teacher, mask) if scale is None else scale).clamp_min(_SMALLEST)


def teacher_scale(loss: Loss, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """What the normalised form of `hidden_mse` or `score_mse` divides by, a mean over the items of that loss."""
    if loss is score_mse and mask is not None:
        pairs = pair_mask(mask)
        return masked_mean(_centre_rows(teacher, pairs).square().mean(1), pairs)
    return masked_mean(teacher.square(), mask)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL divergence of attention distributions from scores [B, H, T, T]: mean over heads and real queries.

    Also the loss of MiniLMv2's relations, whose scores are Q Q^T, K K^T or V V^T over the square root of the width.
    """
    keys = mask.to(torch.bool)[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    log_student = F.log_softmax(student.float().masked_fill(~keys, lowest), -1)
    log_teacher = F.log_softmax(teacher.float().masked_fill(~keys, lowest), -1)
    difference = (log_teacher - log_student).masked_fill(~keys, 0.0)
    return masked_mean((log_teacher.exp() * difference).sum(-1).mean(1), mask)


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos of the angle between states [B, T, D], mean over real tokens."""
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def normalized_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of unit vectors :math:`s/\|s\|` and :math:`t/\|t\|`, of states [B, D] or [B, T, D].

    A mean over the width D too: Sun et al. 2019, eq. 7, writes a squared norm, but their beta of 10 to 1000 belongs to
    the mean that their code takes.
    """
    difference = F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)
    return masked_mean(difference.square(), mask)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of outputs: a regression's values [B] or [B, 1], or logits [B, C] (Ba and Caruana 2014)."""
    return masked_mean((student - teacher).float().square(), mask)


def task_loss(logits: Tensor, labels: Tensor, kind: str | None = None) -> Tensor:
    """A sequence classifier's own loss of logits [B, C], as transformers has it.

    Args:
        labels: classes [B]; values [B] or [B, 1] of a regression; yes or no [B, C], float, where labels are many.
        kind: ``config.problem_type``; guessed from dtype and shape of the labels where None.
    """
    several = labels.is_floating_point() and labels.shape == logits.shape and logits.shape[1] > 1
    if kind == "multi_label_classification" or (kind is None and several):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if kind == "regression" or logits.shape[1] == 1:
        return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def span_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Soft cross-entropy of start and end positions, [2, B, T] logits, over real tokens; the mean of the two.

    The classes are the positions of the example itself, so padding must not be among them.
    """
    keep = mask.to(torch.bool)
    lowest = torch.finfo(torch.float32).min
    target = F.softmax(teacher.float().masked_fill(~keep, lowest) / temperature, -1)
    log_student = F.log_softmax(student.float().masked_fill(~keep, lowest) / temperature, -1)
    return -(target * log_student.masked_fill(~keep, 0.0)).sum(-1).mean() * temperature**2


def span_kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`span_cross_entropy` less the teacher's entropy: the same gradient, and 0 where the two agree."""
    entropy = span_cross_entropy(teacher, teacher, mask, temperature=temperature)
    return span_cross_entropy(student, teacher, mask, temperature=temperature) - entropy


def span_hard_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """`span_cross_entropy` to the teacher's most likely start and end."""
    real = teacher.float().masked_fill(~mask.to(torch.bool), torch.finfo(torch.float32).min)
    return span_cross_entropy(student, _decision(real), mask)


def _centre_rows(scores: Tensor, pairs: Tensor) -> Tensor:
    keep = pairs.unsqueeze(1)
    kept = scores.masked_fill(~keep, 0.0)
    mean = kept.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_min(1)
    return scores - mean


LOSSES: dict[str, Loss] = {
    "soft_ce": soft_cross_entropy,
    "kl": kl_divergence,
    "hard_ce": hard_cross_entropy,
    "sigmoid_ce": sigmoid_cross_entropy,
    "sigmoid_kl": sigmoid_kl_divergence,
    "sigmoid_hard_ce": sigmoid_hard_cross_entropy,
    "mse": mse,
    "hidden_mse": hidden_mse,
    "score_mse": score_mse,
    "attention_kl": attention_kl,
    "cosine": cosine_distance,
    "normalized_mse": normalized_mse,
    "span_ce": span_cross_entropy,
    "span_kl": span_kl_divergence,
    "span_hard_ce": span_hard_cross_entropy,
}


_ITEMS: dict[Loss, str] = {
    score_mse: "pairs",
    span_cross_entropy: "rows",
    span_kl_divergence: "rows",
    span_hard_cross_entropy: "rows",
}


def loss_items(loss: Loss, *, rows_only: bool) -> str:
    """What a loss is a mean over (an entry of `ITEMS`): its attribute ``items``, or real tokens, or rows.

    Args:
        rows_only: the features are [B, D], without tokens.
    """
    if rows_only:
        return "rows"
    return _ITEMS.get(loss) or str(getattr(loss, "items", "tokens"))


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """bool [B, T]: real tokens; None where the inputs are no tokens and all of them count (images).

    Rows of several texts [B, N, T] (multiple choice) are [B * N, T], as their models see them.
    """
    ids: Tensor | None = inputs.get("input_ids")
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is not None:
        mask = mask.to(torch.bool)
        return mask.flatten(0, 1) if ids is not None and ids.dim() == 3 else mask
    embedded = inputs.get("inputs_embeds")
    if ids is not None:
        return torch.ones_like(ids.flatten(0, -2), dtype=torch.bool)
    return None if embedded is None else torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)


def output_mask(mask: Tensor | None, labels: Tensor | None, all_tokens: bool) -> Tensor | None:
    """bool [B, T]: the tokens whose outputs are compared.

    All real ones where `all_tokens` says so (a language model has something to say about each: Sanh et al. 2019);
    otherwise those that the task labels, in rows that have a label at all.
    """
    if all_tokens or mask is None or labels is None or labels.shape != mask.shape or labels.is_floating_point():
        return mask
    labelled = labels >= 0
    return torch.where(labelled.any(1, keepdim=True), labelled, mask)


def span_labels(inputs: Mapping[str, Any]) -> list[Tensor]:
    """[B] positions of start and end, -100 where they are outside of the real text; an empty list without them."""
    found = [inputs.get(name) for name in ("start_positions", "end_positions")]
    mask = token_mask(inputs)
    if mask is None or not all(isinstance(x, Tensor) for x in found):
        return []
    # As the models of transformers read them: before the text is its first token, behind it is no answer.
    flat = [x.reshape(-1).clamp_min(0) for x in found if isinstance(x, Tensor)]
    length = mask.shape[1]
    inside = [(x < length) & mask.gather(1, x.clamp_max(length - 1).unsqueeze(1)).squeeze(1) for x in flat]
    return [torch.where(i, x, x.new_tensor(_IGNORED)) for x, i in zip(flat, inside, strict=True)]


def count_labels(inputs: Mapping[str, Any], real_only: bool = False) -> Tensor:
    """Scalar: the labels that the task's own loss is a mean over.

    Args:
        real_only: the loss leaves out padding by the attention mask, and not by labels (ELECTRA's discriminator).
    """
    labels, spans = inputs.get("labels"), span_labels(inputs)
    if isinstance(labels, Tensor):
        if labels.is_floating_point():
            return labels.new_tensor(labels.numel())
        mask = token_mask(inputs) if real_only else None
        counted = labels != _IGNORED
        return (counted if mask is None or mask.shape != labels.shape else counted & mask).sum()
    if spans:
        return torch.stack([(x != _IGNORED).sum() for x in spans]).sum()
    return torch.tensor(_rows(inputs))


def count_items(inputs: Mapping[str, Any], *, all_tokens: bool = False, real_only: bool = False) -> Tensor:
    """float32 [len(ITEMS)]: how many of each there are in a batch; the arguments are those of the functions above."""
    mask, labels = token_mask(inputs), inputs.get("labels")
    rows = _rows(inputs)
    if mask is None:
        tokens: Any = torch.ones(rows)  # as many in every row, so that each row counts the same
        pairs = outputs = tokens
    else:
        tokens = mask.sum(-1)
        pairs = tokens.square()
        kept = output_mask(mask, labels, all_tokens)
        outputs = tokens if kept is None else kept
    found = [torch.tensor(rows), tokens.sum(), pairs.sum(), outputs.sum(), count_labels(inputs, real_only)]
    device = tokens.device
    return torch.stack([x.to(device, torch.float32) for x in found])


def _rows(inputs: Mapping[str, Any]) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0), 0)
