r"""One choice of structure, bits and tables under a budget: what to drop, what to narrow, and how to store the rest.

    >>> plan = qbert.plan(model, batches, size_mb=6)
    >>> print(plan); plan.plot("front.png")
    >>> qbert.compress(model, tokenizer, task, plan.pipeline, folder="out")

For every structure (all layers; the best choice of fewer; narrower feed-forward parts) the damage of every way to store
every matrix and table is measured on rows that it was not fitted to (`qbert.allocation.whole_file`), and the sum is
minimised exactly under the bytes. The few plans of least predicted divergence,

.. math:: KL_\mathrm{structure} + c\,\Bigl(KL_\mathrm{activations} + \sum_i \mathrm{damage}_{i, o_i}\Bigr),

(c: what one trial plan shows that parts do to each other, on the rows that score them) are then made, and compared
with the float model by a forward pass on rows that nothing was fitted to or scored on: the nearest one is the plan.
Bits alone are always among the structures, so that a structure has to earn its place.

References: Yao et al. 2021, HAWQ-V3, section 3.4 (bits as an integer program); Kurtic et al. 2022, oBERT
(order of steps).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qbert.allocation.blocks import check_widths
from qbert.allocation.budgets import rounded_up
from qbert.allocation.whole_file import FILE_DEFAULTS, FilePlan, fitted_and_scored, smallest_file_mb
from qbert.arguments import is_whole, real_number
from qbert.bits import FLOAT_BITS, BitsConfig
from qbert.calibration import Batch, by_length, check_batches
from qbert.encoders.inputs import most_tokens, without_labels
from qbert.encoders.targets import base_model, encoder_layers
from qbert.hessian.batches import fingerprint
from qbert.hessian.checkpoint import model_fingerprint
from qbert.inference.cpu import optimize_for_inference
from qbert.packing import pack
from qbert.pipeline.alternatives import alternative_sizes, matrix_alternatives, steps_of
from qbert.pipeline.answers import Answers
from qbert.pipeline.candidates import Candidate, Plan, Prediction, structure_name
from qbert.pipeline.clock import milliseconds
from qbert.pipeline.kept import Kept
from qbert.pipeline.steps import Depth, Prune, Share, Step, Structure, step_from_dict
from qbert.progress import progress_bar
from qbert.quantize import quantize_model
from qbert.saving.records import is_quantized
from qbert.students.depth import compare_depths
from qbert.tasks.evaluation import wants_pairs
from qbert.version import __version__

_CHECKED = 3  # plans that are made and compared by a forward pass
# Of these, the same structure with bits alone is made too: the more options, the more luck in the best.
_CHECKED_PLAIN = 2
_FRONT_POINTS = 24
_HOPELESS = 0.1  # of a file with the narrowest weights: nothing is worth measuring for that
# A choice of layers needs a forward pass on these; it only starts a comparison on all rows.
_SEARCH_BATCHES = 4
_FFN_SHARES = (0.25, 0.5, 0.75)
_FINEST = 0.03  # share of a size that plans within a share of the answers are told apart by
_SLACK = 2.0  # times the share that a structure may lose before any bits: few rows measure it
_HEAD_SHARE = 0.25
_SANDWICH = 3  # layers; of so few a sandwich shares none


def plan(
    model: nn.Module,
    batches: Any,
    *,
    size_mb: float | None = None,
    latency_ms: float | None = None,
    within: float | None = None,
    shape: tuple[int, int] = (1, 128),
    bits: Sequence[int] = (2, 3, 4, 8),
    structures: Sequence[Sequence[Step]] | None = None,
    further: bool = True,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Plan:
    """The least damaged model that keeps the budgets, or the smallest that stays within a share of the float model.

    Args:
        model: a float encoder; it is left as it was.
        batches: at least four dicts of tensors without labels, some hundred rows like those to come. Every
            fourth checks finished plans; of the others half fit the options and half score them.
        size_mb: largest file, 10^6 bytes.
        latency_ms: longest call of the packed, fused model at `shape`, measured here and now on the model's device.
        within: share of rows, such as 0.01, whose answer may be another than the float model's: the smallest such model
            is planned. Of values it is 1 - correlation, of embeddings 1 - cosine.
        shape: (sequences, tokens) of the call that `latency_ms` is about; of multiple choice (questions, tokens of a
            choice), of images their number is the first.
        bits: the widths to choose from.
        structures: what to try beside bits alone, each a sequence of `Depth`, `Share`, `Prune` and `Factorize`; where
            None, one layer, two and half of them fewer, shared ones, fewer heads, and a quarter, half and three
            quarters of the feed-forward columns fewer; for `latency_ms` also several of these at once.
        further: whether matrices may also be stored as two factors or with 2:4 zeros, in bits of their own.
        progress: show bars.
        checkpoint: folder in which everything that is measured is kept: what a structure costs and does, finished plans
            and times. The same plan, interrupted, goes on from there, and so does one for another budget.
        **settings: defaults of the `BitsConfig`.

    Returns:
        `Plan`: print it for a table; `qbert.compress` makes the model by its ``.pipeline``.

    Raises:
        ValueError: no budget, `within` beside `size_mb`, a budget that nothing can keep (the sentence says why), or one
            above the float model; impossible bits, shapes or structures; a clock too noisy to keep a latency budget by
            (its spread is named); a `checkpoint` of another model, other batches or settings.
        TypeError: a model or batches of another type.
    """
    _check_float(model)
    _check_budgets(model, size_mb, latency_ms, within, bits, shape)
    planner = Planner(
        model,
        batches,
        bits=bits,
        structures=structures,
        further=further,
        progress=progress,
        checkpoint=checkpoint,
        **settings,
    )
    return planner.plan(size_mb=size_mb, latency_ms=latency_ms, within=within, shape=shape)


class Planner:
    """What each structure of one model costs and does, measured once for plans of several budgets.

    Args:
        model, batches, bits, structures, further, progress, checkpoint, **settings: as `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        bits: Sequence[int] = (2, 3, 4, 8),
        structures: Sequence[Sequence[Step]] | None = None,
        further: bool = True,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        _check_float(model)
        bits, given = _check_bits(bits), _check_structures(structures)
        checked = check_batches(batches, "batches")
        if checked is None or len(checked) < 4:
            raise ValueError("batches: plans are fitted, scored and checked on different rows; pass at least 4 batches")
        self.model, self.bits, self.further, self.progress, self.settings = model, bits, further, progress, settings
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        written = re.sub(r" at 0x[0-9a-f]+", "", f"{model} {kind}")  # addresses, which are others in each process
        asked = {
            "qbert": __version__,
            "model": hashlib.sha256(written.encode()).hexdigest(),
            "weights": model_fingerprint(model) if checkpoint is not None else None,
            "batches": fingerprint(checked) if checkpoint is not None else None,
            "bits": bits,
            "structures": None if given is None else [_as_json(steps) for steps in given],
            "further": further,
            "settings": settings,
        }
        self._kept = Kept(checkpoint, asked)
        self.check = by_length(model, [batch for i, batch in enumerate(checked) if i % 4 == 3])
        self.rest = [batch for i, batch in enumerate(checked) if i % 4 != 3]
        self.fit, self.score = (by_length(model, part) for part in fitted_and_scored(self.rest))
        self.wanted = {"score": Answers(model, self.score), "check": Answers(model, self.check)}
        self.left_out: list[str] = []
        self.prediction = Prediction()
        self._models: dict[tuple[Step, ...], nn.Module] = {}
        self._parts: dict[tuple[Step, ...], _Part] = {}
        self._starts: dict[tuple[Step, ...], tuple[float, float]] = {}
        self._smallest_files: dict[tuple[Step, ...], float] = {}
        self._last: tuple[tuple[Step, ...], nn.Module] | None = None
        if given is None:
            usual, self.left_out = self._kept.once(["usual structures"], self._usual_as_json)
            given = [tuple(step_from_dict(step) for step in steps) for steps in usual]
        self.structures = list(dict.fromkeys([(), *given]))
        self._faster = list(self._for_time()) if structures is None else []
        self._always_left_out = tuple(self.left_out)

    def _usual(self) -> list[tuple[Step, ...]]:
        """Fewer layers, or fewer of their own, chosen by measurement, and narrower layers."""
        count, few = len(encoder_layers(self.model)), self.rest[:_SEARCH_BATCHES]
        found: list[tuple[Step, ...]] = []
        for keep in dict.fromkeys((count - 1, count - 2, (count + 1) // 2)):
            if 1 <= keep < count:
                found.append((Depth(compare_depths(self.model, few, keep, sandwiches=False).best.layers),))
        narrower = [*(Prune(ffn=share) for share in _FFN_SHARES), Prune(heads=_HEAD_SHARE)]
        for step in [*([Share("sandwich")] if count > _SANDWICH else []), *narrower]:
            try:  # whether this family can be changed so, which takes no data
                step.change(self.model, None)
            except ValueError as error:
                self.left_out.append(f"{structure_name([step])}: {error}")
            else:
                found.append((step,))
        return found

    def _usual_as_json(self) -> tuple[list[Any], list[str]]:
        found = self._usual()
        return [_as_json(steps) for steps in found], self.left_out

    def _for_time(self) -> Iterator[tuple[Step, ...]]:
        """What takes layers, columns and heads away at once, for time alone: for bytes, bits do less harm."""
        shallow = [steps for steps in self.structures if isinstance((*steps, None)[0], Depth)]
        columns = any(isinstance(step, Prune) and step.ffn for steps in self.structures for step in steps)
        heads = any(isinstance(step, Prune) and step.heads for steps in self.structures for step in steps)
        shares = (0.0, _HEAD_SHARE) if heads else (0.0,), _FFN_SHARES if columns else (0.0,)
        for steps, out, ffn in itertools.product(((), *shallow), *shares):
            if out or ffn:
                yield (*steps, Prune(heads=out, ffn=ffn))

    def plan(
        self,
        *,
        size_mb: float | None = None,
        latency_ms: float | None = None,
        within: float | None = None,
        shape: tuple[int, int] = (1, 128),
    ) -> Plan:
        """The plan for one budget; arguments and errors as `plan`'s."""
        _check_budgets(self.model, size_mb, latency_ms, within, self.bits, shape)
        self.left_out = list(self._always_left_out)
        timed = {}
        if latency_ms is not None:
            more = progress_bar(
                dict.fromkeys([*self.structures, *self._faster]), desc="milliseconds", disable=not self.progress
            )
            timed = {steps: self._milliseconds(steps, shape) for steps in more}
        parts = list(self._within_budgets(size_mb, latency_ms, within, timed))
        if within is not None:
            candidates = list(self._smaller_and_smaller(parts, within, timed))
            if not candidates:
                why = "; ".join(self.left_out)
                raise ValueError(
                    f"within={within:g}: no plan of {self.bits!r} bits stays that near ({why}); allow more"
                )
            candidates.reverse()
        else:
            filled = [(self.fill(part.steps, size_mb, timed.get(part.steps)), part) for part in parts]
            filled.sort(key=lambda pair: pair[0].predicted)
            ranked = [candidate for candidate, _ in filled]
            checked: list[Candidate] = []
            for place, (candidate, part) in enumerate(filled[:_CHECKED]):
                plain = self._plain(candidate, part, size_mb) if place < _CHECKED_PLAIN else None
                checked += [candidate, *([plain] if plain else [])]
            made = [self._made(c) for c in progress_bar(checked, desc="plans", disable=not self.progress)]
            candidates = [*sorted(made, key=lambda c: c.measured or 0.0), *ranked[_CHECKED:]]
        return Plan(
            candidates[0],
            tuple(candidates),
            tuple(self.left_out),
            {part.name: self._front(part) for part in parts},
            _in_words(size_mb, latency_ms, within, shape),
            self._parts[()].files if () in self._parts else None,
            self.prediction,
        )

    def _within_budgets(
        self,
        size_mb: float | None,
        latency_ms: float | None,
        within: float | None,
        timed: Mapping[tuple[Step, ...], float],
    ) -> Iterator[_Part]:
        """The structures that keep the budgets and may win, with the damage of all their options."""
        bound, found = float("inf"), False
        tried = self.structures
        if latency_ms is not None:
            slow = [
                f"{structure_name(steps)}: {ms:.2f} ms are too slow" for steps, ms in timed.items() if ms > latency_ms
            ]
            self.left_out += slow
            # The nearest in float first: most of the others then cannot win, and their parts are not measured.
            fast = [steps for steps, ms in timed.items() if ms <= latency_ms]
            fast = [steps for steps in fast if not any(_takes_more(steps, other) for other in fast)]
            starts = [self._start(steps)[0] for steps in progress_bar(fast, desc="in float", disable=not self.progress)]
            tried = [fast[i] for i in np.argsort(starts, kind="stable")]
        fits = size_mb is None or any(self._smallest_mb(steps) <= size_mb for steps in tried)
        for steps in progress_bar(tried, desc="structures", disable=not self.progress):
            name = structure_name(steps)
            start, agreement = self._start(steps)
            if within is not None and agreement < 100 * (1 - _SLACK * within):
                self.left_out.append(f"{name}: agrees on {agreement:.1f} % before any bits")
                continue
            if start > bound:
                self.left_out.append(f"{name}: diverges by {start:.4f} before any bits, more than a whole plan does")
                continue
            if size_mb is not None and self._smallest_mb(steps) > size_mb:
                if fits and not steps:
                    self.part(steps)  # which `Plan.bits_alone` promises
                self.left_out.append(f"{name}: the smallest file has {rounded_up(self._smallest_mb(steps))} MB")
                continue
            part = self.part(steps)
            if not found:
                self.prediction = self.calibrated(steps, size_mb)
            if within is None:
                bound = min(bound, self.fill(steps, size_mb).predicted)
            found = True
            yield part
        if not found:
            why = "; ".join(self.left_out)
            named = f"size_mb={size_mb:g}" if size_mb is not None else f"latency_ms={latency_ms:g}"
            raise ValueError(f"{named}: no plan keeps it ({why}); allow more, or give structures= that are smaller")

    def _smallest_mb(self, steps: tuple[Step, ...]) -> float:
        """The smallest file of a structure, which shapes tell before anything is measured."""
        if steps not in self._smallest_files:
            model = self._models[steps] if steps in self._models else self._shaped(steps)
            further = alternative_sizes(model, self.settings, self.bits) if self.further else None
            self._smallest_files[steps] = smallest_file_mb(model, self.bits, further=further, **self.settings)
        return self._smallest_files[steps]

    def part(self, steps: tuple[Step, ...]) -> _Part:
        """The options of one structure, measured the first time."""
        if steps not in self._parts:
            made: list[FilePlan] = []

            def measured() -> dict[str, Any]:
                model = self._changed(steps)
                further = matrix_alternatives(model, self.fit, self.settings, self.bits) if self.further else None
                made.append(
                    FilePlan(model, self.rest, self.bits, further=further, progress=self.progress, **self.settings)
                )
                return made[0].to_dict()

            values = self._kept.once(["options", _as_json(steps)], measured)
            files = made[0] if made else FilePlan.from_dict(values, self.bits, self.settings)
            self._parts[steps] = _Part(steps, files, self._start(steps)[0])
        return self._parts[steps]

    def _start(self, steps: tuple[Step, ...]) -> tuple[float, float]:
        """(divergence, agreement) of a structure in float."""
        if steps not in self._starts:
            found = self._kept.once(
                ["in float", _as_json(steps)],
                lambda: self.wanted["score"].likeness(self._changed(steps)) if steps else (0.0, 100.0),
            )
            self._starts[steps] = float(found[0]), float(found[1])
        return self._starts[steps]

    def _milliseconds(self, steps: tuple[Step, ...], shape: tuple[int, int]) -> float:
        """What a call of a structure takes on this machine, measured the first time."""
        about = [*shape, torch.get_num_threads(), str(next(self.model.parameters()).device), platform.node()]
        return float(
            self._kept.once(
                ["milliseconds", _as_json(steps), *about], lambda: self._latency(self._shaped(steps), shape)
            )
        )

    def calibrated(self, steps: tuple[Step, ...], size_mb: float | None) -> Prediction:
        """What the damages leave out, by two trials: everything at 8 bits, and a plan for this size.

        Both are made on the rows that the options were fitted to and measured on those that they were scored on, so
        that the rows which check the finished plans stay unseen.
        """
        found = self._kept.once(["trial", _as_json(steps), size_mb], lambda: self._tried(steps, size_mb))
        return Prediction(*map(float, found))

    def _tried(self, steps: tuple[Step, ...], size_mb: float | None) -> tuple[float, float, float]:
        model, part = self._changed(steps), self.part(steps)
        files = part.files
        activations = self._divergence_between(model, self._eight_bits(model))
        picked = files.choose(min(size_mb or part.largest_mb, part.largest_mb))
        for step in steps_of(files.forms(picked)):
            model = step.change(model, self.fit)
        trial = quantize_model(model, files.configuration(picked), calibration_data=self.fit)
        expected = self.unit * files.damage(picked) + activations
        return self.unit, activations, self._divergence_between(model, trial) / expected if expected > 0 else 1.0

    def _divergence_between(self, model: nn.Module, other: nn.Module) -> float:
        wanted = self.wanted["score"] if model is self.model else Answers(model, self.score)
        return wanted.likeness(other)[0]

    def _eight_bits(self, model: nn.Module) -> nn.Module:
        """`model` with everything in 8 bits, activations as they will be."""
        settings = {**FILE_DEFAULTS, **self.settings, "rounding": "nearest"}
        return quantize_model(model, BitsConfig(8, embedding_bits=8, **settings), calibration_data=self.fit)

    def _changed(self, steps: tuple[Step, ...]) -> nn.Module:
        """The float model of a structure, fitted to the rows that options are fitted to."""
        if steps not in self._models:
            self._models[steps] = self.changed(steps, self.fit)
        return self._models[steps]

    def _shaped(self, steps: Sequence[Step]) -> nn.Module:
        """A model in the shape of a structure, whose values say nothing: enough to be timed."""
        model = self.model
        for step in steps:
            model = cast(Structure, step).change(model, None if isinstance(step, (Prune, Share)) else self.fit)
        return model

    def changed(self, steps: Sequence[Step], batches: Sequence[Any]) -> nn.Module:
        """The float model of a structure, fitted to these batches."""
        return _after(self.model, steps, batches)

    def fill(
        self,
        steps: tuple[Step, ...],
        size_mb: float | None,
        latency_ms: float | None = None,
        *,
        further: bool = True,
    ) -> Candidate:
        """The least predicted divergence of a structure in a size.

        Args:
            steps, size_mb: the structure and the size.
            latency_ms: what it was measured to take.
            further: whether matrices may be stored as two factors or with zeros.

        Raises:
            ValueError: nothing of it is as small.
        """
        part = self.part(steps)
        files = part.files
        picked = files.choose(min(size_mb or part.largest_mb, part.largest_mb), further=further)
        return Candidate(
            (*steps, *steps_of(files.forms(picked))),
            files.configuration(picked),
            files.size(picked) / 1e6,
            latency_ms,
            part.start + self.prediction(files.damage(picked)),
        )

    def _plain(self, candidate: Candidate, part: _Part, size_mb: float | None) -> Candidate | None:
        """The plan of the same structure whose matrices are all whole; None where `candidate` is that, or none fits."""
        if candidate.structure == part.steps:
            return None
        try:
            return self.fill(part.steps, size_mb, candidate.latency_ms, further=False)
        except ValueError:  # too small a size for bits alone
            return None

    def _front(self, part: _Part) -> tuple[tuple[float, float], ...]:
        """(MB, predicted divergence) of a structure over sizes."""
        files = part.files
        points = []
        for size in np.geomspace(files.smallest_mb * 1.0001, part.largest_mb * 1.0001, _FRONT_POINTS):
            picked = files.choose(float(size))
            points.append((files.size(picked) / 1e6, part.start + self.prediction(files.damage(picked))))
        return tuple(dict.fromkeys(points))

    def _made(self, candidate: Candidate) -> Candidate:
        """The same plan, made by all rows but those that check it, with what a forward pass says of it."""

        def measured() -> tuple[float, float]:
            model = self._made_of(candidate.structure)
            packed = pack(quantize_model(model, candidate.config, calibration_data=self.rest))
            return self.wanted["check"].likeness(packed)

        about = ["made", _as_json(candidate.structure), candidate.config.to_dict()]
        divergence, agreement = map(float, self._kept.once(about, measured))
        return replace(candidate, measured=divergence, agreement=agreement)

    def _made_of(self, steps: tuple[Step, ...]) -> nn.Module:
        """`changed` on all rows but those that check; the last structure is kept, whose plans follow each other."""
        first = max((own for own in self._parts if steps[: len(own)] == own), key=len, default=())
        if self._last is None or self._last[0] != first:
            self._last = (first, self.changed(first, self.rest))
        return _after(self._last[1], steps[len(first) :], self.rest)

    def _smaller_and_smaller(
        self, parts: Sequence[_Part], within: float, timed: Mapping[tuple[Step, ...], float]
    ) -> Iterator[Candidate]:
        """The smallest plan that agrees on all but a share of the rows, then smaller ones of other structures."""
        best: Candidate | None = None
        for part in parts:
            most = part.largest_mb if best is None else min(part.largest_mb, best.megabytes * (1 - _FINEST))
            if part.files.smallest_mb > most:
                self.left_out.append(f"{part.name}: no file of it has {most:.2f} MB or less")
                continue
            found = self._smallest(part, most, within, timed.get(part.steps))
            if found is not None:
                best = found
                yield found

    def _smallest(self, part: _Part, most: float, within: float, latency_ms: float | None) -> Candidate | None:
        """The smallest plan of a structure that is near enough, of at most `most` MB: by bisection over sizes."""

        def made(size: float) -> tuple[Candidate, bool]:
            candidate = self._made(self.fill(part.steps, size, latency_ms))
            return candidate, candidate.agreement is not None and candidate.agreement >= 100 * (1 - within)

        best, near = made(most)
        if not near:
            self.left_out.append(f"{part.name}: agrees on {best.agreement:.1f} % in {best.megabytes:.2f} MB")
            return None
        low, high = part.files.smallest_mb, best.megabytes
        while high - low > _FINEST * high:
            middle = (low + high) / 2
            found, near = made(middle)
            best, low, high = (found, low, middle) if near else (best, middle, high)
        return best

    def _latency(self, model: nn.Module, shape: tuple[int, int]) -> float:
        """`milliseconds` of one call of the packed, fused model."""
        fused = optimize_for_inference(pack(self._eight_bits(model)))
        timed = base_model(fused)[1] if wants_pairs(fused) else fused
        return milliseconds(timed, _in_shape(self.check[0], *shape, apart=wants_pairs(fused)))

    @property
    def unit(self) -> float:
        """What a damage is in units of the divergence (`Answers.unit`)."""
        return self.wanted["check"].unit


def _as_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [step.to_dict() for step in steps]


def _in_shape(batch: Batch, rows: int, tokens: int, *, apart: bool) -> dict[str, Tensor]:
    """A batch of so many rows of so many tokens, none of them padding, of what one holds; images stay as large as they
    are. Of several texts a row (choices) each has so many tokens; those that are encoded `apart` are rows."""
    shaped = {}
    for name, value in without_labels(batch).items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if apart:
            value = value.flatten(0, -2)
        times = [rows // len(value) + 1, *[1] * (value.dim() - 1)]
        if value.is_floating_point() and name != "attention_mask":
            shaped[name] = value.repeat(*times)[:rows].contiguous()
        else:
            times[-1] = tokens // value.shape[-1] + 1
            shaped[name] = value.repeat(*times)[:rows, ..., :tokens].contiguous()
    if "attention_mask" in shaped:
        shaped["attention_mask"] = torch.ones_like(shaped["attention_mask"])
    return shaped


def _after(model: nn.Module, steps: Sequence[Step], batches: Sequence[Any]) -> nn.Module:
    """`model` after these structural steps, fitted to these batches."""
    for step in steps:
        model = cast(Structure, step).change(model, batches)
    return model


def _takes_more(steps: Sequence[Step], other: Sequence[Step]) -> bool:
    """Whether a structure takes away all that another does, and more: it can be faster, and never nearer."""
    own, less = _taken(steps), _taken(other)
    return own is not None and less is not None and own != less and all(a >= b for a, b in zip(own, less, strict=True))


def _taken(steps: Sequence[Step]) -> tuple[float, float, float] | None:
    """(minus layers kept, heads, columns) of the usual structures; None of others."""
    layers, heads, ffn = -math.inf, 0.0, 0.0
    for step in steps:
        if isinstance(step, Depth) and not is_whole(step.layers):
            layers = -float(len(step.layers))  # type: ignore[arg-type]
        elif isinstance(step, Prune) and step.pattern is None:
            heads, ffn = step.heads, step.ffn
        else:
            return None
    return layers, heads, ffn


@dataclass(frozen=True)
class _Part:
    """One structure: its options, and its own divergence."""

    steps: tuple[Step, ...]
    files: FilePlan
    start: float

    @property
    def name(self) -> str:
        return structure_name(self.steps)

    @property
    def largest_mb(self) -> float:
        """Above this size nothing gets better."""
        picked = [min(range(len(i.options)), key=lambda o, i=i: i.options[o].damage) for i in self.files.items]  # type: ignore[misc]
        return self.files.size(picked) / 1e6


def _check_float(model: nn.Module) -> None:
    if is_quantized(model):
        raise ValueError("model is quantized already; plan for the float model")


def _check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    widths = check_widths(bits)
    if all(width in FLOAT_BITS for width in widths):
        raise ValueError(f"bits={widths!r} leaves every weight in float; give one out of 2, 3, 4 and 8 too")
    return widths


def _check_structures(structures: Any) -> list[tuple[Step, ...]] | None:
    """`structures` as tuples; None where none are given."""
    if structures is None:
        return None
    wanted = "give sequences of Depth, Share, Prune and Factorize, such as [(Depth(3),)]"
    if not isinstance(structures, Iterable):
        raise ValueError(f"structures={structures!r} is no list; {wanted}")
    given = list(structures)
    wrong = next((steps for steps in given if not isinstance(steps, Iterable)), None)
    if wrong is not None:
        raise ValueError(f"structures: {wrong!r} is no sequence of steps; {wanted}")
    found = [tuple(steps) for steps in given]
    other = next((step for steps in found for step in steps if not isinstance(step, Structure)), None)
    if other is not None:
        raise ValueError(f"structures: {other!r} is none; {wanted}")
    return found


def _check_shape(shape: Any) -> None:
    whole = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(is_whole(n) and n >= 1 for n in shape)
    if not whole:
        raise ValueError(f"shape={shape!r} is not possible; give (sequences, tokens), such as (1, 128)")


def _check_budgets(
    model: nn.Module,
    size_mb: float | None,
    latency_ms: float | None,
    within: float | None,
    bits: Sequence[int],
    shape: tuple[int, int],
) -> None:
    """Refuse budgets that say nothing, contradict each other or that nothing could keep."""
    bits = _check_bits(bits)
    _check_shape(shape)
    given = {"size_mb": size_mb, "latency_ms": latency_ms, "within": within}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        raise ValueError("give size_mb=, latency_ms= or within=; a plan needs a budget")
    for name, value in asked.items():
        if real_number(name, value) <= 0:
            raise ValueError(f"{name}={value!r} is not possible; use a positive number")
    if within is not None and size_mb is not None:
        raise ValueError("within and size_mb contradict: the smallest model within a share has no other size; give one")
    if within is not None and within >= 1:
        raise ValueError(f"within={within!r} is not possible; use a share such as 0.01")
    whole = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    if size_mb is not None and size_mb >= whole:
        raise ValueError(f"size_mb={size_mb:g} is no budget: the float model has {whole:.1f} MB; use a smaller number")
    if size_mb is not None and size_mb < _HOPELESS * whole * min(bits) / 32:
        raise ValueError(
            f"size_mb={size_mb:g} is too small: with all weights in {min(bits)} bits this model takes about "
            f"{whole * min(bits) / 32:.2g} MB, and structures save a part of that; use a larger number"
        )
    longest = most_tokens(model, model)
    if latency_ms is not None and longest and shape[1] > longest:
        raise ValueError(f"shape: {shape[1]} tokens are more than the model reads, {longest}; use fewer")


def _in_words(size_mb: float | None, latency_ms: float | None, within: float | None, shape: tuple[int, int]) -> str:
    parts = []
    if size_mb is not None:
        parts.append(f"at most {size_mb:g} MB")
    if latency_ms is not None:
        parts.append(f"at most {latency_ms:g} ms at {shape[0]}x{shape[1]}")
    if within is not None:
        parts.append(f"within {100 * within:g} % of the float model's answers")
    return " and ".join(parts)
