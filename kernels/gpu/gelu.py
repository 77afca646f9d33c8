"""GELU inside kernels: in the epilogue of a product, and before a row is quantized.

It stands alone because both of these need it, and one imports the other.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def gelu(y):
    """Exact GELU, float32."""
    return y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
