"""The one door for a kind of layer that can be quantized.

A kind is a class of float module together with its two twins: `TrainableLayer`, which keeps the float weight and
fake-quantizes it, and `PackedTensor`, which keeps low-bit codes. Everything that converts, packs, saves, loads or
counts layers asks here and knows no class by name. A new kind is one file that defines the twins and registers them;
the float class and its weight as a matrix are told by `qbert.encoders.weights`.

    >>> kind_of(nn.Linear(4, 4)).trainable.__name__
    'QuantLinear'
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import TensorSpec
from qbert.layers.packed import PackedTensor
from qbert.layers.quantizer import WeightQuantizer
from qbert.quantizers.activations import ActivationQuantizer


class TrainableLayer:
    """What every fake-quantized layer has, beside the `nn.Module` that it also is.

    Attributes:
        weight: the float parameter, in the layout of the float module; the very object of the module it replaced.
        spec: bits, groups, scheme and activation quantization.
        weight_quantizer: grids of the weight as a matrix [rows, columns].
        activation_quantizer: how the input is quantized; ``None`` leaves it in float (tables have no such input).
    """

    weight: Tensor
    spec: TensorSpec
    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer | None

    @classmethod
    @abstractmethod
    def from_float(
        cls, module: Any, quantizer: WeightQuantizer, activation: ActivationQuantizer | None = None
    ) -> TrainableLayer:
        """A quantized twin that owns the very parameters of `module` (ties stay ties)."""
        raise NotImplementedError

    @property
    def matrix(self) -> Tensor:
        """The float weight as a matrix [rows, columns] (a view)."""
        return self.weight

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The dequantized weight [rows, columns] that the layer computes with."""
        return self.weight_quantizer(self.matrix)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Kind:
    """One class of float module and its twins.

    Attributes:
        covers: whether a float module is of this kind.
        trainable, packed: the classes of the twins.
    """

    covers: Callable[[nn.Module], bool]
    trainable: type[TrainableLayer]
    packed: type[PackedTensor]


_KINDS: list[Kind] = []


def register(kind: Kind) -> None:
    """Add a kind; its float modules and twins are then converted, packed, saved and loaded like all others."""
    _KINDS.append(kind)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a float module or one of its twins belongs to; ``None`` for any other module."""
    return next((k for k in _KINDS if type(module) in (k.trainable, k.packed) or k.covers(module)), None)
