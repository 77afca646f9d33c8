"""A model under a budget: the plan, what it becomes with distillation, and simpler choices of equal size beside it.

    python experiments/compress.py --size-mb 10.2 6.1
    python experiments/compress.py --within 0.01 --task sst2 --data-dir DATA
    python experiments/compress.py --latency-ms 4 --recipe qbert_kd --steps 150 --seeds 0 1 2
    python experiments/compress.py --size-mb 10.2 6.1 4.7 --families --trim-vocabulary --task stsb --data-dir DATA

`qbert.plan` chooses structure, bits and tables; `qbert.compress` makes the model. Beside it, in files of the same size:
uniform bits, the paper's ranking by |mean| + std of the Hessian's top eigenvalues, and random choices, and with
``--families`` one kind of structure at a time; all rounded by the same compensated rounding on the same rows. Scores
are of held-out rows, plans and roundings are made on training rows without their labels, which the teacher was not
tuned on where there are such. They are drawn by their length: data sets of phrases are scored on whole sentences.
Pairs of sentences with a number (STS-B) are scored with the published sentence encoder as it is.

It stands alone since `compress.py` has another question of its own, which students to train; `compress_page.py` makes
one page and picture of several records.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from compress_bench import load_teacher, milliseconds, one_thread
from other_domains import OtherDomain, other_domain
from qat_table import spread

from qbert.allocation.whole_file import FilePlan
from qbert.cli.arguments import subject_of
from qbert.encoders.inputs import without_labels
from qbert.encoders.targets import base_model
from qbert.pipeline import Factorize, Share
from qbert.results import Record, provenance, text_table

_DRAWS = 3
_SIZE_MB = 10.2  # where no budget and no student is named
_SPECTRUM = {"runs": 5, "tol": 1e-2}
_SPECTRUM_ROWS = 32
_POOL = 8  # rows to draw one from
_SHAPE = (1, 128)  # sequences, tokens of what is timed
_CORPUS = 20_000  # training rows whose pieces make a vocabulary
# CPU seconds for MiniLM-L6 (22.7 M parameters) of measuring the options of one structure, and of rounding one model.
_MEASURING, _ROUNDING, _PARAMETERS = 75.0, 30.0, 22.7e6
_MORE_FAMILIES = ((Share("sandwich"),), (Factorize(0.5),))
_BACKWARD = 4.0  # passes of the model that a training step and its teacher take
# What a row says: key -> (header, digits); the score is called by its metric.
_CELLS = {
    "score": ("", 2),
    "retention": ("of float", 1),
    "agreement": ("same answer", 1),
    "divergence": ("divergence", 4),
    "checked": ("on training rows", 4),
    "predicted": ("predicted", 4),
    "other domain": ("other domain", 2),
    "megabytes": ("MB", 2),
    "ms": (f"ms {_SHAPE[0]}x{_SHAPE[1]}", 1),
    "times": ("of float's speed", 1),
}
_NO_SPREAD = ("megabytes", "ms", "times")


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """``--size-mb --latency-ms --within --recipe --steps --calibration-rows --draws --families --trim-vocabulary``."""
    group = parser.add_argument_group("budgets, instead of --student")
    group.add_argument("--size-mb", type=float, nargs="+", help="largest file, 10^6 bytes; several one after the other")
    group.add_argument("--latency-ms", type=float, help="longest call of 1x128 tokens, fused, measured here")
    group.add_argument("--within", type=float, help="share of answers that may change: the smallest such model")
    group.add_argument("--recipe", help="also distil the planned model by this recipe, such as qbert_kd")
    group.add_argument("--steps", type=int, default=100, help="steps of that distillation; default: 100")
    group.add_argument("--calibration-rows", type=int, default=512, help="training rows to plan on; default: 512")
    group.add_argument("--draws", type=int, default=_DRAWS, help=f"random choices beside the plan; default: {_DRAWS}")
    group.add_argument("--families", action="store_true", help="also one kind of structure at a time, at every size")
    group.add_argument(
        "--trim-vocabulary", action="store_true", help="also plan with the word pieces of the training texts alone"
    )


def budgets_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each plan has to keep; empty where students were asked for instead.

    Raises:
        ValueError: students and budgets together.
    """
    others = {"latency_ms": arguments.latency_ms, "within": arguments.within}
    others = {name: value for name, value in others.items() if value is not None}
    if arguments.student and (arguments.size_mb or others):
        raise ValueError("--student trains a student; --size-mb, --latency-ms and --within plan a model; give one")
    if arguments.size_mb or not (others or arguments.student):
        return [{"size_mb": size, **others} for size in arguments.size_mb or [_SIZE_MB]]
    return [others] if others else []


