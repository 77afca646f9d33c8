r"""What a change of a matrix costs: the moments of its inputs, and of the loss's gradients in its outputs.

For a matrix W with inputs x, C = E[x x^T] prices a change by what it does to the layer's output, and C together with G,
the Gauss-Newton second moment of the output's gradients, by what it does to the loss: tr(G dW C dW^T) / 2
(`qbert.allocation.kronecker`). No labels are needed: for cross-entropy the second derivative does not depend on them.
In a file of its own, since pruning and factorising ask for the same.

    >>> moments = second_moments(model, batches, linears, gradients=True)
    >>> moments[linear].inputs, moments[linear].gradients
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.allocation.kronecker import kronecker_factors
from qbert.calibration import Batch, by_length, check_batches, run_batch
from qbert.encoders.inputs import to_device, unmasked
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import Target, encoder_layers, find_targets
from qbert.hessian.losses import in_full_precision
from qbert.quantizers.rounding import damped

_NEGLIGIBLE = 1e-12


class Moments(NamedTuple):
    """C [I, I] of a matrix's inputs and G [O, O] of its outputs' gradients, float64; G is None where not asked for."""

    inputs: Tensor
    gradients: Tensor | None


def layer_matrices(model: nn.Module) -> list[Target]:
    """The plain linear maps inside of the encoder layers of a float model, in module order."""
    return [t for t in find_targets(model) if t.layer is not None and type(t.module) is nn.Linear]


def has_head(model: nn.Module) -> bool:
    """Whether a model is known to have a task head, whose loss tells what an output is worth."""
    return any(hasattr(model, name) for name in ("classifier", "qa_outputs", "score", "out_proj"))


@in_full_precision
def second_moments(
    model: nn.Module, data: Any, linears: Sequence[nn.Linear], *, gradients: bool
) -> dict[nn.Linear, Moments]:
    """The moments of `linears` over `data`, the model as it is.

    Args:
        model: a float encoder; with a task head where `gradients` are asked for.
        data: batches, as for `quantize_model`; labels are not looked at.
        linears: modules of `model`.
        gradients: whether G is wanted, which costs a backward pass a class and batch.

    Raises:
        ValueError: no data, a matrix that no batch reaches, or `gradients` of a model without logits.
        TypeError: data of another type.
    """
    batches = check_batches(data, "data")
    if batches is None:
        raise ValueError("data is missing; give batches of a few hundred unlabelled rows")
    batches = by_length(model, batches)
    if not gradients:
        seen = observe(model, linears, lambda: (run_batch(model, to_device(b, model)) for b in batches), batches)
        return {m: Moments(of.second, None) for m, of in seen.items()}
    factors = kronecker_factors(model, _labelled(model, batches), linears)
    return {m: Moments(f.inputs, f.gradients) for m, f in factors.items()}


@dataclass(frozen=True)
class Observed:
    """What a matrix reads: mean [I] and second moment E[x x^T] [I, I] of its inputs, float64, without padding."""

    mean: Tensor
    second: Tensor

    @property
    def covariance(self) -> Tensor:
        """E[(x - E[x]) (x - E[x])^T] [I, I]: what a change costs if the bias may follow it."""
        return self.second - torch.outer(self.mean, self.mean)


@torch.no_grad()
def observe(
    model: nn.Module, linears: Sequence[nn.Linear], passes: Callable[[], Iterable[Any]], batches: Sequence[Batch]
) -> dict[nn.Linear, Observed]:
    """The inputs of `linears` in one pass over `batches`.

    Args:
        model: what holds them.
        linears: the matrices.
        passes: gives an iterable that runs the batches one by one, in their order.
        batches: for their masks.

    Raises:
        ValueError: if a matrix reads nothing, or NaN or infinity.
    """
    sums = {m: torch.zeros(m.in_features, dtype=torch.float64, device=m.weight.device) for m in linears}
    outer = {m: torch.zeros(m.in_features, m.in_features, dtype=torch.float64, device=m.weight.device) for m in linears}
    count = dict.fromkeys(linears, 0)
    mask: list[Tensor | None] = [None]

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        rows = unmasked(args[0], mask[0]).flatten(0, -2).float()
        sums[module] += rows.double().sum(0)
        outer[module] += rows.T @ rows
        count[module] += len(rows)

    handles = [m.register_forward_pre_hook(hook) for m in linears]
    try:
        with evaluation_mode(model):
            done = iter(passes())
            for batch in batches:
                known = batch.get("attention_mask")
                mask[0] = None if known is None else known.to(next(model.parameters()).device)
                next(done)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if module in count and (not count[module] or not bool(torch.isfinite(outer[module]).all())):
            told = "holds NaN or infinity" if count[module] else "is never read"
            raise ValueError(f"data: the input of {name} {told}; give batches on which the model uses it and is finite")
    return {m: Observed(sums[m] / count[m], outer[m] / count[m]) for m in linears}


@torch.no_grad()
def observe_layers(
    model: nn.Module, data: Any, linears_of: Callable[[nn.Module], Sequence[nn.Linear]]
) -> Iterator[tuple[nn.Module, dict[nn.Linear, Observed]]]:
    """Layer after layer, what matrices of it read once the layers below are as the caller has left them.

    Args:
        model: a float encoder, which the caller may change between two layers.
        data: batches, as for `quantize_model`.
        linears_of: the matrices of a layer that are looked at.

    Yields:
        (layer, inputs by matrix), bottom first.
    """
    batches = check_batches(data, "data")
    if batches is None:
        raise ValueError("data is missing; give batches of a few hundred unlabelled rows")
    batches = by_length(model, batches)
    layers = [layer for _, layer in encoder_layers(model)]

    def run(index: int) -> None:
        run_batch(model, to_device(batches[index], model))

    with evaluation_mode(model):
        cache = LayerCache(layers, len(batches), run)
        for depth, layer in enumerate(layers):
            cache.advance(depth)

            def passes(layer: nn.Module = layer) -> Iterator[None]:
                for index in range(len(batches)):
                    with cache.replay(index), _stopped_after(layer, once=cache.usable):
                        run(index)
                    yield

            yield layer, observe(model, list(linears_of(layer)), passes, batches)


class _PassedError(Exception):
    """The layer that a pass was made for is done."""


@contextlib.contextmanager
def _stopped_after(layer: nn.Module, once: bool) -> Iterator[None]:
    """Inside, a pass ends with `layer`, if that is called `once`."""

    def stop(*_: Any) -> None:
        raise _PassedError

    handle = layer.register_forward_hook(stop) if once else None
    try:
        yield
    except _PassedError:
        pass
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def _labelled(model: nn.Module, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """`batches` with the model's own predictions for labels."""
    labelled = []
    with evaluation_mode(model):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = getattr(model(**inputs), "logits", None)
            if logits is None:
                raise ValueError(
                    f"model: {type(model).__name__} has no logits whose loss could be looked at; give it a task head, "
                    "or weigh by activations only"
                )
            regression = logits.shape[-1] == 1
            labelled.append({**inputs, "labels": logits.squeeze(-1) if regression else logits.argmax(-1)})
    return labelled


def roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """M^1/2 and M^-1/2 [N, N] float64 of a second moment with `damping` times its mean diagonal added."""
    values, vectors = torch.linalg.eigh(damped(moment, damping))
    values = values.clamp_min(_NEGLIGIBLE * float(values[-1]))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
