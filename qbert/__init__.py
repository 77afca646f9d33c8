"""qbert: Hessian-guided quantization of BERT-like encoders to 2-8 bits.

    >>> import qbert
    >>> spectrum = qbert.hessian_spectrum(model, batches)
    >>> bits = qbert.allocate_bits(spectrum, bits=(2, 3))
    >>> student = qbert.quantize_model(model, bits)

Names are imported on first use, so that `import qbert` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qbert.registration import register_with_transformers

__version__ = "0.1.0"

_HOME = {
    "BitsConfig": "qbert.bits",
    "TensorSpec": "qbert.bits",
    "allocate_bits": "qbert.allocation",
    "bit_shares": "qbert.allocation_shares",
    "export_onnx": "qbert.export",
    "HessianSpectrum": "qbert.hessian",
    "hessian_spectrum": "qbert.hessian",
    "load": "qbert.hub",
    "model_size": "qbert.sizes",
    "optimize_for_inference": "qbert.inference",
    "pack": "qbert.packed",
    "pareto": "qbert.fronts",
    "quantize_model": "qbert.quantize",
    "sensitivity": "qbert.sensitivities",
    "unpack": "qbert.packed",
}

__all__ = [
    "BitsConfig",
    "HessianSpectrum",
    "TensorSpec",
    "__version__",
    "allocate_bits",
    "bit_shares",
    "export_onnx",
    "hessian_spectrum",
    "load",
    "model_size",
    "optimize_for_inference",
    "pack",
    "pareto",
    "quantize_model",
    "sensitivity",
    "unpack",
]

if TYPE_CHECKING:
    from qbert.allocation import allocate_bits
    from qbert.allocation_shares import bit_shares
    from qbert.bits import BitsConfig, TensorSpec
    from qbert.export import export_onnx
    from qbert.fronts import pareto
    from qbert.hessian import HessianSpectrum, hessian_spectrum
    from qbert.hub import load
    from qbert.inference import optimize_for_inference
    from qbert.packed import pack, unpack
    from qbert.quantize import quantize_model
    from qbert.sensitivities import sensitivity
    from qbert.sizes import model_size


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qbert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


register_with_transformers()
