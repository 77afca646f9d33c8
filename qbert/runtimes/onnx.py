"""Packed models in operators of ONNX: low-bit weights for ONNX Runtime, with the outputs of the packed model.

Matrices of up to 4 bits become ``MatMulNBits`` (2- or 4-bit codes in blocks of input columns that share the scale of
their row); 8-bit ones int8 initializers behind ``DequantizeLinear``; tables int8 initializers of which only the rows
that are looked up are dequantized. Activations are quantized by standard operators exactly as the packed model does,
or left in float.

    >>> record = record_model(packed, partial(onnx_twin, quantize_activations=True), ("input_ids", "attention_mask"))
    >>> write_onnx(record, "model.onnx")

Reference: ONNX operator DequantizeLinear (opset 13 and later); ONNX Runtime contrib operator
com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor
from qbert.runtimes.layers import IntegerGrid, QuantizedInput, integer_grid, packed_bytes
from qbert.runtimes.recorded import MEND, RECORDED, Recorded, check_kind

_OPSET = 18


def onnx_twin(module: PackedTensor, quantize_activations: bool) -> nn.Module:
    """A packed table or linear map in operators that ONNX has; ValueError for another kind of layer."""
    check_kind(module, "ONNX")
    if isinstance(module, PackedEmbedding):
        return OnnxTable(module)
    assert isinstance(module, PackedLinear)
    return onnx_linear(module, quantize_activations)


def write_onnx(record: Recorded, target: Path | BinaryIO) -> None:
    """Write a record with twins of `onnx_twin`; ValueError for an operator that ONNX lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its successor, which has no symbolic operators
        try:
            torch.onnx.export(
                record.copy(),
                record.example(*RECORDED),
                target if not isinstance(target, Path) else str(target),  # type: ignore[arg-type]
                input_names=list(record.inputs),
                output_names=list(record.outputs),
                dynamic_axes=record.axes,
                opset_version=_OPSET,
                dynamo=False,
                custom_opsets={"com.microsoft": 1} if any(isinstance(m, _OnnxNBits) for m in record.modules()) else {},
            )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # an operator that ONNX lacks, for instance
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"packed: {record.name} cannot be written as an ONNX file ({reason[:200]}); {MEND}"
            ) from error


class OnnxSession:
    """A file of `write_onnx` in ONNX Runtime.

    Args:
        inputs, outputs: names, as in the record that was written.
        source: the file, or its bytes.
        threads: of one product; ``None`` lets ONNX Runtime decide.
        accuracy: "1" keeps the inputs of 8-bit matrices in float; "4", its own default, rounds them to 8 bits.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: Path | bytes,
        threads: int | None = None,
        accuracy: str = "1",
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        model = str(source) if isinstance(source, Path) else source
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs = inputs, list(outputs)
        # An input that the model never reads is none of the file's.
        self._taken = {put.name for put in self._session.get_inputs()}

    def __call__(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs for int64 [B, T] inputs, in the order of the record's."""
        given = dict(zip(self._inputs, values, strict=True))
        found = self._session.run(self._outputs, {n: v.numpy() for n, v in given.items() if n in self._taken})
        return tuple(map(torch.from_numpy, found))


_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 16  # what MatMulNBits takes


def onnx_linear(layer: PackedLinear, quantize_activations: bool) -> nn.Module:
    """The twin of a `PackedLinear`: MatMulNBits where its codes fit, else DequantizeLinear, else floats."""
    grid = integer_grid(layer)
    lowest, highest = int(grid.codes.min()), int(grid.codes.max())
    block = _block(layer.columns // layer.layout.input_groups)
    for bits in (2, 4):
        half = 1 << (bits - 1)
        shift = 0 if bits == 4 and lowest >= -half else lowest + half
        if highest - shift < half and block and layer.layout.bits < 8:
            return _OnnxNBits(layer, grid, half - shift, bits, block, quantize_activations)
    return _OnnxLinear(layer, grid, quantize_activations)


def _block(columns: int) -> int:
    """The largest block size of MatMulNBits that divides a run of columns with one scale; 0 if none does."""
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK and columns % block:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


class _OnnxNBits(QuantizedInput):
    """A matrix as MatMulNBits: unsigned codes [O, I] of 2 or 4 bits, lowest first in a byte."""

    def __init__(
        self, layer: PackedLinear, grid: IntegerGrid, shift: int, bits: int, block: int, quantize: bool
    ) -> None:
        super().__init__(layer, quantize, grid.offset)
        self.bits, self.block = bits, block
        rows, columns = grid.codes.shape
        self.shape = rows, columns
        blocks = columns // block
        spread = blocks // grid.scale.shape[1]
        zero = (grid.zero.to(torch.int32) + shift).repeat_interleave(spread, 1)
        self.register_buffer("codes", packed_bytes(grid.codes + shift, bits).view(rows, blocks, -1))
        self.register_buffer("scale", grid.scale.repeat_interleave(spread, 1).reshape(-1).contiguous())
        self.register_buffer("zero", packed_bytes(zero, bits).reshape(-1))
        self.register_buffer("weight", grid.weight(), persistent=False)

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
        rank = x.type().dim()
        # Without a type the exporter warns, once a matrix; lengths stay open.
        return y if rank is None else y.setType(x.type().with_sizes([*[None] * (rank - 1), rows]))


class _OnnxLinear(QuantizedInput):
    """A matrix as int8 codes behind DequantizeLinear, or in float where input groups do not allow that."""

    def __init__(self, layer: PackedLinear, grid: IntegerGrid, quantize: bool) -> None:
        self.plain = grid.scale.shape[1] > 1
        super().__init__(layer, quantize, None if self.plain else grid.offset)
        self.register_buffer("weight", layer.quantized_weight().float() if self.plain else grid.weight())
        if not self.plain:
            self.register_buffer("codes", grid.codes.to(torch.int8))
            self.register_buffer("scale", grid.scale[:, 0].contiguous())
            self.register_buffer("zero", grid.zero[:, 0].to(torch.int8))

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
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.register_buffer("codes", table.int_codes())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.int8) if bool((zero == zero.round()).all()) else zero)

    @property
    def weight(self) -> Tensor:
        """The whole table in float32 [V, D], for forwards that look at its shape (CLIP) or read it."""
        return self.forward(torch.arange(self.num_embeddings, device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to float32 rows [..., D]."""
        rows = self.codes[ids].float().unflatten(-1, (self.groups, -1))  # type: ignore[index]
        zero = self.zero[ids].float().unsqueeze(-1)  # type: ignore[index]
        return (self.scale[ids].unsqueeze(-1) * (rows - zero)).flatten(-2)  # type: ignore[index]
