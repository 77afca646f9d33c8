"""The loss over the plane of the top two Hessian eigenvectors of one block (Q-BERT, figures 2 and 3).

``L(a, b) = loss at W + a e_1 + b e_2`` on a square grid around the trained weights W. A sharp bowl says that rounding
this block costs much, a flat one that it costs little, a saddle that the model is not at a minimum.

    >>> surfaces = [loss_landscape(model, batches, name) for name in ("encoder.layer.0", "encoder.layer.5")]
    >>> plot_landscapes(surfaces, "landscape.png")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbert.arguments import real_number, whole_number
from qbert.files import write_whole
from qbert.hessian.blocks import find_block
from qbert.hessian.eigen import top_eigenpairs
from qbert.hessian.evaluating import in_full_precision
from qbert.hessian.losses import LossFunction
from qbert.hessian.operator import HessianOperator
from qbert.hessian.parts import Part, vector_options
from qbert.hessian.subsets import random_subset

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
    """

    name: str
    offsets: NDArray[np.float64]
    losses: NDArray[np.float64]
    eigenvalues: tuple[float, float]
    converged: bool

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
    subset = random_subset(
        model, batches, samples=samples, seed=seed, collate_fn=collate_fn, micro_batch_size=micro_batch_size
    )
    operator = HessianOperator(model, subset, {name: block.parameters}, loss_fn=loss_fn)
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
    return LossLandscape(name, offsets, losses, (first.value, second.value), first.converged and second.converged)


def mean_loss(operator: HessianOperator) -> float:
    """Mean loss at the weights as they are now; infinite where the model overflows."""
    try:
        return HessianOperator(operator.model, operator.batches, {}, loss_fn=operator.loss_fn).loss
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


def plot_landscapes(
    landscapes: Sequence[LossLandscape], path: str | os.PathLike[str], *, kind: str = "contour"
) -> None:
    """Draw surfaces side by side with one colour scale; a star marks the trained weights.

    Args:
        landscapes: at least one.
        path: image file; its suffix chooses the type.
        kind: ``contour`` or ``surface`` (three-dimensional).

    Raises:
        ValueError: nothing to draw, or an unknown kind.
    """
    if not landscapes:
        raise ValueError("landscapes: nothing to draw; pass at least one LossLandscape")
    if kind not in ("contour", "surface"):
        raise ValueError(f"kind: {kind!r} is unknown; use 'contour' or 'surface'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(landscapes) + 1, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    finite = np.concatenate([s.losses[np.isfinite(s.losses)] for s in landscapes])
    low, high = float(finite.min()), float(finite.max())
    high = high if high > low else low + 1e-12
    # Square-root colours and quadratic levels: a parabola gets evenly spaced contours.
    norm = PowerNorm(0.5, low, high)
    levels = low + (high - low) * np.linspace(0, 1, 17) ** 2
    reach = min(float(s.offsets[-1]) for s in landscapes)  # the same window for all, so that slopes compare
    panels = []
    for index, surface in enumerate(landscapes, 1):
        losses = np.clip(np.where(np.isfinite(surface.losses), surface.losses, high), low, high)
        x, y = np.meshgrid(surface.offsets, surface.offsets, indexing="ij")
        axes: Any = figure.add_subplot(1, len(landscapes), index, projection="3d" if kind == "surface" else None)
        panels.append(axes)
        if kind == "surface":
            axes.plot_surface(x, y, losses, cmap="viridis", norm=norm, rstride=1, cstride=1, alpha=0.9)
            axes.plot([0], [0], [surface.center], "*", color="red", markersize=11, label="trained weights", zorder=9)
            axes.set_zlim(low, high)
            axes.set_zlabel("mean loss")
            axes.set_box_aspect(None, zoom=0.8)
        else:
            axes.contourf(x, y, losses, levels=levels, cmap="viridis", norm=norm)
            axes.contour(x, y, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
            axes.plot(
                [0],
                [0],
                "*",
                color="red",
                markeredgecolor="white",
                markersize=14,
                label=f"trained weights, loss {surface.center:.3g}",
            )
            axes.set_aspect("equal")
        eigenvalues = ", ".join(f"{value:.3g}" for value in surface.eigenvalues)
        note = "" if surface.converged else " (not converged)"
        axes.set_title(f"{surface.name}\ntop eigenvalues {eigenvalues}{note}", fontsize="medium")
        axes.set_xlabel("distance along eigenvector 1")
        axes.set_ylabel("distance along eigenvector 2")
        axes.legend(loc="upper right", fontsize="small")
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis"), ax=panels, shrink=0.85, pad=0.02 if kind == "contour" else 0.1
    )
    bar.set_label("mean loss")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))
