"""Bring a low-bit encoder back to its teacher's score: post-training quantization, plain QAT and KD-aware QAT compared.

    python experiments/qat_distill.py --bits 4
    python experiments/qat_distill.py --bits 2 --task sst2 --data-dir DATA --train-limit 8000 --seeds 0 1 2
    python experiments/qat_distill.py --bits-config outputs/hessian_spectrum-reviews/bits.json

The teacher is fine-tuned on the task (or loaded from the cache) and scored first. Plain QAT learns from the labels,
KD-aware QAT from the teacher alone; both get the same rows in the same order, the same steps and the same learning
rate, and the weights of the last step count. The KD student is packed, saved, loaded again and scored again.
Reference: Shen et al. 2020 (Q-BERT, the bits); Zhang et al. 2020 (TernaryBERT, distillation for QAT).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import add_task_arguments, positive, prepare_run, provenance, run_script

METHODS = {"qat": "QAT", "kd": "KD-QAT", "float": "float, same steps"}
_EVALUATIONS = 4
_CURVE_ROWS = 500


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--bits", type=int, default=4, help="bits of the encoder's matrices: 2, 3, 4 or 8; default: 4")
    bits.add_argument("--bits-config", help="JSON file with bits by layer, as the spectrum experiment writes it")
    parser.add_argument("--recipe", default="qbert_kd", help="what the student learns from; default: qbert_kd")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of data order and dropout; default: that of --seed")
    parser.add_argument("--epochs", type=float, help="passes over the rows for QAT and KD-QAT; default: 2")
    parser.add_argument("--batch-size", type=positive, default=16, help="rows a step; default: 16")
    parser.add_argument("--learning-rate", type=float, help="peak rate of QAT and KD-QAT; default: the recipe's")
    parser.add_argument("--teacher-epochs", type=positive, help="passes for the teacher; default: by task")
    parser.add_argument("--train-limit", type=positive, help="train the teacher and the students on this many rows")
    parser.add_argument("--eval-limit", type=positive, help="score on at most this many rows")
    parser.add_argument("--float-control", action="store_true", help="also train a float student for the same steps")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of this command stopped")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/qat.md")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [arguments.seed]
    return arguments


def check_request(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(recipe, bits configuration), refused before any work.

    Raises:
        ValueError, FileNotFoundError: naming the argument and the choices.
    """
    from qbert import BitsConfig
    from qbert.distill.recipes import RECIPES

    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe {arguments.recipe} is not known; use one of {', '.join(sorted(RECIPES))}")
    if arguments.epochs is not None and not arguments.epochs > 0:
        raise ValueError(f"--epochs {arguments.epochs:g} is not possible; use a positive number")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        raise ValueError(f"--learning-rate {arguments.learning_rate:g} is not possible; use a number such as 1e-4")
    recipe = RECIPES[arguments.recipe]()
    if arguments.bits_config:
        if not Path(arguments.bits_config).is_file():
            raise FileNotFoundError(f"--bits-config {arguments.bits_config} is no file; write one with BitsConfig.save")
        return recipe, BitsConfig.load(arguments.bits_config)
    return recipe, recipe.bits_config(arguments.bits)


