"""The loss over the plane of the top two Hessian eigenvectors of one block (Q-BERT, figures 2 and 3).

``L(a, b) = loss at W + a e_1 + b e_2`` on a square grid around the trained weights W. A sharp bowl says that rounding
this block costs much, a flat one that it costs little, a saddle that the model is not at a minimum.

    >>> surfaces = [loss_landscape(model, batches, name) for name in ("encoder.layer.0", "encoder.layer.5")]
    >>> plot_landscapes(surfaces, "landscape.png")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbert.arguments import real_number, whole_number
from qbert.hessian.batches import batch_size
from qbert.hessian.blocks import Part, find_block, vector_options
from qbert.hessian.eigen import top_eigenpairs
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.hessian.operator import HessianOperator

_RADIUS_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class LossLandscape:
    """A loss surface.

    Attributes:
        name: the block.
        offsets: [S] distances from the trained weights along either eigenvector, in units of the weights.
        losses: [S, S] mean loss at (offsets[i] along the first, offsets[j] along the second eigenvector).
        eigenvalues: the two eigenvalues of largest magnitude, signed.
        converged: whether both reached the tolerance.
        samples: how many the loss is a mean over.
    """

    name: str
    offsets: NDArray[np.float64]
    losses: NDArray[np.float64]
    eigenvalues: tuple[float, float]
    converged: bool
    samples: int = 0

    @property
    def center(self) -> float:
        """Mean loss at the trained weights."""
        middle = len(self.offsets) // 2
        return float(self.losses[middle, middle])


@in_full_precision
def loss_landscape(
    model: nn.Module,
    batches: Any,
    name: str,
    *,
    granularity: str = "layer",
    steps: int = 11,
    radius: float | None = None,
    samples: int | None = 64,
    tol: float = 1e-2,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
) -> LossLandscape:
    """Loss on a grid of `steps` x `steps` points; the model's weights are put back exactly.

    Args:
        model: the trained model.
        batches: labelled data, as for `hessian_spectrum`.
        name: a block of `granularity`, such as ``encoder.layer.0``.
        granularity: ``layer``, ``block``, ``matrix`` or ``group``.
        steps: odd number of grid points along either axis.
        radius: largest distance along an axis; default 1 % of the norm of the block's weights.
        samples: number of samples, drawn by `seed`; None: all.
        tol: relative error of the eigenvalues; the picture needs no sharp ones.
        seed: for the samples and the start vectors.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss.
        collate_fn: for a data set.
        micro_batch_size: samples per forward pass.

    Raises:
        ValueError: an unknown block, an even number of steps, a radius that is not positive.
    """
    if whole_number("steps", steps) < 3 or steps % 2 == 0:
        raise ValueError(f"steps: {steps} has no middle point; use an odd number from 3 on, such as 11")
    block = find_block(model, name, granularity)
    if radius is None:
        radius = _RADIUS_SHARE * float(sum(p.detach().double().square().sum() for p in block.parameters)) ** 0.5
    if not real_number("radius", radius) > 0:
        raise ValueError(f"radius: {radius} spans no surface; use a positive distance")
    measured = MeasuredLoss.on_random_samples(
        model, batches, loss_fn, samples=samples, seed=seed, collate_fn=collate_fn, micro_batch_size=micro_batch_size
    )
    operator = HessianOperator.of(measured, {name: block.parameters})
    pairs = top_eigenpairs(
        lambda v: operator.product(name, v),
        block.size,
        k=min(2, block.size),
        tol=tol,
        seed=seed,
        confidence=None,
        **vector_options(block.parameters),
    )
    operator.release()
    first, second = pairs[0], pairs[-1]
    offsets = np.linspace(-radius, radius, steps)
    offsets[steps // 2] = 0.0
    losses = np.empty((steps, steps))
    with displaced(block.parameters) as move:
        for i, a in enumerate(offsets):
            for j, b in enumerate(offsets):
                move(float(a) * first.vector + float(b) * second.vector)
                losses[i, j] = mean_loss(operator)
    count = sum(batch_size(batch) for batch in measured.batches)
    converged = first.converged and second.converged
    return LossLandscape(name, offsets, losses, (first.value, second.value), converged, count)


def mean_loss(operator: HessianOperator) -> float:
    """Mean loss at the weights as they are now; infinite where the model overflows."""
    try:
        return HessianOperator.of(operator.measured, {}).loss
    except ValueError:
        return float("inf")


@contextlib.contextmanager
def displaced(parameters: Sequence[Part]) -> Iterator[Callable[[Tensor], None]]:
    """Gives ``move(offset [n])``, which sets the weights to where they were plus `offset`; restored bit by bit."""
    originals = [p.detach().clone() for p in parameters]

    def move(offset: Tensor) -> None:
        parts = offset.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, original, part in zip(parameters, originals, parts, strict=True):
                parameter.detach().copy_(original + part.view_as(original).to(original))

    try:
        yield move
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.detach().copy_(original)
