"""What a student can be matched on, and how it is recorded without changing a model.

========================  =========================================================================================
feature                   tensors, one a layer
========================  =========================================================================================
``hidden``                hidden states [B, T, D]; number 0 is the embedding output
``embeddings``            the embedding output alone
``cls``                   the first token of each hidden state [B, D]
``scores``                attention scores before the softmax Q K^T / sqrt(d), [B, H, T, T]
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
from collections.abc import Iterable
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import LayerParts
from qbert.encoders.targets import attention_heads, base_model, encoder_layers, join_path, linear_role

_RELATIONS = {"relations.query": "query", "relations.key": "key", "relations.value": "value"}
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

    def features(self, name: str, output: Any) -> list[Tensor]:
        """The tensors of one feature, after the forward pass that gave `output`."""
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
        if name == "scores":
            pairs = zip(self._calls["query"], self._calls["key"], self._heads["query"], strict=True)
            return [dot_scores(query, key, heads or self._config_heads()) for query, key, heads in pairs]
        if name in _RELATIONS:
            role = _RELATIONS[name]
            given = self.relation_heads
            calls = zip(self._calls[role], self._heads[role], strict=True)
            return [dot_scores(x, x, given or heads or self._config_heads()) for x, heads in calls]
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
        config = getattr(base, "config", None)
        relative = bool(getattr(config, "relative_attention", False)) or hasattr(config, "rope_parameters")
        if not found or (relative and "scores" in self.wanted):
            raise ValueError(
                f"the attention of {type(self.model).__name__} does not compute its scores from separate query and "
                "key maps alone, so feature 'scores' or 'relations' cannot be recorded; match 'hidden' or 'logits'"
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
