"""Student, teacher and the loss between them as one module, whose forward pass gives the loss and each of its terms.

It stands alone because it is a module like any other: it computes a loss without a trainer around it.

`Distillation` is what the optimizer, the data-parallel wrapper and the checkpoints see: the student and, beside it,
`DistillationHeads` with all that is trained or counted only for the sake of the loss (projections, automatic
weights). The teacher is *not* a submodule, so it is never switched to training mode, optimized or saved.

    >>> Distillation(student, teacher, recipe, example_batch)(**batch)["loss"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.distill.aside import Rates, left_as_it_is, problem_type_kept, restore, train_without_dropout
from qbert.distill.features import OWN, Recorder
from qbert.distill.losses import (
    ITEMS,
    LOSSES,
    Loss,
    count_items,
    count_labels,
    hard_cross_entropy,
    kl_divergence,
    loss_items,
    mse,
    output_mask,
    sigmoid_cross_entropy,
    sigmoid_hard_cross_entropy,
    sigmoid_kl_divergence,
    soft_cross_entropy,
    span_cross_entropy,
    span_hard_cross_entropy,
    span_kl_divergence,
    span_labels,
    teacher_scale,
    token_mask,
)
from qbert.distill.mapping import Pairs, layer_pairs, state_pairs
from qbert.distill.outputs import TEACHER_LOGITS
from qbert.distill.recipe import Match, Recipe, Stage
from qbert.encoders.inputs import accepted_inputs, to_device
from qbert.encoders.modes import evaluation_mode

AUTO_WEIGHT_STEPS = 100
EXPECTED_ITEMS = "expected_items"  # keyword of `Distillation.forward`
MULTI_LABEL = "multi_label_classification"

SPAN = "span"

# Losses over classes that exclude each other, and what they become where every label is decided on its own, or where
# the classes are the positions of each text.
_OF_LABELS: dict[Loss, Loss] = {
    soft_cross_entropy: sigmoid_cross_entropy,
    kl_divergence: sigmoid_kl_divergence,
    hard_cross_entropy: sigmoid_hard_cross_entropy,
}
_OF_POSITIONS: dict[Loss, Loss] = {
    soft_cross_entropy: span_cross_entropy,
    kl_divergence: span_kl_divergence,
    hard_cross_entropy: span_hard_cross_entropy,
}


class DistillationHeads(nn.Module):
    """What the loss needs and the exported student must not have.

    Attributes:
        projections: one linear map a pair ("STAGE.TERM.STUDENT"), or one a term ("STAGE.TERM") where shared.
        auto_sum, auto_count: sum and number of the values seen of each term with automatic weight, by recipe order.
    """

    auto_sum: Tensor
    auto_count: Tensor

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict()
        self.register_buffer("auto_sum", torch.zeros(terms))
        self.register_buffer("auto_count", torch.zeros(terms))

    def forget(self) -> None:
        """Begin to count again."""
        self.auto_sum.zero_()
        self.auto_count.zero_()


class Distillation(nn.Module):
    """The student under training.

    Args:
        student: the model to train.
        teacher: the model to learn from.
        recipe: stages and their matches.
        example: a small batch as the collator makes it. It is run once through both models, so that a match that
            cannot work is refused before training, and projections get their widths.

    Raises:
        ValueError: a layer that does not exist, widths that differ without a projection, features of another shape.
    """

    teacher: nn.Module

    def __init__(self, student: nn.Module, teacher: nn.Module, recipe: Recipe, example: dict[str, Any]) -> None:
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.stage_index = 0
        self.heads = DistillationHeads(len(recipe.terms))
        self._dropout_rates: Rates = []
        self._recorders: dict[tuple[int, bool], Recorder] = {}  # by stage, and whether of the teacher
        self.set_teacher(teacher)
        self._pairs: dict[tuple[int, str], Pairs] = {}
        self._scales: dict[tuple[str, int], Tensor] = {}  # by term and student layer, of the present step
        self._has_looked = False
        self._all_tokens = False
        # ELECTRA's discriminator: each token is replaced, or it is not.
        self._decides_tokens = hasattr(student, "discriminator_predictions")
        self._prepare(example)

    @property
    def stage(self) -> Stage:
        """The stage whose loss is computed now."""
        return self.recipe.stages[self.stage_index]

    def set_teacher(self, teacher: nn.Module) -> None:
        """Learn from `teacher`, which is only ever run in evaluation mode and without gradients, and keeps its own."""
        # Past nn.Module's bookkeeping: as a submodule it would be trained, moved to train() and saved. Its parameters
        # keep their requires_grad, because students are copies of it.
        object.__setattr__(self, "teacher", teacher)
        self._recorders = {key: recorder for key, recorder in self._recorders.items() if not key[1]}

    def train(self, mode: bool = True) -> Distillation:
        """Training mode of the student; without dropout where the recipe says so. The teacher stays as it is."""
        super().train(mode)
        if mode and not self.recipe.dropout:
            self._dropout_rates += train_without_dropout(self.student)
        elif self._dropout_rates:
            restore(self._dropout_rates)
            self._dropout_rates = []
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The student's table (the Trainer adds NEFTune's noise to its output)."""
        return cast(Any, self.student).get_input_embeddings()  # type: ignore[no-any-return]

    def activation_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute the student's activations in the backward pass (the Trainer asks for it)."""
        cast(Any, self.student).activation_checkpointing_enable(**arguments)

    def forward(self, **inputs: Any) -> Any:
        """In training mode {"loss": scalar, "terms": [number of terms]}; in evaluation mode the student's output."""
        inputs.pop("num_items_in_batch", None)
        expected = inputs.pop(EXPECTED_ITEMS, None)
        if self.training:
            return self.losses(inputs, expected)
        inputs.pop(TEACHER_LOGITS, None)
        return self.student(**inputs)

    def losses(self, inputs: dict[str, Any], expected: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted sum and the unweighted terms of the present stage for one batch.

        Args:
            expected: float [len(ITEMS)], the number of items (`count_items`) of a micro-batch of this training step on
                average. Each term is then multiplied by this batch's share of it, so that the plain mean over all
                micro-batches and processes is the mean over all items of the step. None: the batch is the whole.
        """
        stage = self.stage
        student_inputs = inputs if stage.uses_labels else _without_labels(inputs)
        recorded = self._run(self.student, student_inputs, stage)
        target = None
        if stage.uses_teacher:
            target = self._run_teacher(inputs, stage)
        shares = None if expected is None else self.count_items(inputs).to(expected.device) / expected.clamp_min(1e-9)
        total: Tensor | None = None
        terms: list[Tensor] = []
        for match in stage.matches:
            value, items = self._term(match, recorded, target, inputs)
            if shares is not None:
                value = value * shares[ITEMS.index(items)]
            weight = self._weight(match, value)
            total = value * weight if total is None else total + value * weight
            terms.append(value.detach().float())
        for recorder, _ in (found for found in (recorded, target) if found is not None):
            recorder.forget()
        assert total is not None  # a stage has at least one match
        return {"loss": total, "terms": torch.stack(terms)}

    @torch.no_grad()
    def look_ahead(
        self, batches: Sequence[dict[str, Any]], expected: Tensor | None, mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Find what all micro-batches of a step must share: the scales of normalised terms, and automatic weights.

        Args:
            batches: the micro-batches of this process, on the device; none where the step is one batch, which needs
                nothing of the kind.
            expected: as of `losses`.
            mean: gives the mean of a tensor over all processes.
        """
        self._scales, self._has_looked = {}, False
        matches = self.stage.matches
        if not batches or expected is None:
            return
        normalized = [match for match in matches if match.options.get("normalized")]
        counted = [match for match in matches if self._counts_weight(match)]
        if normalized:
            found = [self._teacher_scales(normalized, dict(inputs), expected) for inputs in batches]
            whole = mean(torch.stack([torch.stack(list(scales.values())) for scales in found]).mean(0))
            self._scales = dict(zip(found[0], whole.unbind(), strict=True))
        if counted:
            with left_as_it_is(self):
                terms = torch.stack([self.losses(dict(inputs), expected)["terms"] for inputs in batches]).mean(0)
            for match, value in zip(matches, mean(terms), strict=True):
                if match in counted:
                    self._count_weight(match, value)
        self._has_looked = True

    def _teacher_scales(
        self, matches: Sequence[Match], inputs: dict[str, Any], expected: Tensor
    ) -> dict[tuple[str, int], Tensor]:
        recorder, output = self._run_teacher(inputs, self.stage)
        shares = self.count_items(inputs).to(expected.device) / expected.clamp_min(1e-9)
        mask, found = token_mask(inputs), {}
        for match in matches:
            pairs = self._pairs[self.stage_index, match.term]
            teacher = _of_layers(recorder, match, output, [t for _, t in pairs])
            for s, t in pairs:
                share = shares[ITEMS.index(loss_items(match.loss_function(), rows_only=teacher[t].dim() == 2))]
                kept = None if teacher[t].dim() == 2 else mask
                found[match.term, s] = teacher_scale(match.loss_function(), teacher[t], kept).float() * share
        recorder.forget()
        return found

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """float32 [len(ITEMS)]: what the losses of these models are means over, in one batch."""
        return count_items(inputs, all_tokens=self._all_tokens, real_only=self._decides_tokens)

    def _run(self, model: nn.Module, inputs: dict[str, Any], stage: Stage) -> tuple[Recorder, Any]:
        key = (self.stage_index, model is self.teacher)
        if key not in self._recorders:
            wanted = {match.feature for match in stage.matches} - OWN
            heads = {m.options["heads"] for m in stage.matches if "heads" in m.options}
            self._recorders[key] = Recorder(model, wanted, relation_heads=max(heads) if heads else None)
        with self._recorders[key] as recorder:
            return recorder, model(**accepted_inputs(model, inputs), **recorder.arguments)

    def _run_teacher(self, inputs: dict[str, Any], stage: Stage) -> tuple[Any, Any]:
        kept = inputs.get(TEACHER_LOGITS)
        if kept is not None and stage.takes_kept_outputs:
            return _KeptOutputs(), kept
        with torch.no_grad(), evaluation_mode(self.teacher):
            return self._run(self.teacher, _without_labels(inputs), stage)

    def _term(self, match: Match, recorded: Any, target: Any, inputs: dict[str, Any]) -> tuple[Tensor, str]:
        """(value, what it is a mean over: one of `ITEMS`)."""
        recorder, output = recorded
        if match.feature == "labels":
            return self._label_loss(output, inputs), "labels"
        if match.feature == "cost":
            return _cost(output), "rows"
        if match.feature == "logits":
            (ours,), (given,) = recorder.features("logits", output), target[0].features("logits", target[1])
            given = given.to(ours.dtype)
            given = given.reshape(ours.shape) if isinstance(target[0], _KeptOutputs) else given
            return self._logits_term(match, output, ours, given, inputs)
        pairs = self._pairs[self.stage_index, match.term]
        student = _of_layers(recorder, match, output, [s for s, _ in pairs])
        teacher = _of_layers(target[0], match, target[1], [t for _, t in pairs])
        dtype = student[pairs[0][0]].dtype
        teacher = {t: x.to(dtype) for t, x in teacher.items()}
        if match.feature == "probes":
            said = [self._logits_term(match, output, student[s], teacher[t], inputs)[0] for s, t in pairs]
            return torch.stack(said).sum() if match.reduction == "sum" else torch.stack(said).mean(), "rows"
        mask = token_mask(inputs)
        values = [self._pair_loss(match, s, student[s], teacher[t], mask) for s, t in pairs]
        if torch.is_grad_enabled() and not values[0].requires_grad:
            raise ValueError(
                f"term {match.term!r} has no gradient: the feature was recorded inside reentrant gradient "
                "checkpointing; set activation_checkpointing_kwargs={'use_reentrant': False}"
            )
        stacked = torch.stack(values)
        items = loss_items(match.loss_function(), rows_only=student[pairs[0][0]].dim() == 2)
        return stacked.sum() if match.reduction == "sum" else stacked.mean(), items

    def _label_loss(self, output: Any, inputs: dict[str, Any]) -> Tensor:
        """The task's own loss, 0 for a batch without a label."""
        spans, mask = span_labels(inputs), token_mask(inputs)
        if spans and mask is not None and getattr(output, "start_logits", None) is not None:
            # Not the model's own: that counts padding as possible answers, and is NaN where every start, or every
            # end, is outside of the text.
            logits = torch.stack([output.start_logits, output.end_logits]).float()
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
            loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(spans), reduction="sum")
            return loss / count_labels(inputs).clamp_min(1)
        if getattr(output, "loss", None) is None:
            raise ValueError("a term needs labels, but the batch has none; drop it or give labelled data")
        if not bool(count_labels(inputs, self._decides_tokens)):
            some = next(p for p in self.student.parameters() if p.requires_grad)
            return some.sum() * 0.0
        return cast(Tensor, output.loss)

    def _logits_term(
        self, match: Match, output: Any, student: Tensor, teacher: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, str]:
        mask, labels = token_mask(inputs), inputs.get("labels")
        if getattr(output, "start_logits", None) is not None:
            items = "tokens" if match.loss == "mse" else "rows"
            return _logits_loss(match, student, teacher, mask, SPAN), items
        if self._decides_tokens:
            student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)  # [B, T, 1]
            return _logits_loss(match, student, teacher, mask, MULTI_LABEL), "tokens"
        if student.dim() == 3:
            mask = output_mask(mask, labels, self._all_tokens)
            return _logits_loss(match, student, teacher, mask, None), "outputs"
        kind = problem_type(self.student, self.teacher) or _guessed_type(student, labels)
        return _logits_loss(match, student, teacher, None, kind), "rows"

    def _pair(self, match: Match, student: list[Tensor], teacher: list[Tensor]) -> Pairs:
        counts = {"students": len(student), "teachers": len(teacher)}
        try:
            if match.feature in ("hidden", "cls"):
                embedding = match.embedding and match.feature == "hidden"
                fewer = {key: count - 1 for key, count in counts.items()}
                return state_pairs(match.layers, embedding=embedding, **fewer)
            return layer_pairs(match.layers, **counts)
        except ValueError as error:
            raise ValueError(f"term {match.term!r}: {error}") from error

    def _pair_loss(self, match: Match, index: int, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        # Squares and sums of half-precision features overflow.
        student, teacher = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (student, teacher))
        if match.projection is not None:
            student = self.heads.projections[self._projection_key(match, index)](student)
        options = {key: value for key, value in match.options.items() if key != "heads"}
        if (match.term, index) in self._scales:
            options["scale"] = self._scales[match.term, index]
        if mask is None and student.dim() > 2:
            mask = torch.ones(student.shape[0], student.shape[-2], dtype=torch.bool, device=student.device)
        return match.loss_function()(student, teacher, None if student.dim() == 2 else mask, **options)

    def _projection_key(self, match: Match, index: int) -> str:
        key = f"{self.stage_index}-{match.term}"
        return key if match.projection == "shared" else f"{key}-{index}"

    def _weight(self, match: Match, value: Tensor) -> float | Tensor:
        if match.weight != "auto":
            return match.weight
        index = self.recipe.terms.index(match.term)
        if self.training and torch.is_grad_enabled() and not self._has_looked and self._counts_weight(match):
            self._count_weight(match, value)
        mean = self.heads.auto_sum[index] / self.heads.auto_count[index].clamp_min(1)
        return 1.0 / mean.clamp_min(1e-12) if self.heads.auto_count[index] > 0 else 1.0

    def _counts_weight(self, match: Match) -> bool:
        index = self.recipe.terms.index(match.term)
        return match.weight == "auto" and bool(self.heads.auto_count[index] < AUTO_WEIGHT_STEPS)

    def _count_weight(self, match: Match, value: Tensor) -> None:
        index = self.recipe.terms.index(match.term)
        self.heads.auto_sum[index] += value.detach().float()
        self.heads.auto_count[index] += 1

    @torch.no_grad()
    def _prepare(self, example: dict[str, Any]) -> None:
        """Run one batch through every stage: refuse what cannot work, make the projections."""
        device = next(self.student.parameters()).device
        self.teacher.to(device)
        inputs = to_device(example, self.student)
        try:
            with evaluation_mode(self.student), problem_type_kept(self.student):
                for index, stage in enumerate(self.recipe.stages):
                    self.stage_index = index
                    recorded = self._run(self.student, _without_labels(inputs), stage)
                    self._all_tokens |= _predicts_words(self.student, recorded[1])
                    if stage.uses_teacher:
                        self._check_features(stage, recorded, self._run_teacher(inputs, stage), device)
                    self.losses(inputs if stage.uses_labels else _without_labels(inputs))
        finally:
            self.stage_index = 0

    def _check_features(self, stage: Stage, recorded: Any, target: Any, device: torch.device) -> None:
        for match in stage.matches:
            if match.feature not in OWN | {"logits"}:
                ours, theirs = (recorder.features(match.feature, output) for recorder, output in (recorded, target))
                self._check_widths(match, ours, theirs, device)

    def _check_widths(self, match: Match, student: list[Tensor], teacher: list[Tensor], device: torch.device) -> None:
        pairs = self._pairs[self.stage_index, match.term] = self._pair(match, student, teacher)
        for s, t in pairs:
            ours, theirs = student[s].shape, teacher[t].shape
            if match.projection is None:
                if ours != theirs:
                    raise ValueError(_misfit(match, list(ours), list(theirs)))
                continue
            key = self._projection_key(match, s)
            if key not in self.heads.projections:
                linear = nn.Linear(ours[-1], theirs[-1])
                nn.init.orthogonal_(linear.weight)
                nn.init.zeros_(linear.bias)
                self.heads.projections[key] = linear.to(device)


