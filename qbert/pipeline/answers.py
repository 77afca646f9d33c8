"""What a model answers on some rows, and how near another model's answers are: the measure that plans are made by.

It stands apart from `qbert.pipeline.plan`, which knows structures and bytes, and nothing of what models return.

    >>> answers = Answers(model, batches)
    >>> answers.likeness(packed)             # (divergence, agreement)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.calibration import Batch, model_outputs, run_batch
from qbert.encoders.inputs import to_device, unmasked, without_labels
from qbert.encoders.modes import evaluation_mode
from qbert.tasks.evaluation import fidelity

_MOST_KEPT = 2**26  # values; more, those of words over a vocabulary, are computed again
_AT_ONCE = 2**22  # values that are compared in float64 together
_NEVER = -1e9  # logit of padding as the place of an answer: its probability is exactly 0, and no infinity enters a KL


class _Answer(NamedTuple):
    """What a model returns for one batch.

    Attributes:
        values: [rows, outputs] float32 on the CPU: logits of rows, or of all real tokens; starts, then ends, of spans;
            unit vectors.
        kind: ``rows``, ``tokens``, ``spans`` or ``vectors``.
    """

    values: Tensor
    kind: str


class Answers:
    """The answers of `model` on `batches`, which those of others are compared with.

    Args:
        model: what the others are compared with; kept, and left as it is.
        batches: dicts of tensors; labels are not looked at.

    Attributes:
        kind: what it answers with: ``rows`` (logits or values), ``tokens`` (logits of each), ``spans`` (starts and
            ends) or ``vectors`` (its own sentence embedding, or the mean of what it returns over real tokens).
        width: outputs of a row.

    Raises:
        ValueError: the model returns no numbers.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        kept: list[Tensor] = []
        self._kept: list[Tensor] | None = kept
        for values, kind in _answers(model, batches):
            self.kind, self.width = kind, values.shape[1] if values.dim() > 1 else 1
            kept.append(values)
            if sum(map(Tensor.numel, kept)) > _MOST_KEPT:
                self._kept = None
                break

    @property
    def are_values(self) -> bool:
        """Whether they are numbers rather than classes or vectors."""
        return self.kind in ("rows", "tokens") and (self.problem_type == "regression" or self.width == 1)

    @property
    def unit(self) -> float:
        """What a damage (`qbert.outputs`) is in units of the divergence: of the mean squared difference of C values
        2 / C, of spans, whose start and end are two rows, one half, else 1."""
        if self.are_values:
            return 2.0 / self.width
        return 0.5 if self.kind == "spans" else 1.0

    def likeness(self, model: nn.Module) -> tuple[float, float]:
        """(divergence, agreement) of another model's answers, as `qbert.tasks.evaluation.fidelity`; of vectors 1 -
        cosine, and 100 times the cosine."""
        others = (values for values, _ in _answers(model, self.batches))
        pairs = zip(self._wanted(), others, strict=True)
        if self.kind == "spans" or (self.kind == "tokens" and not self.are_values):
            return self._by_pieces(pairs)
        wanted, found = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if self.kind == "vectors":
            cosine = float((wanted * found).sum(1).mean())
            return 1 - cosine, 100 * cosine
        all_at_once = fidelity(wanted, found, self.problem_type)
        return all_at_once.divergence, all_at_once.agreement

    def _wanted(self) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else (v for v, _ in _answers(self.model, self.batches))

    def _by_pieces(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """The means over all rows, some at a time: a vocabulary in float64 takes more than all else of a plan."""
        rows, divergence, agreement = 0, 0.0, 0.0
        for pair in pairs:
            most = max(1, _AT_ONCE // pair[0].shape[1])
            for wanted, found in zip(*(values.split(most) for values in pair), strict=True):
                if len(wanted):
                    piece = fidelity(wanted, found, self.problem_type)
                    rows += len(wanted)
                    divergence += len(wanted) * piece.divergence
                    agreement += len(wanted) * piece.agreement
        return divergence / rows, agreement / rows


def _answers(model: nn.Module, batches: Sequence[Batch]) -> Iterator[_Answer]:
    """What `model` returns, batch by batch."""
    for batch in batches:
        inputs = to_device(without_labels(batch), model)
        with torch.no_grad(), evaluation_mode(model):
            values, kind = _answer(run_batch(model, inputs), inputs.get("attention_mask"))
        yield _Answer(values.float().cpu(), kind)


def _answer(output: Any, mask: Tensor | None) -> tuple[Tensor, str]:
    outputs = [y for y in model_outputs(output) if y.is_floating_point()]
    if not outputs:
        raise ValueError("model: it returns no logits, hidden states or embedding; plan for a model that does")
    if len(outputs) == 2:
        ends = torch.cat(outputs)  # [2 B, T]
        return ends if mask is None else ends.masked_fill(mask.repeat(2, 1) == 0, _NEVER), "spans"
    (values,) = outputs
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if values is logits:
        return (values, "rows") if values.dim() < 3 else (unmasked(values, mask).flatten(0, -2), "tokens")
    if values.dim() == 3:
        keep = values.new_ones(values.shape[:2]) if mask is None else mask.to(values)
        values = (values * keep.unsqueeze(-1)).sum(1)
    return nn.functional.normalize(values.flatten(1) if values.dim() > 1 else values.unsqueeze(1), dim=1), "vectors"
