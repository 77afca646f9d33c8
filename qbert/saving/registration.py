"""Tells transformers about packed models, whichever of the two libraries is imported first.

transformers has no entry points: a quantization method exists once somebody has registered it. Importing the registry
(and torch with it) takes seconds, which ``import qbert`` alone should not cost; so if the registry is not loaded yet,
registration waits until it is.

    >>> import qbert                                      # calls `register_with_transformers`
    >>> AutoModel.from_pretrained("folder of a packed model")
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the ``qbert`` quantization method now, or right after transformers' registry is imported."""
    if _REGISTRY in sys.modules:
        importlib.import_module("qbert.saving.hf")
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


class _AfterRegistry(MetaPathFinder):
    """Finds nothing itself; lets the import of `_REGISTRY` end with the import of ``qbert.saving.hf``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("qbert.saving.hf")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
