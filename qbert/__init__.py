"""qbert: Hessian-guided quantization of BERT-like encoders to 2-8 bits.

    >>> import qbert
    >>> spectrum = qbert.hessian_spectrum(model, batches)
    >>> bits = qbert.allocate_bits(spectrum, bits=(2, 3))
    >>> student = qbert.quantize_model(model, bits)

Names are imported on first use, so that `import qbert` stays fast.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbert.moved import keep_old_paths
from qbert.saving.registration import register_with_transformers
from qbert.version import __version__

_HOME = {
    "BitsConfig": "qbert.bits",
    "TensorSpec": "qbert.bits",
    "Pipeline": "qbert.pipeline",
    "allocate_bits": "qbert.allocation.allocate",
    "bit_shares": "qbert.allocation.allocate",
    "compress": "qbert.pipeline",
    "choose_grid": "qbert.allocation.grids",
    "export_onnx": "qbert.onnx",
    "export_openvino": "qbert.openvino",
    "factorize": "qbert.students.lowrank",
    "HessianSpectrum": "qbert.hessian",
    "hessian_spectrum": "qbert.hessian",
    "load": "qbert.saving.hf",
    "model_size": "qbert.sizes",
    "optimize_for_inference": "qbert.inference.cpu",
    "pack": "qbert.packing",
    "pareto": "qbert.allocation.front",
    "plan": "qbert.pipeline.plan",
    "prune": "qbert.students.pruned",
    "quantize_model": "qbert.quantize",
    "save_trainable": "qbert.saving.trainable",
    "sensitivity": "qbert.allocation.sensitivity",
    "shrink": "qbert.shrinking",
    "unpack": "qbert.packing",
}
_ROOMS = ("allocation", "distill", "hessian", "kernels", "pipeline", "students", "tasks")

__all__ = [
    "BitsConfig",
    "HessianSpectrum",
    "Pipeline",
    "TensorSpec",
    "__version__",
    "allocate_bits",
    "bit_shares",
    "choose_grid",
    "compress",
    "export_onnx",
    "export_openvino",
    "factorize",
    "hessian_spectrum",
    "load",
    "model_size",
    "optimize_for_inference",
    "pack",
    "pareto",
    "plan",
    "prune",
    "quantize_model",
    "save_trainable",
    "sensitivity",
    "shrink",
    "unpack",
]

if TYPE_CHECKING:
    from qbert.allocation.allocate import allocate_bits, bit_shares
    from qbert.allocation.front import pareto
    from qbert.allocation.grids import choose_grid
    from qbert.allocation.sensitivity import sensitivity
    from qbert.bits import BitsConfig, TensorSpec
    from qbert.hessian import HessianSpectrum, hessian_spectrum
    from qbert.inference.cpu import optimize_for_inference
    from qbert.onnx import export_onnx
    from qbert.openvino import export_openvino
    from qbert.packing import pack, unpack
    from qbert.pipeline import Pipeline, compress
    from qbert.pipeline.plan import plan
    from qbert.quantize import quantize_model
    from qbert.saving.hf import load
    from qbert.saving.trainable import save_trainable
    from qbert.shrinking import shrink
    from qbert.sizes import model_size
    from qbert.students.lowrank import factorize
    from qbert.students.pruned import prune

# The code of two rooms lies in top-level folders, reached through links. Where they are missing (an unpacked source
# archive) or are small files (a clone without symbolic links), it is found beside this folder.
_here = Path(__file__).parent
_linked = all((_here / room).is_dir() for room in ("distill", "kernels"))
if not _linked and (_here.parent / "kernels" / "formats.py").is_file():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"qbert.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'qbert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_ROOMS})


register_with_transformers()
keep_old_paths()
