"""How many bytes a model takes under a bits configuration, to the byte, without quantizing it.

A tensor [O, I] of b bits takes the packed codes (``qbert.kernels.formats``; b O I / 8 bytes where rows fill whole
bytes, (b / 2 + .75) O I / 8 of a matrix with 2:4 zeros), one float32 scale for each pair of row group and input group,
and a zero point for each, int8 in the ``asymmetric`` scheme, float32 in the ``offset`` one, none in the others; the map
from rows to groups follows from their number and is not stored. Everything else stays in its own dtype. Tied and shared
tensors are counted once.

    >>> print(model_size(model, {"encoder.layer.0": 8, "*": 4}))

MB is 10^6 bytes here and everywhere in the library. The sizes in Shen et al. 2020 (Q-BERT, table 1: 415.4, 48.1, ...),
which call themselves MB, are MiB = 2^20 bytes and leave scales and zero points out; both units are printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import DEFAULT_GROUPS, BitsConfig, TensorSpec
from qbert.encoders.targets import Target, base_models, encoder_layers, find_targets, join_path
from qbert.encoders.weights import matrix_size
from qbert.kernels.formats import half_row_nbytes, packed_nbytes
from qbert.layers.kind import TrainableLayer
from qbert.layers.layout import StoredZero, stored_sparsity, stored_zero
from qbert.layers.packed import PackedTensor
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.tables import LowRankTable, MixedTable, other_bytes, part_shapes, part_specs
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import group_layout

PARTS = ("encoder", "embeddings", "other")
_PART_LABELS = {"encoder": "encoder matrices", "embeddings": "embeddings", "other": "everything else"}
_ZERO_BYTES = {"none": 0, "int8": 1, "float32": 4}
_PACKED_BUFFERS = frozenset({"codes", "scale", "zero", "input_scale", "input_zero"})
_STATIC_RANGE_BYTES = 8  # float32 scale and zero point of one activation


@dataclass(frozen=True)
class TensorSize:
    """Bytes of one stored tensor.

    Attributes:
        name: dotted name in the model.
        part: ``encoder`` (matrices inside of the encoder layers), ``embeddings`` (lookup tables) or ``other`` (biases,
            normalization, pooler and heads).
        elements: number of values.
        bits: bits of a value as stored.
        weight_bytes: the values themselves.
        metadata_bytes: scales, zero points and static activation ranges.
        float_bytes: the values in the dtype of the float model.
        is_matrix: whether at least two axes are longer than one.
    """

    name: str
    part: str
    elements: int
    bits: int
    weight_bytes: int
    metadata_bytes: int
    float_bytes: int
    is_matrix: bool = False


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a whole model; print it for a table.

    Attributes:
        tensors: every stored tensor, once.
    """

    tensors: tuple[TensorSize, ...]

    @property
    def total(self) -> int:
        """All bytes: values and metadata."""
        return sum(t.weight_bytes + t.metadata_bytes for t in self.tensors)

    @property
    def encoder(self) -> int:
        """Bytes of the matrices in the encoder layers, metadata apart."""
        return self._weights("encoder")

    @property
    def embeddings(self) -> int:
        """Bytes of the embedding tables, metadata apart."""
        return self._weights("embeddings")

    @property
    def other(self) -> int:
        """Bytes of everything else: biases, normalization, pooler, heads."""
        return self._weights("other")

    @property
    def metadata(self) -> int:
        """Bytes of scales, zero points and static activation ranges."""
        return sum(t.metadata_bytes for t in self.tensors)

    @property
    def float_total(self) -> int:
        """Bytes of the float model."""
        return sum(t.float_bytes for t in self.tensors)

    @property
    def mb(self) -> float:
        """`total` in MB, 10^6 bytes."""
        return self.total / 1e6

    @property
    def mib(self) -> float:
        """`total` in MiB, 2^20 bytes."""
        return self.total / 2**20

    @property
    def ratio(self) -> float:
        """How many times smaller than the float model, everything counted."""
        return self.float_total / self.total

    @property
    def encoder_ratio(self) -> float:
        """How many times smaller the encoder matrices are, metadata apart: 32 / 2.5 = 12.8 for half 2 and half 3 bits.

        Raises:
            ValueError: if the model has no matrices in encoder layers.
        """
        if self.encoder == 0:
            raise ValueError("model: it has no matrices in encoder layers, so there is no encoder ratio; use .ratio")
        return sum(t.float_bytes for t in self.tensors if t.part == "encoder") / self.encoder

    @property
    def left_in_float(self) -> tuple[TensorSize, ...]:
        """The matrices and tables that are stored in 16 bits or more, largest first."""
        return tuple(sorted((t for t in self.tensors if t.is_matrix and t.bits >= 16), key=lambda t: -t.elements))

    def _weights(self, part: str) -> int:
        return sum(t.weight_bytes for t in self.tensors if t.part == part)

    def rows(self) -> list[tuple[str, int, float, int, int]]:
        """(label, elements, mean bits, float bytes, bytes) of every part, of the metadata, and in all."""
        rows = []
        for part in PARTS:
            members = [t for t in self.tensors if t.part == part]
            elements, stored = sum(t.elements for t in members), self._weights(part)
            if members:
                mean_bits = sum(t.elements * t.bits for t in members) / max(elements, 1)
                rows.append((_PART_LABELS[part], elements, mean_bits, sum(t.float_bytes for t in members), stored))
        elements = sum(t.elements for t in self.tensors)
        rows.append(("scales and zero points", 0, 0.0, 0, self.metadata))
        rows.append(("total", elements, 8 * self.total / max(elements, 1), self.float_total, self.total))
        return rows

    def __str__(self) -> str:
        lines = [
            f"{'':<24}{'values':>12}{'bits/value':>12}{'float MB':>11}{'MB (1e6)':>11}{'MiB (2^20)':>12}{'smaller':>9}"
        ]
        for label, elements, bits, before, after in self.rows():
            values = f"{elements:>12,}{bits:>12.2f}{before / 1e6:>11.2f}" if elements else " " * 35
            ratio = f"{before / after:>8.1f}x" if before and after else ""
            lines.append(f"{label:<24}{values}{after / 1e6:>11.2f}{after / 2**20:>12.2f}{ratio}")
        left = self.left_in_float
        if left and len(left) < sum(t.is_matrix for t in self.tensors):
            more = f" and {len(left) - 3} more" if left[3:] else ""
            lines.append("in float: " + ", ".join(f"{t.name} ({t.elements:,} values)" for t in left[:3]) + more)
        return "\n".join(lines)


