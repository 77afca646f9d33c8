"""Lookup tables in fewer bytes than one number of bits a row: mixed bits by rows, and low rank.

Both are made of tables and linear maps of their own, each of which is quantized, trained, packed, saved and loaded as
every other one is, under their names: ``word_embeddings.bits8``, ``word_embeddings.bits2``, or ``word_embeddings.rows``
and ``word_embeddings.up``.

    >>> open_tables(model, {"embeddings.word_embeddings": TensorSpec(bits=2, row_bits={8: 500})}, uses)

Which rows get more bits, and which subspace a low rank keeps, follows from what the table is used for (`TableUse`).
Rows are ordered by their share f of the tokens times the squared error that the fewest bits make. The damage of an
error d is f d^T G d, G the mean metric of the model's outputs in what the table returns: a rank r keeps the top r right
singular vectors of diag(f)^1/2 E G^1/2, rotated at random, so that no column of the factor has a larger range than
another (Hsu et al. 2022, FWSVD, weigh rows so; Chen et al. 2021, DRONE, whiten so; Ashkboos et al. 2024, QuaRot, rotate
so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.bits import TensorSpec
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.weights import is_table
from qbert.kernels import formats
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.quantizer import WeightQuantizer

UP_BITS = 8
_CLASS_BITS = 2  # of the number that says which bits a row has: one of four
_WIDTHS = formats.BITS
_OFFSET = 2  # formats.pack takes signed codes
_DAMPING = 0.05  # share of the mean of its diagonal that is added to the metric: it is an estimate from few rows


@dataclass(frozen=True)
class TableUse:
    """What a table [V, D] is used for.

    Attributes:
        share: [V] float64, the share of the tokens that each row is expected to be, sum 1.
        metric: [D, D] float64, mean over tokens of g g^T, g the gradient of the outputs in what the table returns.
    """

    share: Tensor
    metric: Tensor


class ComposedTable(nn.Module):
    """A lookup table [V, D] that several modules hold together; ids [...] -> rows [..., D]."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @property
    def weight(self) -> Tensor:
        """The whole table [V, D], for code that reads it without calling the layer."""
        return self(torch.arange(self.num_embeddings, device=self._device()))  # type: ignore[no-any-return]

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The whole table [V, D] that the layer computes with."""
        return self.weight

    def float_table(self) -> nn.Embedding:
        """An ordinary table with the values of this one."""
        return nn.Embedding.from_pretrained(self.quantized_weight().clone(), freeze=False, padding_idx=self.padding_idx)

    def _device(self) -> torch.device:
        return next(t.device for t in (*self.parameters(), *self.buffers()))


class MixedTable(ComposedTable):
    """A table whose rows have different bits: a table for all rows of the same bits, and two bits a row that say which.

    Attributes:
        row_class: uint8 [1, ceil(V / 4)], for every row the index of its bits among 2, 3, 4, 8.
    """

    row_class: Tensor

    def __init__(self, shape: tuple[int, int], padding_idx: int | None, counts: Mapping[int, int]) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        self.widths = tuple(sorted(counts, reverse=True))
        for bits in self.widths:
            self.add_module(f"bits{bits}", nn.Embedding(counts[bits], self.embedding_dim))
        self.register_buffer(
            "row_class", torch.zeros(1, formats.packed_row_nbytes(shape[0], _CLASS_BITS), dtype=torch.uint8)
        )
        self._places: tuple[Tensor, Tensor] | None = None

    def part(self, bits: int) -> Any:
        """The table of the rows of `bits` bits."""
        return getattr(self, f"bits{bits}")

    def row_widths(self) -> Tensor:
        """Bits of every row, int64 [V]."""
        codes = formats.unpack(self.row_class, _CLASS_BITS, self.num_embeddings)[0]
        return torch.tensor(_WIDTHS, device=codes.device)[codes.long() + _OFFSET]

    @torch.no_grad()
    def assign(self, widths: Tensor) -> None:
        """Say which bits every row has; int64 [V], as many of each as its table has rows."""
        index = torch.searchsorted(torch.tensor(_WIDTHS, device=widths.device), widths)
        self.row_class.copy_(formats.pack((index - _OFFSET).unsqueeze(0), _CLASS_BITS))
        self._places = None

    def places(self) -> tuple[Tensor, Tensor]:
        """Bits [V] of every row, and its place [V] in the table of those bits."""
        if self._places is None or self._places[0].device != self.row_class.device:
            widths = self.row_widths()
            place = torch.zeros_like(widths)
            for bits in self.widths:
                inside = widths == bits
                place[inside] = torch.arange(int(inside.sum()), device=widths.device)
            self._places = widths, place
        return self._places

    def prepare(self, exact: bool = True) -> None:
        """Find every row's place before the first call."""
        self.places()

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., D]."""
        widths, place = (F.embedding(input, t.unsqueeze(1)).squeeze(-1) for t in self.places())
        first, *others = self.widths
        rows = self.part(first)(torch.where(widths == first, place, 0))
        for bits in others:
            inside = widths == bits
            rows = torch.where(inside.unsqueeze(-1), self.part(bits)(torch.where(inside, place, 0)), rows)
        return cast(Tensor, rows)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._places = None

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LowRankTable(ComposedTable):
    """A table [V, D] of rank r: rows of length r, and one matrix that makes rows of length D of them."""

    rows: Any
    up: Any

    def __init__(self, shape: tuple[int, int], padding_idx: int | None, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        self.rows = nn.Embedding(self.num_embeddings, rank, padding_idx)
        self.up = nn.Linear(rank, self.embedding_dim, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., D]."""
        return cast(Tensor, self.up(self.rows(input)))


