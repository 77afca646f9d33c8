"""A model under a budget: the plan, what it becomes with distillation, and simpler choices of equal size beside it.

    python experiments/compress.py --size-mb 10.2 6.1
    python experiments/compress.py --within 0.01 --task sst2 --data-dir DATA
    python experiments/compress.py --latency-ms 4 --recipe qbert_kd --steps 150 --seeds 0 1 2

`qbert.plan` chooses structure, bits and tables; `qbert.compress` makes the model. Beside it, in files of the same size:
uniform bits, the paper's ranking by |mean| + std of the Hessian's top eigenvalues, and random choices, all rounded by
the same compensated rounding on the same rows. Scores are of held-out rows, plans and roundings are made on training
rows without their labels. It stands alone since `compress.py` has another question of its own, which students to train.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qbert.allocation.whole_file import FilePlan
from qbert.encoders.inputs import without_labels
from qbert.results import Record, markdown_table, provenance, text_table

_DRAWS = 5
_SIZE_MB = 10.2  # where no budget and no student is named
_SPECTRUM = {"runs": 5, "tol": 1e-2}
_SPECTRUM_ROWS = 32
_COLUMNS = ("score", "retention", "agreement", "divergence", "predicted", "megabytes", "ms")


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """``--size-mb --latency-ms --within --recipe --steps --calibration-rows --draws``."""
    group = parser.add_argument_group("budgets, instead of --student")
    group.add_argument("--size-mb", type=float, nargs="+", help="largest file, 10^6 bytes; several one after the other")
    group.add_argument("--latency-ms", type=float, help="longest call of 1x128 tokens, fused, measured here")
    group.add_argument("--within", type=float, help="share of answers that may change: the smallest such model")
    group.add_argument("--recipe", help="also distil the planned model by this recipe, such as qbert_kd")
    group.add_argument("--steps", type=int, default=100, help="steps of that distillation; default: 100")
    group.add_argument("--calibration-rows", type=int, default=512, help="training rows to plan on; default: 512")
    group.add_argument("--draws", type=int, default=_DRAWS, help=f"random choices beside the plan; default: {_DRAWS}")


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


class Budget:
    """One teacher, its training rows, and what is planned for it.

    Args:
        arguments: of ``compress.py``.
        folder: where results go.
        task, model, tokenizer: the teacher.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, task: Any, model: Any, tokenizer: Any) -> None:
        from qbert.tasks import evaluate, prepare

        self.arguments, self.folder = arguments, folder
        self.task, self.model, self.tokenizer = task, model, tokenizer
        data = prepare(task, tokenizer, "train", limit=arguments.calibration_rows, seed=arguments.seed)
        self.labelled = data.batches(32, seed=arguments.seed)
        self.batches = [without_labels(batch) for batch in self.labelled]

        def scored(candidate: Any) -> Any:
            split, limit = task.evaluation_splits[0], arguments.eval_limit
            return evaluate(candidate, task, tokenizer, split=split, limit=limit, progress=False)

        self.scored = scored
        self.reference = scored(model)
        asked = {
            "task": task.fingerprint("train"),
            "teacher": self.reference.primary,
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
        }

    def row(self, model: Any, predicted: float | None, megabytes: float) -> dict[str, Any]:
        """Score, likeness to the teacher and speed of a packed model."""
        from qbert.tasks.evaluation import fidelity

        result = self.scored(model)
        likeness = fidelity(self.reference.logits, result.logits, getattr(self.model.config, "problem_type", None))
        return {
            "score": result.primary,
            "retention": 100 * result.primary / self.reference.primary if self.reference.primary else 0.0,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
            "predicted": predicted,
            "megabytes": megabytes,
            "ms": self.speed(model),
        }

    def speed(self, model: Any) -> float:
        """Milliseconds of the fused model for 1x128 tokens, the fastest of some."""
        import qbert

        fused = qbert.optimize_for_inference(model)
        pieces = min(1000, model.config.vocab_size)
        ids = torch.randint(5, pieces, (1, 128), generator=torch.Generator().manual_seed(0))
        times = []
        with torch.inference_mode():
            for _ in range(12):
                start = time.perf_counter()
                fused(input_ids=ids, attention_mask=torch.ones_like(ids))
                times.append(1e3 * (time.perf_counter() - start))
        return min(times[2:])

    def planned(self, budget: dict[str, Any]) -> None:
        """Plan one budget, make it, and hold simpler choices of its size against it."""
        import qbert
        from qbert.pipeline import Distill

        name = ", ".join(f"{key} {value:g}" for key, value in budget.items())
        place = self.folder / name.replace(" ", "").replace(",", "-")
        found = qbert.plan(self.model, self.batches, **budget, progress=True)
        print(f"\n{found}\n", flush=True)
        place.mkdir(parents=True, exist_ok=True)
        found.plot(place / "front.png")
        found.pipeline.save(place / "plan.json")
        made = {f"plan ({name}): {found.best.name}": (found.pipeline, self.arguments.seeds[:1])}
        if self.arguments.recipe:
            training = found.with_training(after_bits=[Distill(self.arguments.recipe, steps=self.arguments.steps)])
            made[f"plan ({name}), then {self.arguments.recipe}"] = (training, self.arguments.seeds)
        for title, (pipeline, seeds) in made.items():
            done = {row["seed"] for row in self.record[title]}
            for seed in (seed for seed in seeds if seed not in done):
                folder = place / f"{len(pipeline.steps)}-steps-{seed}"
                model = qbert.compress(
                    self.model,
                    self.tokenizer,
                    self.task,
                    pipeline,
                    folder=folder,
                    train_limit=self.arguments.train_limit,
                    eval_limit=self.arguments.eval_limit,
                    seed=seed,
                    bf16=self.arguments.bf16,
                ).model
                size = max(path.stat().st_size for path in folder.rglob("model.safetensors")) / 1e6
                self.record.add(title, {"seed": seed, **self.row(model, found.best.predicted, size)})
        if found.bits_alone is not None:
            self.rivals(found.bits_alone, budget.get("size_mb", found.best.megabytes))

    def rivals(self, files: FilePlan, size_mb: float) -> None:
        """Simpler choices in a file of this size."""
        from qbert import hessian_spectrum
        from qbert.pipeline import rivals

        fraction = min(1.0, _SPECTRUM_ROWS / self.arguments.calibration_rows)
        spectrum = hessian_spectrum(self.model, self.labelled, fraction=fraction, **_SPECTRUM)  # type: ignore[arg-type]
        choices = {
            "uniform bits": rivals.uniform(files, size_mb),
            "paper's ranking": rivals.ranked(files, spectrum.ranking(), size_mb),
            **{f"chance, draw {seed}": rivals.by_chance(files, size_mb, seed) for seed in range(self.arguments.draws)},
        }
        for name, picked in choices.items():
            title = f"{name} ({size_mb:.1f} MB)"
            if picked is not None and title not in self.record:
                self.record.add(title, {"seed": 0, **self.made(files, picked)})

    def made(self, files: FilePlan, picked: list[int]) -> dict[str, Any]:
        """The row of one choice of a file plan."""
        import qbert

        student = qbert.quantize_model(self.model, files.configuration(picked), calibration_data=self.batches)
        return self.row(qbert.pack(student), files.damage(picked), files.size(picked) / 1e6)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, lines); random draws as their median."""
        rows = {"float": [{"score": self.reference.primary, "retention": 100.0, "megabytes": self.float_mb}]}
        rows |= {name: self.record[name] for name in self.record if not name.startswith("chance")}
        for size in dict.fromkeys(name.split("(")[1] for name in self.record if name.startswith("chance")):
            drawn = [self.record[n][0] for n in self.record if n.startswith("chance") and n.endswith(f"({size}")]
            middle = {key: median(row[key] for row in drawn) for key in _COLUMNS}
            rows[f"median of {len(drawn)} random choices ({size}"] = [middle]
        header = ["", self.task.primary_metric, "of float", "same answer", "KL", "predicted KL", "MB", "ms 1x128"]
        return [*header, "seeds"], [[name, *_cells(found), str(len(found))] for name, found in rows.items()]

    @property
    def float_mb(self) -> float:
        """Size of the teacher."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 1e6


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    digits = {"score": 2, "retention": 1, "agreement": 1, "divergence": 4, "predicted": 4, "megabytes": 2, "ms": 1}
    cells = []
    for key in _COLUMNS:
        values = [row[key] for row in rows if row.get(key) is not None]
        mean = sum(values) / len(values) if values else 0.0
        spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
        text = f"{mean:.{digits[key]}f}" if values else ""
        cells.append(text if spread is None or key in ("megabytes", "ms") else f"{text} ± {spread:.{digits[key]}f}")
    return cells


def run_budgets(arguments: argparse.Namespace, folder: Path, task: Any, model: Any, tokenizer: Any) -> None:
    """Plan every budget, make it, hold simpler choices against it, and write the page."""
    from qbert.files import write_whole

    bench = Budget(arguments, folder, task, model, tokenizer)
    for budget in budgets_of(arguments):
        bench.planned(budget)
    header, lines = bench.table()
    print(f"\n{text_table(header, lines)}\n")
    text = (
        f"## {task.name}\n\n{markdown_table(header, lines)}\n\n{task.describe()}. Plans and roundings saw "
        f"{arguments.calibration_rows} training rows without labels. {provenance()}\n"
    )
    target = Path(arguments.report or folder / "budget.md")
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written: {target}")
