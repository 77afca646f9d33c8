"""The state of an interrupted training run in one safetensors file.

Weights, both AdamW moments and the number of finished steps; the learning rate follows from the step, and no random
state is needed since every step seeds its own. Written aside and renamed: the file is whole or the previous one.
It stands alone because it is the format of a file, which outlives the loop that wrote it.

    >>> save_checkpoint(path, model, optimizer, step=120, seconds=61.0)
    >>> load_checkpoint(path, model, optimizer)
    (120, 61.0)
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qbert.files import check_tensors, write_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    """Write the state after `step` steps and `seconds` seconds of training to `path`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_tensors(path, whole, {"step": str(step), "seconds": str(seconds)})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Put model and optimizer into the saved state; (steps done, seconds spent), (0, 0) without a file.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    if not path.is_file():
        return 0, 0.0
    try:
        metadata = check_tensors(path)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            stored = set(file.keys())
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                if f"{_MOMENTS[0]}/{name}" in stored:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        **{m: file.get_tensor(f"{m}/{name}").to(parameter.device) for m in _MOMENTS},
                    }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read ({error}); delete it to start anew") from error
    return step, seconds
