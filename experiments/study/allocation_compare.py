"""Held-out scores of mixed allocations of one size: what each measure of sensitivity chooses, and what others get.

scores = Scores(model, task, tokenizer, report, settings={}, limit=None, kept=path, asked={}, resume=False)
compare(report, model, scores, pair=(2, 4), settings={}, most=20, seed=0)
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

from qbert.results import Record


class Scores:
    """Held-out loss and primary metric of mixed allocations, put together from one quantized model a width.

    Args:
        model: the float model.
        task, tokenizer: where it is scored, on at most `limit` rows.
        report: `Sensitivities` of `model`.
        settings: `BitsConfig` defaults.
        kept: file that every score is written to at once.
        asked: what the scores depend on; stands in `kept`.
        resume: start from the scores in `kept`.
    """

    def __init__(
        self,
        model: Any,
        task: Any,
        tokenizer: Any,
        report: Any,
        settings: dict[str, Any],
        limit: int | None,
        kept: Path,
        asked: dict[str, Any],
        resume: bool,
    ):
        from qbert import BitsConfig, quantize_model

        self.task, self.tokenizer, self.limit = task, tokenizer, limit
        self.members = report.members
        self.students = {b: quantize_model(model, BitsConfig(b, embedding_bits=8, **settings)) for b in report.bits}
        self.model = quantize_model(model, BitsConfig(report.bits[0], embedding_bits=8, **settings))
        self.prefix = _prefix(model)
        self.kept = Record(kept, asked, resume=resume)
        self.known: dict[tuple[int, ...], tuple[float, float]] = {
            tuple(map(int, key.split())): (loss, score) for key in self.kept for loss, score in self.kept[key]
        }
        self.float = self.known.get(()) or self._keep((), self.score(model))

    def score(self, model: Any) -> tuple[float, float]:
        """(loss, primary metric) on the main held-out split."""
        from qbert.tasks import evaluate

        split = self.task.evaluation_splits[0]
        result = evaluate(model, self.task, self.tokenizer, split=split, limit=self.limit, progress=False)
        return result["loss"], result.primary

    def of(self, bits: tuple[int, ...]) -> tuple[float, float]:
        """(loss, primary metric) with these bits for the blocks, in order."""
        if bits not in self.known:
            for (_, members), width in zip(self.members.items(), bits, strict=True):
                for member in members:
                    path = self.prefix + member
                    self.model.set_submodule(path, self.students[width].get_submodule(path))
            self._keep(bits, self.score(self.model))
        return self.known[bits]

    def _keep(self, bits: tuple[int, ...], result: tuple[float, float]) -> tuple[float, float]:
        """Remember and write down a score; no bits at all stand for the float model."""
        self.known[bits] = result
        self.kept.add(" ".join(map(str, bits)), result)
        return result


def _prefix(model: Any) -> str:
    from qbert.encoders.targets import base_model

    path, _ = base_model(model)
    return path + "." if path else ""


def compare(
    report: Any, model: Any, scores: Scores, pair: tuple[int, int], settings: dict[str, Any], *, most: int, seed: int
) -> dict[str, Any]:
    """Allocations of one size by every measure, by rank and exactly, beside others of that size.

    Args:
        report: `Sensitivities` of `model`.
        scores: where allocations are scored.
        pair: the two widths, half of the weights each.
        settings: `BitsConfig` defaults.
        most: score all allocations of this size, or so many random ones where there are more.
        seed: draws the random ones.

    Returns:
        ``average`` bits, ``others``: [(loss, score)] of all or random allocations by rank, ``picks``: list of dicts
        with metric, rule, bits, loss, score and ``better``: share of the others that have a smaller loss.
    """
    from qbert import allocate_bits
    from qbert.allocation.predictions import METRICS

    low, high = pair
    sizes = _sizes(report, model)
    upper = math.ceil(len(sizes) / 2)
    equal = len(set(sizes)) == 1
    average = low + (high - low) * (upper / len(sizes) if equal else 0.5)
    picks: list[dict[str, Any]] = []
    for metric in METRICS:
        measured = report.using(metric)
        rules = {f"exact, {low}/{high}": pair, "exact, " + "/".join(map(str, report.bits)): report.bits}
        configs = {
            rule: allocate_bits(measured, bits=bits, average_bits=average + 1e-9, model=model, **settings)
            for rule, bits in rules.items()
        }
        if equal:  # the paper's rule makes models of one size only where all blocks are equally large
            configs = {f"rank, {low}/{high}": allocate_bits(measured, bits=pair, model=model, **settings), **configs}
        for rule, config in configs.items():
            bits = _bits_of(report, model, config)
            loss, score = scores.of(bits)
            picks.append({"metric": metric, "rule": rule, "bits": bits, "loss": loss, "score": score})
    every = equal and math.comb(len(sizes), upper) <= most
    if every:
        sets = list(itertools.combinations(range(len(sizes)), upper))
    else:
        chooser = random.Random(seed)
        room = sum(sizes) * (average - low) / (high - low)
        sets = [_random_set(sizes, room, chooser) for _ in range(most)]
    others = [scores.of(tuple(high if i in chosen else low for i in range(len(sizes)))) for chosen in sets]
    for pick in picks:
        pick["better"] = sum(loss < pick["loss"] for loss, _ in others) / len(others)
    return {"pair": pair, "average": average, "all": every, "others": others, "picks": picks}


def _sizes(report: Any, model: Any) -> list[int]:
    """Number of weights in every block."""
    prefix = _prefix(model)
    return [sum(model.get_submodule(prefix + m).weight.numel() for m in report.members[n]) for n in report.names]


def _random_set(sizes: list[int], room: float, chooser: random.Random) -> tuple[int, ...]:
    """Blocks in random order, as many as find room for the larger width."""
    chosen = []
    for i in chooser.sample(range(len(sizes)), len(sizes)):
        if sizes[i] <= room + 1e-6:
            chosen.append(i)
            room -= sizes[i]
    return tuple(chosen)


def _bits_of(report: Any, model: Any, config: Any) -> tuple[int, ...]:
    specs, prefix = config.resolve(model), _prefix(model)
    return tuple(specs[prefix + report.members[name][0]].bits for name in report.names)
