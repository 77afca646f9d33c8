"""Traces of Hessian blocks from products with random vectors, each with its standard error.

Hutchinson (1989): ``E[z^T H z] = tr H`` for independent signs z. Hutch++ (Meyer, Musco, Musco and Woodruff 2021) spends
a third of the products on the range Q of a sketch ``H S``, takes ``tr(Q^T H Q)`` exactly, and samples only the rest,
``tr((I - Q Q^T) H (I - Q Q^T))``: far less noise where few eigenvalues carry the trace.

    >>> estimate = estimate_trace(lambda v: H @ v, size, probes=30)
    >>> estimate.value, estimate.error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.arguments import whole_number
from qbert.hessian.blocks import parameter_blocks, vector_options
from qbert.hessian.eigen import Product
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.hessian.operator import HessianOperator
from qbert.hessian.vectors import dot
from qbert.progress import progress_bar

METHODS = ("hutch++", "hutchinson")


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace.

    Attributes:
        value: the estimate.
        error: its standard error over the random vectors; nan with fewer than two of them, 0 where it is exact.
        products: number of operator products used.
    """

    value: float
    error: float
    products: int


def estimate_trace(
    product: Product,
    size: int,
    *,
    probes: int = 30,
    method: str = "hutch++",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> TraceEstimate:
    """Trace of a symmetric operator from products with random vectors.

    Args:
        product: v -> H v, both [size].
        size: dimension of the operator.
        probes: number of products; where they reach `size`, the trace is exact.
        method: ``hutch++`` (holds a third of the probes as vectors [size]) or ``hutchinson``.
        seed: of the random vectors.
        dtype, device: of the vectors that `product` gets.

    Raises:
        ValueError: unknown method, fewer than three probes for Hutch++, fewer than one for Hutchinson.
        TypeError: probes that are no whole number.
        ArithmeticError: products that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; use one of {', '.join(METHODS)}")
    probes = whole_number("probes", probes, least=3 if method == "hutch++" else 1)
    generator = torch.Generator().manual_seed(seed)

    def signs() -> Tensor:
        return (torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1).to(device, dtype)

    if size <= probes:
        basis = torch.eye(size, dtype=dtype, device=device)
        return _finite(TraceEstimate(math.fsum(float(dot(product(e), e)) for e in basis), 0.0, size))
    if method == "hutchinson":
        return _finite(_average([float(dot(z, product(z))) for z in (signs() for _ in range(probes))], 0.0, probes))
    third = probes // 3
    Q = torch.linalg.qr(torch.stack([product(signs()) for _ in range(third)], dim=1)).Q  # [size, third]
    exact = math.fsum(float(dot(q, product(q))) for q in Q.T)
    values = []
    for _ in range(probes - 2 * third):
        z = signs()
        z = z - Q @ (Q.T @ z)
        values.append(float(dot(z, product(z))))
    return _finite(_average(values, exact, probes))


@in_full_precision
def hessian_traces(
    model: nn.Module,
    batches: Any,
    *,
    granularity: str = "layer",
    probes: int = 30,
    method: str = "hutch++",
    samples: int | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, TraceEstimate]:
    """Hessian trace of every block of `model`, block name -> `TraceEstimate`.

    Args:
        model: as for `hessian_spectrum`.
        batches: labelled data.
        granularity: ``layer``, ``block``, ``matrix`` or ``group``.
        probes: products per block.
        method: ``hutch++`` or ``hutchinson``.
        samples: number of samples, drawn by `seed`; None: all.
        seed: for samples and random vectors.
        loss_fn, collate_fn, micro_batch_size: as for `hessian_spectrum`.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError, ArithmeticError: as for `estimate_trace` and `hessian_spectrum`.
    """
    blocks = parameter_blocks(model, granularity)
    measured = MeasuredLoss.on_random_samples(
        model, batches, loss_fn, samples=samples, seed=seed, collate_fn=collate_fn, micro_batch_size=micro_batch_size
    )
    operator = HessianOperator.of(measured, {b.name: b.parameters for b in blocks})
    estimates = {}
    with progress_bar(
        total=len(blocks) * probes, desc="trace", unit="product", disable=not progress, smoothing=0
    ) as bar:
        for block in blocks:

            def product(v: Tensor, name: str = block.name) -> Tensor:
                bar.update(1)
                return operator.product(name, v)

            estimates[block.name] = estimate_trace(
                product,
                block.size,
                probes=probes,
                method=method,
                seed=seed,
                **vector_options(block.parameters),
            )
    return estimates


def _average(values: list[float], offset: float, products: int) -> TraceEstimate:
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum((v - mean) ** 2 for v in values)
    error = math.sqrt(spread / (count * (count - 1))) if count > 1 else math.nan
    return TraceEstimate(offset + mean, error, products)


def _finite(estimate: TraceEstimate) -> TraceEstimate:
    if not math.isfinite(estimate.value):
        raise ArithmeticError("the operator returned products that are not finite; check it for overflow")
    return estimate
