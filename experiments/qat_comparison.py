"""Teacher, data and budget of one comparison of training methods; each training gives one row of the table.

    comparison = Comparison(arguments, folder)
    row, student, log = comparison.train("kd", seed=0)
    megabytes = save_packed(comparison, student)

Plain QAT learns from the labels, KD-aware QAT from the teacher alone. Both start from the same codes; rows, their
order and steps are the same, and the rate is each recipe's own. Where unlabelled rows of other
domains are asked for, KD-aware QAT has them in the place of a share of the task's rows.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

METHODS = {"qat": "QAT", "kd": "KD-QAT", "float": "float, same steps"}
POST_TRAINING = {"nearest": "PTQ", "compensated": "PTQ, compensated"}
_EVALUATIONS = 3
_CURVE_ROWS = 250
_ROWS_ELSEWHERE = 1000


class Comparison:
    """What every method of one comparison shares.

    Args:
        arguments: the command line of ``qat_distill.py``.
        recipe, bits: what the student learns from, and its `BitsConfig`, to which the recipe adds its own grids.
        folder: where checkpoints go.

    Attributes:
        reference: held-out result of the teacher.
        elsewhere: other domains that students are scored on, each with the teacher's result.
    """

    def __init__(self, arguments: argparse.Namespace, recipe: Any, bits: Any, folder: Path) -> None:
        from other_domains import other_domains
        from ptq_table import calibration_batches

        from qbert.tasks import load_task, prepare

        self.arguments = arguments
        self.task = self.without_held_out(load_task(arguments.task, data_dir=arguments.data_dir))
        print(f"task: {self.task.describe()}")
        self.teacher, self.tokenizer = self.load_teacher()
        self._ask(recipe, bits, folder)
        data = prepare(self.task, self.tokenizer, "train")
        self.examples, self.collate = self.training_rows(data.examples), data.collate
        self.mixed = self.with_other_domains(self.examples)
        self.batches = calibration_batches(
            self.task, self.teacher, self.tokenizer, arguments.calibration_rows, arguments.seed
        )
        self.reference = self.evaluate(self.teacher)
        print(f"teacher's {self.task.primary_metric}: {self.reference.primary:.2f}")
        domains = other_domains(
            self.task,
            self.tokenizer,
            data_dir=arguments.data_dir,
            limit=arguments.eval_limit or _ROWS_ELSEWHERE,
            choosing=bool(arguments.hold_out),
        )
        self.elsewhere = [(domain, domain.evaluate(self.teacher)) for domain in domains]
        for domain, result in self.elsewhere:
            print(f"on {domain.name}: {result.primary:.2f}")

    def _ask(self, recipe: Any, bits: Any, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.bits = {name: recipe.adapt(with_rounding(bits, name)) for name in POST_TRAINING}
        self.default_bits = with_rounding(bits, "nearest")
        self.specs = bits.resolve(self.teacher)
        self._made: dict[Any, Any] = {}

    def asking(self, recipe: Any, bits: Any, start: str, folder: Path) -> Comparison:
        """The same teacher, rows and budget with another recipe, other bits, and another start."""
        other = copy.copy(self)
        other.arguments = argparse.Namespace(**{**vars(self.arguments), "start": start})
        other._ask(recipe, bits, folder)
        return other

    def without_held_out(self, task: Any) -> Any:
        """The task itself, or with --hold-out rows of its training set in the place of the validation rows."""
        if not self.arguments.hold_out:
            return task
        rows = task.rows("train")
        if not self.arguments.hold_out < len(rows):
            raise ValueError(f"--hold-out {self.arguments.hold_out} leaves none of {len(rows):,} rows to train on")
        order = random.Random(0).sample(range(len(rows)), len(rows))
        chosen = set(order[: self.arguments.hold_out])
        splits = {
            "train": [row for i, row in enumerate(rows) if i not in chosen],
            "validation": [rows[i] for i in sorted(chosen)],
        }
        return replace(task, splits=splits, source=f"{task.source}, validation rows cut from its training rows")

    def training_rows(self, examples: list[Any]) -> list[Any]:
        """The rows that students learn from: long enough ones, at most as many as asked for, drawn by the seed."""
        from qbert.tasks.task import subset

        fewest = self.arguments.min_tokens or 0
        kept = [example for example in examples if len(example["input_ids"]) >= fewest]
        if not kept:
            raise ValueError(f"--min-tokens {fewest} leaves no row to train on; use a smaller number")
        return list(subset(kept, self.arguments.train_limit, self.arguments.seed))

    def with_other_domains(self, examples: list[Any]) -> list[Any]:
        """The rows of a method that needs no labels: of other domains where asked for, in the place of some."""
        from other_domains import unlabelled_rows

        from qbert.tasks.task import subset

        if not self.arguments.unlabelled:
            return examples
        share = int(self.arguments.unlabelled_share * len(examples))
        others = unlabelled_rows(
            self.arguments.unlabelled,
            self.task,
            self.tokenizer,
            share,
            data_dir=self.arguments.data_dir,
            seed=self.arguments.seed,
        )
        kept = subset(examples, len(examples) - share, self.arguments.seed)
        return [{k: v for k, v in example.items() if k != "labels"} for example in (*kept, *others)]

    def load_teacher(self) -> tuple[Any, Any]:
        """(model, tokenizer): fine-tuned here, from the cache, or the given one as it is."""
        from qbert.tasks import build_model, fine_tune

        arguments = self.arguments
        if arguments.no_fine_tune:
            print(f"teacher: {arguments.model}, as it is")
            model, tokenizer = build_model(self.task, arguments.model, tuned=True)
            return model.to(arguments.device), tokenizer
        tuned = fine_tune(
            self.task,
            arguments.model,
            device=arguments.device,
            epochs=arguments.teacher_epochs,
            train_limit=teacher_limit(arguments),
            seed=arguments.seed,
            bf16=arguments.teacher_bf16,
        )
        print(f"teacher: {tuned.path} ({'from the cache' if tuned.from_cache else f'tuned in {tuned.seconds:.0f} s'})")
        return tuned.model, tuned.tokenizer

    def evaluate(self, model: Any, limit: int | None = None) -> Any:
        """Held-out score of a model."""
        from qbert.tasks import evaluate

        limits = [n for n in (limit, self.arguments.eval_limit) if n is not None]
        split = self.task.evaluation_splits[0]
        return evaluate(model, self.task, self.tokenizer, split=split, limit=min(limits, default=None))

    def row(self, model: Any, seconds: float) -> dict[str, Any]:
        """Score, retention and likeness to the teacher, here and on other domains, and time of one student."""
        from qbert.tasks.evaluation import fidelity

        result = self.evaluate(model)
        kind = getattr(getattr(self.teacher, "config", None), "problem_type", None)

        def likeness(wanted: Any, found: Any) -> dict[str, float]:
            alike = fidelity(wanted.logits, found.logits, kind)
            return {
                "score": found.primary,
                "retention": 100 * found.primary / wanted.primary if wanted.primary else 0.0,
                "agreement": alike.agreement,
                "divergence": alike.divergence,
            }

        elsewhere = {domain.name: likeness(wanted, domain.evaluate(model)) for domain, wanted in self.elsewhere}
        return {**likeness(self.reference, result), "seconds": seconds, "elsewhere": elsewhere}

    def post_training_row(self, rounding: str) -> dict[str, Any]:
        """The row without training; of nearest rounding on the library's grid or the recipe's, by score."""
        rows = []  # the better by the reported score itself: a choice that can only favour the row without training
        for bits in dict.fromkeys([self.bits[rounding], *([self.default_bits] if rounding == "nearest" else [])]):
            start = time.monotonic()
            student = self.quantized(bits)
            rows.append(self.row(student, time.monotonic() - start))
        return max(rows, key=lambda row: row["score"])

    def quantized(self, bits: Any) -> Any:
        """The teacher in these bits, made once."""
        from qbert import quantize_model

        if bits not in self._made:
            data = self.batches if bits.defaults["rounding"] == "compensated" else None
            self._made[bits] = quantize_model(self.teacher, bits, calibration_data=data, progress=True)
        return copy.deepcopy(self._made[bits])

    def student(self, method: str) -> Any:
        """A fresh student: quantized, or a float copy for the control."""
        if method == "float":
            return copy.deepcopy(self.teacher)
        return self.quantized(self.bits[self.arguments.start])

    def distiller(self, method: str, seed: int) -> Any:
        """The trainer of one method; all but recipe and seed are the same."""
        from transformers import TrainingArguments

        from qbert.distill import Distiller, recipes

        recipe = self.recipe if method == "kd" else recipes.qat()
        rate = (self.arguments.learning_rate if method == "kd" else None) or recipe.arguments["learning_rate"]
        on_cpu = self.arguments.device == "cpu"
        settings = TrainingArguments(
            str(self.trained_in(method, seed)),
            per_device_train_batch_size=self.arguments.batch_size,
            num_train_epochs=self.arguments.epochs,
            learning_rate=rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=5,
            save_steps=100,
            save_total_limit=2,
            seed=seed,
            use_cpu=on_cpu,
            bf16=self.arguments.bf16,
            report_to="none",
        )
        return Distiller(
            teacher=self.teacher,
            student=self.student(method),
            recipe=recipe,
            args=settings,
            train_dataset=self.mixed if method == "kd" else self.examples,
            data_collator=self.collate,
            processing_class=self.tokenizer,
            check_teacher=method == "kd",
            callbacks=[self.scorer()],
        )

    def scorer(self) -> Any:
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

    def train(self, method: str, seed: int) -> tuple[dict[str, Any], Any, list[Any]]:
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

    def drop_checkpoints(self, method: str, seed: int) -> None:
        """Delete the checkpoints of a training whose row is kept: they are several times the model's size."""
        for checkpoint in self.trained_in(method, seed).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def trained_in(self, method: str, seed: int) -> Path:
        """Folder of the curves and checkpoints of one training."""
        return self.folder / f"{method}-{seed}"

    def widths(self) -> str:
        """The encoder's bits in words: "4", or "2/3 mixed"."""
        from qbert.encoders.targets import find_targets

        matrices = [target.path for target in find_targets(self.teacher) if not target.is_embedding]
        bits = {self.specs[path].bits for path in matrices if path in self.specs}
        return f"{'/'.join(map(str, sorted(bits)))} mixed" if len(bits) > 1 else str(*bits)


