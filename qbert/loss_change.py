r"""The true change of the loss when one block of matrices is quantized and nothing else.

.. math:: \Delta L_i(b) = L(W_1, \dots, Q_b(W_i), \dots, W_n) - L(W)

Layers below the block compute what they computed before, so their output is kept and given back (a cached prefix):
measuring all n layers of an encoder at one width costs about (n + 1) / 2 instead of n forward passes. Where that
cannot be done (shared layers, a model without a list of layers) or does not reproduce the loss, the whole model runs.

    >>> changes = LossChanges(model, batches); changes.of({"encoder.layer.0.output.dense": quantized})
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.hessian.evaluating import evaluating
from qbert.hessian.losses import LossFunction, model_loss, to_device
from qbert.hessian.samples import Batch, loss_weight
from qbert.targets import encoder_layers, find_targets

_SAME_LOSS = 1e-5


class LossChanges:
    """Losses of a model on fixed data with some of its weights replaced; the model is left as it was.

    Args:
        model: a float encoder with a task head, or any module together with `loss_fn`.
        batches: micro-batches with labels.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of a batch; default ``model(**batch).loss``.
        cache_prefix: keep the output of the layers below.

    Attributes:
        loss: mean loss of the unchanged model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        loss_fn: LossFunction | None = None,
        cache_prefix: bool = True,
    ) -> None:
        self.model, self.batches, self.loss_fn = model, batches, loss_fn or model_loss
        weights = [loss_weight(batch) for batch in batches]
        self._shares = [weight / sum(weights) for weight in weights]
        self._modules = {t.name: t.module for t in find_targets(model)}
        self._layers = [layer for _, layer in encoder_layers(model)] if cache_prefix else []
        self._layer_of = {t.name: t.layer for t in find_targets(model)}
        self._depth = 0  # layers 0 .. depth-1 are cached
        self._outputs: list[Any] = []  # output of layer depth-1 for every batch
        self._first = self._batch_loss(0)
        self.loss = self._mean_loss()
        if self._layers and not self._called_once_each():
            self._layers = []

    def of(self, weights: Mapping[str, Tensor]) -> float:
        """Change of the mean loss when the matrices named (`Target.name`) have these values [O, I].

        Fastest when called for the lowest layers first.
        """
        if self._layers:
            self._advance(min(self._layer_of[name] or 0 for name in weights))
        with replaced({name: self._modules[name] for name in weights}, weights):
            return self._mean_loss() - self.loss

    def _mean_loss(self) -> float:
        return sum(share * self._batch_loss(i) for i, share in enumerate(self._shares))

    def _batch_loss(self, index: int) -> float:
        with evaluating(self.model, ()), torch.no_grad(), self._prefix(index):
            return float(self.loss_fn(self.model, to_device(self.batches[index], self.model)))

    def _called_once_each(self) -> bool:
        calls = [0] * len(self._layers)

        def count(index: int) -> Any:
            def hook(*_: Any) -> None:
                calls[index] += 1

            return hook

        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(count(index)).remove)
            with evaluating(self.model, ()), torch.no_grad():
                self.loss_fn(self.model, to_device(self.batches[0], self.model))
        return all(c == 1 for c in calls)

    def _advance(self, depth: int) -> None:
        """Cache the output of layer depth-1, starting over if a deeper one is cached."""
        if depth < self._depth:
            self._depth, self._outputs = 0, []
        if depth == self._depth:
            return
        recorded: list[Any] = []
        hook = self._layers[depth - 1].register_forward_hook(lambda module, inputs, output: recorded.append(output))
        try:
            self._mean_loss()
        finally:
            hook.remove()
        self._depth, self._outputs = depth, recorded
        if len(recorded) != len(self.batches) or not self._same_as(self._batch_loss(0), self._first):
            self._layers, self._depth, self._outputs = [], 0, []

    @staticmethod
    def _same_as(loss: float, expected: float) -> bool:
        return abs(loss - expected) <= _SAME_LOSS * max(1.0, abs(expected))

    @contextlib.contextmanager
    def _prefix(self, index: int) -> Iterator[None]:
        """Inside, the cached layers give back their stored output for batch `index`."""
        stubbed = self._layers[: self._depth]
        own = [layer.__dict__.get("forward") for layer in stubbed]
        try:
            for layer in stubbed:
                layer.forward = lambda *args, **kwargs: self._outputs[index]
            yield
        finally:
            for layer, forward in zip(stubbed, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


@contextlib.contextmanager
def replaced(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the modules compute with the given weights; the parameters stay the same objects."""
    parameters = {name: module.weight for name, module in modules.items()}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(kept[name])  # type: ignore[operator, arg-type]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
