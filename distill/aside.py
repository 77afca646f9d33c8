"""What a distillation changes for a while and gives back: buffers, gradients, random generators, dropout.

It stands alone because the constructor, the estimate and the training all lean on it, and none of them on another.

    >>> with random_state_kept(), left_as_it_is(model):
    ...     model.train()(**batch).loss.backward()

Dropout takes many forms: a module, a function, a rate in the config. Putting `nn.Dropout` in evaluation mode is not
enough: transformers drops attention probabilities (and, in some families, hidden states) by functions that look at the
mode of the module around them.

    >>> undo = train_without_dropout(student)
    >>> restore(undo)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from qbert.encoders.modes import modes_kept

Rates = list[tuple[nn.Module, str, float]]


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


def train_without_dropout(model: nn.Module) -> Rates:
    """Put `model` in training mode, with nothing in it that drops.

    Modules of transformers' own get their evaluation mode, because they read their rates from anywhere, the config
    included. Where training mode means more than dropout (recomputed activations, LSTMs, modules of the user's own,
    quantizers that follow their batches) it stays on, and the rates that the module holds are set to 0.

    Returns:
        The rates that were set to 0, for `restore`: (module, name of the attribute, value).
    """
    model.train()
    changed: Rates = []
    for module in model.modules():
        recomputes = getattr(module, "gradient_checkpointing", False) is True
        if type(module).__module__.startswith("transformers") and not recomputes:
            module.training = False
            continue
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
            if is_rate and isinstance(value, float) and value > 0:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
        if isinstance(module, _DropoutNd):
            module.training = False
    return changed


def restore(rates: Rates) -> None:
    """Give the modules the rates back that `train_without_dropout` took."""
    for module, name, value in rates:
        setattr(module, name, value)
