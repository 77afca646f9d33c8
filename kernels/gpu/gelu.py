"""GELU inside kernels: in the epilogue of a product, and before a row is quantized.

It stands alone because both of these need it, and one imports the other.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def gelu(y):
    """Exact GELU, float32: y Phi(y) = max(y, 0) - |y| Phi(-|y|), Phi the normal distribution function.

    Phi(-a) = 2^q(a), and log2 Phi(-a) is so smooth that q is one polynomial for all a up to 6, of least largest error
    in Phi; beyond, Phi is below 1e-9. erf(y / sqrt(2)) = 1 - 2 Phi(-y) is then within 3e-7, the error of the GPU's own
    exponential counted (2^-22.5), in 14 instructions without a branch, where libdevice's erf makes it 32.
    Infinities and NaN come out as of y (1 + erf(y / sqrt(2))) / 2.
    """
    a = tl.minimum(tl.abs(y), 6.0)
    q = tl.fma(a, -2.8349115837045247e-06, 3.9377679058816284e-05)
    q = tl.fma(q, a, -0.00018618020112626255)
    q = tl.fma(q, a, -0.00013693644723389298)
    q = tl.fma(q, a, 0.00706342002376914)
    q = tl.fma(q, a, -0.052496179938316345)
    q = tl.fma(q, a, -0.4592081904411316)
    q = tl.fma(q, a, -1.1511051654815674)
    q = tl.fma(q, a, -1.0)
    half = 0.5 * y
    return tl.fma(-a, tl.exp2(q), half + tl.abs(half))
