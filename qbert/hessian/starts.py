"""Start vectors of all blocks' eigenvalue iterations, from one Hessian product of all blocks together.

It stands alone because it is about what the blocks have in common, where the iterations know one operator each.

Let H_ij be the blocks of the Hessian of all blocks' parameters, a_j fixed vectors and z_j standard Gaussian ones. A
product with u, ``u_j = a_j + c z_j``, gives ``y_i = sum_j H_ij u_j`` for all blocks i: in an encoder of L layers at the
price of 6 L - 1 forward passes of a layer, where one product of each takes L (L + 4). Along a unit eigenvector x of
H_ii, of eigenvalue lambda, y_i is something fixed plus ``c sum_j <H_ji x, z_j>``: a Gaussian number of variance
``c^2 sum_j ||H_ji x||^2``, of which the term j = i alone is ``c^2 lambda^2``. That is all that the proofs of
`qbert.hessian.eigen` ask for (`Start` with ``power=1``), so that the first product of every iteration, which takes off
what the noise holds of the many eigenvalues near zero, is had for all blocks at once. What the other blocks add makes
the noise longer, as the root of their number; it also makes the guess better, since the top directions of all blocks
move the outputs of the same samples.

The a_j are pieces of the gradient: where there is something left to learn, it lies among the top directions of the
Hessian (Gur-Ari et al. 2018, arXiv:1812.04754), and the graph that products are taken from gives it for nothing. Beside
a large subset the Gauss-Newton directions of a few samples cost as little, and are better (`gauss_newton_starts`).

    >>> operator = HessianOperator(model, batches, {**blocks, TOGETHER: together(blocks.values())})
    >>> starts = coupled_starts(operator, generators, {})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qbert.hessian.batches import Batch, batch_size
from qbert.hessian.blocks import Part, vector_options
from qbert.hessian.eigen import Start, start_vector
from qbert.hessian.gauss_newton.loss_factor import NoModelOutputError
from qbert.hessian.gauss_newton.top import start_vectors
from qbert.hessian.losses import MeasuredLoss
from qbert.hessian.operator import HessianOperator
from qbert.hessian.vectors import dot, norm

TOGETHER = "all blocks together"  # the operator's name for them; the blocks' own are those of modules
NOISE = 0.2  # c, beside guesses of length 1: more of it is the sooner proof, less of it the smaller residual
_GUESS_SAMPLES = 16
_LARGE = 32  # samples in a subset beside which Gauss-Newton directions of 16 cost next to nothing


def together(blocks: Iterable[Sequence[Part]]) -> list[Part]:
    """The parts of all `blocks`, one after the other."""
    return [part for parts in blocks for part in parts]


def guesses(measured: MeasuredLoss, blocks: Mapping[str, Sequence[Part]]) -> dict[str, Tensor]:
    """Gauss-Newton directions of each block on a few samples of a large subset; nothing for a small one.

    Nor where there are no logits. The signs of the blocks' directions go together, see `start_vectors`.
    """
    if sum(map(batch_size, measured.batches)) <= _LARGE:
        return {}
    try:
        return start_vectors(measured.over(some_samples(measured.batches, _GUESS_SAMPLES)), blocks)
    except NoModelOutputError:
        return {}


def coupled_starts(
    operator: HessianOperator,
    generators: Mapping[str, torch.Generator],
    directions: Mapping[str, Tensor] | None,
) -> dict[str, Start]:
    """A start for every block: name -> `Start`, its vector [n] of length 1.

    Args:
        operator: with the blocks of `generators` and, as `TOGETHER`, all of them in the same order.
        generators: block name -> generator of its noise, for all blocks.
        directions: block name -> guess [n] at the top eigenvector; of no length for one that is not known. Empty: the
            gradient's pieces. None: noise alone, for iterations that a guess does not help.
    """
    options = {name: vector_options(operator.blocks[name]) for name in generators}
    sizes = [operator.size(name) for name in generators]
    dtype = max((o["dtype"] for o in options.values()), key=lambda d: d.itemsize)
    noise = [
        # Drawn on the CPU, so that all devices start alike.
        torch.randn(size, generator=generator, dtype=options[name]["dtype"], device="cpu").to(dtype)
        for (name, generator), size in zip(generators.items(), sizes, strict=True)
    ]
    vector = torch.cat(noise).mul_(NOISE).to(options[next(iter(options))]["device"])
    del noise
    if directions is not None:
        found = [directions[name] for name in generators] if directions else operator.gradient(TOGETHER).split(sizes)
        for piece, direction in zip(vector.split(sizes), found, strict=True):
            length = float(norm(direction))
            if length > 0:
                piece.add_(direction.to(piece), alpha=1 / length)
    product = operator.product(TOGETHER, vector)
    starts = {}
    for (name, generator), piece in zip(generators.items(), product.split(sizes), strict=True):
        length = float(norm(piece))
        if length > 0:
            starts[name] = Start((piece / length).to(**options[name]), NOISE / length, power=1)
        else:  # rows of zeros
            starts[name] = start_vector(len(piece), generator=generator, **options[name])
    return starts


def with_previous(start: Start, previous: Tensor | None) -> Start:
    """`start` with the eigenvector [n] of the run before added as far as the two agree.

    They do where subsets are large; small subsets have top directions of their own. Of ``y + <p, y> p`` the Gaussian
    part along x is that of y along ``x + <p, x> p``, whose deviation is at least ``c |lambda| (1 + <p, x>^2)``.
    """
    if previous is None:
        return start
    previous = previous.to(start.vector)
    return Start(start.vector + dot(start.vector, previous) * previous, start.deviation, start.power)


def some_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """About `count` samples, spread evenly over `batches` (which are ordered by length)."""
    total = sum(batch_size(batch) for batch in batches)
    step = max(1, total // count)
    chosen: list[Batch] = []
    position = 0
    for batch in batches:
        size = batch_size(batch)
        rows = torch.tensor(range(-position % step, size, step), dtype=torch.int64, device="cpu")
        position += size
        if len(rows):
            chosen.append(
                {
                    k: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == size else v
                    for k, v in batch.items()
                }
            )
    return chosen
