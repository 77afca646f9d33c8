"""Training mode without dropout, whatever form a model's dropout takes: a module, a function, or a rate in its config.

It stands alone because it is about `nn.Module`'s modes, not about losses. Putting `nn.Dropout` in evaluation mode is not
enough: transformers drops attention probabilities (and, in some families, hidden states) by functions that look at the
mode of the module around them.

    >>> undo = train_without_dropout(student)
    >>> restore(undo)
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Rates = list[tuple[nn.Module, str, float]]


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
