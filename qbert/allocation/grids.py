r"""Which grid: the scheme and the shape of groups that keep a model's outputs, on rows that no code was fitted to.

Neither weight error nor the error of single layers tells which grid serves a model best, and no grid serves all: so
each is tried. Half of the calibration rows choose the codes, the other half score them by the divergence of the outputs
from the float model's; what is chosen is an ordinary configuration.

    >>> choice = choose_grid(model, BitsConfig(2, rounding="compensated"), batches)
    >>> student = quantize_model(model, choice.config, calibration_data=batches)

With ``by_matrix`` single matrices then leave the best grid for another one where that lowers the divergence on some of
the rows kept apart, if the model that comes of it is better on the others: many options that are judged on the rows
that chose among them flatter themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, spec_to_dict
from qbert.calibration import Batch, check_batches, gives_logits, model_outputs, run_batch
from qbert.encoders.inputs import to_device, unmasked
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.targets import find_targets
from qbert.progress import progress_bar
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
        matrices: name of a matrix -> its grid, of those with another than `grid`.
        checked: with `by_matrix`, the divergence of the one grid and of the best choice by matrix, on rows that neither
            was chosen on.
    """

    config: BitsConfig
    grid: str
    divergence: dict[str, float]
    matrices: dict[str, str] = field(default_factory=dict)
    checked: tuple[float, float] | None = None

    def __str__(self) -> str:
        width = max(map(len, self.divergence))
        lines = [
            f"{name:<{width}}  {value:.5f}{'  chosen' if name == self.grid else ''}"
            for name, value in self.divergence.items()
        ]
        if self.checked is not None:
            one, mixed = self.checked
            taken = "taken" if self.matrices else "not taken"
            lines.append(f"by matrix: {mixed:.5f} against {one:.5f} on rows that chose neither; {taken}")
            lines += [f"  {name}: {grid}" for name, grid in self.matrices.items()]
        return "\n".join([f"{'grid':<{width}}  divergence", *lines])


def choose_grid(
    model: nn.Module,
    bits_config: Any,
    calibration_data: Any,
    *,
    grids: Mapping[str, Mapping[str, Any]] | None = None,
    by_matrix: bool = False,
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
        by_matrix: let single matrices have another of the grids where that pays: a pass over a quarter of the rows for
            each matrix and grid, and one more rounding. Sizes of input groups are not mixed, since layers are fused on
            GPUs, and queries, keys and values on CPUs, only without them.
        progress: show bars over grids and matrices.

    Raises:
        ValueError, TypeError: as `quantize_model`; if there is no grid, or there are fewer than two rows (four with
            `by_matrix`).

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
    students: dict[str, nn.Module] = {}
    for name, candidate in progress_bar(named.items(), desc="grids", disable=not progress):
        student = quantize_model(model, candidate, calibration_data=fitted)
        found[name] = divergence(reference, _outputs(student, kept)[0], classes=classes)
        if by_matrix:
            students[name] = student
    best = min(found, key=lambda name: found[name])
    choice = GridChoice(named[best], best, found)
    return _by_matrix(model, choice, named, students, (fitted, kept), progress) if by_matrix else choice


def _by_matrix(
    model: nn.Module,
    choice: GridChoice,
    named: Mapping[str, BitsConfig],
    students: dict[str, nn.Module],
    rows: tuple[list[Batch], list[Batch]],
    progress: bool,
) -> GridChoice:
    """The choice with single matrices on other grids, if that is better on rows that did not choose them."""
    fitted, kept = rows
    choosing, checking = halves(kept)
    specs = {name: config.resolve(model) for name, config in named.items()}
    targets = {t.path: t for t in find_targets(model)}
    readers = Counter(id(t.weight) for t in targets.values())
    base = students[choice.grid]
    swaps = [
        (path, name)
        for path, spec in specs[choice.grid].items()
        for name in named
        if not targets[path].is_embedding
        and readers[id(targets[path].weight)] == 1  # tied matrices have one grid
        and specs[name][path] != spec
        and specs[name][path].input_group_size == spec.input_group_size
    ]
    reference, classes = _outputs(model, choosing)
    checked_reference, _ = _outputs(model, checking)
    one = divergence(checked_reference, _outputs(base, checking)[0], classes=classes)

    def on_grid(path: str, name: str) -> float:
        """Put a matrix on a grid; the divergence then."""
        base.set_submodule(path, students[name].get_submodule(path))
        return divergence(reference, _outputs(base, choosing)[0], classes=classes)

    start = least = divergence(reference, _outputs(base, choosing)[0], classes=classes)
    alone: dict[str, tuple[float, str]] = {}
    for path, name in progress_bar(swaps, desc="matrices", disable=not progress):
        own = base.get_submodule(path)
        alone[path] = min(alone.get(path, (start, choice.grid)), (on_grid(path, name), name))
        base.set_submodule(path, own)
    taken: dict[str, str] = {}
    for path, (_, name) in sorted(alone.items(), key=lambda item: item[1][0]):
        own = base.get_submodule(path)
        found = on_grid(path, name) if name != choice.grid else math.inf
        if found < least:
            least, taken[path] = found, name
        else:
            base.set_submodule(path, own)
    if not taken:
        return replace(choice, checked=(one, one))
    students.clear()  # the room is needed
    config = BitsConfig(
        choice.config.rules | {targets[path].name: spec_to_dict(specs[name][path]) for path, name in taken.items()},
        embedding_bits=choice.config.embedding_bits,
        **choice.config.defaults,
    )
    student = quantize_model(model, config, calibration_data=fitted)
    mixed = divergence(checked_reference, _outputs(student, checking)[0], classes=classes)
    if mixed >= one:
        return replace(choice, checked=(one, mixed))
    return replace(
        choice, config=config, matrices={targets[path].name: n for path, n in taken.items()}, checked=(one, mixed)
    )


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
