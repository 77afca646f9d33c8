"""Tells transformers about quantized models, whichever of the two libraries is imported first.

transformers has no entry points: a quantization method exists once somebody has registered it. Importing the registry
(and torch with it) takes seconds, which ``import qbert`` alone should not cost; so if the registry is not loaded yet,
registration waits until it is. The same holds for what other libraries do with models that are quantized (saving
them, writing their cards, merging adapters into them) and for students of classes of our own.

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

_AFTER = {
    "transformers.quantizers.auto": "qbert.saving.hf",
    "transformers.modeling_utils": "qbert.saving.methods",
    "transformers.models.auto.modeling_auto": "qbert.students.registration",
    "peft.tuners.tuners_utils": "qbert.layers.adapters",
    "sentence_transformers.base.model": "qbert.saving.sentences",
    "sentence_transformers.SentenceTransformer": "qbert.saving.sentences",  # before version 5.4
}


def register_with_transformers() -> None:
    """Register the ``qbert`` quantization method now, or right after transformers' own modules are imported."""
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            _install(theirs, ours)
        elif not any(isinstance(finder, _After) and finder.theirs == theirs for finder in sys.meta_path):
            sys.meta_path.insert(0, _After(theirs, ours))


def _install(theirs: str, ours: str) -> None:
    module = importlib.import_module(ours)
    if hasattr(module, "install"):
        module.install(sys.modules[theirs])


class _After(MetaPathFinder):
    """Finds nothing itself; lets the import of the module `theirs` end with the import of `ours`."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _install(self.theirs, self.ours)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
