"""Contexts that give back what they found: buffers, gradients, the state of the random generators.

It stands alone because the constructor, the estimate and the training all lean on it, and none of them on another.

    >>> with random_state_kept(), left_as_it_is(model):
    ...     model.train()(**batch).loss.backward()
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from qbert.encoders.modes import modes_kept


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generators (of every GPU in use) are afterwards where they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def problem_type_kept(model: nn.Module) -> Iterator[None]:
    """The config still does not say what the outputs mean if it did not: transformers writes its guess into it."""
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if config is not None and getattr(config, "problem_type", None) != kind:
            config.problem_type = kind


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Modes, buffers (running ranges and statistics) and gradients of `model` are afterwards what they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    with modes_kept(model):
        mode = model.training
        try:
            yield
        finally:
            model.train(mode)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
