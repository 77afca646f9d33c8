"""Rows ``sqrt(w_n) L_n^T J_n`` of the Gauss-Newton matrix of every block: what each sample's outputs do with weights.

It stands alone because it is autograd and hooks; `top` is the linear algebra over its rows.

The quick way looks at all samples of a batch in one forward and backward pass. Samples of an encoder do not see each
other, so what reaches the outputs of a Linear or LayerNorm in the rows of sample n is that sample's own, and together
with the inputs it makes the sample's gradients. Where the blocks hold anything else than weights of such modules, or
where a first sample looked at by itself tells otherwise (samples that are not the first dimension, a weight with a
second use), every sample gets a pass of its own.

    >>> for group in sample_rows(measured, blocks, rows_per_sample=8, seed=0):
    ...     group.rows["layer 0"].gram()
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.hessian.batches import BATCH_COST, Batch, batch_size, loss_weight, micro_batches
from qbert.hessian.blocks import Part, Rows, distinct_parameters, whole
from qbert.hessian.gauss_newton.factor_rows import Entries, FactorRows, OuterProducts, dense
from qbert.hessian.gauss_newton.loss_factor import LossFactor, MixedSamplesError, loss_curvature, loss_factor
from qbert.hessian.losses import MeasuredLoss

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleGroup:
    """What some samples add to the Gauss-Newton matrices.

    Attributes:
        rows: block name -> rows.
        complete: whether they are all rows that there are, and not random combinations.
        samples: number of samples.
    """

    rows: dict[str, FactorRows]
    complete: bool
    samples: int


def sample_rows(
    measured: MeasuredLoss,
    blocks: Mapping[str, Sequence[Part]],
    *,
    rows_per_sample: int,
    seed: int,
    together: bool = True,
    check: bool = False,
) -> Iterator[SampleGroup]:
    """The rows of all samples, one group of them after the other.

    Args:
        measured: the loss, over micro-batches with labels.
        blocks: name -> parameters.
        rows_per_sample: samples with more rows get so many random combinations of them.
        seed: for these.
        check: see whether the first batch's loss comes through its logits alone; see `loss_factor`.
        together: look at the samples of a batch in one pass where that is known to be right; False: at each by itself.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on, or not them alone (`check`).
    """
    parameters = distinct_parameters(part for block in blocks.values() for part in block)
    generator = torch.Generator().manual_seed(seed)
    unchecked = True
    for batch in map(measured.on_device, _by_length(measured)):
        if together:
            with measured.evaluating(parameters):
                found = _Together.of(measured, batch, parameters, check)
                if found is not None:
                    share = measured.share(batch) ** 0.5
                    columns, complete = _columns(found.factor, share, rows_per_sample, generator)
                    entries, count = found.entries(columns), columns.shape[0] * columns.shape[2]
                    if unchecked and batch_size(batch) > 1:
                        unchecked = False
                        if not _is_right(measured, batch, parameters, found.factor, columns, entries):
                            found = None
            if found is not None:
                check = False
                yield SampleGroup(
                    {name: _rows(parts, entries, count) for name, parts in blocks.items()}, complete, batch_size(batch)
                )
                continue
            _log.info("a pass for each sample: the blocks are not weights of Linear and LayerNorm modules alone")
            together = False
        samples = measured.over([batch]).rows(trimmed=True)
        for single in (one for i in range(len(samples)) for one in samples.collate([i])):
            weight = measured.share(single)
            if weight > 0:
                with measured.evaluating(parameters):
                    factor = loss_factor(measured, single, check=check)
                    check = False
                    columns, complete = _columns(factor, weight**0.5, rows_per_sample, generator)
                    alone = _gradients(factor, columns, parameters)
                count = columns.shape[2]
                yield SampleGroup({name: _rows(parts, alone, count) for name, parts in blocks.items()}, complete, 1)


class _Together:
    """Inputs and outputs of the modules that own `parameters`, in one forward pass of a batch."""

    def __init__(
        self, factor: LossFactor, uses: list[tuple[nn.Linear | nn.LayerNorm, Tensor, Tensor]], parameters: set[int]
    ):
        self.factor, self.uses, self.parameters = factor, uses, parameters

    @classmethod
    def of(
        cls, measured: MeasuredLoss, batch: Batch, parameters: Sequence[nn.Parameter], check: bool
    ) -> _Together | None:
        """None where a parameter belongs to another kind of module, or the samples cannot be told apart."""
        wanted = {id(p) for p in parameters}
        owners = [m for m in measured.model.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]
        if not all(type(m) in (nn.Linear, nn.LayerNorm) for m in owners):  # subclasses may compute anything
            return None
        uses: list[tuple[nn.Linear | nn.LayerNorm, Tensor, Tensor]] = []

        def remember(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            uses.append((module, inputs[0] if inputs else torch.empty(0), output))

        with contextlib.ExitStack() as stack:
            for module in owners:
                stack.callback(module.register_forward_hook(remember).remove)
            try:
                factor = loss_factor(measured, batch, check=check)
            except MixedSamplesError:
                return None
        rows = batch_size(batch)
        for module, x, y in uses:
            plain = isinstance(module, nn.Linear) or len(module.normalized_shape) == 1
            if not plain or not y.requires_grad or x.ndim < 2 or len(x) != rows:
                return None
        return cls(factor, uses, wanted)

    def entries(self, columns: Tensor) -> dict[int, Entries]:
        """Rows of every parameter by its identity, for `columns` [B, d, k]; row b * k + j is that of column j."""
        rows, _, width = columns.shape
        count = rows * width
        outputs = [y for _, _, y in self.uses]
        collected: dict[int, list[Entries]] = {}

        def collect(parameter: Tensor | None, entries: Entries) -> None:
            if parameter is not None and id(parameter) in self.parameters:
                collected.setdefault(id(parameter), []).append(entries)

        for j in range(width):
            seeds = self.factor.seeds(columns[:, :, j])
            found = torch.autograd.grad(self.factor.outputs, outputs, seeds, retain_graph=True, allow_unused=True)
            for (module, x, _), gradient in zip(self.uses, found, strict=True):
                if gradient is None:
                    continue
                left = gradient.detach().flatten(0, -2)
                tokens = len(left) // rows
                row = torch.arange(rows, device=left.device).repeat_interleave(tokens) * width + j
                right = x.detach().flatten(0, -2)
                if isinstance(module, nn.LayerNorm):
                    right = nn.functional.layer_norm(right, module.normalized_shape, eps=module.eps)
                    collect(module.weight, _summed(left * right, row, count))
                else:
                    collect(module.weight, OuterProducts(left, right, row, count))
                collect(module.bias, _summed(left, row, count))
        return {key: _added(entries) for key, entries in collected.items()}


def _summed(values: Tensor, row: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, values.shape[1]).index_add_(0, row, values)


def _added(entries: list[Entries]) -> Entries:
    """The sum of rows from several uses of a parameter and several columns."""
    outer = [e for e in entries if isinstance(e, OuterProducts)]
    if len(outer) < len(entries):
        return torch.stack([e for e in entries if isinstance(e, Tensor)]).sum(dim=0)
    left, right, row = (torch.cat([getattr(e, name) for e in outer]) for name in ("left", "right", "row"))
    return OuterProducts(left, right, row, outer[0].count)


def _columns(factor: LossFactor, share: float, most: int, generator: torch.Generator) -> tuple[Tensor, bool]:
    """``share * L`` [B, d, k] with at most `most` columns: a sample's own, or random combinations where it has more."""
    matrix = share * factor.matrix
    rank = matrix.shape[2]
    if rank <= most:
        return matrix, True
    columns = matrix[:, :, -most:].clone()
    for sample in (factor.ranks > most).nonzero().flatten().tolist():
        signs = torch.randint(0, 2, (rank, most), generator=generator, device="cpu") * 2 - 1
        columns[sample] = matrix[sample] @ signs.to(matrix) / most**0.5
    return columns, False


