"""Encoder layers with fewer attention heads and feed-forward columns than their config says.

It stands alone because a saved model with other widths needs it to load, whoever made it.

The maps around what is taken out become smaller, so that every product is dense. transformers 5 builds all layers of
one width and has no `prune_heads`; the widths of each layer are kept by `qbert.encoders.structure`, or in the config
itself where one number says them all.

    >>> keep(model, {0: ([0, 1, 3], range(768))})        # three heads and 768 columns of layer 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.parts import LayerParts
from qbert.encoders.structure import changes, record, replace_record
from qbert.encoders.targets import base_model, encoder_layers

_FFN_NAMES = ("intermediate_size", "hidden_dim")  # the latter is DistilBERT's


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """(attention heads, feed-forward columns) of an encoder layer.

    Raises:
        ValueError: if the layer is of a family whose parts are not known.
    """
    parts = _parts(layer)
    return parts.heads, int(parts.ffn_out.in_features)  # type: ignore[arg-type]


def head_width(layer: nn.Module) -> int:
    """Width of one attention head of an encoder layer."""
    parts = _parts(layer)
    return int(parts.query.out_features) // parts.heads  # type: ignore[arg-type]


def keep(model: nn.Module, kept: Mapping[int, tuple[Sequence[int], Sequence[int]]]) -> None:
    """Take all other attention heads and feed-forward columns out of layers of a float model, in place.

    Args:
        model: a transformers encoder; its config tells the new widths from then on.
        kept: number of a layer -> (heads, feed-forward columns) to keep, in ascending order.

    Raises:
        ValueError: for layers of an unknown family, or maps that are not plain `nn.Linear`.
    """
    layers = encoder_layers(model)
    for index, (heads, columns) in kept.items():
        parts = _parts(layers[index][1])
        wrong = next((m for m in parts.linears if type(m) is not nn.Linear), None)
        if wrong is not None:
            raise ValueError(f"model: {layers[index][0]} holds a {type(wrong).__name__}; prune the float model first")
        width = head_width(layers[index][1])
        device = next(layers[index][1].parameters()).device
        rows = (torch.tensor(list(heads))[:, None] * width + torch.arange(width)).flatten().to(device)
        inner = torch.tensor(list(columns), device=device)
        for linear in parts.inputs:
            _cut(linear, rows, None)
        _cut(parts.attention_output, None, rows)
        _cut(parts.ffn_in, inner, None)
        _cut(parts.ffn_out, None, inner)
        if len(heads) != parts.heads:
            set_heads(layers[index][1], len(heads))
    _record(model)


def set_heads(layer: Any, heads: int) -> None:
    """Tell the attention of a layer of a known family how many heads it has."""
    attention = getattr(layer.attention, "self", layer.attention)
    if hasattr(attention, "n_heads"):
        attention.n_heads = heads
        return
    attention.num_attention_heads = heads
    attention.all_head_size = heads * attention.attention_head_size


def takes_fewer_heads(layer: nn.Module) -> bool:
    """Whether a layer of a known family can lose heads; MPNet adds one bias of all heads to every layer's scores."""
    return type(layer).__name__ != "MPNetLayer"


def build(base: nn.Module, layers: Mapping[str, Sequence[int]]) -> None:
    """Give layers of `base` maps of other widths, without values.

    Args:
        base: a model whose layers all have the widths of its config.
        layers: dotted name of a layer -> (heads, feed-forward columns).
    """
    for name, (heads, columns) in layers.items():
        layer = base.get_submodule(name)
        parts = _parts(layer)
        rows = heads * head_width(layer)
        if heads < 1 or columns < 1:
            raise ValueError(f"config.json: {name} cannot have {heads} heads and {columns} columns")
        for linear in parts.inputs:
            _empty(linear, rows, None)
        _empty(parts.attention_output, None, rows)
        _empty(parts.ffn_in, columns, None)
        _empty(parts.ffn_out, None, columns)
        if heads != parts.heads:
            set_heads(layer, heads)


def _parts(layer: nn.Module) -> LayerParts:
    parts = LayerParts.of(layer)
    if parts is None:
        raise ValueError(
            f"model: {type(layer).__name__} is not a layer of the BERT kind, so its heads and feed-forward columns "
            "cannot be taken out; give a BERT, RoBERTa, ELECTRA, CamemBERT, DistilBERT or MPNet encoder"
        )
    return parts


def _record(model: nn.Module) -> None:
    """Write the widths of all layers into the config: as its own numbers where they say it, else as a change."""
    _, base = base_model(model)
    config: Any = base.config
    found = {name: layer_widths(layer) for name, layer in encoder_layers(base)}
    name = next(n for n in _FFN_NAMES if hasattr(config, n))
    own_heads = getattr(config, "num_attention_heads", None) or config.n_heads
    others = [entry for entry in changes(model) if entry["change"] != "widths"]
    replace_record(model, others)
    if len({columns for _, columns in found.values()}) == 1 and not others:
        for holder in {id(c): c for c in (config, getattr(model, "config", config))}.values():
            setattr(holder, name, next(iter(found.values()))[1])
    plain = (own_heads, getattr(config, name))
    changed = {layer: list(widths) for layer, widths in found.items() if widths != plain}
    if changed:
        record(model, "widths", layers=changed)


@torch.no_grad()
def _cut(linear: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        weight = weight[rows]
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=bias.requires_grad)
    if columns is not None:
        weight = weight[:, columns]
    linear.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def _empty(linear: Any, rows: int | None, columns: int | None) -> None:
    rows, columns = rows or linear.out_features, columns or linear.in_features
    linear.weight = nn.Parameter(linear.weight.new_empty(rows, columns))
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(rows))
    linear.out_features, linear.in_features = rows, columns
