"""Spectral density of a Hessian block by stochastic Lanczos quadrature.

For a random unit vector v the Lanczos matrix T gives a Gauss quadrature of the spectral measure: nodes theta_j (its
eigenvalues) with weights ``(first component of eigenvector j)^2`` integrate polynomials up to degree 2k - 1 exactly
(Golub and Welsch 1969; Ghorbani, Krishnan and Xiao 2019). Averaged over probes they estimate the density of all n
eigenvalues.

    >>> density = spectral_density(lambda v: H @ v, size)
    >>> density.plot("density.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import nn

from qbert.arguments import whole_number
from qbert.files import write_whole
from qbert.hessian.blocks import find_block, vector_options
from qbert.hessian.eigen import Product, check_product
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.hessian.operator import HessianOperator
from qbert.hessian.vectors import dot, norm
from qbert.plots import new_figure

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Weighted nodes that stand for the eigenvalues of an operator of dimension `size`.

    Attributes:
        name: of the block, or empty.
        nodes: [P, K] Ritz values of each probe.
        weights: [P, K] shares of the spectrum, each row summing to 1.
        size: dimension n.
    """

    name: str
    nodes: Array
    weights: Array
    size: int

    def moment(self, degree: int) -> float:
        """Mean of eigenvalue^degree; times `size` it is the trace of that power."""
        return float((self.weights * self.nodes**degree).sum(axis=1).mean())

    def fraction_below(self, value: float) -> float:
        """Estimated share of eigenvalues smaller than `value`."""
        return float((self.weights * (self.nodes < value)).sum(axis=1).mean())

    def curve(self, points: int = 400, width: float | None = None) -> tuple[Array, Array]:
        """The density smoothed by Gaussians of standard deviation `width` (default: 1 % of the range), ([X], [X])."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        # Nodes that are equal up to rounding are one point.
        spread = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0
        width = width or 0.01 * spread or 1e-3 * max(abs(high), 1e-12)
        x = np.linspace(low - 4 * width, high + 4 * width, points)
        bumps = np.exp(-0.5 * ((x[:, None, None] - self.nodes) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return x, (bumps * self.weights).sum(axis=2).mean(axis=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the smoothed density on a logarithmic scale, with the extreme Ritz values marked."""
        figure = new_figure(7, 4.2)
        axes = figure.add_subplot()
        x, y = self.curve()
        axes.semilogy(x, np.maximum(y, 1e-12), color="tab:blue")
        floor = max(1e-2 / self.size, 1e-10) / max(x[-1] - x[0], 1e-300)
        axes.set_ylim(bottom=floor)
        extremes = [self.nodes.min(), self.nodes.max()]
        axes.plot(extremes, [floor * 1.5] * 2, "^", color="tab:red", label="extreme Ritz values", clip_on=False)
        axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_xlabel("eigenvalue  [loss / weight²]")
        axes.set_ylabel("density")
        axes.set_title(f"Hessian spectral density{' of ' + self.name if self.name else ''} ({self.size:,} eigenvalues)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
        write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def spectral_density(
    product: Product,
    size: int,
    *,
    probes: int = 4,
    steps: int = 30,
    seed: int = 0,
    name: str = "",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> SpectralDensity:
    """Density of a symmetric operator from probes * steps products.

    Args:
        product: v -> H v, both [size].
        size: dimension of the operator.
        probes: number of random start vectors to average over.
        steps: Lanczos steps from each, which are the nodes it gives; at most `size`.
        seed: of the start vectors.
        name: of the operator, for the picture.
        dtype, device: of the vectors that `product` gets.

    Raises:
        TypeError, ValueError: probes or steps that are no whole number of at least 1.
        ArithmeticError: products that are not finite.
    """
    probes, steps = whole_number("probes", probes, least=1), whole_number("steps", steps, least=1)
    generator = torch.Generator().manual_seed(seed)
    steps = min(steps, size)
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    for probe in range(probes):
        vector = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        diagonal, side = _tridiagonal(product, vector / norm(vector), steps)
        values, vectors = eigh_tridiagonal(diagonal, side)
        nodes[probe, : len(values)], weights[probe, : len(values)] = values, vectors[0] ** 2
        nodes[probe, len(values) :] = values[-1]  # the Krylov space ended early: repeated nodes of weight 0
    return SpectralDensity(name, nodes, weights, size)


@in_full_precision
def hessian_density(
    model: nn.Module,
    batches: Any,
    name: str,
    *,
    granularity: str = "layer",
    probes: int = 4,
    steps: int = 30,
    samples: int | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
) -> SpectralDensity:
    """Spectral density of one block of `model`.

    Args:
        model: as for `hessian_spectrum`.
        batches: labelled data.
        name: a block of `granularity`, such as ``encoder.layer.0``.
        granularity: ``layer``, ``block``, ``matrix`` or ``group``.
        probes, steps: as for `spectral_density`; their product is the number of Hessian products.
        samples: number of samples, drawn by `seed`; None: all.
        seed: for samples and random vectors.
        loss_fn, collate_fn, micro_batch_size: as for `hessian_spectrum`.

    Raises:
        ValueError, TypeError, ArithmeticError: an argument or a Hessian that cannot be used.
    """
    block = find_block(model, name, granularity)
    measured = MeasuredLoss.on_random_samples(
        model, batches, loss_fn, samples=samples, seed=seed, collate_fn=collate_fn, micro_batch_size=micro_batch_size
    )
    operator = HessianOperator.of(measured, {name: block.parameters})
    return spectral_density(
        lambda v: operator.product(name, v),
        block.size,
        probes=probes,
        steps=steps,
        seed=seed,
        name=name,
        **vector_options(block.parameters),
    )


def _tridiagonal(product: Product, vector: torch.Tensor, steps: int) -> tuple[Array, Array]:
    """Diagonal and side diagonal of the Lanczos matrix, full reorthogonalization; shorter if the space ends."""
    basis = [vector]
    diagonal: list[float] = []
    side: list[float] = []
    while True:
        remainder = product(basis[-1])
        check_product(remainder)
        diagonal.append(float(dot(basis[-1], remainder)))
        for _ in range(2):
            for v in basis:
                remainder = remainder - dot(v, remainder) * v
        length = float(norm(remainder))
        scale = max(abs(d) for d in diagonal) + max(side, default=0.0)
        if len(diagonal) == steps or length <= 10 * torch.finfo(vector.dtype).eps * scale:
            return np.array(diagonal), np.array(side)
        side.append(length)
        basis.append(remainder / length)