class Comparison:
    """Teacher, data and settings that every method shares; each method gives one row of the table."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from qbert.tasks import fine_tune, load_task, prepare

        self.arguments, self.folder = arguments, folder
        self.recipe, self.bits = check_request(arguments)
        self.task = load_task(arguments.task, data_dir=arguments.data_dir)
        print(f"task: {self.task.describe()}")
        tuned = fine_tune(
            self.task,
            arguments.model,
            device=arguments.device,
            epochs=arguments.teacher_epochs,
            train_limit=arguments.train_limit,
            seed=arguments.seed,
        )
        self.teacher, self.tokenizer = tuned.model, tuned.tokenizer
        print(f"teacher: {tuned.path} ({'from the cache' if tuned.from_cache else f'tuned in {tuned.seconds:.0f} s'})")
        self.bits.resolve(self.teacher)
        self.data = prepare(self.task, self.tokenizer, "train", limit=arguments.train_limit, seed=arguments.seed)
        self.reference = self.evaluate(self.teacher)
        print(f"teacher's {self.task.primary_metric}: {self.reference.primary:.2f}")

    def evaluate(self, model: Any, limit: int | None = None) -> Any:
        """Held-out score of a model."""
        from qbert.tasks import evaluate

        limits = [n for n in (limit, self.arguments.eval_limit) if n is not None]
        split = self.task.evaluation_splits[0]
        return evaluate(model, self.task, self.tokenizer, split=split, limit=min(limits, default=None), progress=False)

    def row(self, model: Any, seconds: float) -> dict[str, float]:
        """Score, retention, likeness to the teacher and time of one student."""
        from qbert.distill.fidelity import fidelity

        result = self.evaluate(model)
        likeness = fidelity(self.reference.logits, result.logits)
        return {
            "score": result.primary,
            "retention": 100 * result.primary / self.reference.primary if self.reference.primary else 0.0,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
            "seconds": seconds,
        }

    def student(self, method: str) -> Any:
        """A fresh student: quantized, or a float copy for the control."""
        import copy

        from qbert import quantize_model

        return copy.deepcopy(self.teacher) if method == "float" else quantize_model(self.teacher, self.bits)

    def distiller(self, method: str, seed: int) -> Any:
        """The trainer of one method; all but recipe and seed are the same."""
        from transformers import TrainingArguments

        from qbert.distill import Distiller, recipes

        recipe = self.recipe if method == "kd" else recipes.qat()
        rate = self.arguments.learning_rate or self.recipe.arguments["learning_rate"]
        on_cpu = self.arguments.device == "cpu"
        settings = TrainingArguments(
            str(self.folder / f"{method}-{seed}"),
            per_device_train_batch_size=self.arguments.batch_size,
            num_train_epochs=self.arguments.epochs or 2.0,
            learning_rate=rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=5,
            save_steps=100,
            save_total_limit=2,
            seed=seed,
            use_cpu=on_cpu,
            report_to="none",
        )
        return Distiller(
            teacher=self.teacher,
            student=self.student(method),
            recipe=recipe,
            args=settings,
            train_dataset=self.data.examples,
            data_collator=self.data.collate,
            processing_class=self.tokenizer,
            check_teacher=method == "kd",
            callbacks=[self.scorer(method)],
        )

    def scorer(self, method: str) -> Any:
        """A callback that adds the held-out score to the curves a few times on the way."""
        from transformers import TrainerCallback

        comparison = self

        class Scorer(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % max(state.max_steps // _EVALUATIONS, 1) == 0:
                    score = comparison.evaluate(kwargs["model"].student, _CURVE_ROWS).primary
                    name = f"held-out {comparison.task.primary_metric}"
                    state.log_history.append({"step": state.global_step, name: score})

        return Scorer()

    def train(self, method: str, seed: int) -> tuple[dict[str, float], Any, list[Any]]:
        """(row, student, log) of one training, taken up again where it was interrupted if --resume was given."""
        from qbert.distill.checkpoint import last_good_checkpoint

        distiller = self.distiller(method, seed)
        checkpoint = last_good_checkpoint(distiller.folder) if self.arguments.resume else None
        print(f"\n{METHODS[method]}, seed {seed}{f', from {checkpoint}' if checkpoint else ''}", flush=True)
        start = time.monotonic()
        distiller.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        row = self.row(distiller.student, time.monotonic() - start)
        print(describe(METHODS[method], row), flush=True)
        return row, distiller.student, distiller.state.log_history


def describe(name: str, row: dict[str, float]) -> str:
    """One line."""
    return (
        f"{name}: {row['score']:.2f} ({row['retention']:.1f} % of the teacher), "
        f"agreement {row['agreement']:.1f} %, divergence {row['divergence']:.4f}, {row['seconds']:.0f} s"
    )


def print_cost(comparison: Comparison, methods: list[str]) -> None:
    """Measure a step of each method and say how long all will take."""
    total = 0.0
    for method in methods:
        cost = comparison.distiller(method, comparison.arguments.seeds[0]).estimate()
        total += cost["seconds"] * len(comparison.arguments.seeds)
        print(f"{METHODS[method]}: {cost['steps']:.0f} steps of {cost['seconds_per_step']:.2f} s")
    seeds = len(comparison.arguments.seeds)
    print(f"training will take about {total / 60:.1f} min for {seeds} seed(s); --epochs and --train-limit shorten it")


def save_packed(comparison: Comparison, student: Any) -> tuple[Path, float]:
    """Pack and save the student, load it again, and check that it is the same model.

    Returns:
        The folder, and the size of its weights in MB.

    Raises:
        ArithmeticError: if the loaded model gives other outputs than the one that was saved.
    """
    import torch

    import qbert

    packed = qbert.pack(student)
    target = comparison.folder / "student"
    packed.save_pretrained(target)
    comparison.tokenizer.save_pretrained(target)
    loaded = type(student).from_pretrained(target).eval().to(comparison.arguments.device)
    before, after = comparison.evaluate(packed), comparison.evaluate(loaded)
    if not torch.equal(before.logits, after.logits):
        raise ArithmeticError(f"the model in {target} gives other outputs than the one that was saved")
    trained = comparison.evaluate(student)
    difference = float((trained.logits - after.logits).abs().max())
    megabytes = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e6
    print(
        f"\nsaved to {target}: {megabytes:.2f} MB; loaded again it scores {after.primary:.2f} (in training form "
        f"{trained.primary:.2f}, largest difference of an output {difference:.1e})"
    )
    return target, megabytes


def table(comparison: Comparison, rows: dict[str, list[dict[str, float]]], megabytes: float) -> tuple[Any, Any]:
    """(header, lines): mean and spread over the seeds."""
    metric = comparison.task.primary_metric
    header = ["", metric, "retention", "agreement", "divergence", "MB", "seconds"]
    full = sum(p.numel() * p.element_size() for p in comparison.teacher.parameters()) / 1e6
    lines = [["teacher", f"{comparison.reference.primary:.2f}", "100 %", "100 %", "0", f"{full:.1f}", ""]]
    for name, found in rows.items():
        size = full if name == METHODS["float"] else megabytes
        columns = [spread([r[key] for r in found], digits) for key, digits in _COLUMNS]
        lines.append([name, columns[0], columns[1] + " %", columns[2] + " %", columns[3], f"{size:.1f}", columns[4]])
    return header, lines


_COLUMNS = (("score", 2), ("retention", 1), ("agreement", 1), ("divergence", 4), ("seconds", 0))


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several values."""
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 and digits else text


