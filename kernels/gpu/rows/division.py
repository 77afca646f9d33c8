"""Correctly rounded division by a number that many are divided by, in three or five instructions instead of a branch.

It stands alone because it knows nothing of rows and codes, which `quantize_rows` divides by their step.

A quotient q of a product with the rounded reciprocal r = rn(1 / b) is corrected by its remainder, which one fused
multiply-add computes exactly: q' = q + (a - q b) r (Markstein, IBM Journal of Research and Development 34(1), 1990).

    inverse = tl.div_rn(1.0, b)
    q = quotient(a, b, inverse, LONG=True)         # what tl.div_rn(a, b) gives
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def quotient(a, b, inverse, LONG: tl.constexpr):
    """a / b, rounded to nearest, half to even, float32; `inverse` is 1 / b so rounded.

    For finite a, 2^-100 < b < 2^100 and quotients that are neither subnormal nor above 2^20. One correction is right
    for every a of at most 11 significant bits, fp16 and bf16 values: all 2^10 x 2^23 pairs of significands were tried.
    LONG numerators, of up to 24, need a second one: the first leaves less than a unit in the last place, from where
    Markstein's theorem holds.
    """
    q = a * inverse
    q = tl.fma(tl.fma(-q, b, a), inverse, q)
    if LONG:
        q = tl.fma(tl.fma(-q, b, a), inverse, q)
    return q


@triton.jit
def lift_of(b):
    """A power of two by which a tiny b, and what is divided by it, are multiplied first; 1 for others."""
    return tl.where(b < 2.0**-60, 2.0**80, 1.0)
