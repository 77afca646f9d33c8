"""Lookup tables with low-bit rows: `QuantEmbedding`, which trains, and `PackedEmbedding`, which is deployed.

Both quantize or unpack only the rows that are looked up.

    >>> packed.embeddings.word_embeddings(ids)                     # [...] -> [..., D]

Reference: Shen et al. 2020, section 3.1.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.weights import is_table
from qbert.kernels import dispatch
from qbert.kernels.operands import PackedWeight
from qbert.layers.kind import Kind, TrainableLayer, register
from qbert.layers.layout import PackedLayout
from qbert.layers.packed import PackedTensor


class QuantEmbedding(TrainableLayer, nn.Embedding):
    """A lookup table [V, D] with fake-quantized rows; only the rows that are looked up are quantized."""

    activation_quantizer = None
    is_trainable_matrix = False

    @classmethod
    def shaped_as(cls, module: nn.Embedding) -> QuantEmbedding:
        """A twin with the shape of `module`, which has no `max_norm`, on device meta."""
        return cls(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            device="meta",
        )

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., D]. Raises ValueError if the table was resized."""
        if len(self.weight) != len(self.weight_quantizer.row_group):
            raise ValueError(self.weight_quantizer.resized(len(self.weight)))
        return cast(Tensor, self.weight_quantizer(super().forward(input), rows=input))


_SMALL_TABLE = 2**20


class PackedEmbedding(PackedTensor):
    """A lookup table [V, D] with packed rows; only the rows that are looked up are unpacked."""

    is_packed_matrix = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        layout: PackedLayout,
        source: PackedTensor | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, layout, source)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._float_table: Tensor | None = None
        self._fast: PackedWeight | None = None

    @classmethod
    def shaped_as(
        cls, module: nn.Embedding, layout: PackedLayout, source: PackedTensor | None = None
    ) -> PackedEmbedding:
        """An empty packed twin with the shape of `module`, float or trainable."""
        return cls(module.num_embeddings, module.embedding_dim, module.padding_idx, layout, source)

    def float_module(self) -> nn.Module:
        """A table of this shape without values (device meta)."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")

    def prepare(self, exact: bool = True) -> None:
        """Keep what is read faster than made.

        On a CPU the float values of a table of at most 2^20 values, whose rows take longer to unpack than to read; on a
        GPU what one kernel takes that gathers and dequantizes.
        """
        assert self.owner.codes is not None
        if self.owner.codes.device.type != "cpu":
            self._fast = self.packed_weight()
        elif self.rows * self.columns <= _SMALL_TABLE:
            self._float_table = self._dequantize(None, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., D]. Raises RuntimeError in training mode, IndexError for unknown ids."""
        self._refuse_training()
        if input.numel() == 0:
            return torch.empty(*input.shape, self.embedding_dim, dtype=self.dtype, device=input.device)
        if self._float_table is not None and input.device.type == "cpu" and self.dtype == torch.float32:
            return F.embedding(input, self._float_table)
        if self._fast is not None and input.device == self._fast.codes.device:
            return dispatch.embedding(input, self._fast, self.dtype)
        return self._dequantize(input.reshape(-1), self.dtype).reshape(*input.shape, self.embedding_dim)


register(Kind(is_table, QuantEmbedding, PackedEmbedding))