def _gradients(factor: LossFactor, columns: Tensor, parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """Rows of every parameter for one sample, flat, one backward pass for each of its `columns` [1, d, k]."""
    found: dict[int, list[Tensor]] = {id(p): [] for p in parameters}
    for j in range(columns.shape[2]):
        seeds = factor.seeds(columns[:, :, j])
        gradients = torch.autograd.grad(factor.outputs, parameters, seeds, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            flat = torch.zeros_like(parameter) if gradient is None else gradient
            found[id(parameter)].append(flat.detach().reshape(-1))
    return {key: torch.stack(rows) for key, rows in found.items()}


def _rows(parts: Sequence[Part], entries: Mapping[int, Entries], count: int) -> FactorRows:
    """The `count` rows of one block; for parameters that the outputs do not depend on they are zero."""
    found: list[Entries] = []
    for part in parts:
        parameter = whole(part)
        entry = entries.get(id(parameter))
        if entry is None:
            found.append(torch.zeros(count, part.numel(), dtype=part.dtype, device=part.device))
        elif not isinstance(part, Rows):
            found.append(entry)
        elif isinstance(entry, OuterProducts):
            found.append(entry.cut(part.start, part.stop))
        else:
            found.append(entry.view(len(entry), *parameter.shape)[:, part.start : part.stop].flatten(1))
    return FactorRows(found)


def _is_right(
    measured: MeasuredLoss,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    factor: LossFactor,
    columns: Tensor,
    entries: Mapping[int, Entries],
) -> bool:
    """Whether the first sample with labels has, by itself, the loss Hessian and the gradients that `batch` gave it."""
    count, _, width = columns.shape
    singles = (
        {k: v[i : i + 1] if isinstance(v, Tensor) and v.ndim > 0 and len(v) == count else v for k, v in batch.items()}
        for i in range(count)
    )
    index, single = next((i, one) for i, one in enumerate(singles) if loss_weight(one) > 0)
    matrix = factor.matrix[index].detach()
    probe = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(
        matrix
    )
    probe = matrix @ (matrix.T @ probe)
    outputs, curvature = loss_curvature(measured, single, probe)
    share = loss_weight(single) / loss_weight(batch)
    expected = matrix @ (matrix.T @ probe)
    if not _small(share * curvature - expected, expected, matrix.dtype):
        return False
    column = columns[index, :, -1:][None]
    alone = _gradients(LossFactor(outputs, column, factor.ranks), column, parameters)
    last = index * width + width - 1
    rows = _rows(parameters, entries, count * width).taken(last, last + 1).parts
    pairs = [(alone[id(p)][0], dense(row)[0]) for p, row in zip(parameters, rows, strict=True)]
    norms = [[torch.linalg.vector_norm(v) for v in (a - b, b)] for a, b in pairs]
    differences, lengths = torch.tensor(norms, dtype=torch.float64, device="cpu").T
    return _small(differences, lengths, matrix.dtype)


def _small(differences: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether the parts of a difference are no more than rounding of a vector of the parts `expected`."""
    return bool(
        torch.linalg.vector_norm(differences) <= torch.finfo(dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
    )


def _by_length(measured: MeasuredLoss) -> list[Batch]:
    """The rows of all batches in batches no larger than those, with little padding."""
    samples = measured.rows(trimmed=True)
    cost = BATCH_COST.get(measured.device.type)
    return micro_batches(samples, range(len(samples)), samples.default_batch_size, batch_cost=cost)
