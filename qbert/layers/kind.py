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
from qbert.layers.quantizer import WeightQuantizer, check_grid, note_grid
from qbert.quantizers.activations import ActivationQuantizer


class TrainableLayer(nn.Module):
    """What every fake-quantized layer has, beside the float module that it also is.

    Its grids follow when its weight is exchanged for another one: a new ``weight`` (a tied head, say), or a state dict
    that holds a weight without its grids (of a float model), has them found anew; a state dict of other bits or another
    scheme is refused. What an optimizer does in place is training.

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
    is_trainable_matrix = True  # a table says no

    @classmethod
    @abstractmethod
    def shaped_as(cls, module: Any) -> TrainableLayer:
        """A twin with the shape of the float `module`, whose parameters and quantizers are still to come."""
        raise NotImplementedError

    @classmethod
    def from_float(
        cls, module: Any, quantizer: WeightQuantizer, activation: ActivationQuantizer | None = None
    ) -> TrainableLayer:
        """A quantized twin that owns the very parameters of `module` (ties stay ties)."""
        quantized: Any = cls.shaped_as(module)
        quantized.weight = module.weight
        if hasattr(module, "bias"):
            quantized.bias = module.bias
        quantized.spec, quantized.weight_quantizer = quantizer.spec, quantizer
        quantized.activation_quantizer = activation
        return quantized.train(module.training)  # type: ignore[no-any-return]

    @property
    def matrix(self) -> Tensor:
        """The float weight as a matrix [rows, columns] (a view)."""
        return self.weight

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The dequantized weight [rows, columns] that the layer computes with."""
        return self.weight_quantizer(self.matrix)  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        exchanged = name == "weight" and isinstance(value, nn.Parameter) and value is not self._parameters.get(name)
        super().__setattr__(name, value)
        if exchanged and "weight_quantizer" in self._modules:
            self._find_again()

    def grid(self) -> list[Any]:
        """What a state dict of the layer does not say by tensors."""
        activation = getattr(self, "activation_quantizer", None)
        if activation is not None and not activation.enabled:
            activation = None
        quantizer = self.weight_quantizer
        asked = (None, None) if activation is None else (activation.bits, activation.mode)
        return [quantizer.bits, quantizer.spec.scheme, *asked]

    def _find_again(self) -> None:
        weight, quantizer = self.matrix, self.weight_quantizer
        if len(weight) != len(quantizer.row_group):
            raise ValueError(quantizer.resized(len(weight)))
        if not weight.is_meta:
            quantizer.find(weight.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_grid(destination, prefix, self.grid())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        check_grid(prefix, local_metadata, self.grid(), lists[2])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if f"{prefix}weight" in state_dict and f"{prefix}weight_quantizer.scale" not in state_dict and not lists[2]:
            self._find_again()


def _as_it_is(module: Any, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Kind:
    """One class of float module and its twins.

    Attributes:
        covers: whether a float module is of this kind.
        trainable, packed: the classes of the twins.
        rows: ``rows(module, input)``, what the matrix [O, I] is multiplied with, [..., I], or [..., g, I] where each of
            g equal runs of its rows has inputs of its own.
        outputs: ``outputs(module, output)``, what comes of each of those rows, [..., O].
        mask: ``mask(module, mask)``, which of those rows are no padding, from the attention mask [B, T].
    """

    covers: Callable[[nn.Module], bool]
    trainable: type[TrainableLayer]
    packed: type[PackedTensor]
    rows: Callable[[Any, Tensor], Tensor] = _as_it_is
    outputs: Callable[[Any, Tensor], Tensor] = _as_it_is
    mask: Callable[[Any, Tensor], Tensor] = _as_it_is

    @property
    def reads_rows(self) -> bool:
        """Whether the matrix is multiplied with the module's input as it is."""
        return self.rows is _as_it_is


_KINDS: list[Kind] = []


def register(kind: Kind) -> None:
    """Add a kind; its float modules and twins are then converted, packed, saved and loaded like all others."""
    _KINDS.append(kind)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a float module or one of its twins belongs to; ``None`` for any other module."""
    return next((k for k in _KINDS if type(module) in (k.trainable, k.packed) or k.covers(module)), None)
