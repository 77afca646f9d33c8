"""How small may a student be, and how few labels does it need? Score against the number of labels.

    python experiments/study/low_resource.py
    python experiments/study/low_resource.py --task sst2 --data-dir DATA --labels 100 1000 --seeds 0 1 2

For every number of labels a teacher is fine-tuned on that many rows. Each student then learns twice, with the same
steps: from those labels alone, and from the teacher's outputs on all rows, most of which it sees without their label.
The teacher runs over the rows once; its outputs are kept. Writes low_resource.json and low_resource.md. Source:
Wasserblat et al. 2020, "Exploring the Boundaries of Low-Resource BERT Distillation".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbert.cli.arguments import add_task_arguments, positive, prepare_run, run_script
from qbert.results import Record, markdown_table, provenance

# Peak learning rate of each student.
RATES = {"bilstm": 2e-3, "cnn": 2e-3, "layers": 2e-4}
# Share of the steps that a student takes: one that starts from the teacher's layers needs fewer, and each costs more.
PATIENCE = {"bilstm": 1.0, "cnn": 1.0, "layers": 0.2}
TITLES = {"bilstm": "BiLSTM", "cnn": "CNN", "layers": "3 layers"}
WAYS = {"labels": "its labels alone", "teacher": "the teacher on all rows", "copies": "the teacher, altered copies too"}
_KEPT_LAYERS = 3
_MOST_EPOCHS = 20
_COPIES = 4  # of a row, at most
_WORD_SIZE = 300


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument(
        "--labels", type=positive, nargs="+", default=[100, 400], help="numbers of labels; default: 100 400"
    )
    parser.add_argument("--rows", type=positive, default=4000, help="rows that students see, at most; default: 4000")
    parser.add_argument(
        "--copies", type=positive, help="with the most labels, also learn from this many altered copies of all rows"
    )
    parser.add_argument(
        "--students", nargs="+", default=list(RATES), choices=list(RATES), help="which; default: all of them"
    )
    parser.add_argument("--steps", type=positive, default=400, help="steps of each training; default: 400")
    parser.add_argument("--batch-size", type=positive, default=32, help="rows a step; default: 32")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of students; default: that of --seed")
    parser.add_argument(
        "--teacher-steps", type=positive, default=120, help="a teacher of few labels has this many steps; default: 120"
    )
    parser.add_argument("--eval-limit", type=positive, help="score on at most this many rows")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of this command stopped")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/low_resource.md")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [arguments.seed]
    arguments.labels = sorted(set(arguments.labels))
    return arguments


class Study:
    """Task, rows and settings that all trainings share.

    Args:
        arguments: the command line.
        folder: where teachers' outputs and checkpoints go.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from qbert.tasks import load_task, subset

        self.arguments, self.folder = arguments, folder
        self.task = load_task(arguments.task, data_dir=arguments.data_dir)
        if self.task.kind != "classification":
            raise ValueError(f"--task {arguments.task} is of kind {self.task.kind}; this study needs classes")
        available = len(self.task.rows("train"))
        if arguments.labels[-1] > available:
            raise ValueError(f"--labels {arguments.labels[-1]} are more than the {available} rows of {self.task.name}")
        self.pool = list(subset(self.task.rows("train"), arguments.rows, arguments.seed))
        print(self.task.describe())

    def teacher(self, labels: int) -> Any:
        """The `FineTuned` encoder of this many labels; epochs so that few labels also make some steps."""
        from qbert.tasks import fine_tune

        epochs = -(-self.arguments.teacher_steps * 32 // labels)
        return fine_tune(
            self.task,
            self.arguments.model,
            epochs=min(max(epochs, 1), _MOST_EPOCHS),
            train_limit=labels,
            seed=self.arguments.seed,
            progress=False,  # else every epoch of few rows is followed by a held-out score of many
        )

    def rows(self, tokenizer: Any, labels: int, way: str) -> Any:
        """Tokenized rows: the labelled ones, or those and the others of the pool without their label."""
        from qbert.tasks import prepare, subset

        labelled = list(subset(self.task.rows("train"), min(labels, self.arguments.rows), self.arguments.seed))
        data = prepare(self._task_of(labelled), tokenizer, "train")
        if way == "labels":
            return data
        known = {id(row) for row in labelled}
        others = [row for row in self.pool if id(row) not in known][: self.arguments.rows - len(labelled)]
        if way == "copies":
            others += self.altered(tokenizer, [*labelled, *others])
        if others:
            more = prepare(self._task_of(others), tokenizer, "train")
            data.examples += [{**example, "labels": -100} for example in more.examples]
        return data

    def altered(self, tokenizer: Any, rows: list[Any]) -> list[Any]:
        """Altered copies of rows, without the rows themselves."""
        from qbert.tasks.augment import Lexical, augmented

        method = Lexical(tokenizer.mask_token)
        more = augmented(
            self._task_of(rows), method, copies=_COPIES, limit=self.arguments.copies, cache=self.folder, progress=False
        )
        return list(more.task.rows("train")[len(rows) :])

    def _task_of(self, rows: list[Any]) -> Any:
        from dataclasses import replace

        return replace(self.task, splits={**self.task.splits, "train": rows})

    def student(self, name: str, tuned: Any, seed: int) -> Any:
        """A fresh student of a teacher."""
        from qbert import students
        from qbert.encoders.targets import main_layers
        from qbert.students.depth import student_with_layers
        from qbert.students.vocabulary import word_table

        if name == "layers":
            depth = len(main_layers(tuned.model)[1])
            last = min(_KEPT_LAYERS, depth) - 1
            return student_with_layers(tuned.model, [0, *range(depth - last, depth)])
        shape: dict[str, Any] = {
            "pairs": len(self.task.text_fields) == 2,
            "tokenizer": tuned.tokenizer,
            "seed": seed,
            "dropout": 0.1,
            "dimensions": min(_WORD_SIZE, word_table(tuned.model).embedding_dim),
        }
        return students.bilstm(tuned.model, **shape) if name == "bilstm" else students.cnn(tuned.model, **shape)

    def train(self, name: str, labels: int, way: str, seed: int, tuned: Any) -> dict[str, Any]:
        """The row of one training."""
        from transformers import TrainingArguments

        from qbert import model_size
        from qbert.distill import Distiller, TeacherOutputs, recipes

        start = time.process_time()
        data, student = self.rows(tuned.tokenizer, labels, way), self.student(name, tuned, seed)
        outputs = None
        if way != "labels":
            kept = self.folder / f"outputs-{self.task.name}-{labels}"
            outputs = TeacherOutputs.of(tuned.model, data, kept, collate=data.collate)
        settings = TrainingArguments(
            str(self.folder / "training"),
            max_steps=max(round(self.arguments.steps * PATIENCE[name]), 1),
            per_device_train_batch_size=self.arguments.batch_size,
            learning_rate=RATES[name],
            warmup_steps=0.1,
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=self.arguments.device == "cpu",
        )
        distiller = Distiller(
            teacher=tuned.model,
            student=student,
            recipe=recipes.qat(learned_steps=False) if way == "labels" else recipes.low_resource(),
            args=settings,
            train_dataset=data,
            data_collator=data.collate,
            check_teacher=False,
            teacher_outputs=outputs,
        )
        distiller.train()
        return {
            "seed": seed,
            "score": self.score(student, tuned.tokenizer),
            "bytes at 8 bits": model_size(student, 8).total,
            "CPU seconds": round(time.process_time() - start, 1),
        }

    def score(self, model: Any, tokenizer: Any) -> float:
        """Primary metric on held-out rows."""
        from qbert.tasks import evaluate

        split, limit = self.task.evaluation_splits[0], self.arguments.eval_limit
        return float(evaluate(model, self.task, tokenizer, split=split, limit=limit, progress=False).primary)


def key_of(name: str, labels: int, way: str) -> str:
    """What the rows of one kind of training are called in the record."""
    return f"{name} {labels} {way}"


def mean_and_spread(rows: Sequence[dict[str, Any]], teacher: float | None = None) -> str:
    """Mean score, its standard deviation over seeds, and percent of the teacher's score."""
    if not rows:
        return "-"
    scores = [row["score"] for row in rows]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    share = f" ({100 * statistics.fmean(scores) / teacher:.1f} %)" if teacher else ""
    return f"{statistics.fmean(scores):.1f}{spread}{share}"


def report(results: Record) -> str:
    """The Markdown page of a record."""
    content, asked = results.content, results.content["asked"]
    labels, names = asked["labels"], asked["students"]
    body = []
    for count in labels:
        teacher = results[f"teacher {count}"]
        for name in names if teacher else ():
            found = [results[key_of(name, count, way)] for way in WAYS]
            scores = [mean_and_spread(rows, teacher[0]["score"]) for rows in found]
            body.append([f"{count:,}", mean_and_spread(teacher), TITLES[name], *scores])
    header = ["labels", "teacher", "student", *WAYS.values()]
    found = [results[key_of(name, labels[-1], "labels")] for name in names]
    sizes = "; ".join(
        f"{TITLES[name]} {rows[0]['bytes at 8 bits'] / 1e6:.2f}"
        for name, rows in zip(names, found, strict=True)
        if rows
    )
    fewer = " (3 layers, which start as the teacher's: a fifth of them)" if "layers" in names else ""
    copies = f", or on these and at most {asked['copies']:,} altered copies of them" if asked["copies"] else ""
    return (
        "# Students of few labels\n\n"
        f"{content['data']}. Held-out {content['metric']}, mean and standard deviation over students' seeds "
        f"{', '.join(map(str, asked['seeds']))}; in brackets the percent of the teacher's score. One teacher for each "
        f"number of labels, tuned on those rows alone. Every student: {asked['steps']} steps of {asked['batch size']}"
        f"{fewer}; with the teacher, its probabilities on "
        f"{asked['rows seen']:,} rows, of which only the labelled ones bring a label{copies}.\n\n"
        f"{markdown_table(header, body)}\n\n"
        f"MB with 8-bit weights and tables: {sizes}.\n\n{content['made by']}\n"
    )


def main() -> None:
    """Train what is missing, then write the page."""
    from qbert.extras import require
    from qbert.files import write_whole

    arguments = parse_arguments()
    require("accelerate", "the training")
    folder = prepare_run(arguments, "low_resource")
    study = Study(arguments, folder)
    asked = {
        "task": study.task.fingerprint("train"),
        "held-out data": study.task.fingerprint(study.task.evaluation_splits[0]),
        "model": arguments.model,
        "labels": arguments.labels,
        "students": arguments.students,
        "rows seen": arguments.rows,
        "copies": arguments.copies,
        "steps": arguments.steps,
        "batch size": arguments.batch_size,
        "seeds": arguments.seeds,
        "seed": arguments.seed,
        "teacher steps": arguments.teacher_steps,
        "evaluation limit": arguments.eval_limit,
    }
    results = Record(folder / "low_resource.json", asked, resume=arguments.resume)
    target = Path(arguments.report or folder / "low_resource.md")
    about = {"data": study.task.describe(), "metric": study.task.primary_metric, "made by": provenance()}
    for labels in reversed(arguments.labels):
        run = _Runs(study, results, labels, about)
        ways = list(WAYS) if arguments.copies and labels == arguments.labels[-1] else list(WAYS)[:2]
        for name in arguments.students:
            for way in ways:
                for seed in arguments.seeds:
                    run.once(name, way, seed)
                    write_whole(target, lambda aside: aside.write_text(report(results), encoding="utf-8"))
    print(f"\n{report(results)}\nwritten: {target}")


class _Runs:
    """The trainings of one number of labels, each done once; their teacher is made when one is missing."""

    def __init__(self, study: Study, results: Record, labels: int, about: dict[str, Any]) -> None:
        self.study, self.results, self.labels, self.about = study, results, labels, about
        self._tuned: Any = None

    def once(self, name: str, way: str, seed: int) -> None:
        """Train a student unless the record has it."""
        key = key_of(name, self.labels, way)
        if seed in {row["seed"] for row in self.results[key]}:
            return
        if self._tuned is None:
            self._tuned = self.study.teacher(self.labels)
            if f"teacher {self.labels}" not in self.results:
                score = self.study.score(self._tuned.model, self._tuned.tokenizer)
                self.results.add(f"teacher {self.labels}", {"score": score}, **self.about)
                print(f"teacher of {self.labels} labels: {score:.2f}", flush=True)
        row = self.study.train(name, self.labels, way, seed, self._tuned)
        self.results.add(key, row)
        print(f"{TITLES[name]}, {self.labels} labels, {WAYS[way]}, seed {seed}: {row['score']:.2f}", flush=True)


if __name__ == "__main__":
    run_script(main, "add --resume to go on from there")
