"""What in an encoder can be quantized, and which role each tensor plays.

Architectures are read from the module tree, not from a list of model classes: any encoder that transformers builds
from ``nn.Linear`` and ``nn.Embedding`` is understood. Names are relative to the base model, so that a configuration
written for ``BertModel`` also fits ``BertForSequenceClassification``.

    >>> [t.name for t in find_targets(model) if t.role == "query"]
    ['encoder.layer.0.attention.self.query', ...]
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn

from qbert.encoders.weights import gate_matrices, is_matrix, is_recurrent, is_table, matrix_size, weight_matrix

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
        name: dotted module name relative to the base model (full path for modules outside of it, and in models with
            several encoders).
        path: dotted module name in the model as it was given; of a gate matrix, the name of its parameter.
        module: the module that holds the tensor (`qbert.encoders.weights`); for a gate matrix of an LSTM or GRU a
            linear map that shares its parameters.
        role: ``query``, ``key``, ``value``, ``qkv``, ``attention_output``, ``ffn_in``, ``ffn_out``, ``linear``,
            ``word_embedding``, ``position_embedding``, ``type_embedding`` or ``head``.
        layer: index of the encoder layer, ``None`` outside of the layers.
        heads: number of equal blocks of output rows that belong to one attention head each (Q-BERT section 3.3),
            ``None`` where rows have no head.
        aliases: further names that patterns may use.
    """

    name: str
    path: str
    module: nn.Module
    role: str
    layer: int | None
    heads: int | None
    aliases: tuple[str, ...] = ()

    @property
    def is_embedding(self) -> bool:
        """Whether the tensor is a lookup table [V, D]."""
        return self.role in EMBEDDING_ROLES

    @property
    def weight(self) -> Tensor:
        """The tensor as its module stores it; a parameter, unless a parametrization computes it."""
        return cast(Tensor, self.module.weight)

    @property
    def matrix(self) -> Tensor:
        """The tensor as [O, I] ([V, D] of a table): a view of `weight`."""
        return weight_matrix(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of a matrix, [V, D] of a table."""
        rows, columns = self.matrix.shape
        return rows, columns

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a pattern may match."""
        return (self.name, self.path, *self.aliases)


_FOUND: ContextVar[dict[int, list[Target]] | None] = ContextVar("targets by id of the model", default=None)


def base_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The encoder inside of `model`, the first of several, as (dotted path in `model`, module).

    A task head, a ``SentenceTransformer`` or any other wrapper is looked through; a model with no transformers
    model inside is its own base (path ``""``).
    """
    return base_models(model)[0]


def base_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every encoder inside of `model`, none of which lies in another, as (dotted path in `model`, module).

    A bi-encoder or a router has several; CLIP is one model with two towers.
    """
    from transformers import PreTrainedModel

    found: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inside:
            continue
        prefix = module.base_model_prefix
        if prefix and isinstance(getattr(module, prefix, None), nn.Module):
            path, module = join_path(path, prefix), getattr(module, prefix)
        found.append((path, module))
        inside |= {id(m) for m in module.modules()}
    return found or [("", model)]


def encoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The encoder layers as (name relative to the base model, module), bottom first, one encoder after the other.

    The layers of an encoder are the elements of the module list that holds the most matrix weights, and of every
    other list of layers with attention and feed-forward parts (CANINE's character encoders, CLIP's second tower).
    A layer that is applied several times (ALBERT) is listed once. With several base models names are full paths.

    Raises:
        ValueError: if the model has no list of layers with linear maps inside.
    """
    layers = _named_layers([(prefix, _layer_lists(base)) for prefix, base in base_models(model)])
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.ModuleList of layers with nn.Linear inside; "
            "pass an encoder built from Linear modules"
        )
    return layers


def main_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest-weighted list of layers of the first encoder, with its name relative to that base model.

    Raises:
        ValueError: if the model has no list of layers with linear maps inside.
    """
    found = _main_list(base_model(model)[1])
    if found is None:
        raise ValueError(f"model: {type(model).__name__} has no list of layers; pass an encoder with layers")
    return found


def find_targets(model: nn.Module) -> list[Target]:
    """Every quantizable tensor of `model`, in module order; a shared module is listed once.

    Matrices outside of the embeddings and the encoder (pooler, classifier, language-model head) have the role
    ``head``. A model without encoder layers gives targets of role ``linear``.
    """
    known = _FOUND.get()
    if known is None:
        return _find_targets(model)
    if id(model) not in known:
        known[id(model)] = _find_targets(model)
    return list(known[id(model)])


@contextlib.contextmanager
def targets_found_once() -> Iterator[None]:
    """Inside, models stay what they are, so that `find_targets` walks over each of them only once."""
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def _find_targets(model: nn.Module) -> list[Target]:
    bases = base_models(model)
    several = len(bases) > 1
    lists = [(prefix, _layer_lists(base)) for prefix, base in bases]
    layer_names = [name for name, _ in _named_layers(lists)]
    trunks = {prefix: _trunk_names(base, found) for (prefix, base), (_, found) in zip(bases, lists, strict=True)}
    heads = {prefix: attention_heads(base) for prefix, base in bases}
    targets = []
    for path, module in _quantizable(model):
        if _READ_WITHOUT_FORWARD.search(path):
            continue
        prefix = next((p for p, _ in bases if not p or path == p or path.startswith(p + ".")), None)
        local = path if not prefix else path[len(prefix) + 1 :]
        name = path if several else local
        layer = next((i for i, n in enumerate(layer_names) if name.startswith(n + ".")), None)
        if is_table(module):
            role = _embedding_role(local) if prefix is not None else HEAD_ROLE
        elif layer_names and not (prefix is not None and (layer is not None or local.split(".")[0] in trunks[prefix])):
            role = HEAD_ROLE
        else:
            role = linear_role(local)
        known = heads.get(prefix or "", next(iter(heads.values())))
        head_blocks = _heads_in_rows(module, role, _own_heads(model, path, known))
        aliases = (local,) if several and prefix else ()
        targets.append(Target(name, path, module, role, layer, head_blocks, aliases))
    return targets


def _quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every plain matrix and table; of an LSTM or GRU its gate matrices."""
    for path, module in model.named_modules():
        if is_recurrent(module):
            yield from ((join_path(path, name), linear) for name, linear in gate_matrices(module))
        elif is_table(module) or is_matrix(module):
            yield path, module


class EncoderWeight(NamedTuple):
    """A weight of at least two axes inside an encoder.

    Attributes:
        path: dotted parameter name in the model.
        tensor: the parameter.
        owner: class name of the module that holds it.
        in_layers: whether it lies in a list of modules, as encoder layers do.
    """

    path: str
    tensor: nn.Parameter
    owner: str
    in_layers: bool


def encoder_weights(model: nn.Module) -> list[EncoderWeight]:
    """Every weight with at least two axes longer than one in the encoders of `model`, poolers and heads apart."""
    found: dict[int, EncoderWeight] = {}
    for prefix, base in base_models(model):
        lists = tuple(name + "." for name, m in base.named_modules() if isinstance(m, nn.ModuleList))
        trunk = _trunk_names(base, _layer_lists(base))
        for name, module in base.named_modules():
            if name and name.split(".")[0] not in trunk:
                continue
            for leaf, tensor in module.named_parameters(recurse=False):
                if sum(size > 1 for size in tensor.shape) > 1:
                    weight = EncoderWeight(
                        join_path(prefix, name, leaf), tensor, type(module).__name__, (name + ".").startswith(lists)
                    )
                    found.setdefault(id(tensor), weight)
    return list(found.values())


def linear_role(name: str) -> str:
    """The role that the dotted name of a matrix inside an encoder tells; ``linear`` where it tells none.

    Of a map in factors (`qbert.encoders.factors`) the part that gives its outputs has the role of the whole.
    """
    name = re.sub(r"\.(whole|up)$", "", name)
    return next((role for pattern, role in _LINEAR_ROLES if re.search(pattern, name)), "linear")


def _main_list(base: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The module list that holds the most matrix weights."""
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {name: sum(map(matrix_size, module.modules())) for name, module in lists}
    best = max(sizes.values(), default=0)
    # The innermost list that holds all of it: ALBERT nests its one real layer in a list of groups.
    return [(n, m) for n, m in lists if sizes[n] == best][-1] if best else None


def _layer_lists(base: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The main list and every other list of whole layers, in module order."""
    main = _main_list(base)
    if main is None:
        return []
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in base.named_modules():
        if name == main[0]:
            found.append(main)
        elif isinstance(module, nn.ModuleList) and not main[0].startswith(name + "."):
            outer = any(name.startswith(n + ".") for n, _ in (main, *found))
            if not outer and len(module) and all(_is_whole_layer(layer) for layer in module):
                found.append((name, module))
    return found


def _is_whole_layer(layer: nn.Module) -> bool:
    """Whether a module has both parts of an encoder layer: attention and feed-forward matrices."""
    roles = {linear_role(name) for name, module in layer.named_modules() if matrix_size(module)}
    return bool(roles & _HEAD_SPLIT_ROLES) and bool(roles & {"ffn_in", "ffn_out"})


def _named_layers(lists: list[tuple[str, list[tuple[str, nn.ModuleList]]]]) -> list[tuple[str, nn.Module]]:
    """Layers with their names, from (path, `_layer_lists`) of every base model."""
    layers = []
    for prefix, found in lists:
        for name, members in found:
            stem = join_path(prefix, name) if len(lists) > 1 else name
            layers += [(join_path(stem, i), layer) for i, layer in members.named_children()]
    return layers


def _trunk_names(base: nn.Module, lists: list[tuple[str, nn.ModuleList]]) -> set[str]:
    """Top-level children of the base model on the way to and through its lists of layers (not pooler or heads)."""
    holders = {name.split(".")[0] for name, _ in lists}
    children = [name for name, _ in base.named_children()]
    last = max((i for i, name in enumerate(children) if name in holders), default=len(children) - 1)
    return set(children[: last + 1])


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
    return blocks if weight_matrix(module).shape[0] % blocks == 0 else None


def _own_heads(model: nn.Module, path: str, known: int | None) -> int | None:
    """Heads that the attention around the matrix at `path` says it has, or else those that the config says."""
    parts = path.split(".")
    for length in range(len(parts) - 1, max(len(parts) - 3, 0), -1):  # its module, or that of its factors
        around = model.get_submodule(".".join(parts[:length]))
        own = getattr(around, "num_attention_heads", None) or getattr(around, "n_heads", None)
        if isinstance(own, int):
            return own
    return known


def attention_heads(base: nn.Module) -> int | None:
    """Attention heads of a layer, by the config of `base`; ``None`` if it does not say."""
    config = getattr(base, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", None)
    return heads if isinstance(heads, int) else None


def join_path(*parts: str) -> str:
    """The dotted path of a module from parts of it, of which some may be empty."""
    return ".".join(p for p in parts if p)
