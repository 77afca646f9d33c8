r"""Students with parts of their teacher: attention heads and feed-forward columns taken out, weights set to zero.

A head is a block of columns of the attention's output matrix, a feed-forward unit one column of the second feed-forward
matrix; with them go the rows that computed them, so that every product is dense and smaller. With inputs x of
covariance :math:`\Sigma` and P the inverse of its part that is left, taking out columns g of W costs

.. math:: \mathrm{tr}\, G\, W_g (P_{gg})^{-1} W_g^T, \qquad W \leftarrow W - W_g (P_{gg})^{-1} P_{g,:},

and the bias takes over what was constant. G, the second moment of the loss's gradients in the outputs, makes that the
loss's own second order. Zeros without a dense shape (2:4, or anywhere) are `qbert.quantizers.sparsity`.

    >>> student = qbert.prune(model, heads=0.25, ffn=0.5, data=batches)    # smaller, of the same class
    >>> student = qbert.prune(model, pattern="2:4", data=batches)

References: Hassibi and Stork 1993 (OBS); Kurtic et al. 2023, ZipLM, section 3 (heads and columns by OBS); Michel et al.
2019 (heads); Frantar and Alistarh 2023, SparseGPT.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from qbert.bits import covers
from qbert.encoders.parts import LayerParts
from qbert.encoders.sharing import SharedLayers
from qbert.encoders.targets import encoder_layers, main_layers
from qbert.encoders.widths import head_width, keep, layer_widths, takes_fewer_heads
from qbert.encoders.zeros import note_zeros, noted_zeros
from qbert.quantizers.rounding import damped
from qbert.quantizers.sparsity import Pattern, sparsify
from qbert.students.curvature import has_head, layer_matrices, observe_layers, second_moments

Model = TypeVar("Model", bound=nn.Module)
_ROUNDS = 48  # in which columns are taken out, and their scores found anew


def prune(
    model: Model,
    *,
    heads: float | Sequence[float] = 0.0,
    ffn: float | Sequence[float] = 0.0,
    pattern: str | float | None = None,
    data: Any = None,
    compensate: bool = True,
    names: str | Sequence[str] = "*",
    damping: float = 0.01,
) -> Model:
    """A copy of `model` without some of its heads, feed-forward columns or weights.

    Layer after layer, bottom first, on what the layers below have become, so that each makes good for them.

    Args:
        model: a float encoder; it is left alone. For heads and columns of the BERT kind (`qbert.encoders.widths`).
        heads: share of every layer's attention heads to take out, in [0, 1); or one share a layer.
        ffn: share of every layer's feed-forward columns, likewise.
        pattern: zeros in the matrices that are left: "2:4" (two of four neighbours stay, which GPUs multiply at twice
            the speed), or a share of zeros anywhere, such as 0.5.
        data: batches (a few hundred unlabelled rows) for second-order scores and compensation; without them weights are
            chosen by magnitude.
        compensate: whether what stays makes good for what goes (needs `data`).
        names: patterns of the matrices that get zeros, as in `BitsConfig`.
        damping: share of a moment's mean diagonal that is added to its diagonal.

    Returns:
        A model of the same class in evaluation mode, whose config tells its widths. Zeros stay zeros when it is trained
        by a `Distiller` or quantized on a grid that has a zero.

    Raises:
        ValueError: nothing to prune, a share that leaves no head or column, layers of an unknown family, or a pattern
            that does not fit; before anything is computed.
    """
    kept, zeros, matrices = _asked(model, heads, ffn, pattern, names)
    student = copy.deepcopy(model).eval()
    if kept:
        _take_out(student, kept, data, compensate, damping)
    if zeros is not None:
        _set_zeros(student, set(matrices), zeros, data, compensate, damping)
        note_zeros(student, noted_zeros(student) | dict.fromkeys(matrices, cast("str | float", pattern)))
    return student


def pruned_structure(
    model: Model,
    *,
    heads: float | Sequence[float] = 0.0,
    ffn: float | Sequence[float] = 0.0,
    pattern: str | float | None = None,
    names: str | Sequence[str] = "*",
) -> Model:
    """A copy of `model` with the widths that `prune` gives it, and with its first heads and columns, chosen by nothing.

    Its values need not be there (device meta). Arguments and errors as for `prune`.
    """
    kept, _, matrices = _asked(model, heads, ffn, pattern, names)
    student = copy.deepcopy(model)
    if kept:
        keep(student, {depth: (range(h), range(columns)) for depth, (h, columns) in enumerate(kept)})
    note_zeros(student, noted_zeros(student) | dict.fromkeys(matrices, cast("str | float", pattern)))
    return student


def _asked(
    model: nn.Module, heads: Any, ffn: Any, pattern: Any, names: str | Sequence[str]
) -> tuple[list[tuple[int, int]], Pattern | None, list[str]]:
    """((heads, columns) that stay in each layer, pattern of zeros, matrices that get it)."""
    zeros = None if pattern is None else Pattern.parse(pattern)
    kept = _kept_counts(model, heads, ffn)
    if not kept and zeros is None:
        raise ValueError("there is nothing to prune; give heads=, ffn= or pattern=")
    return kept, zeros, _named(model, names, zeros) if zeros is not None else []


class Removal(NamedTuple):
    """Columns taken out: the groups that stay, ascending, weights [O, I] with zeros for the others, bias change [O]."""

    kept: list[int]
    weight: Tensor
    bias_change: Tensor


def remove_groups(
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    keep_groups: int,
    width: int,
    *,
    gradients: Tensor | None = None,
    damping: float = 0.01,
    compensate: bool = True,
) -> Removal:
    """Take the cheapest groups of `width` neighbouring columns out of a matrix, scores found anew on the way.

    Args:
        weight: [O, I] float64.
        mean, covariance: [I] and [I, I] float64, of the inputs.
        keep_groups: how many groups stay.
        width: columns of a group (a head's width, or 1).
        gradients: G [O, O], or None for the plain squared error of the outputs.
        damping: share of the covariance's mean diagonal that is added to its diagonal.
        compensate: whether columns that stay, and the bias, make good for those that go.

    Returns:
        The weights, zero where columns were taken out, of least error for the groups that stay; and what the bias
        changes by, [O].
    """
    metric = damped(covariance, damping)
    groups = weight.shape[1] // width
    left = list(range(groups))
    if not compensate:
        costs = _costs(weight, covariance + torch.outer(mean, mean), width, gradients)
        left = sorted(costs.argsort(descending=True, stable=True)[:keep_groups].tolist())
    inverse, present = torch.linalg.inv(metric), weight.clone()
    step = max(1, (groups - keep_groups) // _ROUNDS)
    while len(left) > keep_groups:
        scores = _scores(present, inverse, left, width, gradients)
        go = sorted(scores.argsort(stable=True)[: min(step, len(left) - keep_groups)].tolist())
        columns = torch.cat([torch.arange(left[g] * width, (left[g] + 1) * width) for g in go]).to(weight.device)
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (P_gg)^-1 P_g,:
        present -= present[:, columns] @ solved
        present[:, columns] = 0
        inverse -= inverse[:, columns] @ solved
        left = [g for i, g in enumerate(left) if i not in set(go)]
    stay = torch.cat([torch.arange(g * width, (g + 1) * width) for g in left]).to(weight.device)
    result = torch.zeros_like(weight)
    result[:, stay] = weight[:, stay]
    if compensate:  # once more in one piece, without the rounding errors of many steps
        factor = torch.linalg.cholesky(metric[stay][:, stay])
        result[:, stay] = torch.cholesky_solve(metric[stay] @ weight.T, factor).T
        return Removal(left, result, (weight - result) @ mean)
    return Removal(left, result, torch.zeros_like(weight[:, 0]))


def _scores(weight: Tensor, inverse: Tensor, left: Sequence[int], width: int, gradients: Tensor | None) -> Tensor:
    """tr G W_g (P_gg)^-1 W_g^T of the groups that are left."""
    seen = weight if gradients is None else gradients @ weight
    if width == 1:
        index = torch.tensor(left, device=weight.device)
        return (seen[:, index] * weight[:, index]).sum(0) / inverse.diagonal()[index]
    found = []
    for group in left:
        own = slice(group * width, (group + 1) * width)
        inner = weight[:, own].T @ seen[:, own]  # W_g^T G W_g
        found.append(torch.linalg.solve(inverse[own, own], inner).trace())
    return torch.stack(found)


def _costs(weight: Tensor, second: Tensor, width: int, gradients: Tensor | None) -> Tensor:
    """tr G W_g C_gg W_g^T of every group: what it costs to leave one out and change nothing else."""
    seen = weight if gradients is None else gradients @ weight
    inner = (seen.T.unflatten(0, (-1, width)) @ weight.T.unflatten(0, (-1, width)).transpose(1, 2)).double()
    blocks = second.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [groups, width, width]
    return (inner * own).sum((1, 2))


def _kept_counts(model: nn.Module, heads: Any, ffn: Any) -> list[tuple[int, int]]:
    """(heads, columns) that stay in each layer; empty if all do."""
    if not any(_is_asked(x) for x in (heads, ffn)):
        return []
    layers = encoder_layers(model)
    if noted_zeros(model):
        raise ValueError("model: it has zeros in a pattern; take heads and columns out first, or both in one call")
    if isinstance(main_layers(model)[1], SharedLayers):
        raise ValueError("model: its layers are applied at several depths; prune first, then share them")
    shares = [_shares(name, value, len(layers)) for name, value in (("heads", heads), ("ffn", ffn))]
    kept = []
    for (name, layer), head_share, ffn_share in zip(layers, *shares, strict=True):
        present = layer_widths(layer)
        counts = [round(n * (1 - share)) for n, share in zip(present, (head_share, ffn_share), strict=True)]
        for count, n, share, what in zip(counts, present, (head_share, ffn_share), ("heads", "ffn"), strict=True):
            if count < 1:
                raise ValueError(f"{what}={share} leaves none of the {n} of {name}; take out less")
        if counts[0] != present[0] and not takes_fewer_heads(layer):
            raise ValueError(f"heads: {type(layer).__name__} adds a bias of all heads to its scores; prune ffn= only")
        kept.append((counts[0], counts[1]))
    return kept


def _is_asked(share: Any) -> bool:
    return bool(share) if isinstance(share, (int, float)) else any(share)


def _shares(name: str, value: Any, layers: int) -> list[float]:
    shares = [float(value)] * layers if isinstance(value, (int, float)) else [float(x) for x in value]
    if len(shares) != layers:
        raise ValueError(f"{name}: {len(shares)} shares for {layers} layers; give one each, or one number")
    wrong = next((share for share in shares if not 0 <= share < 1), None)
    if wrong is not None:
        raise ValueError(f"{name}={wrong} is not a share to take out; use a number from 0 to below 1")
    return shares


def _named(model: nn.Module, names: str | Sequence[str], pattern: Pattern) -> list[str]:
    """Names of the matrices that get zeros."""
    patterns = [names] if isinstance(names, str) else list(names)
    targets = layer_matrices(model)
    for one in patterns:
        if one != "*" and not any(covers(one, t.names) for t in targets):
            raise ValueError(f"names: {one!r} matches no matrix of the layers; they are {targets[0].name}, ...")
    chosen = [t for t in targets if any(one == "*" or covers(one, t.names) for one in patterns)]
    for target in chosen:
        pattern.check(target.name, target.shape[1])
    return [t.name for t in chosen]


def _take_out(student: nn.Module, kept: Sequence[tuple[int, int]], data: Any, compensate: bool, damping: float) -> None:
    """Take heads and columns out of `student` in place."""
    layers = [layer for _, layer in encoder_layers(student)]
    chosen: dict[int, tuple[list[int], list[int]]] = {}
    gradients: dict[nn.Linear, Any] = {}
    if data is not None:
        linears = [m for layer in layers for m in _readers(layer)]
        gradients = _gradients(student, data, linears)
    for depth, (layer, seen) in enumerate(_observed(student, data, layers)):
        present = layer_widths(layer)
        stay = []
        for linear, have, want, width in zip(
            _readers(layer), present, kept[depth], (head_width(layer), 1), strict=True
        ):
            if have == want:
                stay.append(list(range(have)))
                continue
            weight = linear.weight.detach().double()
            if linear in seen:
                found = remove_groups(
                    weight, seen[linear].mean, seen[linear].covariance, want, width,
                    gradients=gradients.get(linear), damping=damping, compensate=compensate,
                )  # fmt: skip
            else:
                found = _by_magnitude(layer, weight, want, width)
            with torch.no_grad():
                linear.weight.copy_(found.weight)
                if linear.bias is not None:
                    linear.bias.add_(found.bias_change)
            stay.append(found.kept)
        chosen[depth] = stay[0], stay[1]
    keep(student, chosen)


def _readers(layer: nn.Module) -> list[nn.Linear]:
    """The matrix that reads the heads, and the one that reads the feed-forward columns."""
    parts = LayerParts.of(layer)
    assert parts is not None
    return [cast(nn.Linear, parts.attention_output), cast(nn.Linear, parts.ffn_out)]


def _gradients(student: nn.Module, data: Any, linears: Sequence[nn.Linear]) -> dict[nn.Linear, Any]:
    """G of each matrix, where the model has outputs whose loss is known."""
    if not has_head(student):
        return {}
    return {m: of.gradients for m, of in second_moments(student, data, linears, gradients=None).items()}


def _observed(student: nn.Module, data: Any, layers: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    if data is None:
        yield from ((layer, {}) for layer in layers)
    else:
        yield from observe_layers(student, data, _readers)


def _by_magnitude(layer: nn.Module, weight: Tensor, want: int, width: int) -> Removal:
    """The groups with the largest weights on both sides: what computes them (value, or first matrix) and reads them."""
    parts = LayerParts.of(layer)
    assert parts is not None
    source = parts.ffn_in if width == 1 else parts.value
    computed = cast(Tensor, source.weight).detach().double().square().sum(1)
    sizes = (weight.square().sum(0) * computed).unflatten(0, (-1, width)).sum(1)
    stay = sorted(sizes.argsort(descending=True, stable=True)[:want].tolist())
    gone = torch.ones(len(sizes), dtype=torch.bool).index_fill_(0, torch.tensor(stay), False)
    result = weight.masked_fill(gone.repeat_interleave(width).to(weight.device), 0)
    return Removal(stay, result, torch.zeros_like(weight[:, 0]))


def _set_zeros(
    student: nn.Module, names: set[str], pattern: Pattern, data: Any, compensate: bool, damping: float
) -> None:
    """Set weights of `student` to zero in place, its layers one after the other."""
    chosen = {t.module for t in layer_matrices(student) if t.name in names}
    if data is None:
        for module in chosen:
            _copy(module, sparsify(module.weight.detach(), None, pattern))  # type: ignore[operator]
        return

    def of(layer: nn.Module) -> list[nn.Linear]:
        return [cast(nn.Linear, m) for m in layer.modules() if m in chosen]

    for _, seen in observe_layers(student, data, of):
        for linear, inputs in seen.items():
            weight = linear.weight.detach()
            _copy(linear, sparsify(weight, inputs.second, pattern, damping=damping, compensate=compensate))


@torch.no_grad()
def _copy(linear: Any, values: Tensor) -> None:
    linear.weight.copy_(values)
