"""What a plan is: candidates, how their divergence was predicted, and the one that was chosen, as table and picture.

It stands apart from `qbert.pipeline.plan`, which finds them: plans are kept, printed, drawn and run where none is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbert.allocation.whole_file import FilePlan
from qbert.bits import BitsConfig
from qbert.files import write_whole
from qbert.pipeline.run import Pipeline, short
from qbert.pipeline.steps import Pack, Quantize, Step
from qbert.plots import new_figure
from qbert.results import text_table


@dataclass(frozen=True)
class Candidate:
    """One plan.

    Attributes:
        structure: steps that change the float model; none for bits alone.
        config: how everything is stored.
        megabytes: of the file, 10^6 bytes, at most.
        latency_ms: measured, of one call of the fused packed model; None where no latency was asked for.
        predicted: divergence from the float model: that of the structure, and `Prediction` of what its parts do; nats
            for classes.
        measured: the same of the finished model, on rows of their own; None where it was not made.
        agreement: percent of those rows with the float model's answer.
    """

    structure: tuple[Step, ...]
    config: BitsConfig
    megabytes: float
    latency_ms: float | None
    predicted: float
    measured: float | None = None
    agreement: float | None = None

    @property
    def name(self) -> str:
        """The structure in words."""
        return structure_name(self.structure)


@dataclass(frozen=True)
class Prediction:
    """Divergence of a model from the damages of its parts: (unit x damage + activations) x together.

    Attributes:
        unit: 1; of a mean squared difference of C values 2 / C, since damages are half of their sum.
        activations: divergence of the model with everything at 8 bits: what rounded activations do.
        together: divergence of a trial plan as a multiple of what its parts and activations do one by one.
    """

    unit: float = 1.0
    activations: float = 0.0
    together: float = 1.0

    def __call__(self, damage: float) -> float:
        """Divergence for the sum of the parts' damages."""
        return (self.unit * damage + self.activations) * self.together

    def __str__(self) -> str:
        return (
            "predicted, measured: divergence from the float model (of classes in nats). Predicted is the sum over all\n"
            f"weights, one by one, and {self.activations:.4f} for 8-bit activations, times {self.together:.2f}: by so "
            "many times its own sum\na trial plan diverged."
        )


@dataclass(frozen=True)
class Plan:
    """The plan that was chosen, those it was chosen from, and the whole front; print it for a table.

    Attributes:
        best: the chosen one.
        candidates: the best plan of every structure within the budgets, of the best of them with bits alone too, the
            nearest to the float model first.
        left_out: structures that cannot keep a budget or cannot win, and why.
        front: structure -> (MB, predicted divergence) over sizes.
        budget: what was asked for, in words.
        bits_alone: the options of every matrix and table of the whole model, for other choices among them; None
            where that is too slow for `latency_ms`.
        prediction: how damages become predicted divergences.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    left_out: tuple[str, ...]
    front: Mapping[str, tuple[tuple[float, float], ...]]
    budget: str
    bits_alone: FilePlan | None
    prediction: Prediction = Prediction()

    @property
    def pipeline(self) -> Pipeline:
        """The steps that make the chosen model."""
        return self.with_training(())

    def with_training(self, after_structure: Iterable[Step] = (), after_bits: Iterable[Step] = ()) -> Pipeline:
        """The same with further steps, such as a `Distill` after the structure was changed or the bits were."""
        return Pipeline(
            (*self.best.structure, *after_structure, Quantize(self.best.config), *after_bits, Pack())  # type: ignore[arg-type]
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw size against predicted divergence, a line a structure, and the measured plans."""
        figure = new_figure(6.8, 4.8)
        axes = figure.add_subplot()
        for name, points in self.front.items():
            sizes, harms = zip(*points, strict=True)
            axes.plot(sizes, harms, "-", linewidth=1.2, label=name)
        measured = [(c.megabytes, c.measured) for c in self.candidates if c.measured is not None]
        axes.plot(*zip(*measured, strict=True), "k.", markersize=8, label="made and measured")
        axes.plot([self.best.megabytes], [self.best.measured], "r*", markersize=14, label=f"chosen: {self.best.name}")
        if min(harm for points in self.front.values() for _, harm in points) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("file [MB = 10⁶ bytes]")
        axes.set_ylabel("divergence from the float model")
        axes.set_title(f"Plans for {self.budget}")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
        write_whole(path, lambda aside: figure.savefig(aside, dpi=150))

    def __str__(self) -> str:
        timed = any(c.latency_ms is not None for c in self.candidates)
        header = ["plan", "MB", *(["ms"] if timed else []), "predicted", "measured", "same answer"]
        rows = []
        for c in self.candidates:
            mark = "* " if c is self.best else "  "
            latency = ["" if c.latency_ms is None else f"{c.latency_ms:.2f}"] if timed else []
            found = ["", ""] if c.measured is None else [f"{c.measured:.4f}", f"{c.agreement:.1f} %"]
            rows.append([mark + c.name, f"{c.megabytes:.2f}", *latency, f"{c.predicted:.4f}", *found])
        lines = [f"Plan for {self.budget}:", text_table(header, rows), str(self.prediction), *self.left_out]
        bits = sorted({(rule["bits"], name) for name, rule in self.best.config.rules.items()})
        counts = {width: sum(b == width for b, _ in bits) for width, _ in bits}
        lines.append("weights stored: " + ", ".join(f"{n} in {b} bits" for b, n in counts.items()))
        lines += [f"  {name}: {_form(rule)}" for name, rule in self.best.config.rules.items() if "embeddings" in name]
        return "\n".join(lines)


def structure_name(steps: Sequence[Step]) -> str:
    """A structure in words."""
    return " and ".join(short(step) for step in steps) or "bits alone"


def _form(rule: Mapping[str, Any]) -> str:
    words = [f"{rule['bits']} bits"]
    if rule.get("rank"):
        words.append(f"rank {rule['rank']}")
    words += [f"{count:,} rows in {width}" for width, count in rule.get("row_bits", ())]
    return ", ".join(words)