def _of_layers(recorder: Recorder, match: Match, output: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> its feature, of the layers that a term compares."""
    needed = list(dict.fromkeys(layers))
    return dict(zip(needed, recorder.features(match.feature, output, needed), strict=True))


class _KeptOutputs:
    """Stands for the `Recorder` of a teacher that need not run, since its logits came with the batch."""

    def features(self, name: str, output: Tensor) -> list[Tensor]:
        """The logits, which are all that was kept."""
        assert name == "logits"
        return [output]

    def forget(self) -> None:
        """Nothing is recorded."""


def _cost(output: Any) -> Tensor:
    """What the architecture under search costs."""
    cost = getattr(output, "cost", None)
    if cost is None:
        raise ValueError("a term 'cost' prices an architecture under search, and the student is none; leave it out")
    return cast(Tensor, cost)


def _misfit(match: Match, ours: list[int], theirs: list[int]) -> str:
    """Why two features cannot be compared, and what can."""
    shapes = f"term {match.term!r}: the student's feature has shape {ours} and the teacher's {theirs}"
    if match.feature == "scores" and ours[1] != theirs[1]:
        names = "'relations.query', 'relations.key' or 'relations.value'"
        return (
            f"{shapes}, {ours[1]} and {theirs[1]} heads; leave the term out, or match {names}, which have as many "
            "heads as you say"
        )
    if match.feature.startswith("relations."):
        return f"{shapes}; give all relations options={{'heads': N}} with an N that divides both widths"
    return f"{shapes}; give the match projection='linear' or match another feature"


def _predicts_words(model: nn.Module, output: Any) -> bool:
    """Whether the outputs are over the vocabulary, as a (masked) language model's are."""
    logits, size = getattr(output, "logits", None), getattr(getattr(model, "config", None), "vocab_size", None)
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[-1] == size


def _without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("labels", "start_positions", "end_positions")}


