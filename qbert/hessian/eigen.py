"""Extreme eigenvalues of a symmetric operator that is known by its products alone, each with an error bound.

    >>> pair = lanczos(lambda v: A @ v, size=A.shape[0], tol=1e-3)
    >>> pair.value, pair.error, pair.converged

All iterations start alike and promise the same (`Eigenpair`). They ask for products and take them, so that those of
several blocks can share a pass over the data:

    >>> solver = Lanczos(size)
    >>> while solver.query is not None:
    ...     solver.receive(H @ solver.query)
    >>> solver.result.value

`Lanczos` works with full reorthogonalization, thick restarts, and three grades of certainty about the top eigenvalue.
H is projected on the Krylov space of a start vector; a Ritz pair (theta, y) of the projection T has the residual
``r = ||H V y - theta V y||`` (rounding errors of H included, since the projection is kept in full). Then

* ``bound="residual"``: some eigenvalue lies within r of theta. Always true.
* ``bound="gap"``: within ``r^2 / gap``, if the rest of the spectrum keeps the distance `gap` that the other Ritz
  values and their reach tell (Kato 1949; Parlett 1998, section 11.7). Saves products where the tolerance is tight and
  the residual outlasts the search for rivals; a pair of eigenvalues that is not resolved yet may be taken for one, and
  the error is then up to their distance: with a random start and a second eigenvalue anywhere within 10 % of the first,
  that happens in a quarter to a half of the cases at tolerances of 1e-3 and 1e-4. Where another Ritz value may come
  within a tenth of theta in magnitude, the residual itself has to be within the tolerance: rivals often show themselves
  late.
* ``confidence``: proof that nothing larger was overlooked. For an eigenvector x the start vector v has the component
  ``|<x, v>| >= sigma eps`` with probability ``1 - sqrt(2/pi) eps``, whatever is added to its Gaussian part of
  deviation sigma in each direction. With the characteristic polynomial p of T, ``||p(H) v|| = beta_0 ... beta_k``,
  so every eigenvalue obeys ``prod_j |lambda - theta_j| <= beta_0 ... beta_k / (sigma eps)``: all of them lie below
  the point where the left side, which grows outside of the Ritz values, passes the right one. (The argument of
  Kuczynski and Wozniakowski 1992 for the polynomial at hand.) Since theta never exceeds the top eigenvalue in
  magnitude, theta is within `tol` once that point is below (1 + tol) |theta|.

Without `confidence`, an eigenvalue counts as converged only if no other Ritz value can overtake it, and if by the same
argument, with 99 % probability over the start vector, no eigenvalue is larger by more than half (`UNSEEN`). A direction
that the start holds nothing of but noise, 1 / sqrt(n) of it, needs that many products to show itself, whatever the
residual says: from the second eigenvector of a block of 7 million parameters, three products found that one to 1e-3.
Nearer rivals are excluded with less certainty: in the worst case, a start at the second eigenvector itself, what is
larger by a quarter was overlooked in 3 to 8 % of the cases, what is larger by a tenth in 13 to 24 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from qbert.arguments import real_number, whole_number
from qbert.hessian.vectors import dot, norm

Product = Callable[[Tensor], Tensor]
BOUNDS = ("residual", "gap")
Array = NDArray[np.float64]
# Chebyshev: an eigenvalue that holds a share s of a Ritz vector's spectral weight lies within r / sqrt(s) of its Ritz
# value. After three products no eigenvalue with more than a ninth of it can overtake unseen; every further product
# filters out what is left of the bulk, so that r itself is reach enough after nine.
_RIVAL_PRODUCTS = 9.0
_FAR = 0.9  # of the top eigenvalue's magnitude: Ritz values below are no rivals
_REPORTED_CONFIDENCE = 0.99
UNSEEN = 1.5  # times the magnitude of a converged eigenvalue: nothing beyond, with the reported confidence
_HOPELESS_PRODUCTS = 10


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
        converged: error <= tol, nothing seen of the spectrum can be larger in magnitude, and with 99 % probability
            nothing unseen is larger by more than half (`upper_bound` says by how much at most).
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


@dataclass(frozen=True)
class Start:
    """Start vector of an iteration, and what its proofs rest on.

    Attributes:
        vector: [n].
        deviation, power: along the eigenvector of any eigenvalue lambda, `vector` is the sum of something fixed and of
            a Gaussian number whose standard deviation is at least ``deviation * |lambda| ** power``.
    """

    vector: Tensor
    deviation: float
    power: int = 0


def start_vector(
    size: int,
    *,
    warm: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    random_share: float = 10.0,
) -> Start:
    """Start [size] of about unit length, random in all directions alike.

    The unit `warm` vectors are added up (their signs aligned, since an eigenvector has none), plus a Gaussian vector
    of length `random_share` (1 without warm vectors). It holds about 1 / sqrt(size) of every eigenvector: what lets an
    iteration find the right one from a warm vector that is another, after the products that this little takes to
    grow, and what its proofs are about. A long one costs nothing where most eigenvalues are small, since the first
    product takes it off, and the proofs come sooner (layers of a MiniLM on 16 samples of SST-2: 7.9 products with a
    random share of 0.3, 6.6 with 10, and 6.2 without any proof).
    """
    whole_number("size", size, least=1)
    share = random_share if warm else 1.0
    deviation = share / size**0.5
    # Drawn on the CPU, so that all devices start alike.
    start = torch.randn(size, generator=generator, dtype=dtype, device="cpu").mul_(deviation).to(device)
    guesses: Tensor | None = None
    for guess in warm:
        guess = guess.detach().to(device, dtype)
        length = float(norm(guess))
        if 0 < length < math.inf:
            sign = -1 if guesses is not None and dot(guess, guesses) < 0 else 1
            guesses = guess * (sign / length) if guesses is None else guesses.add_(guess, alpha=sign / length)
    return Start(start if guesses is None else start.add_(guesses), deviation)


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


def upper_bound(roots: Array, log_norm: float, level: float) -> float:
    """Bound on the magnitude of every eigenvalue of H, of probability `level` over the start vector v.

    Args:
        roots: of a monic polynomial p, [k].
        log_norm: logarithm of ``||p(H) v||`` over the deviation of v's random part in any direction; see the module.
        level: probability.
    """
    limit = log_norm - math.log((1 - level) * math.sqrt(math.pi / 2))
    low = float(np.abs(roots).max())
    if limit == -math.inf:
        return low
    high = low + math.exp(min(limit / len(roots), 700.0)) + 1e-300  # there every factor is large enough
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):
            smallest = np.log(np.abs(np.array([[middle], [-middle]]) - roots)).sum(axis=1).min()
        low, high = (middle, high) if smallest <= limit else (low, middle)
    return high


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


class PowerIteration:
    """Power iteration as in Q-BERT's and PyHessian's code: stops when the eigenvalue changes by less than `tol`.

    That rule says nothing about the error (it can be missed by far); `converged` tells whether, at the moment it stops,
    the residual is within `tol` and what is larger by more than half is excluded as in `Lanczos`, here with the
    polynomial ``x^(k-1) (x - value)`` after k products. Same protocol as `Lanczos`.
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
        start = start_vector(size, warm=warm, generator=generator, dtype=dtype, device=device)
        length = norm(start.vector)
        self.query: Tensor | None = start.vector / length
        self._value = math.nan
        self._log_lengths = math.log(float(length) / start.deviation)

    def receive(self, product: Tensor) -> None:
        """Take H @ query, [n]; afterwards `query` is the next vector, or None when `result` stands."""
        if self.query is None:
            raise RuntimeError("PowerIteration.receive: the iteration has ended; read its result")
        check_product(product)
        self.products += 1
        vector, previous = self.query, self._value
        self._value = float(dot(vector, product))
        length = float(norm(product))
        settled = length == 0 or abs(self._value - previous) < self.tol * abs(self._value)
        if not settled and self.products < self.max_products:
            self.query = product / length
            self._log_lengths += math.log(length)
            return
        self.query = None
        distance = float(norm(product - self._value * vector))
        residual = relative(distance, self._value)
        upper = upper_bound(
            np.array([self._value, *[0.0] * (self.products - 1)]),
            self._log_lengths + _log(max(distance, 10 * torch.finfo(vector.dtype).eps * abs(self._value))),
            _REPORTED_CONFIDENCE,
        )
        self.result = Eigenpair(
            value=self._value,
            vector=vector,
            residual=residual,
            error=residual,
            upper_bound=upper,
            other_end=math.nan,
            other_end_residual=math.nan,
            gap=math.nan,
            products=self.products,
            converged=residual <= self.tol and upper <= max(UNSEEN, 1 + self.tol) * abs(self._value),
        )


