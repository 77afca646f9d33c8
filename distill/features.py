"""What a student can be matched on, and how it is recorded without changing a model.

========================  =========================================================================================
feature                   tensors, one a layer
========================  =========================================================================================
``hidden``                hidden states [B, T, D]; number 0 is the embedding output
``embeddings``            the embedding output alone
``cls``                   the first token of each hidden state [B, D]
``scores``                attention scores before the softmax Q K^T / sqrt(d), [B, H, T, T]; MPNet's with its bias
``relations.query``       Q Q^T / sqrt(d) over `heads` relation heads; also ``.key`` and ``.value`` (MiniLMv2)
``module:PATH``           the output of any module, one entry a call
``probes``                what a classifier on each layer says, [B, C] (`qbert.distill.probes`)
``logits``                the model's outputs: [B, C], [B, T, C] or [2, B, T] (start and end of a span)
========================  =========================================================================================

Scores and relations are built from hooks on the query, key and value maps, so both models keep their fast attention
(SDPA gives no scores, and asking transformers for them gives probabilities or ``None``). Hooks append in the order of
the calls, so a layer that is applied several times (ALBERT) counts as several.

    >>> with Recorder(model, {"hidden", "scores"}) as recorder:
    ...     output = model(**batch, **recorder.arguments)
    >>> recorder.features("scores", output)[0].shape
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import LayerParts
from qbert.encoders.targets import attention_heads, base_model, encoder_layers, join_path, linear_role

_RELATIONS = {"relations.query": "query", "relations.key": "key", "relations.value": "value"}
_DISTANCES = re.compile(r"rotary|relative_(attention|position)_bias|distance_embedding|\brel_pos")
_BIAS = "bias"  # where what is added to the scores is kept
_STATES = frozenset({"hidden", "embeddings", "cls"})
# What has no counterpart at the teacher: the task's own loss, and the price of an architecture under search.
OWN = frozenset({"labels", "cost"})
FEATURES = (*sorted(_STATES), "scores", *_RELATIONS, "probes", "logits", *sorted(OWN, reverse=True))


def check_feature(name: str) -> str:
    """`name` if it is a feature.

    Raises:
        ValueError: for another name, with the choices.
    """
    if name not in FEATURES and not (name.startswith("module:") and len(name) > len("module:")):
        raise ValueError(f"feature {name!r} is not known; use one of {', '.join(FEATURES)}, or 'module:PATH'")
    return name


class Recorder:
    """Records features of one forward pass.

    Args:
        model: what will be called inside the ``with`` block.
        features: names from the table above.
        relation_heads: number H of heads of the relations; the model's own attention heads for None.

    Raises:
        ValueError: if the model cannot give a feature, naming it.
    """

    def __init__(self, model: nn.Module, features: Iterable[str], *, relation_heads: int | None = None) -> None:
        self.model = model
        self.wanted = {check_feature(name) for name in features}
        self.relation_heads = relation_heads
        self._calls: dict[str, list[Tensor]] = {}
        self._heads: dict[str, list[int | None]] = {}  # of each call; None where the layer does not say
        self._sources = self._find_sources()
        self._own_heads = _heads_by_map(model) if {"query", "key", "value"} & set(self._sources) else {}
        self._handles: list[Any] = []

    @property
    def arguments(self) -> dict[str, Any]:
        """Extra keyword arguments for the model's forward."""
        states = {"output_hidden_states": True} if self.wanted & _STATES else {}
        return states | ({"output_probes": True} if "probes" in self.wanted else {})

    def features(self, name: str, output: Any, layers: Sequence[int] | None = None) -> list[Tensor]:
        """The tensors of one feature, after the forward pass that gave `output`.

        Args:
            name: one of those that are recorded.
            output: of the model.
            layers: indices of the tensors that are needed, in this order; scores and relations of others are not
                computed. All where None.
        """
        if name == "scores" or name in _RELATIONS:
            return self._products(name, layers)
        found = self._given(name, output)
        return found if layers is None else [found[i] for i in layers]

    def _products(self, name: str, layers: Sequence[int] | None) -> list[Tensor]:
        """Scores, or relations."""
        one, other = ("query", "key") if name == "scores" else (_RELATIONS[name],) * 2
        calls = list(zip(self._calls[one], self._calls[other], self._heads[one], strict=True))
        given = None if name == "scores" else self.relation_heads
        chosen = calls if layers is None else [calls[i] for i in layers]
        found = [dot_scores(a, b, given or heads or self._config_heads()) for a, b, heads in chosen]
        if name == "scores" and _BIAS in self._sources:
            bias = self._calls[_BIAS][0].permute(2, 0, 1)  # [H, T, T]
            found = [scores + bias for scores in found]
        return found

    def _given(self, name: str, output: Any) -> list[Tensor]:
        """What the model gives as it is."""
        if name == "logits":
            return [model_logits(output)]
        if name == "probes":
            return list(output.probes)
        if name in _STATES:
            states = getattr(output, "hidden_states", None)
            if states is None:
                raise ValueError(f"{type(self.model).__name__} returns no hidden states; match 'module:PATH' instead")
            if name == "hidden":
                return list(states)
            return [states[0]] if name == "embeddings" else [state[:, 0] for state in states]
        values = self._calls[name]
        if not values:
            raise ValueError(f"feature {name!r}: the module was not called in the forward pass of the model")
        return values

    def __enter__(self) -> Recorder:
        self._calls = {key: [] for key in self._sources}
        self._heads = {key: [] for key in self._sources}
        for key, modules in self._sources.items():
            for module in modules:
                self._handles.append(module.register_forward_hook(self._hook(key)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget(self) -> None:
        """Let go of the tensors of the last pass."""
        self._calls, self._heads = {}, {}

    def _hook(self, key: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            value = output
            while not isinstance(value, Tensor):
                value = value[0]
            self._calls[key].append(value)
            self._heads[key].append(self._own_heads.get(id(module)))

        return record

    def _find_sources(self) -> dict[str, list[nn.Module]]:
        """Modules to listen to, by the key their outputs are stored under."""
        parameters = inspect.signature(self.model.forward).parameters
        if self.wanted & _STATES and not (
            "output_hidden_states" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        ):
            raise ValueError(f"{type(self.model).__name__} returns no hidden states; match 'module:PATH' instead")
        if "probes" in self.wanted and "output_probes" not in parameters:
            raise ValueError(
                f"{type(self.model).__name__} has no probes on its layers; make a teacher's by "
                "qbert.distill.probes.probe_layers, and match 'hidden' or 'logits' of other students"
            )
        roles = {_RELATIONS[name] for name in self.wanted & _RELATIONS.keys()}
        if "scores" in self.wanted:
            roles |= {"query", "key"}
        sources: dict[str, list[nn.Module]] = {role: self._projections(role) for role in sorted(roles)}
        if "scores" in self.wanted:
            table = _table_of_distances(self.model)
            sources |= {_BIAS: [table]} if table is not None else {}
        for name in self.wanted:
            if name.startswith("module:"):
                sources[name] = [self._module(name.removeprefix("module:"))]
        return sources

    def _projections(self, role: str) -> list[nn.Module]:
        _, base = base_model(self.model)
        named = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear) or is_factored(m)]
        parts = {id(part) for _, m in named if is_factored(m) for part in m.children()}
        named = [(n, m) for n, m in named if id(m) not in parts]
        # DeBERTa's pos_query_proj has the query role too, but projects positions.
        found: list[nn.Module] = [m for n, m in named if linear_role(n) == role and not re.search(r"\bpos_", n)]
        # A table that attends to itself (SAFE) has such maps too, and is no layer.
        inside = {id(m) for _, layer in encoder_layers(self.model) for m in layer.modules()}
        found = [m for m in found if id(m) in inside] or found
        if not found:
            raise ValueError(
                f"the attention of {type(self.model).__name__} does not compute its scores from separate query and "
                "key maps alone, so feature 'scores' or 'relations' cannot be recorded; match 'hidden' or 'logits'"
            )
        if "scores" in self.wanted and _adds_positions(base) and _table_of_distances(self.model) is None:
            raise ValueError(
                f"the attention of {type(self.model).__name__} does not compute its scores from separate query and "
                "key maps alone (positions rotate them, or are added), so feature 'scores' cannot be recorded; match "
                "'relations.query' and 'relations.key', 'hidden' or 'logits'"
            )
        return found

    def _module(self, path: str) -> nn.Module:
        prefix, _ = base_model(self.model)
        modules = dict(self.model.named_modules())
        for candidate in (path, join_path(prefix, path)):
            if candidate in modules:
                return modules[candidate]
        raise ValueError(f"feature 'module:{path}': {type(self.model).__name__} has no module of that name")

    def _config_heads(self) -> int:
        heads = attention_heads(base_model(self.model)[1])
        if not heads:
            raise ValueError(f"{type(self.model).__name__} does not say its number of attention heads in its config")
        return heads


def _adds_positions(base: nn.Module) -> bool:
    """Whether scores are more than products of queries and keys: those are rotated, or distances add to them."""
    config = getattr(base, "config", None)
    return (
        bool(getattr(config, "relative_attention", False))
        or hasattr(config, "rope_parameters")
        or hasattr(config, "rotary_value")  # RoFormer
        or any(_DISTANCES.search(name) for name, _ in base.named_modules())
    )


def _table_of_distances(model: nn.Module) -> nn.Module | None:
    """What gives, once a pass, the [T, T, H] that MPNet adds to the scores of all layers; None for other families."""
    _, base = base_model(model)
    table = getattr(getattr(base, "encoder", None), "relative_attention_bias", None)
    is_mpnet = getattr(getattr(base, "config", None), "model_type", None) == "mpnet"
    return table if is_mpnet and isinstance(table, nn.Module) else None


def _heads_by_map(model: nn.Module) -> dict[int, int]:
    """id of a query, key or value map -> attention heads of its layer; pruned ones have fewer than the config says."""
    parts = [LayerParts.of(layer) for _, layer in encoder_layers(model)]
    return {id(m): p.heads for p in parts if p is not None for m in (p.query, p.key, p.value)}


def dot_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Scaled dot products Q K^T / sqrt(d) of [B, T, H * d] projections, as [B, H, T, T].

    Raises:
        ValueError: if `heads` does not divide the width.
    """
    width = query.shape[-1]
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}; choose another number of relation heads")
    query, key = (x.unflatten(-1, (heads, width // heads)).transpose(1, 2) for x in (query, key))  # [B, H, T, d]
    return torch.matmul(query, key.transpose(-1, -2)) * (width // heads) ** -0.5


def model_logits(output: Any) -> Tensor:
    """The outputs of a head: ``.logits``, or start and end logits stacked to [2, B, T].

    Raises:
        ValueError: if the output has neither.
    """
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits])
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"{type(output).__name__} has neither logits nor start_logits; give the models a task head")
    return cast(Tensor, logits)
