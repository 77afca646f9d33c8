"""y = x W^T of eight-bit floats by cuBLASLt, through torch: for many tokens the fastest product of an NVIDIA GPU.

`matmul_a8` unpacks its weights as it multiplies, which saves reading them. Once a few thousand tokens share each weight
that saves nothing, and unpacking takes instructions that the tensor cores wait for. Weights of 2 to 4 bits are exact
in e4m3 (`terms.e4m3_weight`), so here they are unpacked once, to a byte each; what follows a product (GELU, the
residual, codes for the next one) is left to the row kernels, which read and write anyway.

As in `matmul_a8`, sm_90 keeps 13 bits behind the first of a sum of e4m3 products (arXiv 2412.19437, section 3.3.2).

    y = matmul_e4m3(xq, x_scale, E4m3Weight(codes, scale, bias), torch.float16)         # [T, I] -> [T, O]
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qbert.kernels.operands import E4m3Weight


def matmul_e4m3(xq: Tensor, x_scale: Tensor | None, weight: E4m3Weight, out_dtype: torch.dtype) -> Tensor:
    """xq float8_e4m3fn [T, I], x_scale float32 [T] or None for 1 -> y [T, O]; I and O multiples of 16."""
    tokens = len(xq)
    if not tokens:
        return torch.empty((0, weight.rows), dtype=out_dtype, device=xq.device)
    steps = _ones(xq.device, tokens) if x_scale is None else x_scale
    made = out_dtype if _makes(xq.device, out_dtype) else torch.bfloat16
    bias = weight.bias if weight.bias is None or made == out_dtype else weight.bias.to(made)
    y = torch._scaled_mm(
        xq, weight.codes.T, steps[:, None], weight.scale[None], bias=bias, out_dtype=made, use_fast_accum=True
    )
    return y if made == out_dtype else y.to(out_dtype)


@cache
def _makes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product with a scale a row gives this dtype there.

    float16 came to it with CUDA 12.9 and torch 2.10 (pytorch pull requests 153555, 166744); asking is surer than
    knowing every pair of versions.
    """
    if dtype == torch.bfloat16:
        return True
    codes = torch.zeros((16, 16), dtype=torch.float8_e4m3fn, device=device)
    steps = torch.ones(16, device=device)
    try:
        torch._scaled_mm(codes, codes.T, steps[:, None], steps[None], out_dtype=dtype, use_fast_accum=True)
    except (RuntimeError, ValueError):
        return False
    return True


# Steps of 1 for so many tokens. Outgrown ones are kept: a captured CUDA graph may read them.
_steps: dict[torch.device, list[Tensor]] = {}


def _ones(device: torch.device, tokens: int) -> Tensor:
    """Ones [tokens]. As for workspaces of split products, run once before the capture of a CUDA graph."""
    known = _steps.setdefault(device, [])
    if not known or len(known[-1]) < tokens:
        made = torch.ones(1 << (tokens - 1).bit_length(), device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return made[:tokens]
        known.append(made)
    return known[-1][:tokens]