def part_specs(spec: TensorSpec, rows: int) -> dict[str, TensorSpec]:
    """Name of a part -> its specification, of a table of `rows` rows with a composed one."""
    if spec.rank is not None:
        up = replace(spec, bits=UP_BITS, groups=None, scheme="asymmetric", activation_bits=None, activation_range=None)
        return {"rows": spec, "up": up}
    counts = _counts(spec, rows)
    whole = tuple(counts.items())  # with the rest, so that any part tells how all rows are cut
    return {f"bits{bits}": replace(spec, bits=bits, row_bits=whole) for bits in counts}


def part_shapes(spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Name of a part -> its shape [rows, columns]."""
    rows, columns = shape
    if spec.rank is not None:
        return {"rows": (rows, spec.rank), "up": (columns, spec.rank)}
    return {f"bits{bits}": (count, columns) for bits, count in _counts(spec, rows).items()}


def other_bytes(spec: TensorSpec, rows: int) -> int:
    """Bytes of what a composed table stores beside its parts."""
    return 0 if spec.rank is not None else formats.packed_row_nbytes(rows, _CLASS_BITS)


def _counts(spec: TensorSpec, rows: int) -> dict[int, int]:
    """Bits -> number of rows, in a table of `rows` rows of which those without bits of their own have the least."""
    counts = dict(spec.row_bits)
    rest = rows - sum(counts.values())
    least = min(spec.bits, *counts) if rest > 0 else 0
    return counts | ({least: counts.get(least, 0) + rest} if rest > 0 else {})


def open_tables(
    model: nn.Module, specs: Mapping[str, TensorSpec], uses: Mapping[nn.Module, TableUse] | None = None
) -> list[tuple[nn.Module, nn.Module]]:
    """Put float composed tables in the place of the tables at the paths of `specs` that ask for one.

    Args:
        uses: table -> what it is used for; without it the new tables have no values yet.

    Returns:
        Pairs of the old and the new module.
    """
    opened: list[tuple[nn.Module, nn.Module]] = []
    for path, spec in specs.items():
        table = model.get_submodule(path)
        if not spec.is_composed or isinstance(table, ComposedTable):
            continue
        if not is_table(table):
            raise ValueError(f"{path} is a {type(table).__name__}, no lookup table that could be composed of parts")
        named = sum(count for _, count in spec.row_bits)
        if named > len(table.weight):  # type: ignore[arg-type]
            raise ValueError(f"{path} has {len(table.weight)} rows, but row_bits names {named}")  # type: ignore[arg-type]
        embedding = cast(nn.Embedding, table)
        weight = embedding.weight
        made = empty_table(spec, (len(weight), weight.shape[1]), embedding.padding_idx, weight.device, weight.dtype)
        if uses is not None:
            fill_table(made, weight.detach(), spec, uses[table])
        made.train(table.training)
        replace_everywhere(model, table, made)
        opened.append((table, made))
    return opened


def open_recorded(model: nn.Module, specs: Mapping[str, TensorSpec]) -> None:
    """`open_tables` of a model whose parts, not whose tables, have the specifications; paths it lacks are left out."""
    for path, spec in specs.items():
        parent = path.rpartition(".")[0]
        if spec.is_composed and parent and any(parent == name for name, _ in model.named_modules()):
            open_tables(model, {parent: spec})


def close_tables(model: nn.Module) -> None:
    """Put ordinary float tables in the place of composed ones."""
    for module in list(model.modules()):
        if isinstance(module, ComposedTable):
            replace_everywhere(model, module, module.float_table())


def empty_table(
    spec: TensorSpec, shape: tuple[int, int], padding_idx: int | None, device: Any, dtype: torch.dtype
) -> ComposedTable:
    """A float composed table without values."""
    with torch.device(device):
        made: ComposedTable
        if spec.rank is not None:
            made = LowRankTable(shape, padding_idx, spec.rank)
        else:
            made = MixedTable(shape, padding_idx, _counts(spec, shape[0]))
    return made.to(dtype)


@torch.no_grad()
def fill_table(made: ComposedTable, weight: Tensor, spec: TensorSpec, use: TableUse) -> None:
    """Give a composed table the values of the float one [V, D]."""
    if isinstance(made, LowRankTable):
        rows, up = low_rank(weight, made.rows.embedding_dim, use)
        made.rows.weight.copy_(rows)
        made.up.weight.copy_(up)
        return
    assert isinstance(made, MixedTable)
    widths = row_widths(weight, spec, use)
    made.assign(widths)
    for bits in made.widths:
        made.part(bits).weight.copy_(weight[widths == bits])


def row_widths(weight: Tensor, spec: TensorSpec, use: TableUse, errors: Tensor | None = None) -> Tensor:
    """Bits of every row [V] of a table: the more, the more its rounding to the fewest bits is expected to harm.

    Args:
        errors: `row_errors` at the fewest bits, where they are known.
    """
    counts = _counts(spec, len(weight))
    if errors is None:
        errors = row_errors(weight, replace(spec, bits=min(counts)))
    harm = use.share.to(weight.device) * errors
    order = harm.argsort(descending=True, stable=True)
    widths = torch.empty(len(weight), dtype=torch.int64, device=weight.device)
    widths[order] = torch.tensor([b for b in sorted(counts, reverse=True) for _ in range(counts[b])]).to(order.device)
    return widths


@torch.no_grad()
def rounded_rows(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Rows [N, D] rounded to nearest with a range each."""
    quantizer = WeightQuantizer(torch.arange(len(weight), device=weight.device), 1, spec).to(weight.device)
    quantizer.find(weight)
    return quantizer(weight)  # type: ignore[no-any-return]


def row_errors(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Squared rounding error of every row [V]."""
    return (rounded_rows(weight, spec) - weight).square().sum(1)


def low_rank(weight: Tensor, rank: int, use: TableUse) -> tuple[Tensor, Tensor]:
    """(rows [V, r], up [D, r]) with rows up^T as near to the table [V, D] as `use` asks, in the dtype of `weight`."""
    down, up = Directions(weight, use).factors(rank)
    return (weight.double() @ down).to(weight.dtype), up.to(weight.dtype)


class Directions:
    """The directions of a table [V, D] that matter, most important first; any number of them gives its two factors."""

    def __init__(self, weight: Tensor, use: TableUse) -> None:
        table, share = weight.double(), use.share.to(weight.device)
        metric = use.metric.to(weight.device)
        mean = float(metric.diagonal().mean()) or 1.0
        values, vectors = torch.linalg.eigh(metric / mean + _DAMPING * torch.eye(len(metric)).to(metric))
        self.root = (vectors * values.clamp_min(_DAMPING / 2).sqrt()) @ vectors.T  # G^1/2
        second = self.root @ ((table * share.unsqueeze(1)).T @ table) @ self.root
        self.vectors = torch.linalg.eigh(second)[1].flip(1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down [D, r], up [D, r]), float64: the rows of the factor are table @ down."""
        kept = self.vectors[:, :rank]
        generator = torch.Generator().manual_seed(rank)
        rotation = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))[0].to(kept)
        return self.root @ kept @ rotation, torch.linalg.solve(self.root, kept) @ rotation


