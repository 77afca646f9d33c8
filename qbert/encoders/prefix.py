"""Outputs of an encoder's lower layers, kept so that what stands above them can be run again alone.

>>> cache = LayerCache([layer for _, layer in encoder_layers(model)], len(batches), lambda i: model(**batches[i]))
>>> cache.advance(4)                 # layers 0 to 3 are not computed again
>>> with cache.replay(0): model(**batches[0])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


class _ReachedError(Exception):
    """What stands above the layer whose output was wanted need not run."""


class LayerCache:
    """Stands in for the first layers of a model on fixed batches.

    Args:
        layers: the encoder layers, bottom first, each of which passes its output on to the next one alone.
        count: number of batches.
        run: ``run(i)`` puts batch i through the model.

    Attributes:
        depth: layers 0 .. depth - 1 are kept.
        usable: whether every layer is called once in a forward pass; if not, nothing is ever kept.
    """

    def __init__(self, layers: Sequence[nn.Module], count: int, run: Callable[[int], object]) -> None:
        self.layers, self.count, self.run = list(layers), count, run
        self.depth = 0
        self._outputs: list[Any] = []  # output of layer depth-1 for every batch
        self.usable = bool(layers) and self._called_once_each()

    def advance(self, depth: int) -> None:
        """Keep the output of layer depth - 1, starting over if a deeper one is kept."""
        if not self.usable or depth == self.depth:
            return
        if depth < self.depth:
            self.depth, self._outputs = 0, []
        if depth == 0:
            return
        recorded: list[Any] = []

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            recorded.append(output)
            raise _ReachedError

        hook = self.layers[depth - 1].register_forward_hook(record)
        try:
            for index in range(self.count):
                with self.replay(index), contextlib.suppress(_ReachedError):
                    self.run(index)
        finally:
            hook.remove()
        if len(recorded) == self.count:
            self.depth, self._outputs = depth, recorded
        else:
            self.forget()

    def forget(self) -> None:
        """Keep nothing from now on."""
        self.usable, self.depth, self._outputs = False, 0, []

    @contextlib.contextmanager
    def replay(self, index: int) -> Iterator[None]:
        """Inside, the kept layers give back their output for batch `index` without computing it."""
        kept = self.layers[: self.depth]
        own = [layer.__dict__.get("forward") for layer in kept]
        try:
            for layer in kept:
                layer.forward = lambda *args, **kwargs: self._outputs[index]
            yield
        finally:
            for layer, forward in zip(kept, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def _called_once_each(self) -> bool:
        calls = [0] * len(self.layers)

        def counting(position: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[position] += 1

            return hook

        with contextlib.ExitStack() as stack:
            for position, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(counting(position)).remove)
            self.run(0)
        return all(c == 1 for c in calls)
