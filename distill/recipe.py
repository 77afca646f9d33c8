"""A distillation run as data: which features are matched, with which loss and weight, in which stages.

    >>> Recipe(
    ...     name="mine",
    ...     source="this file",
    ...     stages=(
    ...         Stage("intermediate", share=0.7, matches=(Match("hidden", "hidden_mse"), Match("scores", "score_mse"))),
    ...         Stage("prediction", share=0.3, matches=(Match("logits", options={"temperature": 2.0}),)),
    ...     ),
    ... )

Nothing here touches a model; `Distiller` reads it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qbert.bits import BitsConfig, TensorSpec
from qbert.distill.features import OWN, check_feature
from qbert.distill.losses import LOSSES, Loss
from qbert.distill.mapping import LAYER_MAPS, LayerMap
from qbert.quantizers.sparsity import Pattern

StepTraining = Literal["fixed", "refit", "learned"]
ActivationTraining = Literal["fixed", "average", "learned"]

_DEFAULT_LOSS = {"hidden": "hidden_mse", "embeddings": "hidden_mse", "scores": "score_mse", "cls": "normalized_mse"}


@dataclass(frozen=True)
class Match:
    """One term of the loss.

    Attributes:
        feature: see `qbert.distill.features`; ``labels`` is the task's own loss on the data's labels, ``cost`` what
            a student under search says it costs (`qbert.distill.search`).
        loss: a name from `qbert.distill.losses.LOSSES`, or a callable (student, teacher, mask) -> scalar, a mean
            over rows [B, D] or real tokens (over what else its attribute ``items`` says: "rows" or "pairs"). Where
            None, the feature's usual one; for ``logits`` by the head: soft cross-entropy (over positions for a span),
            by ``config.problem_type`` that of every label on its own (``soft_ce`` and ``kl`` turn into it), or the mean
            squared error of a regression's values.
        weight: factor of the term; ``auto`` divides the term by its mean over the first 100 steps.
        layers: a named layer map or explicit pairs (see `qbert.distill.mapping`).
        embedding: whether a named map also pairs the embedding outputs (``hidden`` only).
        projection: ``linear`` (one map a pair), ``shared`` (one for all pairs), or None: student and teacher widths
            must then agree. On the student's side.
        reduction: ``mean`` or ``sum`` over the pairs of layers.
        options: further arguments of the loss, such as ``{"temperature": 2.0}``.
        name: what the term is called in logs; the feature's name where empty.
    """

    feature: str
    loss: str | Loss | None = None
    weight: float | Literal["auto"] = 1.0
    layers: LayerMap = "uniform"
    embedding: bool = True
    projection: Literal["linear", "shared"] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        check_feature(self.feature)
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is not known; use one of {', '.join(LOSSES)}, or a callable")
        if self.weight != "auto" and (not isinstance(self.weight, int | float) or not self.weight > 0):
            raise ValueError(f"weight={self.weight!r} of {self.term} is not possible; use a positive number or 'auto'")
        if isinstance(self.layers, str) and self.layers not in LAYER_MAPS:
            raise ValueError(f"layer map {self.layers!r} is not known; use one of {', '.join(LAYER_MAPS)} or pairs")
        if self.projection not in (None, "linear", "shared"):
            raise ValueError(f"projection={self.projection!r} is not possible; use 'linear', 'shared' or None")
        states = self.feature in ("hidden", "embeddings", "cls") or self.feature.startswith("module:")
        if self.projection is not None and not states:
            raise ValueError(
                f"projection={self.projection!r} maps states to another width, and {self.feature!r} has none; "
                "leave it out (heads of another number are matched by 'relations.query' and the like)"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r} is not possible; use 'mean' or 'sum'")
        if not isinstance(self.layers, str) and not len(self.layers):
            raise ValueError(f"layers={self.layers!r} of {self.term} is empty; give at least one pair of layers")
        if self.projection is not None and "." in self.name:
            raise ValueError(f"name={self.name!r} has a dot, which no projection can be called by; use '_' instead")
        self._check_options()

    def _check_options(self) -> None:
        possible = self._option_names()
        unknown = next((name for name in self.options if possible is not None and name not in possible), None)
        if possible is not None and unknown is not None:
            known = f"use some of {', '.join(possible)}" if possible else "leave options out"
            raise ValueError(f"options={dict(self.options)}: the loss of {self.term} takes no {unknown!r}; {known}")
        heat = self.options.get("temperature", 1.0)
        if not isinstance(heat, int | float) or not 0 < heat < math.inf:
            raise ValueError(f"temperature={heat!r} of {self.term} is not possible; use a positive number such as 2.0")

    def _option_names(self) -> list[str] | None:
        """What the loss may be given, None where it does not say."""
        if self.feature in OWN:
            return []
        heads = ["heads"] if self.feature.startswith("relations.") else []
        of_outputs = self.loss is None and self.feature in ("logits", "probes")
        try:
            parameters = inspect.signature(LOSSES["soft_ce"] if of_outputs else self.loss_function()).parameters
        except (TypeError, ValueError):  # some callables of other libraries have no signature
            return None
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        # The first three are student, teacher and mask, and `scale` is found from the batches.
        return [*heads, *(name for name in list(parameters)[3:] if name != "scale")]

    @property
    def term(self) -> str:
        """Name of the term in logs."""
        return self.name or self.feature.removeprefix("module:").replace(".", "_")

    def loss_function(self) -> Loss:
        """The loss of a feature; where the head decides (``logits``), see `qbert.distill.objective`."""
        usual = "attention_kl" if self.feature.startswith("relations.") else _DEFAULT_LOSS.get(self.feature, "mse")
        loss = self.loss or usual
        return LOSSES[loss] if isinstance(loss, str) else loss


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own loss.

    Attributes:
        name: for logs.
        matches: the terms of the loss.
        share: part of all steps, relative to the other stages.
        rate: factor of the learning rate in this stage.
        schedule: ``linear`` (warm-up, then down to 0 at the end of the stage) or ``constant`` (after the warm-up).
        bits: quantize the student's matrices to this many bits when the stage begins (2, 3, 4 or 8); None leaves them.
        teacher: ``given``, or ``previous``: the student as it was at the end of the stage before.
        rates: factor of the learning rate by pattern of module names, as in `BitsConfig` (the longest match counts);
            1 for what none matches. Parts with a factor of 0 stand still.
    """

    name: str
    matches: tuple[Match, ...]
    share: float = 1.0
    rate: float = 1.0
    schedule: Literal["linear", "constant"] = "linear"
    bits: int | None = None
    teacher: Literal["given", "previous"] = "given"
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.matches:
            raise ValueError(f"stage {self.name!r} has no matches; give at least one")
        terms = [match.term for match in self.matches]
        twice = next((term for term in terms if terms.count(term) > 1), None)
        if twice is not None:
            raise ValueError(f"stage {self.name!r} has two terms called {twice!r}; give one of them another name")
        if len({match.options["heads"] for match in self.matches if "heads" in match.options}) > 1:
            raise ValueError(f"stage {self.name!r} has relations of several numbers of heads; give all the same")
        if not self.share > 0 or not self.rate > 0:
            raise ValueError(f"stage {self.name!r}: share={self.share} and rate={self.rate} must be positive")
        slow = next((name for name, rate in self.rates.items() if rate < 0), None)
        if slow is not None:
            raise ValueError(f"stage {self.name!r}: rates[{slow!r}]={self.rates[slow]} must not be negative")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(
                f"stage {self.name!r}: schedule={self.schedule!r} is not possible; use 'linear' or 'constant'"
            )
        if self.teacher not in ("given", "previous"):
            raise ValueError(
                f"stage {self.name!r}: teacher={self.teacher!r} is not possible; use 'given' or 'previous'"
            )
        if self.bits not in (None, 2, 3, 4, 8):
            raise ValueError(f"stage {self.name!r}: bits={self.bits!r} is not possible; use 2, 3, 4 or 8")

    @property
    def uses_labels(self) -> bool:
        """Whether a term needs the data's labels."""
        return any(match.feature == "labels" for match in self.matches)

    @property
    def uses_teacher(self) -> bool:
        """Whether a term needs the teacher's outputs."""
        return any(match.feature not in OWN for match in self.matches)

    @property
    def takes_kept_outputs(self) -> bool:
        """Whether logits that were kept (`qbert.distill.outputs`) can stand for the teacher."""
        return self.teacher == "given" and {match.feature for match in self.matches} <= {"logits", "labels"}


