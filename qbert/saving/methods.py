"""What transformers models with quantized or changed layers do instead of their class's own methods.

`save_pretrained` is looked up on the class, whoever calls it (a user, a Trainer, a SentenceTransformer, the hub), and
whichever way the layers came into the model. So it is replaced once, there, and leaves float models to the original.
transformers has no hook for it: its quantizers are told of a save only where they loaded the model themselves.

In a file of its own because `hf` is imported before ``transformers.modeling_utils``, and this after it
(`registration`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from qbert.encoders.structure import changes, rebuild
from qbert.saving.folder import Saver
from qbert.saving.records import METHOD, is_quantized


def install(theirs: ModuleType) -> None:
    """Replace the methods of the class in ``transformers.modeling_utils``, once."""
    model: Any = theirs.PreTrainedModel
    if not hasattr(model.save_pretrained, "before_qbert"):
        model.save_pretrained = _saving(model.save_pretrained)
        model.post_init = _building(model.post_init)
        model.half = _casting(model.half, torch.float16)
        model.float = _casting(model.float, torch.float32)


def _saving(plain: Callable[..., None]) -> Any:
    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("distributed_checkpoint") and is_quantized(self):
            raise ValueError(
                "distributed_checkpoint: a quantized model is written whole, by one process; leave the argument out"
            )
        # With an adapter loaded, transformers writes the adapter alone.
        ours = is_quantized(self) or bool(changes(self))
        if ours and not getattr(self, "_hf_peft_config_loaded", False):
            Saver(self, plain)(save_directory, *args, **kwargs)
        else:
            plain(self, save_directory, *args, **kwargs)

    save_pretrained.before_qbert = plain  # type: ignore[attr-defined]
    return save_pretrained


def _building(plain: Callable[..., None]) -> Any:
    """What ends the construction of every model: first its structure is changed as its config records."""

    @functools.wraps(plain)
    def post_init(self: Any) -> None:
        inner = getattr(self, self.base_model_prefix, None) if self.base_model_prefix else None
        if changes(self) and not isinstance(inner, torch.nn.Module):  # a head's encoder was built before it
            rebuild(self)
        plain(self)

    return post_init


def _casting(plain: Callable[..., Any], dtype: torch.dtype) -> Any:
    """transformers refuses to cast quantized models by name; codes and scales here keep their own dtype."""

    @functools.wraps(plain)
    def cast(self: Any, *args: Any) -> Any:
        return self.to(dtype) if getattr(self, "quantization_method", None) == METHOD else plain(self, *args)

    return cast
