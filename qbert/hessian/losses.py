"""The loss of a model on a batch, as the second-order tools call it.

>>> model_loss(model, batch)  # model(**batch).loss
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qbert.hessian.batches import Batch, preserved_random_state

LossFunction = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``model(**batch).loss``, for the keys of `batch` that the model's forward names.

    Raises:
        ValueError: if the model returns no loss, or a label is out of range.
    """
    try:
        output = model(**accepted_arguments(model, batch))
    except IndexError as error:
        raise ValueError(f"batches: a label or token id is out of the model's range ({error})") from error
    if isinstance(output, tuple):
        raise ValueError(f"model: {type(model).__name__} returned a tuple; set model.config.return_dict = True")
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"model: {type(model).__name__} returned no loss for a batch with the keys {sorted(batch)}; add "
            "'labels' to the batches, use a model with a task head, or pass loss_fn"
        )
    return loss


def check_scalar(loss: object) -> None:
    """Refuse what is no scalar tensor with a ValueError."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("loss_fn: it must return the mean loss of a batch as a scalar tensor")


def masks_padding(model: nn.Module, loss_fn: LossFunction | None) -> bool:
    """Whether the loss of labelled rows is known not to see masked tokens: a model's own, that takes a mask."""
    named = "attention_mask" in inspect.signature(model.forward).parameters
    return named and (loss_fn is None or loss_fn is model_loss)


def accepted_arguments(model: nn.Module, batch: Batch) -> dict[str, object]:
    """The entries of `batch` that ``model.forward`` names; all of them where it names none."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return {k: v for k, v in batch.items() if not named or k in named}


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """`batch` with its tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


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
