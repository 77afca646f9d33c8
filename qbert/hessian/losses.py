"""The mean loss of a model over labelled data, and the state that the model is in while it is measured.

Everything second-order looks at a `MeasuredLoss`: a model, micro-batches and a loss function, which the public
functions put together once. A mean over labels can be cut: ``L = sum_b w_b L_b / sum_b w_b`` with the numbers of labels
``w_b`` (`loss_weight`). Other losses cannot: sums of means over different things (masked words and next sentences),
means with class weights, spans that lie outside of the text, contrastive losses. No weights put these together again
from the losses of the parts, so that the data have to go through the model at once.

    >>> measured = MeasuredLoss(model, micro_batches, loss_fn).additive()
    >>> sum(measured.share(batch) * measured.value(batch) for batch in measured.batches)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qbert.arguments import whole_number
from qbert.encoders.inputs import accepted_inputs, to_device
from qbert.hessian.batches import (
    Batch,
    BatchSamples,
    as_samples,
    batch_size,
    draw,
    loss_weight,
    micro_batch,
    micro_batches,
    preserved_random_state,
)

_ABOUT_LABELS = ("target", "scalar type long", "can't be cast")  # in messages of torch
LossFunction = Callable[[nn.Module, Batch], Tensor]
_log = logging.getLogger(__name__)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``model(**batch).loss``, for the keys of `batch` that the model's forward names.

    Raises:
        ValueError: if the model returns no loss, or a label is out of range or of a type that its loss does not take.
    """
    try:
        output = model(**accepted_inputs(model, batch))
    except IndexError as error:
        raise ValueError(f"batches: a label or token id is out of the model's range ({error})") from error
    except (RuntimeError, ValueError) as error:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or not any(part in str(error).lower() for part in _ABOUT_LABELS):
            raise
        raise ValueError(
            f"batches: the model's loss does not take labels of {labels.dtype} and shape {tuple(labels.shape)} "
            f"({error}); give whole numbers for classes, floating-point numbers for regression and for several labels "
            "at once, and see model.config.problem_type"
        ) from error
    if isinstance(output, tuple):
        raise ValueError(f"model: {type(model).__name__} returned a tuple; set model.config.return_dict = True")
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"model: {type(model).__name__} returned no loss for a batch with the keys {sorted(batch)}; add "
            "'labels' to the batches, use a model with a task head, or pass loss_fn"
        )
    return loss


P = ParamSpec("P")
T = TypeVar("T")
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_TWICE_DIFFERENTIABLE = ("eager", "sdpa", None)


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """`function` with the caller's inference mode and autocast switched off: neither goes with second derivatives."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device in _AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def evaluating(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `parameters` alone, twice differentiable attention; undone on the way out.

    The global generators of Python, numpy and torch start from a fixed seed inside, so that a loss which draws random
    numbers is the same function in every pass, and are what they were afterwards.

    Raises:
        ValueError: if an attention implementation has no second derivative (flash, flex), or a parameter has a hook
            that changes its gradient.
    """
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation not in _TWICE_DIFFERENTIABLE:
            raise ValueError(
                f"model: the attention implementation {implementation!r} has no second derivative; load the "
                "model with attn_implementation='sdpa' or 'eager'"
            )
    hooked = next((name for name, p in model.named_parameters() if p._backward_hooks), None) if parameters else None
    if hooked is not None:
        raise ValueError(
            f"model: {hooked} has a gradient hook (register_hook), which would go into the Hessian; remove it first"
        )
    training = [module for module in model.modules() if module.training]
    wanted = {id(p) for p in parameters}
    others = [p for p in model.parameters() if id(p) not in wanted]
    try:
        for module in training:
            module.training = False
        with (
            requiring_gradients(others, required=False),
            requiring_gradients(parameters),
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel([SDPBackend.MATH]),
            preserved_random_state(seed=0),
        ):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def requiring_gradients(parameters: Sequence[nn.Parameter], required: bool = True) -> Iterator[None]:
    """`requires_grad` of `parameters` set to `required`, and back on the way out."""
    changed = [p for p in parameters if p.requires_grad != required]
    try:
        for parameter in changed:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not required)


