"""What a teacher knows at each of its layers: a linear probe on every one, trained on the task's labels.

A student whose layers are no transformer's has no states to compare; what a layer makes of the task can be compared in
any case. Each probe reads the mean over the words of one layer and gives logits, like the head; its loss on rows kept
apart says how much that layer has to teach.

    >>> probed = probe_layers(teacher, data, collate=data.collate)
    >>> Distiller(probed, student, recipes.adabert(probed.losses, depth=3), ...).train()

Source: Chen et al. 2020, AdaBERT, section 3.1 (hierarchical knowledge by probes). Differences: the optimum of a convex
loss by L-BFGS on means that are computed once, where the authors train five epochs; losses are of rows kept apart,
since a probe of many dimensions fits any layer on the rows it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from qbert.distill.losses import task_loss
from qbert.encoders.inputs import accepted_inputs, to_device
from qbert.encoders.modes import evaluation_mode
from qbert.progress import progress_bar

_APART = 4  # every fourth row
_LEAST_ROWS = 16
_DECAY = 0.1  # a tenth of it leaves a fourth more loss on rows kept apart, a hundredth the double (SST-2, 1,125 rows)
_STEPS = 100


@dataclass
class ProbedOutput(SequenceClassifierOutput):  # type: ignore[misc]
    """Outputs of a model that has something to say at every layer.

    Attributes:
        probes: logits [B, C] of every layer, the first one first.
        cost: what the architecture costs, a scalar, while it is searched for.
    """

    probes: tuple[Tensor, ...] | None = None
    cost: Tensor | None = None


class ProbedTeacher(nn.Module):
    """A teacher with a probe on every layer. What it says of a row it computes once and remembers.

    Attributes:
        teacher: the model, in evaluation mode whenever it runs.
        probes: a linear map of the mean over words, for each layer.
        losses: of each probe on rows kept apart.
    """

    def __init__(self, teacher: nn.Module, probes: Sequence[nn.Linear], losses: Sequence[float]) -> None:
        super().__init__()
        self.teacher, self.probes, self.losses = teacher, nn.ModuleList(probes), tuple(losses)
        self._known: dict[bytes, Tensor] = {}

    @property
    def config(self) -> Any:
        """The teacher's."""
        return self.teacher.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_probes: bool = False,
    ) -> ProbedOutput:
        """Logits [B, C] of the teacher, and those of its probes."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keys = _keys(input_ids, mask.bool(), token_type_ids)
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if missing:
            given = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": token_type_ids}
            found = self._compute({k: v[missing] for k, v in given.items() if v is not None})
            self._known |= {keys[i]: row for i, row in zip(missing, found, strict=True)}
        every = torch.stack([self._known[key] for key in keys]).to(input_ids.device)  # [B, 1 + layers, C]
        logits, *probes = every.unbind(1)
        return ProbedOutput(logits=logits, probes=tuple(probes) if output_probes else None)

    @torch.no_grad()
    def _compute(self, inputs: dict[str, Tensor]) -> Tensor:
        logits, means = layer_means(self.teacher, inputs)
        shape = (len(logits), -1)
        said = [probe(mean).reshape(shape) for probe, mean in zip(self.probes, means.unbind(1), strict=True)]
        return torch.stack([logits.reshape(shape), *said], 1).float().cpu()


def _keys(ids: Tensor, real: Tensor, types: Tensor | None) -> list[bytes]:
    """What the teacher reads of every row, padding apart."""
    both = torch.stack([ids, torch.zeros_like(ids) if types is None else types], -1).int().cpu()
    return [row[kept].numpy().tobytes() for row, kept in zip(both, real.cpu(), strict=True)]


@torch.no_grad()
def layer_means(teacher: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logits, means [B, layers, D] float32 over the real tokens of each layer's outputs).

    Raises:
        ValueError: the model gives no hidden states.
    """
    with evaluation_mode(teacher):
        output = teacher(**accepted_inputs(teacher, batch), output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states or getattr(output, "logits", None) is None:
        raise ValueError(f"teacher: {type(teacher).__name__} gives no hidden states and logits, so it cannot be probed")
    real = torch.ones_like(batch["input_ids"]) if batch.get("attention_mask") is None else batch["attention_mask"]
    share = (real / real.sum(1, keepdim=True).clamp_min(1)).unsqueeze(-1)
    return output.logits, torch.stack([(state.float() * share).sum(1) for state in states[1:]], 1)


def probe_layers(
    teacher: nn.Module,
    rows: Any,
    *,
    collate: Callable[[list[Any]], Any],
    batch_size: int = 64,
    progress: bool = True,
) -> ProbedTeacher:
    """Train a probe on every layer of `teacher`.

    Args:
        teacher: a fine-tuned model with a head for sequences, not a base model; stays as it is.
        rows: labelled rows with a length, at least 16 of them; every fourth is kept apart for the losses.
        collate: makes a batch of rows.
        batch_size: rows that run together.
        progress: show a bar.

    Raises:
        ValueError: too few rows, rows without a label, a model without hidden states.
    """
    found: list[tuple[Tensor, Tensor]] = []
    if len(rows) < _LEAST_ROWS:
        raise ValueError(f"rows: {len(rows)} are too few to train probes on; give at least {_LEAST_ROWS} labelled rows")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with progress_bar(total=len(rows), desc="teacher's layers", unit="row", disable=not progress) as bar:
        for at in range(0, len(rows), batch_size):
            chosen = order[at : at + batch_size]
            batch = to_device(collate([rows[i] for i in chosen]), teacher)
            labels = batch.pop("labels", None)
            if labels is None or (not labels.is_floating_point() and int(labels.min()) < 0):
                raise ValueError("rows: a row has no label, and probes are trained on labels; leave such rows out")
            found.append((layer_means(teacher, batch)[1].cpu(), labels.cpu()))
            bar.update(len(chosen))
    means, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    classes = int(getattr(getattr(teacher, "config", None), "num_labels", 1))
    device = next(teacher.parameters()).device
    kind = getattr(getattr(teacher, "config", None), "problem_type", None)
    fitted = [_fit(means[:, layer], labels, classes, kind) for layer in range(means.shape[1])]
    return ProbedTeacher(teacher, [probe.to(device) for probe, _ in fitted], [loss for _, loss in fitted])


def _fit(x: Tensor, labels: Tensor, classes: int, kind: str | None) -> tuple[nn.Linear, float]:
    """(probe of one layer's means [N, D], its loss on rows kept apart)."""
    apart = torch.arange(len(x)) % _APART == 0
    mean, spread = x[~apart].mean(0), x[~apart].std(0).clamp_min(1e-6)
    scaled = (x - mean) / spread
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss_of(rows: Tensor) -> Tensor:
        return task_loss(F.linear(scaled[rows], weight, bias), labels[rows], kind)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(~apart) + _DECAY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        probe = nn.Linear(x.shape[1], classes)
        probe.weight.copy_(weight / spread)
        probe.bias.copy_(bias - (weight / spread) @ mean)
        return probe.requires_grad_(False), float(loss_of(apart))
