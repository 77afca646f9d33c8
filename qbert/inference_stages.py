"""The layers of an encoder on a CPU as stages: stacks of fused layers, and between them layers in their own way.

A layer that cannot be fused (one of a class of its own, with another norm, ...) does not hold up the others: those
before it and those behind it are one compiled program each, and it is called as its encoder calls it.

    >>> for stage in stages_of(encoder):
    ...     x = run_alone(encoder, stage, x, mask) if isinstance(stage, int) else stage(x, mask)
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qbert.inference_cpu_layers import FusedLayers
from qbert.inference_parts import LayerParts, reason_not_to_fuse_layer
from qbert.kernels.cpu_chains import compiled

Stage = int | Callable[[Tensor, Tensor | None], Tensor]


def stages_of(encoder: Any, exact: bool = True) -> list[Stage]:
    """The layers of `encoder` in their order: neighbours that fit as one program, others as their index.

    Args:
        encoder: module whose ``layer`` is a list of encoder layers.
        exact: as for `qbert.kernels.cpu.CpuLinear.prepare`.
    """
    stages: list[Stage] = []
    for fits, indices in groupby(range(len(encoder.layer)), lambda i: not reason_not_to_fuse_layer(encoder.layer[i])):
        if fits:
            parts = [parts for i in indices if (parts := LayerParts.of(encoder.layer[i]))]
            stages.append(compiled(FusedLayers(parts, exact)))
        else:
            stages.extend(indices)
    return stages


def run_alone(encoder: Any, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """What `encoder` makes of x float32 [B, T, H] if the layer at `index` is its only one: float32 [B, T, H].

    `mask` broadcasts to [B, heads, T, T], and is true or 0 where a key is seen. It comes without MPNet's bias by
    position, which the encoder adds.
    """
    only = copy(encoder)  # so that the encoder itself decides how its layers are called
    only._modules = {**encoder._modules, "layer": encoder.layer[index : index + 1]}
    # In the layer's dtype, which is another where the model was moved after it was optimized.
    dtype = next((p.dtype for p in only.layer.parameters() if p.is_floating_point()), x.dtype)
    if mask is not None:
        lowest = torch.finfo(dtype).min
        if mask.dtype == torch.bool:  # which only some kinds of attention understand
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        mask = mask.clamp(min=lowest).to(dtype).expand(-1, -1, x.shape[1], -1)
    return type(encoder).forward(only, x.to(dtype), mask)[0].float()  # type: ignore[no-any-return]
