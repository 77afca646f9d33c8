"""Cells: small graphs of convolutions, pools and skips over words, drawn by a search or at random.

A cell reads two sequences and has inner nodes, each the mean of two operations on sequences that come before it: the
two inputs (0 and 1) or earlier nodes (2, 3, ...). What it gives is a trained mixture of its nodes, normalized. It
stands beside `adabert`, which says how a student is made of cells, since a search draws, prices and compares cells
without one.

    >>> cell = Cell.parse([[[0, "conv3"], [1, "max3"]], [[1, "skip"], [2, "wide5"]]])
    >>> cell.parameters(96), random_cell(3, seed=0, like=cell)

Source: Chen et al. 2020, AdaBERT, section 3.2: 3 nodes, kernels 3, 5 and 7, plain and with dilation 2, pools of 3, a
skip. Differences: nothing stands for no operation at all, since such edges win any short search (the two best edges of
a node are kept in any case); a convolution is followed by ReLU and a normalization of each token, where the authors
have one over the batch, whose statistics would count padding; nodes are means and layers end in a normalization, since
sums of skips double from node to node and leave the fourth layer hundreds of times as large as the first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Edge: TypeAlias = "tuple[int, str]"  # (sequence it reads, operation)
INPUTS = 2
EDGES = 2  # that a node keeps
_TRIES = 20_000
_WIDTH = 96  # at which sizes are compared: cells as large at one width are so at every one


class Convolution(nn.Module):
    """A convolution over words, ReLU, and a normalization of each of them."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.convolution = nn.Conv1d(width, width, kernel, padding=padding, dilation=dilation)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """[B, T, W], 0 outside of `inside`, to [B, T, W]."""
        return self.norm(torch.relu(self.convolution(x.transpose(1, 2)).transpose(1, 2)))  # type: ignore[no-any-return]


class Pool(nn.Module):
    """The mean or the largest of each word and its two neighbours, those beyond the ends left out."""

    def __init__(self, largest: bool) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """[B, T, W], 0 outside of `inside` [B, T, 1], to [B, T, W]."""
        if self.largest:
            shown = x.masked_fill(~inside, -torch.inf).transpose(1, 2)
            return F.max_pool1d(shown, 3, 1, 1).transpose(1, 2).masked_fill(~inside, 0)
        total, count = (F.avg_pool1d(part.transpose(1, 2), 3, 1, 1).transpose(1, 2) for part in (x, inside.to(x.dtype)))
        return total / count.clamp_min(1 / 3)


class Skip(nn.Module):
    """The sequence itself."""

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """[B, T, W] as it is."""
        return x


class Operation(NamedTuple):
    """What an edge can do: a convolution of `kernel` words at distance `dilation`, or (kernel 0) `pool` or a skip."""

    kernel: int = 0
    dilation: int = 1
    pool: str = ""

    def module(self, width: int) -> nn.Module:
        """A fresh module of this operation."""
        if self.kernel:
            return Convolution(width, self.kernel, self.dilation)
        return Pool(self.pool == "max") if self.pool else Skip()

    def parameters(self, width: int) -> int:
        """Values that are trained: weight, bias, and gain and shift of the normalization."""
        return self.kernel * width**2 + 3 * width if self.kernel else 0

    def products(self, width: int) -> int:
        """Multiplications a word (of pools: sums or comparisons)."""
        return self.kernel * width**2 if self.kernel else 3 * width if self.pool else 0


OPERATIONS: dict[str, Operation] = {
    **{f"conv{kernel}": Operation(kernel) for kernel in (3, 5, 7)},
    **{f"wide{kernel}": Operation(kernel, dilation=2) for kernel in (3, 5, 7)},
    "mean3": Operation(pool="mean"),
    "max3": Operation(pool="max"),
    "skip": Operation(),
}


@dataclass(frozen=True)
class Cell:
    """Which operations a cell has.

    Attributes:
        nodes: of each inner node its edges (sequence, operation).
    """

    nodes: tuple[tuple[Edge, ...], ...]

    @classmethod
    def parse(cls, value: Any) -> Cell:
        """From a cell, or from lists as a config holds them.

        Raises:
            ValueError: no nodes, an operation that is not known, or an edge from a sequence that comes later.
        """
        if isinstance(value, Cell):
            return value
        try:
            nodes = tuple(tuple((int(source), str(name)) for source, name in node) for node in value)
        except (TypeError, ValueError):
            raise ValueError(f"cell={value!r} is no list of nodes [[sequence, operation], ...]") from None
        if not nodes or not all(nodes):
            raise ValueError(f"cell={value!r} has no nodes, or one without edges; give each at least one")
        for index, node in enumerate(nodes):
            for source, name in node:
                if name not in OPERATIONS:
                    raise ValueError(f"cell: operation {name!r} is not known; use one of {', '.join(OPERATIONS)}")
                if not 0 <= source < INPUTS + index:
                    last = INPUTS + index - 1
                    raise ValueError(f"cell: node {index} reads sequence {source}; those before it are 0 to {last}")
        return cls(nodes)

    def to_list(self) -> list[list[list[Any]]]:
        """Plain JSON values."""
        return [[list(edge) for edge in node] for node in self.nodes]

    def parameters(self, width: int) -> int:
        """Trained values of the operations of one layer."""
        return sum(OPERATIONS[name].parameters(width) for node in self.nodes for _, name in node)

    def products(self, width: int) -> int:
        """Multiplications a word of the operations of one layer."""
        return sum(OPERATIONS[name].products(width) for node in self.nodes for _, name in node)

    def __str__(self) -> str:
        return "; ".join(" + ".join(f"{name}({source})" for source, name in node) for node in self.nodes)


def random_cell(nodes: int = 3, *, seed: int, like: Cell | None = None) -> Cell:
    """A cell drawn at random: any two sequences before a node, any operation on each.

    Args:
        nodes: inner nodes.
        seed: of the draw.
        like: as many nodes, and just as many parameters, as this cell has.

    Raises:
        ValueError: fewer than one node; none of the size was met.
    """
    nodes = len(like.nodes) if like else nodes
    if nodes < 1:
        raise ValueError(f"nodes={nodes} is not possible; use at least 1")
    draw, names = random.Random(seed), list(OPERATIONS)
    for _ in range(_TRIES):
        found = Cell(
            tuple(
                tuple((source, draw.choice(names)) for source in sorted(draw.sample(range(INPUTS + i), EDGES)))
                for i in range(nodes)
            )
        )
        if like is None or found.parameters(_WIDTH) == like.parameters(_WIDTH):
            return found
    raise ValueError(f"like: {_TRIES:,} draws met no cell with as many parameters as {like}; give another one")


class CellLayer(nn.Module):
    """One layer of a student: a cell with weights of its own."""

    def __init__(self, cell: Cell, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.edges = nn.ModuleList(OPERATIONS[name].module(width) for node in cell.nodes for _, name in node)
        self.mixture = nn.Parameter(torch.zeros(len(cell.nodes)))
        self.norm = nn.LayerNorm(width)

    def forward(self, first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
        """Two sequences [B, T, W] of words, 0 outside of `inside` [B, T, 1], to one."""
        states, edges = [first, second], iter(self.edges)
        for node in self.cell.nodes:
            values = [next(edges)(states[source], inside) for source, _ in node]
            states.append(sum(values[1:], values[0]) / len(values) * inside)
        return self.norm(mixed(self.mixture, states[INPUTS:])) * inside  # type: ignore[no-any-return]


def mixed(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, weighed by the softmax of as many `weights`."""
    return torch.stack([share * value for share, value in zip(weights.softmax(0), values, strict=True)]).sum(0)
