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

from qbert.encoders.replace import replace_everywhere
from qbert.files import write_whole
from qbert.inference.forward import remove_fast_forwards
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor, check_module
from qbert.layers.transposed import PackedTransposed
from qbert.quantizers.activations import token_range, token_scale
from qbert.quantizers.grid import code_range

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
        if isinstance(module, PackedEmbedding):
            twin: nn.Module = OnnxTable(module)
        elif type(module) in (PackedLinear, PackedTransposed):
            twin = onnx_linear(module, quantize_activations)
        else:
            raise ValueError(
                f"packed: {type(module).__name__} has no ONNX form yet; export a model without convolutions, or "
                "quantize with {'*': ..., '<its name>': 32} to leave it in float"
            )
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


_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 16  # what MatMulNBits takes


def onnx_linear(layer: nn.Module, quantize_activations: bool) -> nn.Module:
    """The twin of a `PackedLinear`: MatMulNBits where its codes fit, else DequantizeLinear, else floats.

    Both operators know integer zero points only. What a real one is off its nearest integer, times the scale, is an
    offset of all weights of a row, so it comes back as the sum of the inputs times that.
    """
    assert isinstance(layer, PackedLinear)
    scale, zero = layer.row_grids()
    codes = layer.int_codes().to(torch.int32)
    whole = zero.round().clamp(int(codes.min()), int(codes.max())) if layer.spec.scheme == "offset" else zero.round()
    offset = None if torch.equal(zero, whole) else scale * (whole - zero)
    block = _block(layer.columns // layer.layout.input_groups)
    for bits in (2, 4):
        half = 1 << (bits - 1)
        shift = 0 if bits == 4 and int(codes.min()) >= -half else _centre(codes, whole, bits)
        q, z = codes - shift, whole - shift
        fits = -half <= min(int(q.min()), int(z.min())) and max(int(q.max()), int(z.max())) < half
        if fits and block and layer.layout.bits < 8:
            grids = scale, z.to(torch.int32) + half
            return _OnnxNBits(layer, q + half, *grids, offset, bits, block, quantize_activations)
    return _OnnxLinear(layer, codes, scale, whole, offset, quantize_activations)


def _centre(codes: Tensor, zero: Tensor, bits: int) -> int:
    """The offset that puts the lowest code or zero at the lowest code of `bits` bits."""
    return min(int(codes.min()), int(zero.min())) + (1 << (bits - 1))


def _block(columns: int) -> int:
    """The largest block size of MatMulNBits that divides a run of columns with one scale; 0 if none does."""
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK and columns % block:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


class _OnnxInput(nn.Module):
    """Fake quantization of a layer's input in operators that ONNX has."""

    offset: Tensor | None

    def __init__(self, layer: PackedLinear, enabled: bool, offset: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("offset", None if offset is None else offset.T.contiguous())  # [K, O]
        activation = layer.activation_quantizer if enabled else None
        self.mode = None if activation is None else activation.mode
        self.low, self.high = code_range(layer.spec.activation_bits or 8)
        self.static: tuple[float, float] | None = None
        if enabled and layer.input_scale is not None and layer.input_zero is not None:
            self.static = float(layer.input_scale), float(layer.input_zero)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float())

    def quantize(self, x: Tensor) -> Tensor:
        if self.mode == "asymmetric":
            low, scale = token_range(x, self.high - self.low)
            return torch.round((x - low) / scale) * scale + low
        if self.mode is not None:
            scale = token_scale(x, self.high)
            return torch.round(x / scale) * scale
        if self.static is not None:
            scale_, zero = self.static
            return (torch.clamp(torch.round(x / scale_ + zero), self.low, self.high) - zero) * scale_
        return x

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The product `y` [..., O] of the quantized input `x` [..., I] with offsets and bias added."""
        if self.offset is not None:
            y = y + x.unflatten(-1, (self.offset.shape[0], -1)).sum(-1) @ self.offset
        return y if self.bias is None else y + self.bias


class _OnnxNBits(_OnnxInput):
    """A matrix as MatMulNBits: unsigned codes [O, I] of 2 or 4 bits, lowest first in a byte."""

    def __init__(
        self,
        layer: PackedLinear,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        bits: int,
        block: int,
        quantize: bool,
    ) -> None:
        super().__init__(layer, quantize, offset)
        self.bits, self.block = bits, block
        rows, columns = codes.shape
        self.shape = rows, columns
        blocks = columns // block
        spread = blocks // scale.shape[1]
        self.register_buffer("codes", _bytes(codes, bits).view(rows, blocks, -1))
        self.register_buffer("scale", scale.repeat_interleave(spread, 1).reshape(-1).contiguous())
        self.register_buffer("zero", _bytes(zero.repeat_interleave(spread, 1), bits).reshape(-1))
        self.register_buffer("weight", layer.quantized_weight().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize(x)
        y = _MatMulNBits.apply(x, self.codes, self.scale, self.zero, self.weight, *self.shape, self.bits, self.block)
        return self.finish(y, x)


class _MatMulNBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, *sizes: int) -> Tensor:
        return x @ weight.T

    @staticmethod
    def symbolic(
        g: Any, x: Any, codes: Any, scale: Any, zero: Any, weight: Any, rows: int, columns: int, bits: int, block: int
    ) -> Any:
        y = g.op(
            "com.microsoft::MatMulNBits",
            x,
            codes,
            scale,
            zero,
            K_i=columns,
            N_i=rows,
            bits_i=bits,
            block_size_i=block,
        )
        sizes = x.type().sizes()
        return y.setType(x.type().with_sizes([*sizes[:-1], rows])) if sizes is not None else y


class _OnnxLinear(_OnnxInput):
    """A matrix as int8 codes behind DequantizeLinear, or in float where input groups do not allow that."""

    def __init__(
        self, layer: PackedLinear, codes: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, quantize: bool
    ) -> None:
        self.plain = scale.shape[1] > 1
        super().__init__(layer, quantize, None if self.plain else offset)
        self.register_buffer("weight", layer.quantized_weight().float())
        if not self.plain:
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", scale[:, 0].contiguous())
            self.register_buffer("zero", zero[:, 0].to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.plain else _Dequantize.apply(self.codes, self.scale, self.zero, self.weight)
        x = self.quantize(x)
        return self.finish(nn.functional.linear(x, weight), x)  # type: ignore[arg-type]


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero: Any, weight: Any) -> Any:
        return g.op("DequantizeLinear", codes, scale, zero, axis_i=0).setType(weight.type())


class OnnxTable(nn.Module):
    """A lookup table as int8 codes; the rows that are looked up are dequantized."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        scale, zero = table.row_grids()
        self.groups = scale.shape[1]
        self.register_buffer("codes", table.int_codes())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.int8) if bool((zero == zero.round()).all()) else zero)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to float32 rows [..., D]."""
        rows = self.codes[ids].float().unflatten(-1, (self.groups, -1))  # type: ignore[index]
        zero = self.zero[ids].float().unsqueeze(-1)  # type: ignore[index]
        return (self.scale[ids].unsqueeze(-1) * (rows - zero)).flatten(-2)  # type: ignore[index]


def _bytes(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [O, N] of `bits` bits, packed along N with the first in the lowest bits: uint8 [O, bytes]."""
    per_byte = 8 // bits
    padded = nn.functional.pad(values, (0, -values.shape[1] % per_byte)).view(values.shape[0], -1, per_byte)
    return (padded << (torch.arange(per_byte, device=values.device) * bits)).sum(2).to(torch.uint8)