def model_size(
    model: nn.Module, bits_config: int | Mapping[str, Any] | BitsConfig | str | os.PathLike[str] | None = None
) -> ModelSize:
    """Exact bytes of `model` as stored under a configuration.

    Args:
        model: a float model together with `bits_config`; or, without one, a float model as it is, a packed model, or
            one that `quantize_model` made, counted as it will be packed.
        bits_config: as for `quantize_model`. Static activation ranges count where the configuration asks for them
            (they also come with calibration data, which is not known here: 8 bytes a matrix).

    Returns:
        `ModelSize`: bytes of every tensor; print it for a table, ``.mb`` for MB of 10^6 bytes.

    Raises:
        ValueError: if the configuration does not fit (see `BitsConfig.resolve`), or is given for a quantized model.
    """
    if bits_config is None:
        return _measure(model, {}, {})
    if any(isinstance(m, TrainableLayer | PackedTensor) for m in model.modules()):
        raise ValueError("bits_config: the model is quantized already; leave the argument out to measure it as it is")
    specs = BitsConfig.parse(bits_config).resolve(model)
    return _measure(model, specs, {t.path: t for t in find_targets(model)})


# What safetensors writes beside the tensors: the length of its header, the header's own frame, padding to 8 bytes.
FILE_FRAME_BYTES = 8 + len('{"__metadata__":{"format":"pt"}}') + 7
_OFFSET_DIGITS = 9


