"""Extreme eigenvalues of a symmetric operator that is known by its products alone, each with an error bound.

>>> pair = lanczos(lambda v: A @ v, size=A.shape[0], tol=1e-3)
>>> pair.value, pair.error, pair.converged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.arguments import real_number, whole_number

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenpair:
    """The eigenvalue of largest magnitude, as far as `products` products tell.

    Attributes:
        value: signed eigenvalue (Rayleigh quotient of `vector`).
        vector: unit eigenvector [n].
        residual: ||H v - value v|| / |value|: an eigenvalue lies at least that close.
        error: the bound on the relative error of `value` that was held against the tolerance.
        upper_bound: with 99 % probability over the start vector no eigenvalue is larger in magnitude.
        other_end: extreme Ritz value at the opposite end of the spectrum, not necessarily converged.
        other_end_residual: absolute residual of `other_end`.
        gap: distance from `value` to the rest of the spectrum, as far as the other Ritz values tell it (their residuals
            taken off; may be negative); nan where nothing is known of them.
        products: number of operator products used.
        converged: error <= tol, and nothing seen of the spectrum can be larger in magnitude.
    """

    value: float
    vector: Tensor
    residual: float
    error: float
    upper_bound: float
    other_end: float
    other_end_residual: float
    gap: float
    products: int
    converged: bool


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


def start_vector(
    size: int,
    *,
    warm: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    random_share: float = 0.3,
) -> tuple[Tensor, float]:
    """Start vector [size] of about unit length, and the standard deviation of its random part in any direction.

    The unit `warm` vectors are added up (their signs aligned, since an eigenvector has none), plus a Gaussian vector
    of length `random_share` (1 without warm vectors): it makes sure that a warm vector that is an eigenvector of the
    wrong eigenvalue cannot keep the right one out.
    """
    whole_number("size", size, least=1)
    share = random_share if warm else 1.0
    deviation = share / size**0.5
    # Drawn on the CPU, so that all devices start alike.
    start = torch.randn(size, generator=generator, dtype=dtype, device="cpu").mul_(deviation).to(device)
    guesses: Tensor | None = None
    for guess in warm:
        guess = guess.detach().to(device, dtype)
        length = float(torch.linalg.vector_norm(guess))
        if 0 < length < math.inf:
            sign = -1 if guesses is not None and guess @ guesses < 0 else 1
            guesses = guess * (sign / length) if guesses is None else guesses.add_(guess, alpha=sign / length)
    return start if guesses is None else start.add_(guesses), deviation


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


def relative(error: float, value: float) -> float:
    """error / |value|; 0 for no error at all, infinite for an error on a zero value."""
    if error == 0:
        return 0.0
    return float(error / abs(value)) if value else math.inf


def error_bound(value: float, residual: float, gap: float = math.nan) -> float:
    """Bound on the relative error of a Rayleigh quotient: the residual, or with a known gap residual^2 / gap."""
    error = relative(residual, value)
    return min(error, relative(residual**2 / gap, value)) if gap > residual else error


def check_limits(tol: float, max_products: int) -> None:
    """Refuse a tolerance or a product limit that cannot be used with a ValueError or TypeError."""
    if not 0 < real_number("tol", tol) < 1:
        raise ValueError(f"tol: {tol} is not a relative tolerance; use a number between 0 and 1, such as 1e-3")
    whole_number("max_products", max_products, least=1)


def check_confidence(confidence: float | None) -> None:
    """Refuse what is neither None nor a probability with a ValueError or TypeError."""
    if confidence is not None and not 0 < real_number("confidence", confidence) < 1:
        raise ValueError(f"confidence: {confidence} is not a probability; use a number such as 0.99, or None")


def all_finite(vector: Tensor) -> bool:
    """Whether `vector` holds neither NaN nor infinity; a sum finds them in a tenth of the time of a look at each."""
    return bool(torch.isfinite(vector.sum()) or torch.isfinite(vector).all())


def check_product(product: Tensor) -> None:
    """ArithmeticError if `product` holds NaN or infinity."""
    if not all_finite(product):
        raise ArithmeticError("the operator returned a product that is not finite; check it for overflow")
