"""transformers' `Conv1D`, a linear map whose weight is stored as [I, O] (GPT-2 and encoders made of its parts).

The packed form is an ordinary packed linear map; only where the float weight is stored differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbert.encoders.weights import is_transposed
from qbert.layers.kind import Kind, TrainableLayer, register
from qbert.layers.layout import PackedLayout
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor


class QuantTransposed(TrainableLayer, nn.Module):
    """y = fq(x) fq(W) + b with W [I, O]; the grids are those of W^T [O, I]."""

    bias: nn.Parameter

    @classmethod
    def shaped_as(cls, module: Any) -> QuantTransposed:
        """A twin; its weight brings its shape."""
        return cls()

    @property
    def matrix(self) -> Tensor:
        """The float weight as a matrix [O, I] (a view)."""
        return self.weight.t()

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.activation_quantizer is not None:
            input = self.activation_quantizer(input)
        return F.linear(input, self.weight_quantizer(self.matrix), self.bias)


class PackedTransposed(PackedLinear):
    """`PackedLinear` in the place of a `Conv1D`."""

    @classmethod
    def shaped_as(cls, module: Any, layout: PackedLayout, source: PackedTensor | None = None) -> PackedTransposed:
        """An empty packed twin with the shape of `module`, float or trainable."""
        columns, rows = module.weight.shape
        return cls(columns, rows, True, layout, source)

    def float_module(self) -> nn.Module:
        """A `Conv1D` of this shape without values (device meta)."""
        with torch.device("meta"):
            return Conv1D(self.out_features, self.in_features)

    def stored(self, matrix: Tensor) -> Tensor:
        """A weight [O, I] as [I, O]."""
        return matrix.t().contiguous()


register(Kind(is_transposed, QuantTransposed, PackedTransposed))
