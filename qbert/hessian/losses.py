"""The loss of a model on a batch, as the second-order tools call it.

>>> model_loss(model, batch)  # model(**batch).loss
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from qbert.hessian.samples import Batch

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
