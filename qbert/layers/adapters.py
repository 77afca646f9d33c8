"""Low-rank adapters (PEFT) on quantized layers: they train beside the layer, and are not merged into it.

A merge adds the adapter to the float weight under the layer's grid, which was found for another weight: most of it is
rounded away or cut off, without a word. In a file of its own because it waits for PEFT to be imported (`saving`).
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

_ASKED_BEFORE_A_MERGE = "check_adapters_to_merge"


def install(theirs: ModuleType) -> None:
    """Let ``peft.tuners.tuners_utils``, and who has taken the function from there, refuse such merges; once."""
    plain = getattr(theirs, _ASKED_BEFORE_A_MERGE, None)
    if plain is None or hasattr(plain, "before_qbert"):
        return

    @functools.wraps(plain)
    def check(module: Any, *args: Any, **kwargs: Any) -> Any:
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else None
        if hasattr(layer, "quantized_weight"):
            raise ValueError(
                f"adapter: merged into a quantized {type(layer).__name__} it would be rounded to a grid that was made "
                "for the weights without it; merge it into the float model and call quantize_model on that, or leave "
                "it unmerged"
            )
        return plain(module, *args, **kwargs)

    check.before_qbert = plain  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, _ASKED_BEFORE_A_MERGE, None) is plain:
            setattr(module, _ASKED_BEFORE_A_MERGE, check)
