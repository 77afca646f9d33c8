"""Inner products and lengths of vectors of millions of float32 numbers, right to working precision.

A BLAS adds float32 up in float32, a few running sums for all of a vector: at 7 million entries (a layer of BERT-base)
lengths come out 1e-4 wrong, and those of peaked vectors 1e-3, which an iteration to 1e-3 cannot have. Here the CPU adds
up pieces that are short enough, and the pieces in float64; accelerators add up in trees, which are right as they are.

    >>> dot(v, w), norm(v)  # scalars on the vectors' device
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 2**14


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of two real vectors [n] of one dtype and device, a scalar on their device (float64 on CPUs)."""
    if a.device.type != "cpu":
        return (a * b).sum()
    if a.dtype == torch.float64 or len(a) <= _PIECE:
        return torch.dot(a, b).double()
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).double().sum()


def norm(a: Tensor) -> Tensor:
    """Euclidean length of a real vector [n], a scalar on its device (float64 on CPUs)."""
    return dot(a, a).sqrt()
