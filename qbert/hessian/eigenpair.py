"""What an eigenvalue iteration finds and promises: the pair, its error bound, and the checks of what it is given.

Shared by every iteration (`qbert.hessian.eigen`, `qbert.hessian.krylov`), so that all of them promise the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
