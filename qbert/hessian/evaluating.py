"""A model put into the state in which its loss is differentiated twice, and put back.

>>> with evaluating(model, parameters):
...     gradients = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_TWICE_DIFFERENTIABLE = ("eager", "sdpa", None)


@contextlib.contextmanager
def evaluating(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `parameters` alone, twice differentiable attention; undone on the way out.

    Raises:
        ValueError: if an attention implementation has no second derivative (flash, flex).
    """
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation not in _TWICE_DIFFERENTIABLE:
            raise ValueError(
                f"model: the attention implementation {implementation!r} has no second derivative; load the "
                "model with attn_implementation='sdpa' or 'eager'"
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
