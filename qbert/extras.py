"""Packages that only some features need: asked for before any work is done, imported where they are used.

Alone because every room may need it, and `import qbert` must not load what it names.

>>> require("matplotlib", "a picture")
"""

from __future__ import annotations

import importlib.util

# import name -> (what pip calls it, the extra of pyproject.toml that brings it)
_OPTIONAL = {
    "accelerate": ("accelerate", "train"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "openvino"),
    "matplotlib": ("matplotlib", "plots"),
    "plotly": ("plotly", "report"),
    "seqeval": ("seqeval", "tasks"),
    "sklearn": ("scikit-learn", "tasks"),
}


class MissingPackageError(ImportError):
    """An optional package that the call needs is not installed; the message says how to install it."""


def is_installed(package: str) -> bool:
    """Whether `package`, an import name, can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, user: str) -> None:
    """Refuse in one sentence to go on without an optional package.

    Args:
        package: import name of one of the optional packages.
        user: what needs it, the first words of the sentence.

    Raises:
        MissingPackageError: if it is not installed; names the pip command.
    """
    distribution, extra = _OPTIONAL[package]
    if not is_installed(package):
        raise MissingPackageError(
            f"{user} needs the package {distribution}, which is not installed; run: pip install {distribution} "
            f"(one of qbert's extra [{extra}])",
            name=package,
        )