def main() -> None:
    """Run the comparison."""
    from qbert.distill.curves import curves_of, plot_curves
    from qbert.report import markdown_table, text_table

    arguments = parse_arguments()
    check_request(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    folder = prepare_run(arguments, "qat_distill")
    comparison = Comparison(arguments, folder)
    methods = ["qat", "kd"] + (["float"] if arguments.float_control else [])
    start = time.monotonic()
    untrained = comparison.student("ptq")
    rows = {"PTQ": [comparison.row(untrained, time.monotonic() - start)]}
    print(describe("post-training quantization", rows["PTQ"][0]))
    print_cost(comparison, methods)
    histories: dict[str, Any] = {}
    kept: Any = None
    for seed in arguments.seeds:
        for method in methods:
            row, student, history = comparison.train(method, seed)
            rows.setdefault(METHODS[method], []).append(row)
            histories.setdefault(METHODS[method], curves_of(history))
            kept = student if method == "kd" and kept is None else kept
    _, megabytes = save_packed(comparison, kept)
    plot_curves(histories, folder / "curves.png")
    header, lines = table(comparison, rows, megabytes)
    print(f"\n{text_table(header, lines)}\n\ncurves: {folder / 'curves.png'}")
    write_report(arguments, folder, comparison, markdown_table(header, lines), rows)


def write_report(arguments: argparse.Namespace, folder: Path, comparison: Comparison, text: str, rows: Any) -> None:
    """The table with all that is needed to make it again, as Markdown and JSON, each aside first."""
    path = Path(arguments.report or folder / "qat.md")
    steps = f"{len(comparison.data)} rows, {arguments.epochs or 2:g} epochs of batches of {arguments.batch_size}"
    budget = f"{steps}, seeds {', '.join(map(str, arguments.seeds))}, recipe {arguments.recipe}, {comparison.bits}"
    content = {path: f"## {comparison.task.name}, {comparison.bits.to_dict()['bits']} bits\n\n{text}\n\n"
               f"{comparison.task.describe()}. Students: {budget}. {provenance()}\n",
               folder / "results.json": json.dumps(rows, indent=2) + "\n"}  # fmt: skip
    for target, value in content.items():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        aside.write_text(value, encoding="utf-8")
        os.replace(aside, target)


if __name__ == "__main__":
    run_script(main, resume_hint="the same command with --resume goes on from the last checkpoint")