def teacher_limit(arguments: argparse.Namespace) -> int | None:
    """How many rows the teacher is trained on; None: all."""
    return None if arguments.teacher_rows == "all" else arguments.teacher_rows or arguments.train_limit


def with_rounding(bits: Any, rounding: str) -> Any:
    """The same configuration with this rounding wherever it does not say which."""
    from qbert import BitsConfig

    return BitsConfig(bits.rules, embedding_bits=bits.embedding_bits, **{"rounding": rounding, **bits.defaults})


def describe(name: str, row: dict[str, Any]) -> str:
    """One line."""
    elsewhere = "".join(
        f"; on {name} {r['score']:.2f} ({r['retention']:.1f} %)" for name, r in row["elsewhere"].items()
    )
    return (
        f"{name}: {row['score']:.2f} ({row['retention']:.1f} % of the teacher), agreement {row['agreement']:.1f} %, "
        f"divergence {row['divergence']:.4f}, {row['seconds']:.0f} s{elsewhere}"
    )


def save_packed(comparison: Comparison, student: Any) -> float:
    """Pack and save the student, load it again, and check that it is the same model.

    Returns:
        Size of its weights on disk in MB.

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
        f"saved to {target}: {megabytes:.2f} MB; loaded again it scores {after.primary:.2f} (in training form "
        f"{trained.primary:.2f}, largest difference of an output {difference:.1e})"
    )
    return megabytes
