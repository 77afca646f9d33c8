r"""Which grid: the scheme and the shape of groups that keep a model's outputs, on rows that no code was fitted to.

Neither weight error nor the error of single layers tells which grid serves a model best, and no grid serves all: so
each is tried. Half of the calibration rows choose the codes, the other half score them by the divergence of the outputs
from the float model's; what is chosen is an ordinary configuration.

    >>> choice = choose_grid(model, BitsConfig(2, rounding="compensated"), batches)
    >>> student = quantize_model(model, choice.config, calibration_data=batches)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qbert.bits import BitsConfig
from qbert.calibration import Batch, check_batches, gives_logits, model_outputs, run_batch
from qbert.encoders.inputs import to_device, unmasked
from qbert.encoders.modes import evaluation_mode
from qbert.quantize import quantize_model

GRIDS: dict[str, dict[str, Any]] = {
    "asymmetric": {"scheme": "asymmetric"},
    "offset": {"scheme": "offset"},
    "midrise": {"scheme": "midrise"},
    "symmetric": {"scheme": "symmetric"},
    "offset, 64 inputs": {"scheme": "offset", "input_group_size": 64},
}


@dataclass(frozen=True)
class GridChoice:
    """The best of several grids.

    Attributes:
        config: the configuration asked for, on the chosen grid.
        grid: its name.
        divergence: name -> divergence on the rows kept apart, of every grid that was tried.
    """

    config: BitsConfig
    grid: str
    divergence: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.divergence))
        lines = [
            f"{name:<{width}}  {value:.5f}{'  chosen' if name == self.grid else ''}"
            for name, value in self.divergence.items()
        ]
        return "\n".join([f"{'grid':<{width}}  divergence", *lines])


def choose_grid(
    model: nn.Module,
    bits_config: Any,
    calibration_data: Any,
    *,
    grids: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> GridChoice:
    """The grid on which the quantized model's outputs stay nearest to the float model's.

    Args:
        model: a float encoder; left alone.
        bits_config: as in `quantize_model`; patterns that name a scheme or a size of input groups keep theirs.
        calibration_data: batches without labels, at least two rows. Of each batch, every other row chooses codes (and
            static ranges) and the rest scores them.
        grids: name -> `BitsConfig` defaults of a grid; `GRIDS`, but for groups of inputs that do not fit the model,
            where None.
        progress: show a bar over the grids.

    Raises:
        ValueError, TypeError: as `quantize_model`; if there are fewer than two rows, or no grid.

    The divergence is the mean KL of logits (classes last), and for other outputs (one number a row, hidden states,
    embeddings) the squared difference relative to the square of the float ones. Padding counts in neither.
    """
    config = BitsConfig.parse(bits_config)
    batches = check_batches(calibration_data)
    if batches is None:
        raise ValueError("calibration_data: choosing a grid needs rows to compare outputs on; pass a few hundred")
    fitted, kept = halves(batches)
    named = _fitting(model, config) if grids is None else {name: _on_grid(config, how) for name, how in grids.items()}
    if not named:
        raise ValueError("grids: there is none to choose from; give at least one, or leave the argument out")
    reference, classes = _outputs(model, kept)
    found: dict[str, float] = {}
    for name, candidate in tqdm(named.items(), desc="grids", disable=not progress):
        student = quantize_model(model, candidate, calibration_data=fitted)
        found[name] = divergence(reference, _outputs(student, kept)[0], classes=classes)
    best = min(found, key=lambda name: found[name])
    return GridChoice(named[best], best, found)


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every other row of every batch, and the rest, each without empty batches; alternating over batches of one row.

    Raises:
        ValueError: if one half would be empty.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    at = 0
    for batch in batches:
        rows = max(len(v) for v in batch.values() if isinstance(v, Tensor))
        for part in (0, 1):
            index = torch.arange((at + part) % 2, rows, 2)
            if len(index):
                taken = {k: v[index.to(v.device)] if _has_rows(v, rows) else v for k, v in batch.items()}
                parts[part].append(taken)
        at += rows
    if not all(parts):
        raise ValueError("calibration_data: one row cannot be halved; pass at least two, better a few hundred")
    return parts


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _on_grid(config: BitsConfig, how: Mapping[str, Any]) -> BitsConfig:
    values = config.to_dict() | dict(how)
    return BitsConfig.from_dict(values)


def _fitting(model: nn.Module, config: BitsConfig) -> dict[str, BitsConfig]:
    named = {}
    for name, how in GRIDS.items():
        candidate = _on_grid(config, how)
        try:
            candidate.resolve(model)
        except ValueError:
            if "input_group_size" not in how:
                raise
        else:
            named[name] = candidate
    return named


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Tensor], bool]:
    """What the model is used for, tensors batch by batch, without padding, in float64; whether those are of classes."""
    found: list[Tensor] = []
    classes = False
    with evaluation_mode(model):
        for batch in batches:
            inputs = to_device(batch, model)
            mask = inputs.get("attention_mask")
            output = run_batch(model, inputs)
            tensors = model_outputs(output)
            classes = gives_logits(output) and all(x.dim() > 1 and x.shape[-1] > 1 for x in tensors)
            found += [(unmasked(x, mask) if x.dim() > 2 else x).double() for x in tensors]
    return found, classes


def divergence(reference: Sequence[Tensor], found: Sequence[Tensor], *, classes: bool) -> float:
    """How far outputs are from those of a reference, tensor by tensor: see `choose_grid`."""
    if classes:
        total = sum(
            float(torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True))
            for a, b in zip(reference, found, strict=True)
        )
        return total / max(sum(x.shape[:-1].numel() for x in reference), 1)
    off = sum(float((a - b).square().sum()) for a, b in zip(reference, found, strict=True))
    return off / max(sum(float(a.square().sum()) for a in reference), 1e-30)