class MeasuredLoss:
    """The mean loss of a model over micro-batches; the model is left as it was.

    Args:
        model: any module.
        batches: micro-batches, dicts of tensors with the model's argument names, labels included.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of the batch (a scalar); None: ``model(**batch).loss``.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch] = (), loss_fn: LossFunction | None = None):
        self.model, self.batches, self.loss_fn = model, batches, loss_fn or model_loss

    @classmethod
    def on_random_samples(
        cls,
        model: nn.Module,
        data: Any,
        loss_fn: LossFunction | None,
        *,
        samples: int | None,
        seed: int,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        micro_batch_size: int | None = None,
    ) -> MeasuredLoss:
        """The loss on `samples` random samples of `data` (None or more than there are: all), cut where it can be.

        Raises:
            ValueError, TypeError: data that cannot be used, or a count that is not positive.
        """
        measured = cls(model, loss_fn=loss_fn)
        view = as_samples(data, collate_fn=collate_fn, pad_token_id=measured.pad_token_id)
        fraction = 1.0 if samples is None else min(1.0, whole_number("samples", samples, least=1) / len(view))
        chosen = draw(len(view), fraction=fraction, seed=whole_number("seed", seed), run=0)
        size = micro_batch(micro_batch_size, view)
        return measured.over(micro_batches(view, chosen, size, seed=seed, unlabelled=True)).additive()

    def over(self, batches: Sequence[Batch]) -> MeasuredLoss:
        """The same loss over other micro-batches."""
        return MeasuredLoss(self.model, batches, self.loss_fn)

    @property
    def device(self) -> torch.device:
        """That of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """What fills `input_ids` up to the length of the others."""
        return getattr(getattr(self.model, "config", None), "pad_token_id", None) or 0

    @property
    def masks_padding(self) -> bool:
        """Whether the loss of labelled rows is known not to see masked tokens: a model's own, that takes a mask."""
        return self.loss_fn is model_loss and "attention_mask" in inspect.signature(self.model.forward).parameters

    @functools.cached_property
    def weight(self) -> int:
        """What the mean runs over: the sum of `loss_weight` over the batches."""
        return sum(loss_weight(batch) for batch in self.batches)

    def share(self, batch: Batch) -> float:
        """Share of `batch` in the mean."""
        return loss_weight(batch) / self.weight

    def rows(self, *, trimmed: bool = False) -> BatchSamples:
        """The rows of all batches, to be put together anew; `trimmed`: without padding that the loss does not see."""
        return BatchSamples(self.batches, self.pad_token_id, trim=trimmed and self.masks_padding)

    def on_device(self, batch: Batch) -> Batch:
        """`batch` with its tensors on the model's device."""
        return to_device(batch, self.model)

    def evaluating(self, parameters: Sequence[nn.Parameter] = ()) -> contextlib.AbstractContextManager[None]:
        """The state that the model is measured in, with gradients for `parameters`; see `evaluating`."""
        return evaluating(self.model, parameters)

    def of(self, batch: Batch) -> Tensor:
        """Mean loss of one batch, in the state that the model is in.

        Raises:
            ValueError: if the loss function returns no scalar tensor.
        """
        loss = self.loss_fn(self.model, self.on_device(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn: it must return the mean loss of a batch as a scalar tensor")
        return loss

    def value(self, batch: Batch) -> float:
        """Mean loss of one batch, in evaluation mode and without gradients."""
        with self.evaluating(), torch.no_grad():
            return float(self.of(batch))

    def additive(self) -> MeasuredLoss:
        """The same loss over batches whose losses, weighted by `loss_weight`, are that of all rows.

        These are the batches that have labels, where that holds for every two neighbours of them put together (a
        forward pass for each batch and each two); otherwise one batch of all rows, with a warning in the log.

        Raises:
            ValueError: where it does not hold and the rows do not fit into one batch.
        """
        if len(self.batches) < 2 or self.adds_up():
            return self.over([batch for batch in self.batches if loss_weight(batch) > 0])
        together = self._together()
        if len(together) > 1:
            raise ValueError(
                "batches: the loss of this model is not a mean over samples or labels, so that it cannot be measured "
                "part by part, and their rows do not fit into one batch; give one batch, with fraction=1, or another "
                "loss_fn"
            )
        _log.warning(
            "the loss of %d samples is not the mean of the losses of their micro-batches (several terms, class "
            "weights, labels outside of the text): they go through the model at once, whatever micro_batch_size is",
            batch_size(together[0]),
        )
        return self.over(together)

    def adds_up(self) -> bool:
        """Whether every two neighbours together have the mean loss of both, weighted by `loss_weight`."""
        tolerance = 10 * torch.finfo(next(self.model.parameters()).dtype).eps ** 0.75
        values: dict[int, float] = {}  # by the batch's identity: every batch but the outer ones is a neighbour twice

        def value(batch: Batch) -> float:
            if id(batch) not in values:
                values[id(batch)] = self.value(batch) if loss_weight(batch) else 0.0
            return values[id(batch)]

        for first, second in itertools.pairwise(self.batches):
            if not (self.masks_padding and "labels" in first) and not _same_shapes(first, second):
                continue
            together = self.over([first, second])._together()
            if len(together) != 1:
                continue
            weights = loss_weight(first), loss_weight(second)
            if not sum(weights):
                continue
            before, after, whole = value(first), value(second), self.value(together[0])
            mean = (weights[0] * before + weights[1] * after) / sum(weights)
            if not abs(whole - mean) <= tolerance * max(abs(before), abs(after), abs(whole)):
                return False
        return True

    def _together(self) -> list[Batch]:
        """All rows in as few batches as can be, padded to the longest."""
        rows = self.rows()
        return rows.collate(range(len(rows)))


def _same_shapes(first: Batch, second: Batch) -> bool:
    """Whether the rows of both can stand in one batch without any padding."""
    one, other = ({k: v.shape[1:] if isinstance(v, Tensor) else v for k, v in b.items()} for b in (first, second))
    return one == other