def header_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes that one tensor takes in the header of a safetensors file, at most: a few too many, for its offsets."""
    digits = "9" * _OFFSET_DIGITS
    sizes = ",".join(map(str, shape))
    return len(f'"{name}":{{"dtype":"BF16","shape":[{sizes}],"data_offsets":[{digits},{digits}]}},')


def quantized_header_bytes(target: Target, spec: TensorSpec) -> int:
    """`header_bytes` of the tensors that hold one quantized weight: codes, scales, zero points, static ranges."""
    if not spec.is_composed:
        row_group, input_groups = group_layout(target, spec)
        return _grid_header_bytes(target.path, spec, target.shape, (int(row_group[-1]) + 1, input_groups))
    total = header_bytes(join_path(target.path, "row_class"), (1, target.shape[0])) if spec.row_bits else 0
    for name, part, shape in _parts_of(target, spec):
        total += _grid_header_bytes(join_path(target.path, name), part, shape, (shape[0], 1))
    return total


def _grid_header_bytes(path: str, spec: TensorSpec, shape: tuple[int, int], grid: tuple[int, int]) -> int:
    total = header_bytes(f"{path}.codes", shape) + header_bytes(f"{path}.scale", grid)
    if _grid_bytes(spec) > 4:
        total += header_bytes(f"{path}.zero", grid)
    if spec.activation_range == "static":
        total += header_bytes(f"{path}.input_scale", ()) + header_bytes(f"{path}.input_zero", ())
    return total


def tensor_bytes(target: Target, spec: TensorSpec) -> tuple[int, int]:
    """(bytes of the codes, bytes of the metadata) of one tensor under a quantized specification.

    Of a table that is stored as several tensors the sums, its map from rows to bits counted with the codes.
    """
    if spec.is_composed:
        parts = [_part_size("", *part, 0) for part in _parts_of(target, spec)]
        codes = sum(part.weight_bytes for part in parts) + other_bytes(spec, target.shape[0])
        return codes, sum(part.metadata_bytes for part in parts)
    row_group, input_groups = group_layout(target, spec)
    groups = int(row_group[-1]) + 1
    zero: StoredZero = "int8" if spec.scheme == "asymmetric" else "float32" if spec.scheme == "offset" else "none"
    codes = _code_bytes(target.matrix, spec.bits, zero, spec.scheme, target.is_embedding)
    return codes, groups * input_groups * _grid_bytes(spec)


def _code_bytes(matrix: Tensor, bits: int, zero: StoredZero, scheme: str, is_table: bool) -> int:
    """Bytes of the codes of a weight [O, I]; of a matrix with 2:4 zeros of those that are stored."""
    rows, columns = matrix.shape
    if not is_table and stored_sparsity(matrix.detach(), bits, zero, scheme):
        return rows * half_row_nbytes(columns, bits)
    return packed_nbytes(rows, columns, bits)


def _grid_bytes(spec: TensorSpec) -> int:
    return 4 + {"asymmetric": 1, "offset": 4}.get(spec.scheme, 0)


def _parts_of(target: Target, spec: TensorSpec) -> Iterator[tuple[str, TensorSpec, tuple[int, int]]]:
    """(name, specification, shape) of the tensors that a composed table is stored as."""
    shapes = part_shapes(spec, target.shape)
    yield from ((name, part, shapes[name]) for name, part in part_specs(spec, target.shape[0]).items())


def _part_size(path: str, name: str, spec: TensorSpec, shape: tuple[int, int], float_bytes: int) -> TensorSize:
    rows, columns = shape
    groups = rows if name != "up" else min(rows, DEFAULT_GROUPS)
    part, elements = "other" if name == "up" else "embeddings", rows * columns
    return TensorSize(
        join_path(path, name, "weight"),
        part,
        elements,
        spec.bits,
        packed_nbytes(rows, columns, spec.bits),
        groups * _grid_bytes(spec),
        float_bytes,
        True,
    )


def _composed_sizes(target: Target, spec: TensorSpec) -> Iterator[TensorSize]:
    """The tensors that a composed table is stored as; float bytes are those of the whole table, once."""
    width = target.weight.element_size()
    left = target.weight.numel() * width
    for name, part, shape in _parts_of(target, spec):
        given = left if spec.rank is not None else shape[0] * shape[1] * width
        yield _part_size(target.path, name, part, shape, given)
        left -= given
    more = other_bytes(spec, target.shape[0])
    if more:
        yield TensorSize(join_path(target.path, "row_class"), "other", more, 8, more, 0, 0)


def _measure(model: nn.Module, specs: Mapping[str, TensorSpec], targets: Mapping[str, Target]) -> ModelSize:
    quantized = _quantized_weights(model, specs, targets)
    layers = _layer_paths(model)
    static = [p for p, spec in specs.items() if spec.activation_range == "static" and not targets[p].is_embedding]
    composed = {id(targets[p].weight): (targets[p], spec) for p, spec in specs.items() if spec.is_composed}
    known = _float_bytes_in_tables(model)
    tensors: list[TensorSize] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (WeightQuantizer, ActivationQuantizer)):
            continue
        if isinstance(module, PackedTensor) and module.codes is not None:
            tensors.append(_packed_size(path, module, layers, known))
        for name, tensor in _stored(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if id(tensor) in composed:
                tensors += _composed_sizes(*composed[id(tensor)])
                continue
            bits, metadata = 8 * tensor.element_size(), 0
            stored = tensor.numel() * tensor.element_size()
            float_bytes = known.get(join_path(path, name), stored)
            if id(tensor) in quantized:
                bits, stored, metadata = quantized[id(tensor)]
            part = _part(path, module, tensor, layers)
            matrix = sum(size > 1 for size in tensor.shape) > 1
            tensors.append(
                TensorSize(join_path(path, name), part, tensor.numel(), bits, stored, metadata, float_bytes, matrix)
            )
        if _has_static_range(module):
            static.append(path)
    for path in static:
        tensors.append(TensorSize(join_path(path, "activation_range"), "other", 0, 32, 0, _STATIC_RANGE_BYTES, 0))
    return ModelSize(tuple(tensors))


def _quantized_weights(
    model: nn.Module, specs: Mapping[str, TensorSpec], targets: Mapping[str, Target]
) -> dict[int, tuple[int, int, int]]:
    """id of a weight -> (bits, bytes of its codes, bytes of its metadata)."""
    found: dict[int, tuple[int, int, int]] = {}
    for path, spec in specs.items():
        target = targets[path]
        found.setdefault(id(target.weight), (spec.bits, *tensor_bytes(target, spec)))
    for module in model.modules():
        if isinstance(module, TrainableLayer):
            quantizer = module.weight_quantizer
            zero = stored_zero(quantizer)
            table = not module.is_trainable_matrix
            codes = _code_bytes(module.matrix, quantizer.bits, zero, quantizer.spec.scheme, table)
            metadata = quantizer.scale.numel() * (4 + _ZERO_BYTES[zero])
            found.setdefault(id(module.weight), (quantizer.bits, codes, metadata))
    return found


def _float_bytes_in_tables(model: nn.Module) -> dict[str, int]:
    """Name of a tensor of a composed table -> its share of the bytes of the float table."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, MixedTable):
            found[join_path(path, "row_class")] = 0
        elif isinstance(module, LowRankTable):
            width = module.rows.weight.element_size()
            found[join_path(path, "rows.weight")] = module.num_embeddings * module.embedding_dim * width
            found[join_path(path, "up.weight")] = 0
    return found


