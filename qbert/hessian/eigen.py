"""Extreme eigenvalues of a symmetric operator that is known by its products alone, each with an error bound.

>>> pair = lanczos(lambda v: A @ v, size=A.shape[0], tol=1e-3)
>>> pair.value, pair.error, pair.converged
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qbert.arguments import whole_number
from qbert.hessian.eigenpair import Eigenpair, Product, check_limits, check_product, relative, start_vector


class PowerIteration:
    """Power iteration as in Q-BERT's and PyHessian's code: stops when the eigenvalue changes by less than `tol`.

    That rule says nothing about the error (it can be missed by far); `converged` tells whether the residual is
    within `tol` at the moment it stops. Same protocol as `qbert.hessian.krylov.Lanczos`.
    """

    def __init__(
        self,
        size: int,
        *,
        tol: float = 1e-3,
        max_products: int = 200,
        warm: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        check_limits(tol, max_products)
        self.tol, self.max_products = tol, max_products
        self.products = 0
        self.result: Eigenpair | None = None
        start, _ = start_vector(size, warm=warm, generator=generator, dtype=dtype, device=device)
        self.query: Tensor | None = start / torch.linalg.vector_norm(start)
        self._value = math.nan

    def receive(self, product: Tensor) -> None:
        """Take H @ query, [n]; afterwards `query` is the next vector, or None when `result` stands."""
        if self.query is None:
            raise RuntimeError("PowerIteration.receive: the iteration has ended; read its result")
        check_product(product)
        self.products += 1
        vector, previous = self.query, self._value
        self._value = float(torch.dot(vector, product))
        length = float(torch.linalg.vector_norm(product))
        settled = length == 0 or abs(self._value - previous) < self.tol * abs(self._value)
        if not settled and self.products < self.max_products:
            self.query = product / length
            return
        self.query = None
        residual = relative(float(torch.linalg.vector_norm(product - self._value * vector)), self._value)
        self.result = Eigenpair(
            value=self._value,
            vector=vector,
            residual=residual,
            error=residual,
            upper_bound=math.inf,
            other_end=math.nan,
            other_end_residual=math.nan,
            gap=math.nan,
            products=self.products,
            converged=residual <= self.tol,
        )


def lanczos(product: Product, size: int, *, seed: int = 0, **settings: Any) -> Eigenpair:
    """Eigenpair of largest magnitude of a symmetric operator.

    Unless told otherwise it goes on until the value is proven to the tolerance with 99 % probability
    (``confidence=0.99``; Kuczynski and Wozniakowski 1992).

    Args:
        product: v -> H v, both [size] in the dtype and on the device of `settings` (default: float64, CPU).
        size: dimension of the operator.
        seed: of the start vector.
        **settings: those of `qbert.hessian.krylov.Lanczos`, such as ``tol`` (relative error, default 1e-3).

    Raises:
        ValueError, TypeError: a size or setting that cannot be used; ArithmeticError if a product is not finite.
    """
    from qbert.hessian.krylov import Lanczos

    settings = {"confidence": 0.99, **settings}
    return run(Lanczos(size, generator=torch.Generator().manual_seed(seed), **settings), product)


def power_iteration(product: Product, size: int, *, seed: int = 0, **settings: Any) -> Eigenpair:
    """Power iteration on `product`, [size] -> [size]; see `PowerIteration` for what its stopping rule is worth.

    Args:
        product, size, seed: as for `lanczos`.
        **settings: those of `PowerIteration`.

    Raises:
        ValueError, TypeError, ArithmeticError: as `lanczos`.
    """
    return run(PowerIteration(size, generator=torch.Generator().manual_seed(seed), **settings), product)


def top_eigenpairs(product: Product, size: int, *, k: int, seed: int = 0, **settings: Any) -> list[Eigenpair]:
    """The `k` eigenpairs of largest magnitude, multiplicities included, largest first.

    Found one after the other, each orthogonal to those before (deflation; Parlett 1998, section 5.1).

    Args:
        product, size, seed, settings: as for `lanczos`.
        k: number of eigenpairs.

    Raises:
        ValueError: if k is not in 1..size; ValueError, TypeError, ArithmeticError as `lanczos`.
    """
    if not 1 <= whole_number("k", k) <= size:
        raise ValueError(f"k: {k} eigenpairs of an operator of size {size} were asked for; use 1 to {size}")
    pairs: list[Eigenpair] = []
    for index in range(k):
        locked = [pair.vector for pair in pairs]
        pairs.append(lanczos(product, size, seed=seed + index, locked=locked, **settings))
    return sorted(pairs, key=lambda pair: -abs(pair.value))


def run(solver: Any, product: Product) -> Eigenpair:
    """Give `solver` (Lanczos or PowerIteration) the products it asks for until it has a result."""
    while solver.query is not None:
        solver.receive(product(solver.query))
    return solver.result
