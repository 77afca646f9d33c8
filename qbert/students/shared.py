"""Students that apply one layer at several depths, and tables of a smaller width (ALBERT, Subformer).

A shared layer saves bytes, not time. Which layer of a teacher stands for its neighbours is found by trying each,
without any training: one forward pass a choice. Shared by all depths the layer is ALBERT's; the Subformer's sandwich
keeps the first and the last layer for themselves.

    >>> student = share_layers(teacher, "sandwich", data=batches)          # 0, then one four times, then 5
    >>> student = narrow_table(student, 96, heads=4)                       # SAFE: 11.7 M values become 3.0 M

Sources: Lan et al. 2019, ALBERT, section 3.1; Reid et al. 2021, Subformer, sections 2.2 and 2.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qbert.calibration import Batch, check_batches
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.sharing import SharedLayers, share
from qbert.encoders.structure import record
from qbert.encoders.tables import narrowed
from qbert.encoders.targets import base_model, find_targets, main_layers
from qbert.students.depth import compares_values, head_outputs, likeness

Model = TypeVar("Model", bound=nn.Module)


def share_layers(teacher: Model, pattern: str | int | Sequence[int], *, data: Any = None) -> Model:
    """A copy of `teacher`, as deep as before, with fewer layers of its own.

    Args:
        teacher: any encoder with a list of layers, with or without a head.
        pattern: ``all`` (one layer, at every depth), ``sandwich`` (the first and the last for themselves, one between
            them), a number of groups (contiguous runs of equal length), or the layer that each depth applies, such as
            ``[0, 2, 2, 2, 2, 5]``.
        data: batches of unlabelled rows to choose each run's layer on: the one with the least divergence (see
            `qbert.students.depth.Choice`) from the teacher's outputs when it stands for the run. Without them it is the
            one in the middle.

    Returns:
        A model of the same class in evaluation mode, whose config tells the order of its layers. It is trained,
        quantized (each layer once), packed, saved and loaded as every other one.

    Raises:
        ValueError: a pattern that does not fit the teacher's depth, or layers that are shared already.
    """
    _, layers = main_layers(teacher)
    depth = getattr(base_model(teacher)[1].config, "num_hidden_layers", len(layers))
    if isinstance(layers, SharedLayers) or depth != len(layers):
        raise ValueError(f"teacher: {type(teacher).__name__} shares its layers already; give the model before that")
    order, runs = _plan(pattern, len(layers))
    if runs and data is not None:
        order = _best_order(teacher, order, runs, check_batches(data, "data") or [])
    student = copy.deepcopy(teacher).eval()
    share(student, order)
    return student


def narrow_table(model: Model, width: int, *, heads: int = 0, counts: Tensor | None = None) -> Model:
    """A copy of `model` whose word table has a smaller width, with a map up and, on the small width, attention.

    Args:
        model: a float encoder with one plain word table that no head is tied to.
        width: of the table.
        heads: of SAFE's attention, which starts at zero and learns; 0 for none (ALBERT).
        counts: [V], how often each id occurs: the start is then the best of its width on such text.

    Raises:
        ValueError: a width that saves nothing or that `heads` does not divide, or a table that cannot be replaced.
    """
    table, name = _word_table(model)
    rows, columns = table.weight.shape
    if not 1 <= width < columns or width * (rows + columns) >= rows * columns:
        raise ValueError(f"width={width} saves nothing of a table [{rows}, {columns}]; use a smaller one")
    if heads < 0 or (heads and width % heads):
        raise ValueError(f"heads={heads} do not divide a width of {width}; use 0 or a divisor")
    values = table.weight.detach().double()
    weights = torch.ones(rows, dtype=torch.float64) if counts is None else counts.double()
    if weights.shape != (rows,) or bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError(f"counts: expected {rows} numbers that are not negative, one an id")
    metric = values.T @ (weights.to(values.device).unsqueeze(1) * values)
    basis = torch.linalg.eigh(metric).eigenvectors[:, -width:]  # the directions that frequent rows need
    student = copy.deepcopy(model).eval()
    own, _ = _word_table(student)
    made = narrowed(own, width, heads)
    with torch.no_grad():
        made.table.weight.copy_(values @ basis)
        made.up.weight.copy_(basis)
    replace_everywhere(student, own, made.eval())
    record(student, "tables", name=name, width=width, heads=heads)
    return student


def _plan(pattern: str | int | Sequence[int], depth: int) -> tuple[list[int], list[range]]:
    """(layer of each depth, runs whose layer is still to be chosen)."""
    if isinstance(pattern, str):
        if pattern not in ("all", "sandwich"):
            raise ValueError(f"pattern={pattern!r} is not known; use 'all', 'sandwich', a number of groups, or a list")
        if pattern == "sandwich" and depth < 4:
            raise ValueError(f"pattern='sandwich' saves nothing of {depth} layers; it needs 4")
        runs = [range(depth)] if pattern == "all" else [range(1, depth - 1)]
    elif isinstance(pattern, int):
        if not 1 <= pattern < depth or depth % pattern:
            raise ValueError(f"pattern={pattern} groups do not divide {depth} layers; use a smaller divisor of it")
        size = depth // pattern
        runs = [range(start, start + size) for start in range(0, depth, size)]
    else:
        return list(pattern), []
    order = list(range(depth))
    for run in runs:
        order[run.start : run.stop] = [run[(len(run) - 1) // 2]] * len(run)
    return order, runs


def _best_order(teacher: nn.Module, order: list[int], runs: Sequence[range], batches: Sequence[Batch]) -> list[int]:
    """`order` with the layer of each run that does best when all other runs are whole."""
    wanted, values = head_outputs(teacher, batches), compares_values(teacher)
    for run in runs:
        errors = {}
        for source in run:
            tried = [source if depth in run else depth for depth in range(len(order))]
            student = copy.deepcopy(teacher)
            share(student, tried)
            errors[source], _ = likeness(wanted, head_outputs(student, batches), values)
        best = min(errors, key=lambda source: errors[source])
        order = [best if depth in run else layer for depth, layer in enumerate(order)]
    return order


def _word_table(model: nn.Module) -> tuple[nn.Embedding, str]:
    tables = [t for t in find_targets(model) if t.role == "word_embedding"]
    if len(tables) != 1 or type(tables[0].module) is not nn.Embedding:
        raise ValueError(f"model: {type(model).__name__} has {len(tables)} plain word tables; exactly one is needed")
    table = tables[0].module
    others = (n for n, m in model.named_modules() if m is not table and m._parameters.get("weight") is table.weight)
    tied = next(others, "")
    if tied:
        raise ValueError(f"model: {tied} is tied to the word table, whose width it needs; give the base model")
    return table, tables[0].name
