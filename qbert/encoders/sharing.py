"""Encoder layers that are applied at several depths: a list of layers that is longer than what it holds.

It stands alone because a saved model that shares layers needs it to load, whoever made it.

Sharing by assignment (``layers[2] = layers[1]``) trains, but transformers refuses to save it ("shared tensors"), and
ALBERT's `num_hidden_groups` knows contiguous runs only. `SharedLayers` holds every layer once, so that it is saved,
quantized and counted once, and gives it out at all of its depths.

    >>> share(model, [0, 2, 2, 2, 2, 5])            # layers 0, 2 and 5 of the model, the middle one four times
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn

from qbert.encoders.structure import record
from qbert.encoders.targets import base_model, main_layers


class SharedLayers(nn.ModuleList):
    """A list of layers by depth, of which some are the same: what it holds is numbered by first appearance.

    Args:
        layers: the layer of every depth, bottom first.

    Attributes:
        order: the number of the held layer that is applied at each depth.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        held = {id(layer): layer for layer in layers}
        super().__init__(held.values())
        self.order = [list(held).index(id(layer)) for layer in layers]

    def __len__(self) -> int:
        return len(self.order) if "order" in self.__dict__ else len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[depth] for depth in range(len(self))])

    def __getitem__(self, depth: Any) -> Any:
        if isinstance(depth, slice):
            return [self[i] for i in range(*depth.indices(len(self)))]
        return self._modules[str(self.order[depth])]

    def __setitem__(self, depth: Any, layer: Any) -> None:
        raise TypeError("the layers of a shared list stand at several depths; share anew with qbert.students.shared")

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"order={self.order}"


def share(model: nn.Module, order: Sequence[int]) -> None:
    """Let depth i of a model apply what was its layer ``order[i]``, in place; layers that are not named are dropped.

    Raises:
        ValueError: another number of depths, or a layer that does not exist.
    """
    stem, layers = main_layers(model)
    if len(order) != len(layers):
        raise ValueError(
            f"order={list(order)}: it has {len(order)} entries, the model {len(layers)} layers; name one for each depth"
        )
    wrong = next((i for i in order if not 0 <= i < len(layers)), None)
    if wrong is not None:
        raise ValueError(f"order={list(order)}: there is no layer {wrong}; they are numbered 0 to {len(layers) - 1}")
    _put(base_model(model)[1], stem, [layers[source] for source in order])
    record(model, "sharing", stem=stem, order=list(order))


def build(base: nn.Module, stem: str, order: Sequence[int]) -> None:
    """Let depth i of `base` apply layer ``order[i]`` of its list `stem`."""
    layers = cast(nn.ModuleList, base.get_submodule(stem))
    if len(order) != len(layers):
        raise ValueError(f"config.json: the order {list(order)} of shared layers does not fit {len(layers)} layers")
    _put(base, stem, [layers[i] for i in order])


def _put(base: nn.Module, stem: str, layers: list[nn.Module]) -> None:
    parent_name, _, name = stem.rpartition(".")
    setattr(base.get_submodule(parent_name), name, SharedLayers(layers))


def uses(model: nn.Module) -> dict[nn.Module, int]:
    """How often a module is applied in one pass, for those inside of layers that are applied more than once."""
    found: dict[nn.Module, int] = {}
    _, base = base_model(model)
    for module in base.modules():
        if isinstance(module, SharedLayers):
            for number, layer in enumerate(module._modules.values()):
                count = module.order.count(number)
                found |= dict.fromkeys(cast(nn.Module, layer).modules(), count) if count > 1 else {}
    config: Any = getattr(base, "config", None)
    groups = getattr(getattr(base, "encoder", None), "albert_layer_groups", ())
    depth = getattr(config, "num_hidden_layers", 0)
    for index, group in enumerate(groups):  # ALBERT: contiguous runs of depths
        count = sum(int(i * len(groups) / depth) == index for i in range(depth))
        found |= dict.fromkeys(group.modules(), count) if count > 1 else {}
    return found
