"""Import paths of version 0.1 that have moved into rooms: they lead to the new places, with a DeprecationWarning.

It stands alone so that it can be deleted whole, which version 0.3 will do. Importing nothing by an old path costs
nothing but one look into a table.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NOW_IN: dict[str, tuple[str, ...]] = {
    "allocation_shares": ("allocation.allocate",),
    "block_config": ("allocation.blocks",),
    "budgets": ("allocation.budgets",),
    "choices": ("allocation.blocks",),
    "damage": ("allocation.damage",),
    "export": ("onnx",),
    "export_layers": ("runtimes.onnx",),
    "fast_forward": ("inference.forward",),
    "fronts": ("allocation.front",),
    "hub": ("saving.hf",),
    "hub_files": ("saving.folder",),
    "hub_loading": ("saving.records",),
    "hub_records": ("saving.records",),
    "hub_trainable": ("saving.trainable",),
    "inference_cpu_layers": ("inference.cpu_layers",),
    "inference_gpu": ("inference.gpu",),
    "inference_gpu_layers": ("inference.gpu_layers",),
    "inference_graphs": ("inference.graphs",),
    "inference_model": ("inference.cpu_model",),
    "inference_parts": ("encoders.parts", "inference.fits"),
    "inference_stages": ("inference.cpu",),
    "knapsack": ("allocation.knapsack",),
    "loss_change": ("allocation.sensitivity",),
    "modules": ("layers.quantizer", "layers.linear", "layers.embedding", "encoders.replace"),
    "packed": ("packing", "layers.packed", "layers.linear", "layers.embedding"),
    "packed_layout": ("layers.layout", "quantizers.groups"),
    "packed_modules": ("layers.linear", "layers.embedding", "layers.packed"),
    "packed_tensor": ("layers.packed",),
    "patterns": ("bits",),
    "perturbation": ("allocation.damage",),
    "registration": ("saving.registration",),
    "report": ("results",),
    "sensitivities": ("allocation.sensitivity",),
    "sensitivity_report": ("allocation.predictions",),
    "targets": ("encoders.targets",),
    "tensor_spec": ("bits",),
    "hessian.additive": ("hessian.losses",),
    "hessian.eigenpair": ("hessian.eigen",),
    "hessian.evaluating": ("hessian.losses",),
    "hessian.krylov": ("hessian.eigen",),
    "hessian.memory": ("hessian.operator",),
    "hessian.parallel": ("hessian.checkpoint",),
    "hessian.parts": ("hessian.blocks",),
    "hessian.refine": ("hessian.measure",),
    "hessian.runs": ("hessian.measure",),
    "hessian.samples": ("hessian.batches",),
    "hessian.solve": ("hessian.measure",),
    "hessian.subsets": ("hessian.batches",),
    "tasks.cache": ("tasks.training",),
    "tasks.checks": ("tasks.task",),
    "tasks.quiet": ("tasks.heads",),
    "tasks.settings": ("tasks.training",),
    "tasks.similarity": ("tasks.heads",),
    "tasks.spans": ("tasks.encoding",),
    "kernels.cpu_chains": ("kernels.cpu.chains",),
    "kernels.cpu_gemm": ("kernels.cpu.gemm",),
    "kernels.prepared": ("kernels.dispatch",),
    "kernels.products": ("kernels.operators",),
    "kernels.twins": ("kernels.reference", "kernels.operators"),
    "kernels.gpu.embedding": ("kernels.gpu.rows.embedding",),
    "kernels.gpu.epilogue": ("kernels.gpu.products.epilogue",),
    "kernels.gpu.layernorm_quant": ("kernels.gpu.rows.layernorm_quant",),
    "kernels.gpu.launch": ("kernels.gpu.tiles",),
    "kernels.gpu.matmul_a16": ("kernels.gpu.products.matmul_a16",),
    "kernels.gpu.matmul_a8": ("kernels.gpu.products.matmul_a8",),
    "kernels.gpu.matmul_a8_mixed": ("kernels.gpu.products.matmul_a8_mixed",),
    "kernels.gpu.quantize_rows": ("kernels.gpu.rows.quantize_rows",),
    "kernels.gpu.unpack": ("kernels.gpu.products.unpack",),
    "kernels.gpu.unpack_f8": ("kernels.gpu.products.unpack",),
    "kernels.gpu.unpack_fp16": ("kernels.gpu.products.unpack",),
    "distill.dropout": ("distill.aside",),
    "distill.fidelity": ("tasks.evaluation",),
    "distill.items": ("distill.losses",),
    "distill.students": ("students.depth",),
}

# Names that two old modules had for different things.
_NOW_CALLED = {"kernels.gpu.unpack_f8": {f"planes{bits}": f"planes{bits}_e4m3" for bits in (2, 3, 4)}}


class _MovedModule(ModuleType):
    """Reads every name from the modules where it is now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old = self.__name__.removeprefix("qbert.")
        new = _NOW_CALLED.get(old, {}).get(name, name)
        for place in _NOW_IN[old]:
            module = importlib.import_module(f"qbert.{place}")
            if hasattr(module, new):
                return getattr(module, new)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("qbert.") or fullname.removeprefix("qbert.") not in _NOW_IN:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        places = " and ".join(f"qbert.{place}" for place in _NOW_IN[module.__name__.removeprefix("qbert.")])
        warnings.warn(f"{module.__name__} has moved to {places}", DeprecationWarning, stacklevel=2)


def keep_old_paths() -> None:
    """Let the old paths be imported, after every place where modules really are."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
