"""Low-precision eigenvectors made honest: one product in full precision for each.

Lanczos on products in bfloat16 finds the eigenvector to about a part in a hundred; the Rayleigh quotient ``v^T H v``
of that vector with the exact H is wrong by the square of it only, and its residual ``||H v - value v||`` tells what is
left.

    >>> pairs = refined(pairs, operator, tol=1e-2, bound="gap")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from qbert.hessian.eigen import Eigenpair, error_bound, relative
from qbert.hessian.operator import HessianOperator

COARSE_TOL = 1e-2  # residual that the rounding of bfloat16 lets an iteration reach


def refined(
    pairs: Mapping[str, Eigenpair], operator: HessianOperator, *, tol: float, bound: str
) -> dict[str, Eigenpair]:
    """`pairs` (block name -> pair) with value, residual and error from one product of `operator` each.

    ``upper_bound`` is infinite: what the rounded operator proves does not hold for the exact one. ``converged`` asks
    that the coarse iteration had converged (so that no other eigenvalue was in sight) and that the error measured in
    full precision is within `tol`; with ``bound="gap"`` it is the square of the residual over the coarse gap, where
    the gap is wide enough to tell the eigenvalue from the next.
    """
    products = operator.products({name: pair.vector for name, pair in pairs.items()})
    found = {}
    for name, pair in pairs.items():
        value = float(torch.dot(pair.vector, products[name]))
        residual = float(torch.linalg.vector_norm(products[name] - value * pair.vector))
        gap = pair.gap - abs(value - pair.value)
        if gap > 2 * residual:
            error = error_bound(value, residual, gap if bound == "gap" else math.nan)
        else:  # the next eigenvalue is not told apart, and may lie as far above again
            error = relative(2 * residual, value)
        found[name] = dataclasses.replace(
            pair,
            value=value,
            residual=relative(residual, value),
            error=error,
            upper_bound=math.inf,
            gap=gap,
            products=pair.products + 1,
            converged=pair.converged and error <= tol,
        )
    return found