class Lanczos:
    """Lanczos iteration that asks for products through `query` and takes them through `receive`.

    Args:
        size: dimension n of the operator.
        tol: wanted bound on the relative error of the eigenvalue.
        bound: how the error is bounded, ``residual`` or ``gap``; see the module.
        confidence: wanted probability, over the start vector, that no larger eigenvalue was overlooked; None asks
            for no proof. Warm vectors save nothing then, and are not used.
        max_products: gives up (converged False) after so many products, or earlier where the operator's rounding
            errors alone exceed `tol`.
        min_products: never stops earlier, unless the whole space is known.
        basis_size: number of basis vectors [n] kept before a thick restart; default: what 256 MiB hold, at least 40.
        warm: guesses [n] at the eigenvector.
        start: what to start from, in the place of a random vector and of `warm`.
        locked: orthonormal vectors [n] to stay orthogonal to (eigenvectors that are known already).
        generator: for all random vectors.
        dtype, device: of the vectors.

    Raises:
        ValueError: an argument that cannot be used.
    """

    def __init__(
        self,
        size: int,
        *,
        tol: float = 1e-3,
        bound: str = "residual",
        confidence: float | None = None,
        max_products: int = 200,
        min_products: int = 3,
        basis_size: int | None = None,
        warm: Sequence[Tensor] = (),
        start: Start | None = None,
        locked: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        check_limits(tol, max_products)
        if bound not in BOUNDS:
            raise ValueError(f"bound: {bound!r} is unknown; use one of {', '.join(BOUNDS)}")
        check_confidence(confidence)
        whole_number("size", size, least=1)
        if basis_size is None:
            basis_size = min(max_products + 1, max(40, 2**28 // (size * dtype.itemsize)))
            basis_size = max(8, basis_size)
        if basis_size < 8:
            raise ValueError(f"basis_size: {basis_size} is too small to restart from; use at least 8")
        self.tol, self.bound, self.confidence = tol, bound, confidence
        self.max_products, self.basis_size = max_products, basis_size
        self.locked = list(locked)
        self.dimension = size - len(self.locked)
        self.min_products = min(min_products, self.dimension)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.products = 0
        self.result: Eigenpair | None = None
        self._basis: list[Tensor] = []
        self._top_rounding = 0.0
        # A V = V H[:k] + next * H[k]; H is kept in full, so that rounding shows up in the residual.
        self._projection = np.zeros((basis_size + 1, basis_size))
        if start is None:
            start = start_vector(
                size, warm=() if confidence else warm, generator=self.generator, dtype=dtype, device=device
            )
        self._log_betas = math.log(float(norm(start.vector)) / start.deviation)
        # Roots of the polynomial that was applied before: Ritz values that a restart left out, and those of the start.
        self._dropped = np.zeros(start.power)
        self._upper = {level: math.inf for level in (_REPORTED_CONFIDENCE, confidence) if level}
        self.query: Tensor | None = self._independent(start.vector)

    def receive(self, product: Tensor) -> None:
        """Take H @ query, [n]; afterwards `query` is the next vector, or None when `result` stands."""
        if self.query is None:
            raise RuntimeError("Lanczos.receive: the iteration has ended; read its result")
        check_product(product)
        self.products += 1
        self._basis.append(self.query)
        k = len(self._basis)
        remainder = self._without_locked(product)
        coefficients = np.zeros(k)
        for _ in range(2):  # twice is enough for orthogonality to working precision (Giraud et al. 2005)
            overlaps = torch.stack([dot(v, remainder) for v in self._basis]).tolist()
            remainder = torch.add(remainder, self._basis[0], alpha=-overlaps[0])
            for v, overlap in zip(self._basis[1:], overlaps[1:], strict=True):
                remainder.add_(v, alpha=-overlap)
            coefficients += overlaps
        length = float(norm(remainder))
        self._projection[:k, k - 1] = coefficients
        self._projection[k, k - 1] = length
        rounding = self._rounding()
        exhausted = length <= rounding
        self._log_betas += _log(max(length, rounding))
        if self._assess(complete=k == self.dimension):
            self.query = None
            return
        if exhausted:  # an invariant subspace: go on outside of it
            self._projection[k, :k] = 0
            self.query = self._independent(self._random(product))
        else:
            self.query = remainder.div_(length)
        if k == self.basis_size:
            self._restart()

    def _rounding(self) -> float:
        """What rounding in the vectors' dtype may do to a product with a unit vector."""
        k = len(self._basis)
        return 10 * torch.finfo(self._basis[0].dtype).eps * float(np.linalg.norm(self._projection[:k, :k]))

    def _ritz(self) -> tuple[Array, Array, Array]:
        """Ritz values [k], largest magnitude first, their coordinates [k, k] and absolute residuals [k]."""
        k = len(self._basis)
        projection = self._projection[:k, :k]
        values, coordinates = eigh((projection + projection.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")
        values, coordinates = values[order], coordinates[:, order]
        rounding = np.linalg.norm((projection - projection.T) / 2 @ coordinates, axis=0)
        self._top_rounding = float(rounding[0])
        return values, coordinates, np.hypot(rounding, self._projection[k, :k] @ coordinates)

    def _assess(self, complete: bool) -> bool:
        """Whether to stop; if so, `result` is set."""
        values, coordinates, residuals = self._ritz()
        top, residual = float(values[0]), float(residuals[0])
        if self.confidence:
            self._update_upper_bounds(values)
        if complete:
            self._upper = dict.fromkeys(self._upper, abs(top) + residual)
        error, gap, rival = relative(residual, top), math.nan, 0.0
        reach = max(1.0, _RIVAL_PRODUCTS / self.products) * residuals[1:]
        if len(values) > 1:
            gap = float(np.min(np.abs(values[1:] - top) - reach))
            rival = float(np.max(np.abs(values[1:]) + reach))
            if (self.bound == "gap" and rival < _FAR * abs(top)) or self.confidence:
                error = error_bound(top, residual, gap)
        if self.confidence:
            error = max(error, relative(self._upper[self.confidence] + self._rounding() - abs(top), top))
            rivals = False  # the proof covers them
        else:
            rivals = rival > abs(top) * (1 + self.tol)
        converged = error <= self.tol and (complete or (self.products >= self.min_products and not rivals))
        if converged and not complete and not self.confidence:
            self._update_upper_bounds(values)
            seen = max(UNSEEN, 1 + self.tol) * abs(top) + self._rounding()
            converged = self._upper[_REPORTED_CONFIDENCE] <= seen
        # What is not symmetric about the operator stays in the residual, however many products follow.
        hopeless = self.products >= _HOPELESS_PRODUCTS and relative(self._top_rounding, top) > self.tol
        if not (converged or complete or hopeless or self.products >= self.max_products):
            return False
        if not self.confidence and not complete:
            self._update_upper_bounds(values)
        other = int(np.argmin(values) if top > 0 else np.argmax(values))
        vector = torch.zeros_like(self._basis[0])
        for coordinate, v in zip(coordinates[:, 0], self._basis, strict=True):
            vector.add_(v, alpha=float(coordinate))
        self.result = Eigenpair(
            value=top,
            vector=vector / norm(vector),
            residual=relative(residual, top),
            error=error,
            # The projection is that of the operator as it is computed: its rounding is not in the proof.
            upper_bound=max(self._upper[_REPORTED_CONFIDENCE], abs(top)) + self._rounding(),
            other_end=float(values[other]),
            other_end_residual=float(residuals[other]),
            gap=gap,
            products=self.products,
            converged=converged,
        )
        return True

    def _update_upper_bounds(self, values: Array) -> None:
        """Lower the bounds on the largest magnitude, each holding with its probability; see the module."""
        roots, top = np.append(values, self._dropped), float(np.abs(values[0]))
        for level in self._upper:
            found = upper_bound(roots, self._log_betas, level)
            # A Ritz value above an earlier bound shows that the start was the one in a hundred: trust that no longer.
            self._upper[level] = found if self._upper[level] < top else min(self._upper[level], found)

    def _restart(self) -> None:
        """Keep the Ritz vectors at both ends and of largest magnitude, drop the middle of the spectrum.

        What is kept, and all that follows, is a Krylov space of the start to which the polynomial with the dropped
        Ritz values as roots was applied (Sorensen 1992; Wu and Simon 2000): the proof goes on with these as factors.
        """
        values, coordinates, _ = self._ritz()
        quarter = self.basis_size // 4
        by_value = np.argsort(values)
        kept = sorted({*range(quarter), *by_value[:quarter].tolist(), *by_value[-quarter:].tolist()})
        y = coordinates[:, kept]
        k, p = len(self._basis), len(kept)
        inner, coupling = y.T @ self._projection[:k, :k] @ y, self._projection[k, :k] @ y
        stacked = torch.stack(self._basis)
        self._basis = list(torch.from_numpy(y.T.copy()).to(stacked) @ stacked)
        self._projection[:] = 0
        self._projection[:p, :p] = inner
        self._projection[p, :p] = coupling
        self._dropped = np.append(self._dropped, np.delete(values, kept))

    def _independent(self, vector: Tensor) -> Tensor:
        """`vector` made orthonormal to the basis and the locked vectors; a random one if nothing of it is left."""
        reference = (self._basis or self.locked or [vector])[0]
        for _ in range(3):
            vector = vector.to(reference)
            length = norm(vector)
            for _ in range(2):
                vector = self._without_locked(vector)
                for v in self._basis:
                    vector = vector - dot(v, vector) * v
            remaining = norm(vector)
            if remaining > 1e3 * torch.finfo(vector.dtype).eps * length:
                return vector / remaining
            vector = self._random(vector)
        raise ArithmeticError("locked: no direction is left outside of the known vectors")

    def _random(self, like: Tensor) -> Tensor:
        """A random vector of the size of `like`, the same on every device."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _without_locked(self, vector: Tensor) -> Tensor:
        for v in self.locked:
            vector = vector - dot(v, vector) * v
        return vector


def lanczos(product: Product, size: int, *, seed: int = 0, **settings: Any) -> Eigenpair:
    """Eigenpair of largest magnitude of a symmetric operator.

    Unless told otherwise it goes on until the value is proven to the tolerance with 99 % probability
    (``confidence=0.99``; Kuczynski and Wozniakowski 1992).

    Args:
        product: v -> H v, both [size] in the dtype and on the device of `settings` (default: float64, CPU).
        size: dimension of the operator.
        seed: of the start vector.
        **settings: those of `Lanczos`, such as ``tol`` (relative error, default 1e-3).

    Raises:
        ValueError, TypeError: a size or setting that cannot be used; ArithmeticError if a product is not finite.
    """
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
