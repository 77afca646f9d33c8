r"""`PackedTensor`: the low-bit weight of a deployed layer, and what every such layer can do with it.

A packed tensor holds the codes q in the byte layout of `qbert.kernels.formats`, and for every group of rows and input
columns a float32 scale s and, where the grid needs one, a zero point z; its weights are

.. math:: \hat w = s\,(q - z).

Which rows form a group follows from the numbers of rows, groups and heads and is not stored. Scales stay float32 when
the model is moved to another dtype, so that no move changes a weight by more than its own rounding.

    >>> packed.encoder.layer[0].output.dense.quantized_weight()    # [O, I]

Reference: Shen et al. 2020, sections 3.1 and 3.3 (the grid and its groups).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.bits import TensorSpec
from qbert.kernels import formats
from qbert.kernels.operands import PackedWeight
from qbert.layers.layout import FIXED_ZERO, PackedLayout, stored_sparsity
from qbert.layers.quantizer import WeightQuantizer, check_grid, note_grid
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import row_group_of
from qbert.quantizers.sparsity import half_is_zero


def check_module(name: str, value: Any) -> None:
    """Raises TypeError unless the argument `name` is a torch module."""
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{name}: a {type(value).__name__} is not a model; give what qbert.load or from_pretrained returns"
        )


class PackedTensor(nn.Module):
    """The packed weight [O, I] of a layer, or a reference to the one of another layer that it is tied to.

    Args:
        rows, columns: O and I of the weight ([V, D] of a table).
        layout: bits, groups and zero points.
        source: the packed layer whose weight this one shares; ``None`` owns its weight.

    Attributes:
        codes: uint8 [O, bytes of a row], as `qbert.kernels.formats.pack` lays them out; of a 2:4 matrix as `pack_half`
            does in files and state dicts, until `expand` is called, so that every product is the same.
        scale: float32 [G, K], K = 1 unless the input is grouped too.
        zero: [G, K] int8, or float32 if the zero points were learned; ``None`` if the scheme fixes them.
        dtype: dtype of the layer's output and of `quantized_weight`.
    """

    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    is_packed_matrix = True  # a table says no

    def __init__(self, rows: int, columns: int, layout: PackedLayout, source: PackedTensor | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.layout = rows, columns, layout
        self.dtype = torch.get_default_dtype()
        # A tuple hides the module from the tree: a tied tensor is saved and moved once, by its owner.
        self._source = () if source is None else (source,)
        size = (layout.groups, layout.input_groups)
        owner = source is None
        self.register_buffer(
            "codes",
            torch.zeros(rows, layout.row_nbytes(columns), dtype=torch.uint8) if owner else None,
        )
        self.register_buffer("scale", torch.ones(size, dtype=torch.float32) if owner else None)
        zero_dtype = {"none": None, "int8": torch.int8, "float32": torch.float32}[layout.zero]
        self.register_buffer("zero", torch.zeros(size, dtype=zero_dtype) if owner and zero_dtype else None)
        self.training = False

    @property
    def owner(self) -> PackedTensor:
        """The layer that holds the codes: this one, or the one it is tied to."""
        return self._source[0].owner if self._source else self

    @property
    def spec(self) -> TensorSpec:
        """Bits, groups, scheme and activation quantization of the layer."""
        return self.layout.spec

    @property
    def weight(self) -> Tensor:
        """Alias of `quantized_weight`, for code that reads the weight without calling the layer."""
        return self.quantized_weight()

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The dequantized weight [O, I] that the layer computes with, in the layer's dtype."""
        return self._dequantize(None, self.dtype)

    @torch.no_grad()
    def int_codes(self) -> Tensor:
        """int8 codes [O, I]."""
        assert self.owner.codes is not None
        return formats.unpack(self.owner.codes, self.layout.bits, self.columns)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the codes in files; 0 where another layer owns them."""
        return 0 if self._source else self.rows * self.layout.row_nbytes(self.columns)

    @torch.no_grad()
    def expand(self) -> None:
        """Turn codes as they were read from a file into those of all weights; nothing happens where they are."""
        if self._is_half(self.codes):
            assert self.codes is not None
            whole = formats.unpack_half(self.codes, self.layout.bits, self._zero_codes())
            self.codes = formats.pack(whole, self.layout.bits)

    def _is_half(self, codes: Tensor | None) -> bool:
        return (
            bool(self.layout.sparsity) and codes is not None and codes.shape[1] == self.layout.row_nbytes(self.columns)
        )

    def _zero_codes(self) -> Tensor:
        """int8 [O, I]: the code of a weight of zero."""
        zero = self.row_grids()[1].to(torch.int8)
        return zero.repeat_interleave(self.columns // zero.shape[1], 1)

    def row_grids(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Float32 scale and zero [N, K] of the rows with indices `rows` [N], or of all rows."""
        owner = self.owner
        assert owner.scale is not None
        if rows is None:
            rows = torch.arange(self.rows, device=owner.scale.device)
        group = row_group_of(rows, self.rows, self.layout.groups, self.layout.heads)
        return owner.scale[group], self.group_zero()[group]

    def packed_weight(self) -> PackedWeight:
        """Codes and grids as the kernels take them, sharing the memory of the owner's buffers."""
        owner, layout = self.owner, self.layout
        assert owner.codes is not None and owner.scale is not None
        group = None
        if layout.groups not in (1, self.rows):
            rows = torch.arange(self.rows, device=owner.scale.device)
            group = row_group_of(rows, self.rows, layout.groups, layout.heads).int()
        return PackedWeight(owner.codes, owner.scale, self.group_zero(), group, layout.bits, self.columns)

    def group_zero(self) -> Tensor:
        """Float32 zero points of the groups [G, K]."""
        owner = self.owner
        assert owner.scale is not None
        if owner.zero is None:
            return torch.full_like(owner.scale, FIXED_ZERO.get(self.layout.spec.scheme, 0.0))
        return owner.zero.float()

    @classmethod
    @abstractmethod
    def shaped_as(cls, module: Any, layout: PackedLayout, source: PackedTensor | None = None) -> PackedTensor:
        """An empty packed twin with the shape of `module`, float or trainable."""
        raise NotImplementedError

    @abstractmethod
    def float_module(self) -> nn.Module:
        """The float module whose place this layer takes, without values (device meta)."""
        raise NotImplementedError

    def stored(self, matrix: Tensor) -> Tensor:
        """A weight [O, I] in the layout in which `float_module` stores it."""
        return matrix

    def activation_twin(self) -> ActivationQuantizer | None:
        """The trainable form of the input quantization; ``None`` if the input is not quantized."""
        return None

    def fill(self, layer: Any, memo: dict[int, Any]) -> None:
        """Take bias, ranges, codes and grids of a trainable layer; `memo` is that of the copy under way."""
        self._fill(layer.weight_quantizer, layer.matrix.detach())

    @abstractmethod
    def prepare(self, exact: bool = True) -> None:
        """Make what a subclass needs to be fast on the device it is on; `exact` as for `PackedLinear.cpu_linear`."""
        raise NotImplementedError

    def _dequantize(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weights [N, I] of the rows `rows` [N] (all rows if ``None``); only those rows are unpacked."""
        packed = self.owner.codes
        assert packed is not None
        if rows is not None:
            packed = F.embedding(rows, packed)
        scale, zero = self.row_grids(rows)
        # Unpacked with its padding, since the check of the padding would stop torch.compile.
        whole = packed.shape[1] * 8 // self.layout.bits
        codes = formats.unpack(packed, self.layout.bits, whole)[:, : self.columns]
        work = torch.promote_types(dtype, torch.float32)
        grid = codes.unflatten(1, (self.layout.input_groups, -1)).to(work)  # [N, K, I/K]
        return (scale.to(work).unsqueeze(-1) * (grid - zero.to(work).unsqueeze(-1))).flatten(1).to(dtype)

    def _refuse_training(self) -> None:
        if self.training:
            raise RuntimeError(
                "a packed model cannot be trained: its weights are integers; call .eval(), or train what "
                "qbert.unpack(model) returns and pack it again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTensor:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        home = self.owner.codes
        assert home is not None
        dtype = fn(torch.empty(0, dtype=self.dtype, device=home.device)).dtype
        super()._apply(fn, recurse)
        self.dtype = dtype if dtype.is_floating_point else self.dtype
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _grid(self) -> list[Any]:
        spec, layout = self.spec, self.layout
        kept: list[Any] = [layout.groups, layout.input_groups, layout.heads, layout.zero]
        kept += [layout.sparsity] if layout.sparsity else []
        return [spec.bits, spec.scheme, spec.activation_bits, spec.activation_range, *kept]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout.sparsity and self.codes is not None and not self._is_half(self.codes):
            codes = self.int_codes()
            destination[f"{prefix}codes"] = formats.pack_half(codes, codes != self._zero_codes(), self.layout.bits)
        note_grid(destination, prefix, self._grid())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        check_grid(prefix, local_metadata, self._grid(), lists[2])
        given = state_dict.get(f"{prefix}codes")
        if self.codes is not None and given is not None and self._is_half(given):
            self.codes = self.codes.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if self.codes is not None and not self.codes.is_meta:
            self.expand()

    def _fill(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        """Take codes and grids from a trained layer."""
        self.dtype = weight.dtype
        if self._source:
            return
        codes = quantizer.codes(weight)
        self.codes = formats.pack(codes, self.layout.bits)
        self.scale = quantizer.scale.detach().float().contiguous().clone()
        if self.zero is not None:
            self.zero = quantizer.zero.detach().to(self.zero.dtype).contiguous()
        if self.is_packed_matrix:
            layout = self.layout
            sparsity = stored_sparsity(weight, layout.bits, layout.zero, layout.spec.scheme)
            if sparsity and half_is_zero(codes - self._zero_codes()):
                self.layout = replace(layout, sparsity=sparsity)

    def _quantizer(self) -> WeightQuantizer:
        """The trainable grids of this tensor."""
        assert self.owner.scale is not None
        device = self.owner.scale.device
        rows = torch.arange(self.rows, device=device)
        group = row_group_of(rows, self.rows, self.layout.groups, self.layout.heads)
        quantizer = WeightQuantizer(group, self.layout.input_groups, self.layout.spec).to(device)
        first = torch.searchsorted(group, torch.arange(self.layout.groups, device=device))
        scale, zero = self.row_grids(first)
        with torch.no_grad():
            quantizer.scale.copy_(scale)
            quantizer.zero.copy_(zero)
        return quantizer

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        tied = ", tied" if self._source else ""
        activation = f", input {self.spec.activation_range}" if self.spec.activation_bits else ""
        return f"{self.rows}x{self.columns}, {self.layout}{activation}{tied}"
