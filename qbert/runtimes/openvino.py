"""Packed models as models of OpenVINO, whose low-bit weights its CPU runtime multiplies as they are.

A weight is a constant of unsigned codes behind ``Convert``, ``Subtract`` (integer zero points) and ``Multiply`` (the
scales), with a ``Reshape`` where input columns are grouped: the pattern that OpenVINO keeps in low bits in its products
and look-ups. Codes of 2, 4 and 8 bits are stored as such and those of 3 bits in 4; tables of 2 bits are stored in 4
too, since the runtime would unfold a 2-bit table to floats when it loads it.

OpenVINO rounds the inputs of such products to 8 bits by itself, in groups of 32 columns ("dynamic quantization"). A
model that quantizes its inputs itself says in the file that this is not to be. So does one with 2-bit weights: together
with bfloat16, the default of processors that have it, OpenVINO 2026.4 returns empty outputs for them.

    >>> record = record_model(packed, partial(openvino_twin, quantize_activations=False), ("input_ids",))
    >>> model = openvino_model(record)

Reference: OpenVINO's documentation, "Low-precision IR" and "LLM weight compression".
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor
from qbert.runtimes.layers import QuantizedInput, integer_grid, packed_bytes
from qbert.runtimes.recorded import MEND, RECORDED, Recorded, check_kind

_STORED = (2, 4, 8)  # widths of codes
_TABLES = 4  # the fewest bits of a table
_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", _GROUP: 0}


def openvino_twin(module: PackedTensor, quantize_activations: bool, least_bits: int = 2) -> nn.Module:
    """A packed table or linear map with what its constant is made of; ValueError for another kind of layer.

    Args:
        module: the packed layer.
        quantize_activations: quantize its input as it does.
        least_bits: the fewest bits in which a matrix is stored: 2, 4 or 8.
    """
    check_kind(module, "OpenVINO")
    if isinstance(module, PackedEmbedding):
        return _Table(module)
    assert isinstance(module, PackedLinear)
    return _Linear(module, quantize_activations, least_bits)


class _Codes:
    """A weight [O, I] of unsigned codes, as OpenVINO stores it.

    Args:
        codes: integers [O, I] of any range up to 256 wide; scale, zero: float32 [O, K], `zero` in the same units.
        least: the fewest bits to store a code in.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, least: int) -> None:
        lowest = int(codes.min())
        self.codes, self.scale, self.zero = codes.to(torch.int32) - lowest, scale, zero - lowest
        self.bits = next(b for b in _STORED if b >= least and int(self.codes.max()) < 1 << b)

    def node(self) -> Any:
        """The float32 [O, I] node of a graph."""
        from openvino import Type
        from openvino import opset13 as op

        rows, columns = self.codes.shape
        groups = self.scale.shape[1]
        shape = [rows, columns] if groups == 1 else [rows, groups, columns // groups]
        units = [rows, 1] if groups == 1 else [rows, groups, 1]
        node = op.convert(_constant(self.codes, self.bits, shape), Type.f32)
        if bool(self.zero.any()):
            if bool((self.zero == self.zero.round()).all()):
                zero = op.convert(_constant(self.zero.to(torch.int32), self.bits, units), Type.f32)
            else:
                zero = op.constant(self.zero.reshape(units).numpy())
            node = op.subtract(node, zero)
        node = op.multiply(node, op.constant(self.scale.reshape(units).numpy()))
        return node if groups == 1 else op.reshape(node, op.constant([rows, columns]), False)


def _constant(values: Tensor, bits: int, shape: list[int]) -> Any:
    from openvino import Shape, Type
    from openvino import Tensor as Data
    from openvino.op import Constant

    kind = {2: Type.u2, 4: Type.u4, 8: Type.u8}[bits]
    data = packed_bytes(values.reshape(1, -1), bits).flatten().numpy()
    return Constant(Data(data, Shape(shape), kind), shared_memory=False)


class _Linear(QuantizedInput):
    """A linear map whose weight is exchanged for its codes after the record was converted."""

    def __init__(self, layer: PackedLinear, quantize: bool, least_bits: int) -> None:
        grid = integer_grid(layer)
        super().__init__(layer, quantize, grid.offset)
        self.stored = _Codes(grid.codes, grid.scale, grid.zero, least_bits)
        self.register_buffer("weight", grid.weight())

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize(x)
        return self.finish(F.linear(x, self.weight), x)  # type: ignore[arg-type]


class _Table(nn.Module):
    """A lookup table whose weight is exchanged for its codes after the record was converted."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        scale, zero = table.row_grids()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.stored = _Codes(table.int_codes(), scale, zero, _TABLES)
        self.register_buffer("weight", table.quantized_weight().float())

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)  # type: ignore[arg-type]


def openvino_model(record: Recorded) -> Any:
    """The ``openvino.Model`` of a record with twins of `openvino_twin`, in float32 but for the packed tensors.

    Raises:
        ValueError: for an operator that OpenVINO lacks.
    """
    from openvino import PartialShape, Type
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    trace = record.trace()
    try:
        # What openvino.convert_model does, without the reports of its use that it sends from processes of their own.
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(trace, example_input=record.example(*RECORDED))
        loaded = frontend.load(decoder)
        for place in loaded.get_inputs():
            loaded.set_element_type(place, Type.i64)
            loaded.set_partial_shape(place, PartialShape([-1, -1]))
        model = frontend.convert(loaded)
        apply_moc_transformations(model, cf=False, smart_reshape=True)
    except Exception as error:  # OpenVINO's own classes, which derive from nothing narrower
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(
            f"packed: {record.name} cannot be converted by OpenVINO ({lines[-1][:200]}); {MEND}"
        ) from error
    for puts, names in ((model.inputs, record.inputs), (model.outputs, record.outputs)):
        for put, name in zip(puts, names, strict=True):
            put.get_tensor().set_names({name})
    stored = {
        f"self.{path}.weight": module.stored
        for path, module in record.named_modules(remove_duplicate=False)
        if isinstance(module, _Linear | _Table)
    }
    for node in model.get_ordered_ops():
        codes = stored.get(node.get_friendly_name())
        if codes is not None and node.get_type_name() == "Constant":
            made = codes.node()
            for taker in node.output(0).get_target_inputs():
                taker.replace_source_output(made.output(0))
    _give_zeros_where_nothing_is_seen(model)
    model.validate_nodes_and_infer_types()
    linears = [m for m in record.modules() if isinstance(m, _Linear)]
    if any(m.mode or m.static or m.stored.bits == _STORED[0] for m in linears):
        model.set_rt_info("0", ["runtime_options", _GROUP])
    return model


def _give_zeros_where_nothing_is_seen(model: Any) -> None:
    """Let attention give zeros to a query that sees no key, as torch's does; OpenVINO's gives NaN."""
    from openvino import Type, opset13

    seen: dict[str, Any] = {}  # layers share their mask
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or len(node.inputs()) < 4:
            continue
        mask = node.input_value(3)
        if mask.get_element_type() != Type.boolean:
            continue
        name = f"{mask.get_node().get_friendly_name()}.{mask.get_index()}"
        if name not in seen:
            seen[name] = opset13.reduce_logical_or(mask, opset13.constant(np.array([-1])), keep_dims=True)
        takers = node.output(0).get_target_inputs()
        kept = opset13.select(seen[name], node.output(0), opset13.constant(np.float32(0)))
        for taker in takers:
            taker.replace_source_output(kept.output(0))


def stored_bits(model: Any) -> dict[int, int]:
    """Bits of codes -> how many weights of an ``openvino.Model`` are stored in them."""
    found: Counter[int] = Counter()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() in ("u2", "u4", "u8"):
            takers = {taker.get_node().get_type_name() for taker in node.output(0).get_target_inputs()}
            if takers == {"Convert"} and node.output(0).get_shape()[-1] > 1:  # of zero points there is one a row
                found[node.get_element_type().bitwidth] += 1
    return dict(sorted(found.items()))


class OpenVinoSession:
    """A model in OpenVINO's CPU runtime. Calls from several threads wait for each other.

    Args:
        outputs: how many it has.
        source: an ``openvino.Model``, or its file.
        settings: of the runtime; "INFERENCE_NUM_THREADS" is that of torch unless given.
    """

    def __init__(self, outputs: int, source: Any, settings: Mapping[str, Any] | None = None) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, **(settings or {})}
        model = str(source) if isinstance(source, Path) else source
        self._outputs = range(outputs)
        self._compiled: Any = openvino.Core().compile_model(model, "CPU", settings)
        self._request: Any = self._compiled.create_infer_request()
        self._turn = threading.Lock()

    def __call__(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs for int64 [B, T] inputs, in the order of the record's."""
        with self._turn:
            found = self._request.infer([v.contiguous().numpy() for v in values], share_inputs=True)
            return tuple(torch.from_numpy(found[i]) for i in self._outputs)
