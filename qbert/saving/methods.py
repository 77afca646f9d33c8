"""What transformers models with quantized layers do instead of their class's own methods.

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

from qbert.saving.folder import Saver
from qbert.saving.records import METHOD, is_quantized


def install(theirs: ModuleType) -> None:
    """Replace the methods of the class in ``transformers.modeling_utils``, once."""
    model: Any = theirs.PreTrainedModel
    if not hasattr(model.save_pretrained, "before_qbert"):
        model.save_pretrained = _saving(model.save_pretrained)
        model.half = _casting(model.half, torch.float16)
        model.float = _casting(model.float, torch.float32)


def _saving(plain: Callable[..., None]) -> Any:
    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if is_quantized(self):
            Saver(self, plain)(save_directory, *args, **kwargs)
        else:
            plain(self, save_directory, *args, **kwargs)

    save_pretrained.before_qbert = plain  # type: ignore[attr-defined]
    return save_pretrained


def _casting(plain: Callable[..., Any], dtype: torch.dtype) -> Any:
    """transformers refuses to cast quantized models by name; codes and scales here keep their own dtype."""

    @functools.wraps(plain)
    def cast(self: Any, *args: Any) -> Any:
        return self.to(dtype) if getattr(self, "quantization_method", None) == METHOD else plain(self, *args)

    return cast
