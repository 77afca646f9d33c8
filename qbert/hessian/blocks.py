"""Parameter blocks of an encoder whose Hessians are looked at: layers, their halves, single matrices, groups of rows.

>>> [block.name for block in parameter_blocks(model, "layer")]
['encoder.layer.0', 'encoder.layer.1', ...]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.targets import HEAD_ROLE, Target, encoder_layers, find_targets
from qbert.quantizers.groups import row_groups

GRANULARITIES = ("layer", "block", "matrix", "group")
_MOST_OUTSIDE = 0.2  # share of the weights; projections of embeddings have less
_log = logging.getLogger(__name__)
_ATTENTION_ROLES = frozenset({"query", "key", "value", "qkv", "attention_output"})


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `start` to `stop` (not included) of a weight matrix [O, I]."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def shape(self) -> torch.Size:
        """[stop - start, I]."""
        return torch.Size((self.stop - self.start, *self.parameter.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrix."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """That of the matrix."""
        return self.parameter.device

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an entry."""
        return self.parameter.element_size()

    def detach(self) -> Tensor:
        """The rows themselves, without gradients; shares the matrix's memory."""
        return self.parameter.detach()[self.start : self.stop]


Part = nn.Parameter | Rows


def whole(part: Part) -> nn.Parameter:
    """The parameter that a part belongs to."""
    return part.parameter if isinstance(part, Rows) else part


def cut(part: Part, tensor: Tensor) -> Tensor:
    """The part's entries of a tensor of its parameter's shape (a view)."""
    return tensor[part.start : part.stop] if isinstance(part, Rows) else tensor


def vector_options(parts: Sequence[Part]) -> dict[str, Any]:
    """``dtype`` and ``device`` of the vectors [n] of a block: those of its first part, but at least float32."""
    return {"dtype": torch.promote_types(parts[0].dtype, torch.float32), "device": parts[0].device}


def distinct_parameters(parts: Iterable[Part]) -> list[nn.Parameter]:
    """The parameters that the parts belong to, each once, in order."""
    return list({id(whole(part)): whole(part) for part in parts}.values())


@dataclass(frozen=True, eq=False)
class ParameterBlock:
    """One diagonal block of the Hessian.

    Attributes:
        name: dotted name relative to the base model.
        parameters: the block's parameters, biases and normalization included where they belong to it; `Rows` of a
            weight for a group.
        members: names of the quantizable tensors (`Target.name`) that it covers.
    """

    name: str
    parameters: list[Part]
    members: list[str]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters)


def parameter_blocks(model: nn.Module, granularity: str = "layer") -> list[ParameterBlock]:
    """The blocks of `model`, bottom first.

    Args:
        model: an encoder, with or without a task head.
        granularity: ``layer``: all parameters of an encoder layer (as in Q-BERT's code); ``block``: its attention
            part and the rest (feed-forward part); ``matrix``: the weight of every quantizable matrix by itself;
            ``group``: its rows, cut into as many groups of neighbours as the encoder has heads (Q-BERT, section 3.3):
            for query, key and value the rows of a head each. They are called ``<matrix>.rows.<first>-<last>``.

    Raises:
        ValueError: unknown granularity, or a model without encoder layers; TypeError if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an encoder (nn.Module), got {type(model).__name__}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: {granularity!r} is unknown; use one of {', '.join(GRANULARITIES)}")
    matrices = [t for t in find_targets(model) if not t.is_embedding and t.role != HEAD_ROLE]
    targets = [t for t in matrices if t.layer is not None]
    _tell_what_is_left_out(matrices)
    if granularity == "matrix":
        blocks = [ParameterBlock(t.name, [_weight(t)], [t.name]) for t in targets]
    elif granularity == "group":
        heads = max((t.heads or 1 for t in targets), default=1)
        blocks = [block for t in targets for block in _groups_of_rows(t, t.heads or heads)]
    else:
        blocks = []
        for index, (name, layer) in enumerate(encoder_layers(model)):
            members = [t for t in targets if t.layer == index]
            split = granularity == "block" and _split_layer(name, layer, members)
            blocks += split or [ParameterBlock(name, _distinct(layer), [t.name for t in members])]
    blocks = [block for block in blocks if block.parameters]
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no parameters in encoder layers to look at")
    return blocks


def _tell_what_is_left_out(matrices: Sequence[Target]) -> None:
    """Warn where the layers are not most of the encoder: XLM has its attention and feed-forward parts in two lists."""
    outside = [t for t in matrices if t.layer is None]
    share = sum(_size(t) for t in outside) / max(1, sum(map(_size, matrices)))
    if share > _MOST_OUTSIDE and len(outside) < len(matrices):
        _log.warning(
            "%d of %d encoder matrices (%.0f %% of the weights) are in no encoder layer and are not measured: %s, ...",
            *(len(outside), len(matrices), 100 * share, outside[0].name),
        )


def _size(target: Target) -> int:
    rows, columns = target.shape
    return rows * columns


def find_block(model: nn.Module, name: str, granularity: str = "layer") -> ParameterBlock:
    """The block called `name`.

    Raises:
        ValueError: if there is none, naming those there are.
    """
    blocks = parameter_blocks(model, granularity)
    for block in blocks:
        if block.name == name:
            return block
    known = [block.name for block in blocks]
    raise ValueError(f"name: {name!r} is no {granularity} of the model; use one of {known[0]} ... {known[-1]}")


def _groups_of_rows(target: Target, groups: int) -> list[ParameterBlock]:
    """The rows of a matrix in runs of nearly equal length."""
    weight = _weight(target)
    if len(weight) != target.shape[0]:
        raise ValueError(
            f"granularity: {target.path} stores its outputs along the second axis, so its rows cannot be looked at "
            "one by one; use 'matrix'"
        )
    sizes = torch.bincount(row_groups(len(weight), groups, target.heads)).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups_of_rows = [Rows(weight, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    name = target.name
    return [ParameterBlock(f"{name}.rows.{g.start}-{g.stop - 1}", [g], [name]) for g in groups_of_rows]


def _split_layer(name: str, layer: nn.Module, members: Sequence[Target]) -> list[ParameterBlock]:
    """Attention part and feed-forward part; everything that is not attention counts to the latter."""
    attention = [t for t in members if t.role in _ATTENTION_ROLES]
    others = [t for t in members if t.role not in _ATTENTION_ROLES]
    if not attention or not others:
        return []
    stem = _common_stem([t.name for t in attention])
    inside = stem != name and not any(t.name.startswith(stem + ".") for t in others)
    if inside:
        modules: list[nn.Module] = [layer.get_submodule(stem[len(name) + 1 :])]
    else:
        modules = [t.module for t in attention]
    first: list[Part] = [*{id(p): p for m in modules for p in m.parameters()}.values()]
    taken = {id(p) for p in first}
    second = [p for p in _distinct(layer) if id(p) not in taken]
    return [
        ParameterBlock(f"{name}.attention", first, [t.name for t in attention]),
        ParameterBlock(f"{name}.ffn", second, [t.name for t in others]),
    ]


def _common_stem(names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common if len(common) < min(map(len, parts)) else common[:-1])


def _distinct(module: nn.Module) -> list[Part]:
    return list(module.parameters())


def _weight(target: Target) -> nn.Parameter:
    weight = target.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"model: the weight of {target.path} is computed from other parameters; use granularity='layer' or "
            "remove its parametrization"
        )
    return weight
