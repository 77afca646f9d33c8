"""Lanczos with full reorthogonalization, thick restarts, and three grades of certainty about the top eigenvalue.

H is projected on the Krylov space of a start vector; a Ritz pair (theta, y) of the projection T has the residual
``r = ||H V y - theta V y||`` (rounding errors of H included, since the projection is kept in full). Then

* ``bound="residual"``: some eigenvalue lies within r of theta. Always true.
* ``bound="gap"``: within ``r^2 / gap``, if the rest of the spectrum keeps the distance `gap` that the other Ritz
  values and their reach tell (Kato 1949; Parlett 1998, section 11.7). Saves about a third of the products; a pair of
  eigenvalues that is not resolved yet may be taken for one, and the error is then up to their distance: with a random
  start and a second eigenvalue anywhere within 10 % of the first, that happens in a quarter to a half of the cases at
  tolerances of 1e-3 and 1e-4. Where another Ritz value may come within a tenth of theta in magnitude, the residual
  itself has to be within the tolerance: rivals often show themselves late.
* ``confidence``: proof that nothing larger was overlooked. For an eigenvector x the start vector v has the component
  ``|<x, v>| >= sigma eps`` with probability ``1 - sqrt(2/pi) eps``, whatever is added to its Gaussian part of
  deviation sigma in each direction. With the characteristic polynomial p of T, ``||p(H) v|| = beta_0 ... beta_k``,
  so every eigenvalue obeys ``prod_j |lambda - theta_j| <= beta_0 ... beta_k / (sigma eps)``: all of them lie below
  the point where the left side, which grows outside of the Ritz values, passes the right one. (The argument of
  Kuczynski and Wozniakowski 1992 for the polynomial at hand.) Since theta never exceeds the top eigenvalue in
  magnitude, theta is within `tol` once that point is below (1 + tol) |theta|.

Without `confidence`, an eigenvalue also counts as converged only if no other Ritz value can overtake it.

    >>> solver = Lanczos(size)
    >>> while solver.query is not None:
    ...     solver.receive(H @ solver.query)
    >>> solver.result.value
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from qbert.arguments import whole_number
from qbert.hessian.eigenpair import (
    Eigenpair,
    check_confidence,
    check_limits,
    check_product,
    error_bound,
    relative,
    start_vector,
)

BOUNDS = ("residual", "gap")
Array = NDArray[np.float64]
# Chebyshev: an eigenvalue that holds a share s of a Ritz vector's spectral weight lies within r / sqrt(s) of its Ritz
# value. After three products no eigenvalue with more than a ninth of it can overtake unseen; every further product
# filters out what is left of the bulk, so that r itself is reach enough after nine.
_RIVAL_PRODUCTS = 9.0
_FAR = 0.9  # of the top eigenvalue's magnitude: Ritz values below are no rivals
_REPORTED_CONFIDENCE = 0.99
_HOPELESS_PRODUCTS = 10


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
        basis_size: number of basis vectors [n] kept before a thick restart, after which no sharper proof is to be
            had; default: what 256 MiB hold, at least 40.
        warm: guesses [n] at the eigenvector.
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
        start, deviation = start_vector(
            size, warm=() if confidence else warm, generator=self.generator, dtype=dtype, device=device
        )
        self._log_betas: float | None = math.log(float(torch.linalg.vector_norm(start)) / deviation)
        self._upper = {level: math.inf for level in (_REPORTED_CONFIDENCE, confidence) if level}
        self.query: Tensor | None = self._independent(start)

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
            overlaps = torch.stack([torch.dot(v, remainder) for v in self._basis]).tolist()
            remainder = torch.add(remainder, self._basis[0], alpha=-overlaps[0])
            for v, overlap in zip(self._basis[1:], overlaps[1:], strict=True):
                remainder.add_(v, alpha=-overlap)
            coefficients += overlaps
        length = float(torch.linalg.vector_norm(remainder))
        self._projection[:k, k - 1] = coefficients
        self._projection[k, k - 1] = length
        rounding = self._rounding()
        exhausted = length <= rounding
        if self._log_betas is not None:
            self._log_betas += math.log(max(length, rounding)) if length or rounding else -math.inf
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
            vector=vector / torch.linalg.vector_norm(vector),
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
        if self._log_betas is None:
            return
        for level in self._upper:
            missed = (1 - level) * math.sqrt(math.pi / 2)
            limit = self._log_betas - math.log(missed)
            low = top = float(np.abs(values[0]))
            if limit == -math.inf:
                self._upper[level] = low
                continue

            def allowed(point: float, limit: float = limit) -> bool:
                with np.errstate(divide="ignore"):
                    logs = np.log(np.abs(np.array([[point], [-point]]) - values)).sum(axis=1)
                return bool(logs.min() <= limit)

            high = low + math.exp(limit / len(values)) + 1e-300  # there every factor is large enough
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if allowed(middle) else (low, middle)
            # A Ritz value above an earlier bound shows that the start was the one in a hundred: trust that no longer.
            self._upper[level] = high if self._upper[level] < top else min(self._upper[level], high)

    def _restart(self) -> None:
        """Keep the Ritz vectors at both ends and of largest magnitude, drop the middle of the spectrum."""
        values, coordinates, _ = self._ritz()
        self._update_upper_bounds(values)
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
        self._log_betas = None  # the kept vectors are no longer powers of H times the start: no sharper proof

    def _independent(self, vector: Tensor) -> Tensor:
        """`vector` made orthonormal to the basis and the locked vectors; a random one if nothing of it is left."""
        reference = (self._basis or self.locked or [vector])[0]
        for _ in range(3):
            vector = vector.to(reference)
            length = torch.linalg.vector_norm(vector)
            for _ in range(2):
                vector = self._without_locked(vector)
                for v in self._basis:
                    vector = vector - torch.dot(v, vector) * v
            remaining = torch.linalg.vector_norm(vector)
            if remaining > 1e3 * torch.finfo(vector.dtype).eps * length:
                return vector / remaining
            vector = self._random(vector)
        raise ArithmeticError("locked: no direction is left outside of the known vectors")

    def _random(self, like: Tensor) -> Tensor:
        """A random vector of the size of `like`, the same on every device."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _without_locked(self, vector: Tensor) -> Tensor:
        for v in self.locked:
            vector = vector - torch.dot(v, vector) * v
        return vector
