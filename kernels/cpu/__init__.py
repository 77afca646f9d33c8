"""Packed layers on a CPU: `linear` on `chains` of torch operators around the int8 products of `gemm`."""

from qbert.kernels.cpu.linear import CpuLinear, embedding

__all__ = ["CpuLinear", "embedding"]
