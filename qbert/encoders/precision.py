"""What is trained holds float32: steps of a few thousandths of a value are lost in half precision.

It stands alone because fine-tuning and distilling know nothing of each other.

    >>> single_precision(model)             # then torch.autocast for the speed of bfloat16
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
Module = TypeVar("Module", bound=nn.Module)


def single_precision(model: Module) -> Module:
    """`model` itself, whose half-precision parameters and buffers are float32 of the same values from now on.

    Parameters stay the same objects, tied ones tied; anything but float16 and bfloat16 is left as it is.
    """

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in HALF else tensor

    return model._apply(widened)