def grids_of(table: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(int8 codes [V, r], scale [V, 1], zero [V, 1], up [D, r] or None) of a packed table, composed or not: r = D
    unless its rank is low.

    Raises:
        ValueError: if it has more than one scale a row.
    """
    if isinstance(table, LowRankTable):
        codes, scale, zero, _ = grids_of(table.rows)
        return codes, scale, zero, table.up.quantized_weight().float()
    if isinstance(table, MixedTable):
        codes, (scale, zero) = None, (torch.empty(table.num_embeddings, 1) for _ in range(2))  # type: ignore[assignment]
        codes = torch.empty(table.num_embeddings, table.embedding_dim, dtype=torch.int8)
        widths = table.row_widths()
        for bits in table.widths:
            inside = widths == bits
            codes[inside], scale[inside], zero[inside], _ = grids_of(table.part(bits))
        return codes, scale, zero, None
    if table.layout.input_groups > 1:
        raise ValueError("the table has several scales a row")
    scale, zero = table.row_grids()
    eight = table.layout.bits == 8 and table.owner.codes is not None  # stored as they are
    codes = table.owner.codes.view(torch.int8) if eight else table.int_codes()
    return codes, scale.contiguous(), zero.contiguous(), None


def is_packed_table(table: Any) -> bool:
    """Whether `grids_of` can tell the codes of `table`."""
    if isinstance(table, LowRankTable):
        return is_packed_table(table.rows) and hasattr(table.up, "codes")
    if isinstance(table, MixedTable):
        return all(is_packed_table(table.part(bits)) for bits in table.widths)
    return isinstance(table, PackedEmbedding) and table.layout.input_groups == 1
