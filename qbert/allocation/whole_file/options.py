"""The ways to store each weight of a model: what an option is, and which ones a weight has before they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from qbert.allocation.blocks import Fixed, fixed_value
from qbert.bits import FLOAT_BITS, BitsConfig, TensorSpec
from qbert.encoders.targets import HEAD_ROLE, Target, base_models, find_targets
from qbert.encoders.weights import is_table
from qbert.sizes import header_bytes, quantized_header_bytes, tensor_bytes

_LARGE_HEAD = 2**14  # values of a head that is worth a choice of its own
FILE_DEFAULTS: dict[str, Any] = {"rounding": "compensated", "activation_range": "asymmetric"}


@dataclass(frozen=True)
class Option:
    """One way to store a weight.

    Attributes:
        rule: what a `BitsConfig` says of it: fields of `TensorSpec`.
        size: bytes in the file, its share of the header included.
        damage: predicted, in units of the outputs' metric (for classes: nats).
        parts: where something else stands in the place of a matrix, the rules of its parts; None for the weight itself.
        form: what stands there (`Alternative.form`); empty for the weight itself.
    """

    rule: Mapping[str, Any]
    size: int
    damage: float
    parts: Mapping[str, Mapping[str, Any]] | None = None
    form: Mapping[str, Any] = field(default_factory=dict)


class Change(NamedTuple):
    """What an option of a matrix changes in a module.

    Attributes:
        weight: bfloat16, in the layout of the module's own.
        bias: [O] float32, what the bias gains; None for nothing.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Alternative:
    """One way to store a matrix in the place of which something else stands, such as two factors or other values.

    Attributes:
        rules: name of each part -> what a `BitsConfig` says of it.
        change: [O, I], what is computed with minus the matrix.
        size: bytes in the file, its share of the header included.
        form: what stands there, in words of whoever puts it there: ``{"rank": 96}``.
        bias: [O], what the bias gains; None for nothing.
    """

    rules: Mapping[str, Mapping[str, Any]]
    change: Tensor
    size: int
    form: Mapping[str, Any]
    bias: Tensor | None = None


@dataclass(frozen=True)
class Item:
    """A weight with its options.

    Attributes:
        names: of the targets that share it.
        options: at least one.
    """

    names: tuple[str, ...]
    options: tuple[Option, ...]


class Rules:
    """The ways to store one weight, before they are measured.

    Attributes:
        first: the target that is asked about the weight.
        names, modules: of all targets that share it.
        fixed: its only rule, if it has one.
        tied: whether it is a table that a head computes with.
        matrix_rules: rules of a matrix; empty for a table, and for what stays as it is.
        further: what may stand in the place of a matrix.
        is_table: whether the weight is a table with options.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        widths: Sequence[int],
        settings: Mapping[str, Any],
        fixed: Fixed | None,
    ) -> None:
        self.first = targets[0]
        table = next((t for t in targets if t.is_embedding), None)
        self.is_table = table is not None
        if table is not None:
            self.first = table
            targets = [table]  # a head that is tied to it follows
        self.names = tuple(t.name for t in targets)
        self.modules = [t.module for t in targets]
        self.widths, self.settings, self.model = widths, settings, model
        self.fixed = _fixed_rule(self.first, fixed)
        self.tied = self.is_table and sum(t.weight is self.first.weight for t in find_targets(model)) > 1
        self.matrix_rules: list[dict[str, Any]] = []
        self.further: tuple[Alternative, ...] = ()
        if not self.is_table:
            chosen = [{"bits": b} for b in widths] if self.fixed is None else [self.fixed]
            head = self.first.role == HEAD_ROLE
            chosen_too = not is_table(self.first.module) and _is_worth_a_choice(model, self.first)
            if not head or self.fixed is not None or chosen_too:
                self.matrix_rules = chosen
            if head and self.matrix_rules and self.fixed is None:
                self.matrix_rules = [*chosen, {"bits": 32}]

    def spec(self, rule: Mapping[str, Any]) -> TensorSpec | None:
        """The specification under a rule; None for float."""
        if rule["bits"] in FLOAT_BITS:
            return None
        config = BitsConfig({name: dict(rule) for name in self.names}, embedding_bits=32, **self.settings)
        return config.resolve(self.model)[self.first.path]

    def size(self, spec: TensorSpec | None) -> int:
        """Bytes in the file."""
        target = self.first
        if spec is None:
            weight = target.weight
            return weight.numel() * weight.element_size() + header_bytes(f"{target.path}.weight", weight.shape)
        static = 8 if spec.activation_range == "static" and not self.is_table else 0
        return sum(tensor_bytes(target, spec)) + static + quantized_header_bytes(target, spec)


def refuse_what_is_not_measured(model: nn.Module, rules: Sequence[Rules]) -> None:
    """Raises ValueError for a model that is quantized, or has nothing to choose, or weights that no module computes
    with alone (gates of an LSTM) whose bits are not fixed."""
    done = next((path for path, m in model.named_modules() if hasattr(m, "quantized_weight")), None)
    if done is not None or not rules:
        raise ValueError(
            f"model: {done} is quantized already; give the float model"
            if done is not None
            else f"model: {type(model).__name__} has no matrix or table that could be quantized; pass an encoder"
        )
    modules = set(model.modules())
    for rule in rules:
        if rule.fixed is None and rule.first.module not in modules:
            raise ValueError(
                f"fixed: what {rule.first.name} does to the outputs is not measured, because it is part of a recurrent "
                f"layer; give its bits, such as fixed={{{rule.first.name!r}: 4}}"
            )


def _is_worth_a_choice(model: nn.Module, target: Target) -> bool:
    """Whether a matrix outside of the layers is large, or part of an encoder as a pooler is."""
    inside = any(not prefix or target.path.startswith(prefix + ".") for prefix, _ in base_models(model))
    has_prefix = any(prefix for prefix, _ in base_models(model))
    return target.weight.numel() >= _LARGE_HEAD or (inside and has_prefix)


def _fixed_rule(target: Target, fixed: Fixed | None) -> dict[str, Any] | None:
    value = fixed_value(target.name, fixed) if fixed else None
    if value is None and target.is_embedding and fixed and "embeddings" in fixed:
        value = fixed["embeddings"]
    if value is None and not target.is_embedding and target.role != HEAD_ROLE and fixed:
        value = fixed.get("*")
    if value is None:
        return None
    return dict(value) if isinstance(value, Mapping) else {"bits": value}


def sharing(model: nn.Module) -> list[list[Target]]:
    """The targets of `model`, those with one weight together."""
    together: dict[int, list[Target]] = {}
    for target in find_targets(model):
        together.setdefault(id(target.weight), []).append(target)
    return list(together.values())
