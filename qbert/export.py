"""Packed models as ONNX files: low-bit weights for ONNX Runtime, with the outputs of the packed model.

Matrices of up to 4 bits become ``MatMulNBits`` (2- or 4-bit codes in blocks of input columns that share the scale of
their row); 8-bit ones int8 initializers behind ``DequantizeLinear``; tables int8 initializers of which only the rows
that are looked up are dequantized. Activations are quantized by standard operators exactly as the packed model does,
or left in float. ONNX Runtime by itself turns an 8-bit matrix into a product with 8-bit activations of its own, which
adds about 0.03 of relative error on MiniLM; the session option ``session.qdq_matmulnbits_accuracy_level`` = "1" makes
it keep floats.

    >>> export_onnx(packed, "model.onnx")
    >>> onnxruntime.InferenceSession("model.onnx").run(None, {"input_ids": ids, "attention_mask": mask})

Reference: ONNX operator DequantizeLinear (opset 13 and later); ONNX Runtime contrib operator
com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbert.export_layers import OnnxTable, onnx_linear
from qbert.fast_forward import remove_fast_forwards
from qbert.files import write_whole
from qbert.modules import replace_everywhere
from qbert.packed_modules import PackedEmbedding
from qbert.packed_tensor import PackedTensor, check_module

_OPSET = 18


def export_onnx(
    packed: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    quantize_activations: bool = True,
) -> None:
    """Write a packed text encoder as an ONNX file with dynamic batch and length, in float32 but for the packed tensors.

    The first output of the model, logits or last hidden state, becomes ``output`` (float32 [B, ...]); a model that
    answers questions has ``start_logits`` and ``end_logits`` [B, T].

    Args:
        packed: what `qbert.pack`, `qbert.load` or ``from_pretrained`` returned, on the CPU, in any dtype. It is left
            alone; if it was optimized for inference, the export is that of the packed model.
        path: file to write.
        inputs: names of the int64 [B, T] inputs, out of those of the model's forward.
        quantize_activations: quantize them as the packed model does; if not, ONNX Runtime multiplies floats, which
            is faster and differs from the packed model by the rounding that it leaves out.

    Raises:
        ValueError: if the model has no packed layer, is not on the CPU, or cannot be called with these inputs.
        TypeError: if it is not a torch module.
        ImportError: if the package ``onnx`` is not installed.
    """
    check_module("packed", packed)
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; call qbert.pack first")
    if any(layer.owner.codes.device.type != "cpu" for layer in layers):  # type: ignore[union-attr]
        raise ValueError("packed: the model is not on the CPU; move it with .to('cpu')")
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("export_onnx needs the package onnx, which is not installed; run: pip install onnx")
    model = deepcopy(packed).eval().to(torch.float32)
    remove_fast_forwards(model)
    _check_inputs(model, inputs)
    for module in [m for m in model.modules() if isinstance(m, PackedTensor)]:
        twin = OnnxTable(module) if isinstance(module, PackedEmbedding) else onnx_linear(module, quantize_activations)
        replace_everywhere(model, module, twin)
    example = _example(inputs, 9)
    names, axes = _outputs(model, inputs, example)
    axes |= {name: {0: "batch", 1: "length"} for name in inputs}

    def write(aside: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer announces its successor, which has no symbolic operators
            torch.onnx.export(
                _FirstOutputs(model, inputs, len(names)),
                example,
                str(aside),
                input_names=list(inputs),
                output_names=names,
                dynamic_axes=axes,
                opset_version=_OPSET,
                dynamo=False,
                custom_opsets={"com.microsoft": 1},
            )

    write_whole(path, write)


def _check_inputs(model: nn.Module, inputs: Sequence[str]) -> None:
    taken = list(inspect.signature(model.forward).parameters)
    wrong = [inputs] if isinstance(inputs, str) else [name for name in inputs if name not in taken]
    if wrong or not inputs:
        raise ValueError(
            f"inputs: {wrong[0] if wrong else inputs!r} is not among the inputs of {type(model).__name__}; give a list "
            f"of some of {', '.join(taken)}"
        )


def _example(inputs: Sequence[str], length: int) -> tuple[Tensor, ...]:
    ids = torch.arange(2 * length, device="cpu").view(2, length) % 7
    mask = torch.ones_like(ids)
    mask[1, length * 2 // 3 :] = 0  # a mask of ones would be traced away
    return tuple(mask if "mask" in name else torch.zeros_like(ids) if "type" in name else ids for name in inputs)


def _outputs(
    model: nn.Module, inputs: Sequence[str], example: tuple[Tensor, ...]
) -> tuple[list[str], dict[str, dict[int, str]]]:
    """Names of the outputs to export, and their axes of varying size: those that follow the length of the example."""
    try:
        with torch.no_grad():
            results = [model(**dict(zip(inputs, e, strict=True))) for e in (example, _example(inputs, 5))]
            shapes = [_FirstOutputs.select(result, 2) for result in results]
    except Exception as error:  # whatever the forward of an unknown model may raise
        raise ValueError(
            f"packed: {type(model).__name__} cannot be called with {', '.join(inputs)} of shape [batch, length] "
            f"({type(error).__name__}: {error}); export a text encoder, such as the one inside "
            "of it, or name other inputs"
        ) from error
    first = results[0]
    names = ["start_logits", "end_logits"] if getattr(first, "start_logits", None) is not None else ["output"]
    axes = {}
    for name, long, short in zip(names, *shapes, strict=False):
        follows = {d: "length" for d in range(1, long.dim()) if long.shape[d] != short.shape[d]}
        axes[name] = {0: "batch"} | follows
    return names, axes


class _FirstOutputs(nn.Module):
    def __init__(self, model: nn.Module, inputs: Sequence[str], count: int) -> None:
        super().__init__()
        self.model, self.inputs, self.count = model, tuple(inputs), count

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self.select(self.model(**dict(zip(self.inputs, values, strict=True))), self.count)

    @staticmethod
    def select(result: Any, count: int) -> tuple[Tensor, ...]:
        return (result,) if isinstance(result, Tensor) else tuple(result[:count])