def problem_type(*models: nn.Module) -> str | None:
    """``config.problem_type`` of the first model that has one: what the outputs of a sequence classifier mean."""
    types = (getattr(getattr(model, "config", None), "problem_type", None) for model in models)
    return next((kind for kind in types if kind is not None), None)


def _guessed_type(logits: Tensor, labels: Tensor | None) -> str | None:
    """What transformers takes a head for whose config does not say: by the number of outputs and the labels' dtype."""
    if logits.dim() == 1 or logits.shape[-1] == 1:
        return "regression"
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return MULTI_LABEL if several else None


def _logits_loss(match: Match, student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str | None) -> Tensor:
    """Loss of the outputs, by the kind of head: ``span``, a `problem_type`, or None (classes, of rows or of tokens)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"term {match.term!r}: the student's outputs have shape {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}; give both the same labels"
        )
    chosen = (LOSSES[match.loss] if isinstance(match.loss, str) else match.loss) or soft_cross_entropy
    if kind == SPAN:
        chosen = _OF_POSITIONS.get(chosen, chosen)
        if chosen is mse and mask is not None:
            mask = mask.expand(2, -1, -1)
    elif kind == MULTI_LABEL:
        chosen = _OF_LABELS.get(chosen, chosen)
    elif chosen in _OF_LABELS and student.dim() < 3 and (kind == "regression" or student.shape[-1] == 1):
        return mse(student, teacher)  # a softmax over classes says nothing about values
    return chosen(student, teacher, mask, **match.options)
