"""What a model gives that a user reads: its logits, or hidden states, and the mean of its logits over batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.calibration.batches import Batch, run_batch
from qbert.encoders.inputs import to_device, unmasked
from qbert.encoders.modes import evaluation_mode

Run = Callable[[int], Any]  # number of a batch -> the model's output for it
_LAST_OUTPUTS = 8  # of a forward pass, among which the logits are looked for
_ROWS_AT_ONCE = 64
_LOGITS = (("logits",), ("start_logits", "end_logits"))


def model_outputs(output: Any) -> list[Tensor]:
    """What a model is used for: its logits, else its last hidden states, else its first tensor."""
    names = _named(output)
    for wanted in (*_LOGITS, ("sentence_embedding",), ("last_hidden_state",)):
        if all(isinstance(names.get(n), Tensor) for n in wanted):
            return [names[n] for n in wanted]
    values = names.values() if names else output if isinstance(output, (tuple, list)) else [output]
    return [y for y in values if isinstance(y, Tensor)][:1]


def gives_logits(output: Any) -> bool:
    """Whether `model_outputs` are logits."""
    return any(all(isinstance(_named(output).get(n), Tensor) for n in wanted) for wanted in _LOGITS)


def _named(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}


@torch.no_grad()
def mean_logits(model: nn.Module, batches: Sequence[Batch], run: Run | None = None) -> tuple[str, Tensor] | None:
    """Name of the layer whose output is the model's logits, and their mean over rows that are no padding.

    Args:
        batches: at least one.
        run: what puts batch i through the model, where that is less work than `run_batch`.

    Returns:
        (dotted name, [C] float64), or ``None`` where the logits are no layer's own output or that has no bias.
    """
    made: deque[tuple[Any, nn.Module]] = deque(maxlen=_LAST_OUTPUTS)
    total: Tensor | None = None
    head: nn.Module | None = None
    count = 0
    candidates = [m for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    handles = [m.register_forward_hook(lambda m, x, y: made.append((y, m))) for m in candidates]
    try:
        with evaluation_mode(model):
            for index, batch in enumerate(batches):
                made.clear()
                inputs = to_device(batch, model)
                output = run_batch(model, inputs) if run is None else run(index)
                logits = model_outputs(output)[0] if gives_logits(output) else None
                head = next((m for y, m in made if y is logits), None)
                if logits is None or head is None or head.bias.shape != logits.shape[-1:]:
                    return None
                added, rows = _sum_of_rows(logits, inputs.get("attention_mask"))
                total = added if total is None else total + added
                count += rows
    finally:
        for handle in handles:
            handle.remove()
    if total is None:
        return None
    return next(name for name, module in model.named_modules() if module is head), total / count


def _sum_of_rows(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Sum, [C] float64, and number of the rows of [B, C] or [B, T, C] that are no padding.

    A few rows at a time, since over a vocabulary a copy in float64 takes more than all else that a model needs.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    places = torch.arange(len(rows), device=rows.device).view(*logits.shape[:-1], 1)
    places = (unmasked(places, mask) if logits.dim() > 2 else places).flatten()
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for some in places.split(_ROWS_AT_ONCE):
        total += rows[some].double().sum(0)
    return total, len(places)
