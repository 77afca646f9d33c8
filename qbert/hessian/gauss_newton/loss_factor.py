"""Second derivatives of the loss of every sample with respect to the model's outputs, as factors.

For outputs z of a model and the mean loss of a batch, ``d^2 loss / dz_b^2 = L_b L_b^T`` for each sample b (Schraudolph
2002); for C classes, L_b has C - 1 columns. Where the Hessian has negative eigenvalues, they are left out.

    >>> factor = loss_factor(MeasuredLoss(model), batch)
    >>> factor.matrix.shape  # [B, d, r]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.hessian.batches import Batch, batch_size
from qbert.hessian.losses import MeasuredLoss

_MOST_OUTPUTS = 4096


class NoModelOutputError(ValueError):
    """The loss is no function of logits that can be seen, so there is no Gauss-Newton matrix."""


class MixedSamplesError(ValueError):
    """The outputs of a batch are not those of its samples, one below the other."""


@dataclass(frozen=True)
class LossFactor:
    """Outputs and loss Hessians of the samples of a batch.

    Attributes:
        outputs: tensors z [B, ...] with the graph that they came from; d entries a sample together.
        matrix: L [B, d, r], its used columns last.
        ranks: [B], number of used columns.
    """

    outputs: list[Tensor]
    matrix: Tensor
    ranks: Tensor

    def seeds(self, column: Tensor) -> list[Tensor]:
        """`column` [B, d] in the shapes of the outputs."""
        rows = len(column)
        pieces = column.split([z.numel() // rows for z in self.outputs], dim=1)
        return [piece.reshape(z.shape) for piece, z in zip(pieces, self.outputs, strict=True)]


def loss_factor(measured: MeasuredLoss, batch: Batch, *, check: bool = False) -> LossFactor:
    """The `LossFactor` of a batch whose loss is a sum over its samples.

    Args:
        check: compare the loss's gradient with what comes through the logits, for two backward passes more.

    Raises:
        NoModelOutputError: if the model returns no logits that the loss depends on; with `check` also if the loss
            depends on the parameters in another way as well (further outputs, terms of the weights themselves).
        MixedSamplesError: if their first dimension is not that of the batch.
    """
    outputs, flat = _first_derivative(measured, batch, check)
    size = flat.shape[1]
    rows = []
    for k in range(size):
        if not flat.requires_grad:  # a loss linear in its outputs
            break
        rows.append(_derivative(flat[:, k].sum(), outputs, len(flat)))
    if not rows:
        return LossFactor(outputs, flat.new_zeros(len(flat), size, 1), torch.zeros(len(flat), dtype=torch.long))
    values, vectors = _eigh(torch.stack(rows, dim=1).double(), outputs)
    kept = values > 1e-6 * values.amax(dim=1, keepdim=True).clamp(min=0)
    columns = vectors * (values * kept).clamp(min=0).sqrt()[:, None]
    ranks = kept.sum(dim=1)
    order = kept.long().argsort(dim=1, stable=True)[:, -max(1, int(ranks.max())) :]  # the used ones last
    matrix = columns.gather(2, order[:, None].expand(-1, size, -1)).to(flat)
    return LossFactor(outputs, matrix, ranks)


def loss_curvature(measured: MeasuredLoss, batch: Batch, vector: Tensor) -> tuple[list[Tensor], Tensor]:
    """(outputs z, ``d^2 loss / dz^2 vector``) of one sample, for `vector` [d]: without any factor."""
    outputs, flat = _first_derivative(measured, batch)
    if not flat.requires_grad or flat.shape[1] != len(vector):
        return outputs, torch.zeros_like(flat[0])
    return outputs, _derivative(flat[0] @ vector, outputs, 1)[0]


def _first_derivative(measured: MeasuredLoss, batch: Batch, check: bool = False) -> tuple[list[Tensor], Tensor]:
    """Outputs, and the loss's derivative with respect to them, [B, d], with its graph."""
    captured: list[Any] = []
    handle = measured.model.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        loss = measured.of(batch)
    finally:
        handle.remove()
    outputs = _logits(captured[0]) if len(captured) == 1 else []
    gradients: tuple[Tensor | None, ...] = (None,)
    if outputs and loss.requires_grad:
        gradients = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    rows = batch_size(batch)
    size = sum(z.numel() for z in outputs) // rows
    if any(g is None for g in gradients) or size > _MOST_OUTPUTS:
        raise NoModelOutputError(
            f"model: {type(measured.model).__name__} shows no logits (at most {_MOST_OUTPUTS} a sample) that its loss "
            "depends on, so it has no Gauss-Newton matrix; use method='lanczos'"
        )
    if check and not _all_through(measured, loss, outputs, gradients):
        raise NoModelOutputError(
            f"model: the loss of {type(measured.model).__name__} depends on its parameters in other ways than through "
            "its logits (further outputs, or the weights themselves), so it has no Gauss-Newton matrix; use "
            "method='lanczos'"
        )
    if rows > 1 and any(len(z) != rows for z in outputs):
        raise MixedSamplesError
    return outputs, torch.cat([g.reshape(rows, -1) for g in gradients if g is not None], dim=1)


def _all_through(
    measured: MeasuredLoss, loss: Tensor, outputs: list[Tensor], gradients: tuple[Tensor | None, ...]
) -> bool:
    """Whether the parameters' gradient is that which `gradients` of the outputs give: J^T dl/dz."""
    parameters = [p for p in measured.model.parameters() if p.requires_grad]
    seeds = [g.detach() for g in gradients if g is not None]
    whole = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    through = torch.autograd.grad(outputs, parameters, seeds, retain_graph=True, allow_unused=True)
    error, length = 0.0, 0.0
    for p, a, b in zip(parameters, whole, through, strict=True):
        first, second = (torch.zeros_like(p) if g is None else g for g in (a, b))
        error += float((first - second).double().square().sum())
        length += float(first.double().square().sum())
    return error <= torch.finfo(loss.dtype).eps * length


def _derivative(value: Tensor, outputs: list[Tensor], rows: int) -> Tensor:
    found = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(z) if g is None else g for g, z in zip(found, outputs, strict=True)]
    return torch.cat([part.reshape(rows, -1) for part in parts], dim=1)


def _eigh(matrices: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, d] and eigenvectors [B, d, d] (in columns) of `matrices` [B, d, d].

    The loss of token classification knows no pairs of tokens: for outputs [B, T, C] whose blocks [C, C] stand alone,
    the blocks are taken apart.
    """
    rows, size, _ = matrices.shape
    if len(outputs) == 1 and outputs[0].ndim == 3 and outputs[0].shape[1] > 1:
        tokens, classes = outputs[0].shape[1:]
        blocks = matrices.view(rows, tokens, classes, tokens, classes)
        alone = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [B, T, C, C]
        if blocks.count_nonzero() == alone.count_nonzero():
            values, vectors = torch.linalg.eigh(alone)
            placed = torch.zeros_like(blocks)
            placed.diagonal(dim1=1, dim2=3).copy_(vectors.permute(0, 2, 3, 1))
            return values.reshape(rows, size), placed.view(rows, size, size)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def _logits(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    for names in (("logits",), ("start_logits", "end_logits")):
        found = [output.get(n) if isinstance(output, Mapping) else getattr(output, n, None) for n in names]
        if all(isinstance(z, Tensor) and z.requires_grad for z in found):
            return [z for z in found if isinstance(z, Tensor)]
    return []
