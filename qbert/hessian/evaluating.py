"""A model put into the state in which its loss is differentiated twice, and put back.

>>> with evaluating(model, parameters):
...     gradients = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
            torch.random.fork_rng(),
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
