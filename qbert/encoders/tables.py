"""Word tables of a smaller width than the model's, with a map up to it, and with attention on the small width.

Without attention that is ALBERT's factorised table (Lan et al. 2019, section 3.1), ``up(table[ids])``; with it SAFE,
the self-attentive factorised embedding of the Subformer (Reid et al. 2021, section 2.3): the small vectors look at each
other before they are mapped up, which costs next to nothing at that width. The attention is added to the vectors, and
starts at zero.

    >>> NarrowTable(30522, 384, width=96, heads=4, padding_idx=0)(ids)          # [B, T] -> [B, T, 384]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.replace import replace_everywhere


class NarrowTable(nn.Module):
    """A word table [V, w] with a map [D, w] to the model's width, and, between them, attention.

    Args:
        num_embeddings: V.
        embedding_dim: D, what comes out.
        width: w.
        heads: of the attention; 0 for none.
        padding_idx: id of padding, which nothing attends to; None if there is none.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, width: int, heads: int, padding_idx: int | None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.width, self.heads = width, heads
        self.table = nn.Embedding(num_embeddings, width, padding_idx)
        self.up = nn.Linear(width, embedding_dim, bias=False)
        if heads:
            self.norm = nn.LayerNorm(width)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.attended = nn.Linear(width, width)
            with torch.no_grad():
                self.attended.weight.zero_()
                self.attended.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """The rows [V, D] as they are without attention: computed, for who reads them."""
        return self.up(self.table.weight)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        x = self.table(input)
        if self.heads:
            x = x + self._attention(self.norm(x), None if self.padding_idx is None else input != self.padding_idx)
        return self.up(x)  # type: ignore[no-any-return]

    def _attention(self, x: Tensor, seen: Tensor | None) -> Tensor:
        maps = (self.query, self.key, self.value)
        query, key, value = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in maps)
        mask = None if seen is None else (seen | ~seen.any(1, keepdim=True))[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.attended(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"{self.num_embeddings}, {self.embedding_dim}, width={self.width}, heads={self.heads}"


def narrowed(table: nn.Embedding, width: int, heads: int) -> NarrowTable:
    """A `NarrowTable` for the place of `table`, in its dtype, device and mode, without its values."""
    made = NarrowTable(table.num_embeddings, table.embedding_dim, width, heads, table.padding_idx)
    return made.to(table.weight.device, table.weight.dtype).train(table.training)


def build(base: nn.Module, name: str, width: int, heads: int) -> None:
    """Put a `NarrowTable` in the place of the table `name` of `base`, without values."""
    table = base.get_submodule(name)
    if type(table) is not nn.Embedding or width < 1 or heads < 0 or (heads and width % heads):
        raise ValueError(f"config.json: {name} cannot be a table of width {width} with {heads} heads")
    replace_everywhere(base, table, narrowed(table, width, heads))