def _packed_size(
    path: str, module: PackedTensor, layers: tuple[str, ...] | None, known: Mapping[str, int]
) -> TensorSize:
    assert module.codes is not None and module.scale is not None
    elements = module.rows * module.columns
    metadata = sum(t.numel() * t.element_size() for t in (module.scale, module.zero) if t is not None)
    part, name = _part(path, module, module.codes, layers), join_path(path, "weight")
    float_bytes = known.get(name, elements * module.dtype.itemsize)
    return TensorSize(name, part, elements, module.layout.bits, module.stored_nbytes, metadata, float_bytes, True)


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the module itself: what a checkpoint holds."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        counted_apart = isinstance(module, PackedTensor) and name in _PACKED_BUFFERS
        if isinstance(buffer, torch.Tensor) and name not in module._non_persistent_buffers_set and not counted_apart:
            yield name, buffer


def _has_static_range(module: nn.Module) -> bool:
    if isinstance(module, PackedTensor):
        return getattr(module, "input_scale", None) is not None
    quantizer = getattr(module, "activation_quantizer", None)
    return isinstance(quantizer, ActivationQuantizer) and quantizer.mode == "static"


def _layer_paths(model: nn.Module) -> tuple[str, ...] | None:
    """Paths of the encoder layers; ``None`` for a model without layers, where every matrix counts as encoder."""
    bases = base_models(model)
    prefix = bases[0][0] if len(bases) == 1 else ""
    try:
        return tuple(join_path(prefix, name) + "." for name, _ in encoder_layers(model))
    except ValueError:
        return None


def _part(path: str, module: nn.Module, tensor: Tensor, layers: tuple[str, ...] | None) -> str:
    if isinstance(module, nn.Embedding) or (isinstance(module, PackedTensor) and not module.is_packed_matrix):
        return "embeddings"
    inside = layers is None or path.startswith(layers)
    return "encoder" if inside and tensor.dim() > 1 and matrix_size(module) else "other"
