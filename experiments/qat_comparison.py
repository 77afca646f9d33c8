"""Teacher, data and budget of one comparison of training methods; each training gives one row of the table.

    comparison = Comparison(arguments, folder)
    row, student, log = comparison.train("kd", seed=0)
    megabytes = save_packed(comparison, student)

Plain QAT learns from the labels, KD-aware QAT from the teacher alone; rows, their order, steps and rate are the same.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

METHODS = {"qat": "QAT", "kd": "KD-QAT", "float": "float, same steps"}
_EVALUATIONS = 3
_CURVE_ROWS = 250


class Comparison:
    """What every method of one comparison shares.

    Args:
        arguments: the command line of ``qat_distill.py``.
        recipe, bits: what the student learns from, and its `BitsConfig`, to which the recipe adds its own grids.
        folder: where checkpoints go.

    Attributes:
        reference: held-out result of the teacher.
    """

    def __init__(self, arguments: argparse.Namespace, recipe: Any, bits: Any, folder: Path) -> None:
        from qbert.tasks import load_task, prepare

        self.arguments, self.recipe, self.folder = arguments, recipe, folder
        self.default_bits, self.bits = bits, recipe.adapt(bits)
        self.task = load_task(arguments.task, data_dir=arguments.data_dir)
        print(f"task: {self.task.describe()}")
        self.teacher, self.tokenizer = self.load_teacher()
        self.specs = self.bits.resolve(self.teacher)
        data = prepare(self.task, self.tokenizer, "train")
        self.examples, self.collate = self.training_rows(data.examples), data.collate
        self.reference = self.evaluate(self.teacher)
        print(f"teacher's {self.task.primary_metric}: {self.reference.primary:.2f}")

    def training_rows(self, examples: list[Any]) -> list[Any]:
        """The rows that students learn from: long enough ones, at most as many as asked for, drawn by the seed."""
        from qbert.tasks.task import subset

        fewest = self.arguments.min_tokens or 0
        kept = [example for example in examples if len(example["input_ids"]) >= fewest]
        if not kept:
            raise ValueError(f"--min-tokens {fewest} leaves no row to train on; use a smaller number")
        return list(subset(kept, self.arguments.train_limit, self.arguments.seed))

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
            train_limit=arguments.train_limit,
            seed=arguments.seed,
            bf16=arguments.bf16,
        )
        print(f"teacher: {tuned.path} ({'from the cache' if tuned.from_cache else f'tuned in {tuned.seconds:.0f} s'})")
        return tuned.model, tuned.tokenizer

    def evaluate(self, model: Any, limit: int | None = None) -> Any:
        """Held-out score of a model."""
        from qbert.tasks import evaluate

        limits = [n for n in (limit, self.arguments.eval_limit) if n is not None]
        split = self.task.evaluation_splits[0]
        return evaluate(model, self.task, self.tokenizer, split=split, limit=min(limits, default=None), progress=False)

    def row(self, model: Any, seconds: float) -> dict[str, float]:
        """Score, retention, likeness to the teacher and time of one student."""
        from qbert.tasks.evaluation import fidelity

        result = self.evaluate(model)
        kind = getattr(getattr(self.teacher, "config", None), "problem_type", None)
        likeness = fidelity(self.reference.logits, result.logits, kind)
        return {
            "score": result.primary,
            "retention": 100 * result.primary / self.reference.primary if self.reference.primary else 0.0,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
            "seconds": seconds,
        }

    def post_training_row(self) -> dict[str, float]:
        """The row without training: on the library's default grid or on the recipe's, whichever scores higher."""
        from qbert import quantize_model

        rows = []
        for bits in {self.default_bits, self.bits}:
            start = time.monotonic()
            student = quantize_model(self.teacher, bits)
            rows.append(self.row(student, time.monotonic() - start))
        return max(rows, key=lambda row: row["score"])

    def student(self, method: str) -> Any:
        """A fresh student: quantized, or a float copy for the control."""
        import copy

        from qbert import quantize_model

        if method == "float":
            return copy.deepcopy(self.teacher)
        return quantize_model(self.teacher, self.bits)

    def distiller(self, method: str, seed: int) -> Any:
        """The trainer of one method; all but recipe and seed are the same."""
        from transformers import TrainingArguments

        from qbert.distill import Distiller, recipes

        recipe = self.recipe if method == "kd" else recipes.qat()
        rate = self.arguments.learning_rate or self.recipe.arguments["learning_rate"]
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
            train_dataset=self.examples,
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


def describe(name: str, row: dict[str, float]) -> str:
    """One line."""
    return (
        f"{name}: {row['score']:.2f} ({row['retention']:.1f} % of the teacher), "
        f"agreement {row['agreement']:.1f} %, divergence {row['divergence']:.4f}, {row['seconds']:.0f} s"
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