@dataclass(frozen=True)
class Zeros:
    """Movement pruning during a training (`qbert.distill.zeros`).

    Attributes:
        pattern: "2:4" and the like, or the share of zeros at the end.
        begin, end: parts of the training between which the share rises; a pattern is whole from `begin` on, and its
            choice moves until `end`.
        names: patterns of the matrices, as in `BitsConfig`; all of the encoder layers where "*".
    """

    pattern: str | float
    begin: float = 0.1
    end: float = 0.7
    names: str | tuple[str, ...] = "*"

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin={self.begin} and end={self.end} are not parts of the training in their order")


@dataclass(frozen=True)
class Recipe:
    """A published (or our own) way of distilling.

    Attributes:
        name, source: what it is called and where it is from.
        stages: in order.
        steps: what happens to the step sizes of weights below 8 bits: ``fixed`` (as found at the start), ``refit``
            (least squares for the present codes, every `refit_every` steps) or ``learned`` (LSQ; those of tables stay
            as found).
        activations: what happens to static activation ranges: ``fixed`` (as calibrated), ``average`` (they follow a
            moving average of the batches) or ``learned`` (LSQ). Dynamic ranges have nothing to train.
        step_rate: learning rate of learned steps, relative to their own size.
        refit_every: steps between two refits.
        freeze_at: part of the training after which step sizes stay as they are.
        dropout: whether the student trains with its dropout.
        zeros: movement pruning on the way; None prunes nothing (zeros of a pruned student stay in any case).
        quantization: settings of `BitsConfig` that the recipe was made for, by number of bits ("2"), by bits and
            rounding ("2, nearest"), or for all ("*").
        arguments: `TrainingArguments` the recipe was made with (learning_rate, num_train_epochs, ...).
    """

    name: str
    source: str
    stages: tuple[Stage, ...]
    steps: StepTraining = "learned"
    activations: ActivationTraining = "fixed"
    step_rate: float = 1e-3
    refit_every: int = 10
    freeze_at: float = 0.9
    dropout: bool = True
    zeros: Zeros | None = None
    quantization: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"recipe {self.name!r} has no stages; give at least one")
        if self.steps not in ("fixed", "refit", "learned"):
            raise ValueError(f"steps={self.steps!r} is not possible; use 'fixed', 'refit' or 'learned'")
        if self.activations not in ("fixed", "average", "learned"):
            raise ValueError(f"activations={self.activations!r} is not possible; use 'fixed', 'average' or 'learned'")
        if not 0 < self.freeze_at <= 1:
            raise ValueError(f"freeze_at={self.freeze_at!r} is not a part of the training; use a number in (0, 1]")
        if self.refit_every < 1 or not self.step_rate > 0:
            raise ValueError(f"refit_every={self.refit_every} and step_rate={self.step_rate} must be positive")

    def bits_config(self, bits: int) -> BitsConfig:
        """The quantizers that the recipe was made for, at this number of bits."""
        return self.adapt(BitsConfig(bits))

    def adapt(self, config: BitsConfig) -> BitsConfig:
        """The same bits with the recipe's quantizers, where `config` does not say otherwise."""
        rules = {}
        for pattern, settings in config.rules.items():
            bits, rounding = settings["bits"], {**config.defaults, **settings}.get("rounding", TensorSpec.rounding)
            ours = {**self.quantization.get(f"{bits}", {}), **self.quantization.get(f"{bits}, {rounding}", {})}
            rules[pattern] = {**{k: v for k, v in ours.items() if k not in config.defaults}, **settings}
        defaults = {**self.quantization.get("*", {}), **config.defaults}
        return BitsConfig(rules, embedding_bits=config.embedding_bits, **defaults)

    @property
    def terms(self) -> list[str]:
        """Every term's name, in order of appearance."""
        return list(dict.fromkeys(match.term for stage in self.stages for match in stage.matches))

    def boundaries(self, total: int) -> list[int]:
        """First step of each stage and, last, `total`.

        Raises:
            ValueError: if a stage would have no step.
        """
        table = Timetable(self, total)
        for stage in table.missing:
            raise ValueError(f"stage {stage.name!r} has no step among {total}; train for longer")
        return table.ends

    def stage_at(self, step: int, total: int) -> int:
        """Index of the stage that step number `step` (from 0) of `total` belongs to."""
        return Timetable(self, total).stage_at(step)

    def rate_at(self, step: int, total: int, warmup: int) -> float:
        """Factor of the learning rate at a step: warm-up in the first stage, then each stage's own schedule."""
        return Timetable(self, total, warmup).rate_at(step)


class Timetable:
    """When each stage of a recipe begins, in a training of `total` steps with `warmup` steps before the full rate.

    Attributes:
        ends: first step of each stage and, last, `total`.
        missing: the stages that have no step.
    """

    def __init__(self, recipe: Recipe, total: int, warmup: int = 0) -> None:
        self.stages, self.warmup = recipe.stages, warmup
        shares = [stage.share for stage in recipe.stages]
        self.ends = [0, *(round(total * done / sum(shares)) for done in itertools.accumulate(shares))]
        spans = zip(self.stages, self.ends, self.ends[1:], strict=False)
        self.missing = [stage for stage, begin, end in spans if begin == end]

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step; the last stage's after the end."""
        return next((i for i, end in enumerate(self.ends[1:]) if step < end), len(self.stages) - 1)

    def rate_at(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        index = self.stage_at(step)
        stage, begin, end = self.stages[index], *self.ends[index : index + 2]
        if step < self.warmup:
            return stage.rate * (step + 1) / self.warmup
        if stage.schedule == "constant":
            return stage.rate
        begin = max(begin, self.warmup)
        return stage.rate * max(end - step, 0) / max(end - begin, 1)
