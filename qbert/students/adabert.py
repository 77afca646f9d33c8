"""AdaBERT: layers of one cell of convolutions and pools on the teacher's word pieces, the cell found for the task.

    >>> space = adabert_space(teacher, tokenizer=tokenizer)            # every cell at once
    >>> Search(probed, space, recipes.adabert_search(...), ...).train()  # qbert.distill.search
    >>> student = adabert(teacher, *space.derive(), tokenizer=tokenizer)

Source: Chen et al. 2020, "AdaBERT: Task-Adaptive BERT Compression with Differentiable Neural Architecture Search",
sections 3.2 and 3.3: the layers share the cell, each has weights of its own; the first reads the two sentences of a
pair (or one twice), later ones the two layers before; the outputs are made from a trained mixture of all layers, each
the mean over its words. Differences: one head, with a hidden layer as all students of `sentences` have it, says at
every depth what it makes of the words, so that every layer can learn from a probe of the teacher's; see also `cells`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.distill.probes import ProbedOutput
from qbert.students.cells import EDGES, INPUTS, OPERATIONS, Cell, CellLayer, mixed
from qbert.students.sentences import SentenceStudent, SentenceStudentConfig, TableKind, make_student

_CELL = (((0, "conv3"), (1, "skip")), ((1, "conv3"), (2, "skip")), ((2, "conv3"), (3, "skip")))


class AdaBertConfig(SentenceStudentConfig):
    """Shape of a student of cells: `depth` layers of `width` channels with one `cell`, beside what all have."""

    model_type = "qbert_adabert"

    def __init__(self, cell: Any = _CELL, width: int = 96, depth: int = 2, **kwargs: Any) -> None:
        self.cell = Cell.parse(cell).to_list()
        self.width, self.depth = width, depth
        super().__init__(**kwargs)


class AdaBertForSequenceClassification(SentenceStudent):
    """Sentences to classes or values by layers of a cell.

    Attributes:
        norm: of the words, once they have the cells' width.
        mixture: [depth], how much each layer counts, before a softmax.
    """

    config_class = AdaBertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.width)
        self.mixture = nn.Parameter(torch.zeros(config.depth))

    @classmethod
    def features(cls, config: Any) -> int:
        """The width of the cells: the sentences of a pair are read together."""
        return config.width  # type: ignore[no-any-return]

    @staticmethod
    def encoder_layers(config: Any) -> list[nn.Module]:
        """A map to the cells' width, and the cells."""
        cell = Cell.parse(config.cell)
        entry = nn.Linear(config.embedding_size, config.width)
        return [entry, *(CellLayer(cell, config.width) for _ in range(config.depth))]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_probes: bool = False,
        **_: Any,
    ) -> ProbedOutput:
        """Logits [B, C] of ids [B, T], the task's loss where labels are given, and each layer's logits if asked for.

        Raises:
            ValueError: pairs without ``token_type_ids``, and no separator is known.
        """
        means = self.depths(*self.read(input_ids, attention_mask, token_type_ids))
        logits = self.head(self.summary(means))
        return ProbedOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            probes=tuple(self.head(mean) for mean in means) if output_probes else None,
            cost=self.cost(),
        )

    def depths(self, words: Tensor, lengths: Tensor) -> list[Tensor]:
        """The mean over the words [B, W] of every layer, from word vectors [B, T, D] ([2 B, T, D] of pairs)."""
        inside = (torch.arange(words.shape[1], device=words.device) < lengths.unsqueeze(1)).unsqueeze(-1)
        first = second = self.norm(self.encoder[0](words)) * inside
        if self.config.pairs:
            first, second = second.chunk(2)
            inside = inside[: len(first)] | inside[len(first) :]
        means = []
        for layer in self.encoder[1:-1]:
            first, second = second, self.through(layer, first, second, inside)
            means.append(second.sum(1) / inside.sum(1))
        return means

    def through(self, layer: Any, first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
        """What one layer makes of the two before it."""
        return layer(first, second, inside)  # type: ignore[no-any-return]

    def summary(self, means: Sequence[Tensor]) -> Tensor:
        """What the outputs are made from, [B, W], of the means of all layers."""
        return mixed(self.mixture, means)

    def cost(self) -> Tensor | None:
        """The price of an architecture under search; of one that is chosen none."""
        return None


class SpaceLayer(nn.Module):
    """A layer that can be any cell: every operation on every edge."""

    def __init__(self, nodes: int, width: int) -> None:
        super().__init__()
        count = sum(INPUTS + node for node in range(nodes))
        self.nodes = nodes
        self.edges = nn.ModuleList(
            nn.ModuleDict({name: operation.module(width) for name, operation in OPERATIONS.items()})
            for _ in range(count)
        )
        self.mixture = nn.Parameter(torch.zeros(nodes))
        self.norm = nn.LayerNorm(width)

    def forward(self, first: Tensor, second: Tensor, inside: Tensor, chosen: Tensor) -> Tensor:
        """As a `CellLayer`, under a choice for every edge, one-hot rows of [edges, operations].

        Where the choice is to be learned, operations that are not chosen run too, since its gradient needs them.
        """
        states: list[Tensor] = [first, second]
        edges: Any = zip(self.edges, chosen, strict=True)
        for _ in range(self.nodes):
            total = torch.zeros_like(first)
            for x, (operations, weights) in zip(list(states), edges, strict=False):
                every = list(operations.values())
                if weights.requires_grad:
                    total = total + sum(w * each(x, inside) for w, each in zip(weights, every, strict=True))
                else:
                    total = total + every[int(weights.argmax())](x, inside)
            states.append(total / len(states) * inside)
        return self.norm(mixed(self.mixture, states[INPUTS:])) * inside  # type: ignore[no-any-return]


class AdaBertSpace(AdaBertForSequenceClassification):
    """All students of up to `depth` layers at once: what a search trains and then derives one of them from.

    In training mode each pass draws an operation for every edge and a number of layers by Gumbel-softmax, one-hot with
    a straight-through gradient (Chen et al. 2020, section 3.4; Jang et al. 2017); in evaluation the likeliest count.

    Attributes:
        architecture: ``edges`` [edges, operations] and ``depth`` [depth], logits of the choices, shared by all layers.
        temperature: of the draws.
        choosing: whether the choices have a gradient; without, only what is drawn is computed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        nodes = len(config.cell)
        count = sum(INPUTS + node for node in range(nodes))
        self.architecture = nn.ParameterDict(
            {"edges": torch.zeros(count, len(OPERATIONS)), "depth": torch.zeros(config.depth)}
        )
        self.temperature, self.choosing = 1.0, False
        self._chosen: Tensor | None = None

    @staticmethod
    def encoder_layers(config: Any) -> list[nn.Module]:
        """A map to the cells' width, and as many layers as there may be."""
        entry = nn.Linear(config.embedding_size, config.width)
        return [entry, *(SpaceLayer(len(config.cell), config.width) for _ in range(config.depth))]

    def depths(self, words: Tensor, lengths: Tensor) -> list[Tensor]:
        """As that of a student, under one draw for all layers."""
        self._chosen = self._draw(self.architecture["edges"])
        return super().depths(words, lengths)

    def through(self, layer: Any, first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
        """What one layer makes of the two before it under the present draw."""
        return layer(first, second, inside, self._chosen)  # type: ignore[no-any-return]

    def summary(self, means: Sequence[Tensor]) -> Tensor:
        """The mixture of as many layers as are drawn."""
        mixtures = [mixed(self.mixture[:count], means[:count]) for count in range(1, len(means) + 1)]
        drawn = self._draw(self.architecture["depth"])
        return torch.stack([share * each for share, each in zip(drawn, mixtures, strict=True)]).sum(0)

    def _draw(self, logits: Tensor) -> Tensor:
        """One-hot choices of the last axis."""
        if not self.training:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        drawn = F.gumbel_softmax(logits.float(), self.temperature, hard=True)
        return drawn if self.choosing else drawn.detach()

    def expected(self) -> Tensor:
        """[2]: parameters, and multiplications a word, of all operations on average under the present choices."""
        shares = self.architecture["edges"].float().softmax(-1).sum(0)  # [operations]
        depth = self.architecture["depth"].float().softmax(0)
        layers = (depth * torch.arange(1, len(depth) + 1, device=depth.device)).sum()
        return layers * (self._prices().to(shares) * shares).sum(1)

    def cost(self) -> Tensor:
        """Expected parameters and multiplications over those of the largest operation everywhere, their mean in [0, 1].

        Chen et al. 2020, eq. 6: the efficiency-aware loss.
        """
        everywhere = len(self.architecture["edges"]) * len(self.architecture["depth"])
        expected = self.expected()
        return (expected / (self._prices().amax(1).to(expected) * everywhere)).mean()

    def _prices(self) -> Tensor:
        """[2, operations]: parameters and multiplications a word of each operation."""
        width, every = self.config.width, list(OPERATIONS.values())
        return torch.tensor([[each.parameters(width) for each in every], [each.products(width) for each in every]])

    @torch.no_grad()
    def derive(self) -> tuple[Cell, int]:
        """(the cell, number of layers) that the choices come to.

        The likeliest operation of every edge, the two edges of a node whose choices are clearest (of equals those that
        come first), and the likeliest number of layers.
        """
        share, best = self.architecture["edges"].softmax(-1).max(-1)
        names, nodes, at = list(OPERATIONS), [], 0
        for node in range(len(self.config.cell)):
            sources = range(INPUTS + node)
            clearest = share[at : at + len(sources)].argsort(descending=True, stable=True)
            kept = sorted(clearest[:EDGES].tolist())
            nodes.append(tuple((source, names[int(best[at + source])]) for source in kept))
            at += len(sources)
        return Cell(tuple(nodes)), int(self.architecture["depth"].argmax()) + 1


def adabert(
    teacher: nn.Module,
    cell: Any = _CELL,
    depth: int = 2,
    *,
    width: int = 96,
    dense: int = 200,
    dropout: float = 0.1,
    table: TableKind = "frozen",
    dimensions: int | None = None,
    rank: int | None = None,
    pairs: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
) -> AdaBertForSequenceClassification:
    """Layers of a cell that read what `teacher` reads and have its labels.

    Args:
        teacher: a float encoder with a head for sequences; stays as it is.
        cell: a `Cell`, or lists of [sequence, operation] by node.
        depth: number of layers.
        width: channels.
        dense, dropout, table, dimensions, rank, pairs, tokenizer, seed: as of `bilstm`.

    Returns:
        The student in evaluation mode; a transformers model with ``save_pretrained`` and ``from_pretrained``.

    Raises:
        ValueError: a cell or size that cannot work, or a teacher without a float word table.
    """
    _check_sizes(width, depth)
    return make_student(
        AdaBertForSequenceClassification,
        teacher,
        seed,
        {"cell": Cell.parse(cell), "width": width, "depth": depth},
        table=table,
        dimensions=dimensions,
        rank=rank,
        pairs=pairs,
        tokenizer=tokenizer,
        dense=dense,
        dropout=dropout,
    )


def adabert_space(
    teacher: nn.Module, *, nodes: int = 3, depth: int = 4, width: int = 96, seed: int = 0, **common: Any
) -> AdaBertSpace:
    """Every student of `adabert` with cells of `nodes` nodes and up to `depth` layers, to search among.

    Args:
        teacher: as of `adabert`, and so are the others and what is raised.
        nodes: inner nodes of a cell.
        depth: the most layers that there may be.
        width, seed: as of `adabert`.
        **common: its ``dense``, ``dropout``, ``table``, ``dimensions``, ``rank``, ``pairs`` and ``tokenizer``.
    """
    _check_sizes(width, depth)
    if nodes < 1:
        raise ValueError(f"nodes={nodes} is not possible; use at least 1")
    sizes = {"cell": [[[0, "skip"]]] * nodes, "width": width, "depth": depth}
    defaults = {"table": "frozen", "dimensions": None, "rank": None, "pairs": False, "tokenizer": None}
    return make_student(AdaBertSpace, teacher, seed, sizes, **{**defaults, "dense": 200, "dropout": 0.1, **common})


def _check_sizes(width: int, depth: int) -> None:
    if width < 1 or depth < 1:
        raise ValueError(f"width={width} and depth={depth} are not possible; use at least 1 of each")
