r"""What a change of a matrix costs: the moments of its inputs, and of the loss's gradients in its outputs.

For a matrix W with inputs x, C = E[x x^T] prices a change by what it does to the layer's output, and C together with G,
the Gauss-Newton second moment of the output's gradients, by what it does to the loss: tr(G dW C dW^T) / 2
(`qbert.allocation.kronecker`). No labels are needed: the second derivatives of cross-entropy and of squared errors do
not depend on them. In a file of its own, since pruning and factorising ask for the same.

    >>> moments = second_moments(model, batches, linears, gradients=True)
    >>> moments[linear].inputs, moments[linear].gradients
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.allocation.kronecker import kronecker_factors
from qbert.calibration import Batch, by_length, check_batches, run_batch
from qbert.calibration.totals import Totals
from qbert.encoders.inputs import to_device, unmasked, without_labels
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import Target, encoder_layers, find_targets
from qbert.hessian.batches import IGNORED_LABEL
from qbert.hessian.gauss_newton.loss_factor import NoModelOutputError
from qbert.hessian.losses import in_full_precision
from qbert.quantizers.rounding import damped

_NEGLIGIBLE = 1e-12
_MOST_COLUMNS = 32  # backward passes a batch for spans, whose loss has two columns a token


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
    model: nn.Module, data: Any, linears: Sequence[nn.Linear], *, gradients: bool | None
) -> dict[nn.Linear, Moments]:
    """The moments of `linears` over `data`, the model as it is.

    The loss is the one that the head is trained with: cross-entropy of classes, of the tags of real tokens, or of the
    start and the end of a span among them; of labels that are decided on their own their binary one; of values the
    squared error.

    Args:
        model: a float encoder; with a task head where `gradients` are asked for.
        data: batches, as for `quantize_model`; labels are not looked at.
        linears: modules of `model`.
        gradients: whether G is wanted, which costs a backward pass a class (and token) and batch, of spans 32 a batch;
            None: where the loss of the outputs is known, and otherwise not, with a warning.

    Raises:
        ValueError: no data, a matrix that no batch reaches, or `gradients` of a model whose outputs have no known loss.
        TypeError: data of another type.
    """
    batches = _batches(model, data)
    if gradients is not False:
        try:
            labelled = [_labelled(model, batch) for batch in batches]
            factors = kronecker_factors(model, labelled, linears, _own_loss, most_columns=_most_columns(labelled))
        except NoModelOutputError as error:
            told = (
                f"model: {type(model).__name__} has no logits whose loss is known (of rows or tokens, start and "
                "end of spans; at most 4,096 a row)"
            )
            if gradients:
                raise ValueError(f"{told}; weigh by activations only") from error
            warnings.warn(f"{told}; its matrices are weighed by their inputs only", stacklevel=4)
        else:
            return {m: Moments(f.inputs, f.gradients) for m, f in factors.items()}
    seen = observe(model, linears, lambda: (run_batch(model, to_device(b, model)) for b in batches), batches)
    return {m: Moments(of.second, None) for m, of in seen.items()}


def _batches(model: nn.Module, data: Any) -> list[Batch]:
    batches = check_batches(data, "data")
    if batches is None:
        raise ValueError("data is missing; give batches of a few hundred unlabelled rows")
    return by_length(model, batches)


@dataclass(frozen=True)
class Observed:
    """What a matrix reads, without padding: float64.

    Attributes:
        mean: [I], E[x].
        second: [I, I], E[x x^T].
        covariance: [I, I], E[(x - E[x]) (x - E[x])^T]: what a change costs if the bias may follow it.
    """

    mean: Tensor
    second: Tensor
    covariance: Tensor


@in_full_precision
def observed_inputs(model: nn.Module, data: Any, linears: Sequence[nn.Linear]) -> dict[nn.Linear, Observed]:
    """What `linears` read over `data`, batches as for `quantize_model`, the model as it is.

    Raises:
        ValueError, TypeError: as `second_moments`.
    """
    batches = _batches(model, data)
    return observe(model, linears, lambda: (run_batch(model, to_device(b, model)) for b in batches), batches)


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
    totals = {m: Totals() for m in linears}
    mask: list[Tensor | None] = [None]

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        totals[module].add(unmasked(args[0], mask[0]).flatten(0, -2), None)

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
    found: dict[nn.Linear, Observed] = {}
    for name, module in model.named_modules():
        if module not in totals:
            continue
        own = totals.pop(module)
        moment = own.moment(0) if own.count else None
        if moment is None or not bool(torch.isfinite(moment.value).all()):
            told = "is never read" if moment is None else "holds NaN or infinity"
            raise ValueError(f"data: the input of {name} {told}; give batches on which the model uses it and is finite")
        found[cast(nn.Linear, module)] = Observed(moment.mean, moment.value, moment.covariance)
    return {m: found[m] for m in linears}


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
    batches = _batches(model, data)
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
def _labelled(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """`batch` with the model's own predictions for labels, and none at padding."""
    inputs = without_labels(batch)
    with evaluation_mode(model):
        kind, outputs = _outputs(model, run_batch(model, to_device(inputs, model)))
    if kind == "spans":
        start, end = (_real(values, inputs).argmax(-1) for values in outputs)
        return {**inputs, "start_positions": start, "end_positions": end}
    (logits,) = outputs
    if kind == "values":
        return {**inputs, "labels": logits}
    if kind == "several labels":
        return {**inputs, "labels": (logits > 0).to(logits)}
    labels, mask = logits.argmax(-1), inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED_LABEL)
    return {**inputs, "labels": labels}


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch of `_labelled`, in which padding has no part."""
    kind, outputs = _outputs(model, run_batch(model, without_labels(batch)))
    if kind == "spans":
        labels = batch["start_positions"], batch["end_positions"]
        ends = [F.cross_entropy(_real(y, batch), wanted) for y, wanted in zip(outputs, labels, strict=True)]
        return torch.stack(ends).mean()
    (logits,) = outputs
    if kind == "values":
        return F.mse_loss(logits, batch["labels"])
    if kind == "several labels":
        return F.binary_cross_entropy_with_logits(logits, batch["labels"])
    return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED_LABEL)


def _outputs(model: nn.Module, output: Any) -> tuple[str, list[Tensor]]:
    """What the outputs of a head mean, and they. Raises NoModelOutputError where it is not known."""
    ends = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
    if all(isinstance(values, Tensor) for values in ends):
        return "spans", [values for values in ends if values is not None]
    logits, kind = getattr(output, "logits", None), getattr(getattr(model, "config", None), "problem_type", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2, 3):
        raise NoModelOutputError(f"a {type(output).__name__} has no logits")
    if logits.dim() == 1 or (logits.dim() == 2 and (logits.shape[-1] == 1 or kind == "regression")):
        return "values", [logits]
    return "several labels" if logits.dim() == 2 and kind == "multi_label_classification" else "classes", [logits]


def _real(scores: Tensor, batch: Batch) -> Tensor:
    """Scores [B, T] of positions, lowest at padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != scores.shape:
        return scores
    return scores.masked_fill(mask.to(scores.device) == 0, torch.finfo(scores.dtype).min)


def _most_columns(labelled: Sequence[Batch]) -> int | None:
    return _MOST_COLUMNS if any("start_positions" in batch for batch in labelled) else None


def roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """M^1/2 and M^-1/2 [N, N] float64 of a second moment with `damping` times its mean diagonal added."""
    values, vectors = torch.linalg.eigh(damped(moment, damping))
    values = values.clamp_min(_NEGLIGIBLE * float(values[-1]))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