def load_float_model(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, model, tokenizer): fine-tuned or given; of pairs with a number the sentence encoder as published."""
    from qbert.tasks import build_sentence_model, load_task

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    if task.kind != "regression" or arguments.no_fine_tune:
        return load_teacher(arguments)
    print(f"task: {task.describe()}\nteacher: {arguments.model or 'the embedded MiniLM-L6'}, as published")
    model, tokenizer = build_sentence_model(arguments.model)
    return task, model.to(arguments.device), tokenizer


class Variant(NamedTuple):
    """A float model to plan for: the teacher, or the teacher with fewer word pieces."""

    label: str
    model: Any
    tokenizer: Any
    labelled: list[Any]
    batches: list[Any]

    @property
    def suffix(self) -> str:
        """What the label adds to the name of a kind of row."""
        return f", {self.label.removesuffix(', ')}" if self.label else ""


class Budget:
    """One teacher, its training rows, and what is planned for it.

    Args:
        arguments: of ``compress.py``.
        folder: where results go.
        task, model, tokenizer: the teacher.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, task: Any, model: Any, tokenizer: Any) -> None:
        self.arguments, self.folder, self.task, self.model = arguments, folder, task, model
        start = time.process_time()
        self.reference = self.scored(model, tokenizer)
        self.evaluation = time.process_time() - start
        asked = {
            **subject_of(task, model),
            "seed": arguments.seed,
            "rows": arguments.calibration_rows,
            "held-out rows": arguments.eval_limit,
            "steps": arguments.steps,
            "bfloat16": arguments.bf16,
        }
        self.record = Record(folder / "budget.json", asked, resume=arguments.resume)
        self.record.content |= {
            "task": task.name,
            "metric": task.primary_metric,
            "data": task.describe(),
            "made by": provenance(),
            "float": {
                "score": self.reference.primary,
                "retention": 100.0,
                "megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
                "rows": int(self.reference["examples"]),
            },
        }
        self.record.content.setdefault("finished", [])
        self.record.content.setdefault("plans", {})
        self.variants = [self.variant("", model, tokenizer)]
        if arguments.trim_vocabulary:
            self.variants.append(self.variant("trimmed vocabulary, ", *self.trimmed(model, tokenizer)))
        self.planners: dict[str, Any] = {}
        self.others: dict[str, OtherDomain | None] = {}
        elsewhere = self.elsewhere(self.variants[0])
        if elsewhere is not None:
            self.record.content["other domain"] = elsewhere.name
            self.record.content["float"]["other domain"] = elsewhere.evaluate(model).primary

    # ---- what is planned for ----

    def variant(self, label: str, model: Any, tokenizer: Any) -> Variant:
        """A model with its calibration rows."""
        labelled = self.drawn(model, tokenizer, self.arguments.calibration_rows)
        return Variant(label, model, tokenizer, labelled, [without_labels(batch) for batch in labelled])

    def drawn(self, model: Any, tokenizer: Any, count: int, skip: int = 0) -> list[Any]:
        """Batches of training rows drawn by their length, after the first `skip` of the draw."""
        from qbert.tasks import prepare
        from qbert.tasks.evaluation import wants_pairs
        from qbert.tasks.task import subset

        seed, rows = self.arguments.seed, self.task.rows("train")
        seen = {id(row) for row in subset(rows, self.arguments.train_limit, seed)}
        unseen = [row for row in rows if id(row) not in seen]
        wanted = self.arguments.calibration_rows
        pool = subset(unseen if len(unseen) >= 2 * wanted else rows, _POOL * wanted, seed)
        task = replace(self.task, splits={**self.task.splits, "train": pool})
        data = prepare(task, tokenizer, "train", as_pairs=wants_pairs(model))
        lengths = np.asarray(data.lengths, dtype=np.float64)
        order = np.random.default_rng(seed).choice(len(lengths), len(lengths), replace=False, p=lengths / lengths.sum())
        chosen = order[skip : skip + count]
        return [data.collate([data.examples[i] for i in chosen[at : at + 32]]) for at in range(0, len(chosen), 32)]

    def trimmed(self, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        """The model and the tokenizer with the pieces of the training texts only."""
        from qbert.students.vocabulary import student_with_vocabulary
        from qbert.tasks.evaluation import wants_pairs
        from qbert.tasks.task import subset

        rows = subset(self.task.rows("train"), _CORPUS, 0)
        texts = [row[name] for row in rows for name in self.task.text_fields]
        texts = [" ".join(text) if isinstance(text, list) else text for text in texts]
        inner = model.backbone if wants_pairs(model) else model
        student, smaller = student_with_vocabulary(inner, tokenizer, texts)
        return (model.around(student) if wants_pairs(model) else student), smaller

    def planner(self, variant: Variant, **options: Any) -> Any:
        """What all plans of a variant are made of, measured once; `options` are those of `Planner`."""
        from qbert.pipeline.plan import Planner

        if variant.label not in self.planners:
            self.planners[variant.label] = Planner(variant.model, variant.batches, progress=True, **options)
        return self.planners[variant.label]

    def calibrated_planner(self, variant: Variant, size_mb: float) -> Any:
        """The same, whose predictions know what damages leave out, also where its plans were kept by an earlier run."""
        from qbert.pipeline.candidates import Prediction

        planner = self.planner(variant)
        if planner.prediction == Prediction():
            planner.prediction = planner.calibrated((), max(size_mb, 1.0001 * planner.part(()).files.smallest_mb))
        return planner

    # ---- measuring ----

    def scored(self, model: Any, tokenizer: Any) -> Any:
        """Held-out score."""
        from qbert.tasks import evaluate

        split, limit = self.task.evaluation_splits[0], self.arguments.eval_limit
        return evaluate(model, self.task, tokenizer, split=split, limit=limit)

    def elsewhere(self, variant: Variant) -> OtherDomain | None:
        """Rows of another kind of text with the same classes, tokenized for a variant; None where there are none."""
        if variant.label not in self.others:
            self.others[variant.label] = other_domain(
                self.task, variant.tokenizer, data_dir=self.arguments.data_dir, limit=self.arguments.eval_limit
            )
        return self.others[variant.label]

    def row(self, model: Any, variant: Variant, predicted: float | None, megabytes: float) -> dict[str, Any]:
        """Score, likeness to the teacher and speed of a packed model."""
        from qbert.tasks.evaluation import fidelity

        result = self.scored(model, variant.tokenizer)
        likeness = fidelity(self.reference.logits, result.logits, getattr(self.model.config, "problem_type", None))
        ms, plain = self.speed(model, variant)
        elsewhere = self.elsewhere(variant)
        return {
            "score": result.primary,
            "retention": 100 * result.primary / self.reference.primary if self.reference.primary else 0.0,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
            "predicted": predicted,
            "other domain": None if elsewhere is None else elsewhere.evaluate(model).primary,
            "megabytes": megabytes,
            "ms": ms,
            "times": plain / ms,
        }

    def speed(self, model: Any, variant: Variant) -> tuple[float, float]:
        """CPU milliseconds on one core of the fused model and of the teacher in float, taking turns."""
        import qbert

        fused = base_model(qbert.optimize_for_inference(model))[1]
        with one_thread():
            fast, plain = milliseconds(
                [fused, base_model(variant.model)[1]], *_SHAPE, min(1000, len(variant.tokenizer))
            )
        return fast, plain

    # ---- what is made ----

    def planned(self, budget: dict[str, Any], variant: Variant) -> None:
        """Plan one budget, make it, and hold simpler choices of its size against it."""
        name = variant.label + ", ".join(f"{key} {value:g}" for key, value in budget.items())
        asked = self.arguments
        stages: list[tuple[Callable[..., None], str]] = [
            (self.make_plan, f" ({asked.recipe}, seeds {asked.seeds})"),
            *([(self.make_families, " (each alone)")] if asked.families else []),
            (self.make_rivals, f" ({asked.draws} draws)"),
        ]
        for work, how in stages:  # with more seeds or draws than before one goes on
            stage = f"{name}: {work.__name__}{how}"
            if stage not in self.record.content["finished"]:
                work(name, budget, variant)
                self.record.content["finished"].append(stage)
                self.record.save()

    def make_plan(self, name: str, budget: dict[str, Any], variant: Variant) -> None:
        """The plan, without and with distillation."""
        import qbert
        from qbert.pipeline import Distill, Pipeline, Prune

        place = self.folder / name.replace(" ", "").replace(",", "-")
        kept = self.record.content["plans"]
        if name not in kept or not (place / "plan.json").is_file():
            found = self.planner(variant).plan(**budget)
            print(f"\n{found}\n", flush=True)
            place.mkdir(parents=True, exist_ok=True)
            found.plot(place / "front.png")
            found.pipeline.save(place / "plan.json")
            best = found.best
            kept[name] = {"text": str(found), "name": best.name, "predicted": best.predicted, "checked": best.measured}
            kept[name] |= {"megabytes": best.megabytes, "size": budget.get("size_mb", best.megabytes)}
            self.record.save()
        plan, pipeline, arguments = kept[name], Pipeline.load(place / "plan.json"), self.arguments
        made = {f"plan ({name}): {plan['name']}": (pipeline, arguments.seeds[:1], "plan")}
        if arguments.recipe:
            fewer_heads = any(isinstance(step, Prune) and step.heads for step in pipeline.steps)
            options = {"scores": 0.0} if fewer_heads and arguments.recipe == "qbert_kd" else {}
            learning = Distill(arguments.recipe, steps=arguments.steps, options=options)
            training = Pipeline((*pipeline.steps[:-1], learning, *pipeline.steps[-1:]))
            made[f"plan ({name}), then {arguments.recipe}"] = (training, arguments.seeds, "trained plan")
        for title, (steps, seeds, group) in made.items():
            done = {row["seed"] for row in self.record[title]}
            for seed in (seed for seed in seeds if seed not in done):
                folder = place / f"{len(steps.steps)}-steps-{seed}"
                model = qbert.compress(
                    variant.model,
                    variant.tokenizer,
                    self.task,
                    steps,
                    folder=folder,
                    train_limit=arguments.train_limit,
                    eval_limit=arguments.eval_limit,
                    seed=seed,
                    bf16=arguments.bf16,
                ).model
                size = max(path.stat().st_size for path in folder.rglob("model.safetensors")) / 1e6
                row = self.row(model, variant, plan["predicted"], size)
                checked = plan["checked"] if group == "plan" else None
                self.add(title, group + variant.suffix, plan["size"], {"seed": seed, **row, "checked": checked})

    def make_families(self, name: str, budget: dict[str, Any], variant: Variant) -> None:
        """One kind of structure at a time in files of this size, without training."""
        import qbert
        from qbert.pipeline.candidates import structure_name

        if "size_mb" not in budget or variant.label:
            return
        size = budget["size_mb"]
        planner = self.calibrated_planner(variant, size)
        for steps in [*planner.structures, *_MORE_FAMILIES]:
            title = f"{structure_name(steps)} ({size:g} MB)"
            if not steps or title in self.record or planner.part(steps).files.smallest_mb > size:
                continue
            found = planner.fill(steps, size)
            model = planner.changed(found.structure, variant.batches)
            packed = qbert.pack(qbert.quantize_model(model, found.config, calibration_data=variant.batches))
            row = self.row(packed, variant, found.predicted, found.megabytes)
            self.add(title, structure_name(steps), size, {"seed": 0, **row})

    def make_rivals(self, name: str, budget: dict[str, Any], variant: Variant) -> None:
        """Simpler choices in a file of this size."""
        from qbert.pipeline import rivals

        if variant.label:
            return
        size_mb = self.record.content["plans"][name]["size"]
        planner = self.calibrated_planner(variant, size_mb)
        files = planner.part(()).files
        choices = {
            "uniform bits": rivals.uniform(files, size_mb),
            "paper's ranking": rivals.ranked(files, self.ranking, size_mb),
            **{f"chance, draw {seed}": rivals.by_chance(files, size_mb, seed) for seed in range(self.arguments.draws)},
        }
        for rival, picked in choices.items():
            title = f"{rival} ({size_mb:.4g} MB)"
            if picked is not None and title not in self.record:
                predicted = planner.prediction(files.damage(picked))
                row = self.made(files, picked, variant, predicted)
                self.add(title, rival.split(",")[0], size_mb, {"seed": 0, **row})

    @functools.cached_property
    def ranking(self) -> list[str]:
        """Layers by |mean| + std of their top eigenvalues, measured once for all budgets."""
        from qbert import hessian_spectrum

        variant = self.variants[0]
        fraction = min(1.0, _SPECTRUM_ROWS / self.arguments.calibration_rows)
        spectrum = hessian_spectrum(
            variant.model,
            variant.labelled,
            fraction=fraction,
            checkpoint=self.folder / "spectrum",
            resume=self.arguments.resume,
            **_SPECTRUM,  # type: ignore[arg-type]
        )
        return spectrum.ranking()

    def made(self, files: FilePlan, picked: list[int], variant: Variant, predicted: float) -> dict[str, Any]:
        """The row of one choice of a file plan."""
        import qbert

        student = qbert.quantize_model(variant.model, files.configuration(picked), calibration_data=variant.batches)
        return self.row(qbert.pack(student), variant, predicted, files.size(picked) / 1e6)

    def add(self, title: str, group: str, size: float, row: dict[str, Any]) -> None:
        """Keep a row and say so."""
        self.record.add(title, {**row, "group": group, "size": size})
        print(f"{title}: {row['score']:.2f}, {row['retention']:.1f} % of float, {row['megabytes']:.2f} MB", flush=True)

    def estimate(self, budgets: int) -> str:
        """What all of it takes, in words."""
        arguments, variants = self.arguments, len(self.variants)
        scale = sum(p.numel() for p in self.model.parameters()) / _PARAMETERS
        structures = 8 if arguments.families else 3
        making = scale * _ROUNDING + self.evaluation
        models = budgets * (variants * 8 + (structures if arguments.families else 0) + 2 + arguments.draws)
        per_row = self.evaluation / max(self.record.content["float"]["rows"], 1)
        runs = budgets * variants * len(arguments.seeds) if arguments.recipe else 0
        training = runs * (arguments.steps * 16 * per_row * _BACKWARD + 2 * making + 2 * self.evaluation)
        total = (variants * structures * scale * _MEASURING + models * making + training) / 60
        return f"about {total:.0f} CPU minutes, {training / 60:.0f} of them for training; --resume goes on after a stop"


def budget_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of one record; random draws as their median."""
    rows: dict[str, list[dict[str, Any]]] = {"float": [content["float"]]}
    found = content["rows"]
    rows |= {name: kept for name, kept in found.items() if not name.startswith("chance")}
    for size in dict.fromkeys(name.split("(")[1] for name in found if name.startswith("chance")):
        drawn = [found[n][0] for n in found if n.startswith("chance") and n.endswith(f"({size}")]
        middle = {key: median(row[key] for row in drawn) for key in _CELLS if drawn[0].get(key) is not None}
        rows[f"median of {len(drawn)} random choices ({size}"] = [middle]
    shown = [key for key in _CELLS if any(row.get(key) is not None for kept in rows.values() for row in kept)]
    header = ["", *(content["metric"] if key == "score" else _CELLS[key][0] for key in shown), "seeds"]
    return header, [[name, *(_cell(kept, key) for key in shown), str(len(kept))] for name, kept in rows.items()]


def _cell(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    return spread(values[:1] if key in _NO_SPREAD else values, _CELLS[key][1])


def run_budgets(arguments: argparse.Namespace, folder: Path) -> None:
    """Plan every budget, make it, hold simpler choices against it, and write the page."""
    from compress_page import draw, section

    from qbert.files import write_whole

    bench = Budget(arguments, folder, *load_float_model(arguments))
    budgets = budgets_of(arguments)
    print(f"{bench.task.primary_metric} of float: {bench.reference.primary:.2f}; {bench.estimate(len(budgets))}")
    for budget in budgets:
        for variant in bench.variants:
            bench.planned(budget, variant)
    content = bench.record.content
    print(f"\n{text_table(*budget_table(content))}\n")
    target = Path(arguments.report or folder / "budget.md")
    picture = target.with_suffix(".png")
    draw([content], picture)
    text = f"{section(content)}\n![Score by size and by time]({picture.name})\n"
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written: {target} and {picture}")
