"""What in an encoder can be quantized, and which role each tensor plays.

Architectures are read from the module tree, not from a list of model classes: any encoder that transformers builds
from ``nn.Linear`` and ``nn.Embedding`` is understood. Names are relative to the base model, so that a configuration
written for ``BertModel`` also fits ``BertForSequenceClassification``.

    >>> [t.name for t in find_targets(model) if t.role == "query"]
    ['encoder.layer.0.attention.self.query', ...]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

EMBEDDING_ROLES = frozenset({"word_embedding", "position_embedding", "type_embedding"})
HEAD_ROLE = "head"
# Leaf names (with as much of the parent as is needed to be unambiguous) over all encoder families.
_LINEAR_ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(Wqkv|qkv|in_proj|qkv_proj|query_key_value)$", "qkv"),
    (r"(^|\.)(query|query_proj|q_lin|q_proj|pos_query_proj|attn\.q)$", "query"),
    (r"(^|\.)(key|key_proj|k_lin|k_proj|pos_key_proj|attn\.k)$", "key"),
    (r"(^|\.)(value|value_proj|v_lin|v_proj|attn\.v)$", "value"),
    (
        r"(attention\.output\.dense|(?<!bottleneck\.)attention\.dense|out_lin|o_proj|attn\.(Wo|o|out_proj))$",
        "attention_output",
    ),
    (r"(^|\.)(intermediate\.dense|lin1|fc1|ffn|mlp\.Wi|up_proj|gate_proj)$", "ffn_in"),
    (r"(^|\.)(output\.dense|lin2|fc2|ffn_output|mlp\.Wo|down_proj)$", "ffn_out"),
)
_HEAD_SPLIT_ROLES = frozenset({"query", "key", "value", "qkv"})
# DeBERTa and LayoutLM 2 and 3 read the `.weight` of these directly and never call the module, so that a module swap
# would change nothing before packing, and the output after it.
_READ_WITHOUT_FORWARD = re.compile(r"(^|\.)(rel_embeddings|rel_pos_(x_|y_)?bias)$")


@dataclass(frozen=True, eq=False)
class Target:
    """One quantizable tensor of a model.

    Attributes:
        name: dotted module name relative to the base model (full path for modules outside of it).
        path: dotted module name in the model as it was given.
        module: the ``nn.Linear`` [O, I] or ``nn.Embedding`` [V, D] that holds the tensor.
        role: ``query``, ``key``, ``value``, ``qkv``, ``attention_output``, ``ffn_in``, ``ffn_out``, ``linear``,
            ``word_embedding``, ``position_embedding``, ``type_embedding`` or ``head``.
        layer: index of the encoder layer, ``None`` outside of the layers.
        heads: number of equal blocks of output rows that belong to one attention head each (Q-BERT section 3.3),
            ``None`` where rows have no head.
    """

    name: str
    path: str
    module: nn.Module
    role: str
    layer: int | None
    heads: int | None

    @property
    def is_embedding(self) -> bool:
        """Whether the tensor is a lookup table [V, D]."""
        return self.role in EMBEDDING_ROLES

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of a matrix, [V, D] of a table."""
        rows, columns = cast(Tensor, self.module.weight).shape
        return rows, columns


def base_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The encoder inside of `model`, as (dotted path in `model`, module).

    A task head, a ``SentenceTransformer`` or any other wrapper is looked through; a model with no transformers
    model inside is its own base (path ``""``).
    """
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            prefix = module.base_model_prefix
            if prefix and isinstance(getattr(module, prefix, None), nn.Module):
                return _join(path, prefix), getattr(module, prefix)
            return path, module
    return "", model


def encoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The encoder layers as (name relative to the base model, module), bottom first.

    The layers are the elements of the module list that holds the most matrix weights; a layer that is applied
    several times (ALBERT) is listed once.

    Raises:
        ValueError: if the model has no list of layers with linear maps inside.
    """
    _, base = base_model(model)
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {name: _linear_weights(module) for name, module in lists}
    if not lists or max(sizes.values()) == 0:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.ModuleList of layers with nn.Linear inside; "
            "pass an encoder built from Linear modules"
        )
    best = max(sizes.values())
    # The innermost list that holds all of it: ALBERT nests its one real layer in a list of groups.
    name, layers = [(n, m) for n, m in lists if sizes[n] == best][-1]
    return [(_join(name, str(i)), layer) for i, layer in enumerate(layers)]


def find_targets(model: nn.Module) -> list[Target]:
    """Every quantizable tensor of `model`, in module order; a shared module is listed once.

    Matrices outside of the embeddings and the encoder (pooler, classifier, language-model head) have the role
    ``head``. A model without encoder layers gives targets of role ``linear``.
    """
    prefix, base = base_model(model)
    try:
        layer_names = [name for name, _ in encoder_layers(model)]
    except ValueError:
        layer_names = []
    heads = _attention_heads(base)
    trunk = _trunk_names(base, layer_names)
    targets = []
    for path, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding) or _READ_WITHOUT_FORWARD.search(path):
            continue
        inside = path == prefix or not prefix or path.startswith(prefix + ".")
        name = path[len(prefix) + 1 :] if inside and prefix else path
        layer = next((i for i, n in enumerate(layer_names) if name.startswith(n + ".")), None)
        if isinstance(module, nn.Embedding):
            role = _embedding_role(name) if inside else HEAD_ROLE
        elif layer_names and not (inside and (layer is not None or name.split(".")[0] in trunk)):
            role = HEAD_ROLE
        else:
            role = linear_role(name)
        targets.append(Target(name, path, module, role, layer, _heads_in_rows(module, role, heads)))
    return targets


def linear_role(name: str) -> str:
    """The role that the dotted name of a matrix inside an encoder tells; ``linear`` where it tells none."""
    return next((role for pattern, role in _LINEAR_ROLES if re.search(pattern, name)), "linear")


def _trunk_names(base: nn.Module, layer_names: list[str]) -> set[str]:
    """Top-level children of the base model on the way to and through the layers (not pooler or heads)."""
    layers_child = layer_names[0].split(".")[0] if layer_names else None
    trunk = set()
    for name, _ in base.named_children():
        trunk.add(name)
        if name == layers_child:
            break
    return trunk


def _embedding_role(name: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if "position" in leaf or "relative" in leaf:
        return "position_embedding"
    if "type" in leaf or "segment" in leaf:
        return "type_embedding"
    return "word_embedding"


def _heads_in_rows(module: nn.Module, role: str, heads: int | None) -> int | None:
    if role not in _HEAD_SPLIT_ROLES or heads is None:
        return None
    blocks = heads * 3 if role == "qkv" else heads
    return blocks if module.out_features % blocks == 0 else None  # type: ignore[operator]


def _attention_heads(base: nn.Module) -> int | None:
    config = getattr(base, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", None)
    return heads if isinstance(heads, int) else None


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)
