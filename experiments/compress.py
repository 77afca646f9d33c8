"""Make an encoder smaller: under a budget, or into students by published recipes, beside their controls.

    python experiments/compress.py
    python experiments/compress.py --size-mb 10.2 6.1 --task sst2 --data-dir DATA
    python experiments/compress.py --student distilbert
    python experiments/compress.py --student tinybert minilm pkd --task sst2 --data-dir DATA --seeds 0 1 2
    python experiments/compress.py --student tinybert --ablations

The teacher is fine-tuned on the task (or loaded from the cache). Without ``--student`` it is planned under a budget
(``compress_budget.py``). Every student has the same rows, steps and batch size. Beside it stand the hard-label control
(the same start, steps and rate, taught by the labels alone) and the teacher made as small by bits alone, without
training. ``compress_table.py`` and ``compress_page.py`` put several results together, ``compress_plans.py`` says how
each student is made. Sources: those of the recipes; see ``--help``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from compress_bench import FORMS, Bench, form_name
from compress_budget import add_budget_arguments, budgets_of, run_budgets
from compress_plans import PLANS, Plan, hard_labels
from compress_table import forms_table, report_text, students_table

from qbert.cli.arguments import (
    add_task_arguments,
    check_training,
    positive,
    prepare_run,
    run_script,
    subject_of,
)
from qbert.results import Record, provenance, text_table
from qbert.students.depth import DepthTable

# Of the embedded corpus: minutes a student on a laptop, and enough steps for every phase.
_EPOCHS = 6.0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    known = "; ".join(f"{name}: {plan.title} ({plan.source})" for name, plan in PLANS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"students: {known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(parser)
    parser.add_argument("--student", nargs="+", help="which students to train; default: none, a budget")
    parser.add_argument("--layers", type=positive, help="layers of a shallow student; default: half of the teacher's")
    parser.add_argument("--keep", type=int, nargs="+", help="which layers it keeps; default: the best by measurement")
    parser.add_argument("--ablations", action="store_true", help="also train what its plan lists as ablations")
    parser.add_argument("--no-controls", action="store_true", help="leave out hard labels and bits alone")
    parser.add_argument("--text", nargs="+", help="files of unlabelled text for general stages, one text a line")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of data order and dropout; default: that of --seed")
    parser.add_argument(
        "--epochs", type=float, default=_EPOCHS, help=f"passes over the rows, all phases together; default: {_EPOCHS:g}"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="rows a step; default: 16")
    parser.add_argument("--learning-rate", type=float, help="peak rate of all students; default: the plan's")
    parser.add_argument("--no-fine-tune", action="store_true", help="--model is a tuned teacher; use it as it is")
    parser.add_argument("--teacher-epochs", type=positive, help="passes for the teacher; default: by task")
    parser.add_argument("--train-limit", type=positive, help="train students, and the teacher, on this many rows")
    parser.add_argument("--bf16", action="store_true", help="train students in bfloat16, where the device computes it")
    parser.add_argument("--eval-limit", type=positive, help="score on at most this many rows")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of this command stopped")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/students.md")
    add_budget_arguments(parser)
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [arguments.seed]
    return arguments


def check_request(arguments: argparse.Namespace) -> list[str]:
    """Names of the students, refused before any work.

    Raises:
        ValueError, FileNotFoundError: naming the argument and the choices.
    """
    for name in arguments.student or ():
        if name not in PLANS:
            raise ValueError(f"--student {name} is not known; use one of {', '.join(sorted(PLANS))}")
    check_training(arguments)
    for flag, values in (("--seeds", arguments.seeds), ("--student", arguments.student or [])):
        if len(set(values)) < len(values):
            raise ValueError(f"{flag} {' '.join(map(str, values))} names one twice; name each once")
    if arguments.keep and arguments.layers not in (None, len(arguments.keep)):
        raise ValueError(f"--layers {arguments.layers} and --keep with {len(arguments.keep)} contradict; give one")
    if arguments.keep:
        arguments.layers = len(arguments.keep)
    missing = next((file for file in arguments.text or () if not Path(file).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"--text {missing} is no file; name a file with one text a line")
    return list(arguments.student or ())


def check_students(arguments: argparse.Namespace, names: list[str]) -> None:
    """Refuse students that this teacher or task cannot have, before the teacher is tuned.

    Raises:
        ValueError: naming the argument and the mend.
    """
    from transformers import AutoConfig

    from qbert.tasks import load_task
    from qbert.tasks.embedded import embedded_encoder
    from qbert.tasks.heads import load_quietly

    config = load_quietly(AutoConfig, str(arguments.model or embedded_encoder()))
    count = config.num_hidden_layers
    whose = f"the teacher has {count} layers"
    wrong = next((layer for layer in arguments.keep or () if not -count <= layer < count), None)
    if wrong is not None:
        raise ValueError(f"--keep {wrong} is not possible; {whose}, numbered 0 to {count - 1}")
    if arguments.layers is not None and arguments.layers > count:
        raise ValueError(f"--layers {arguments.layers} is not possible; {whose}, so use 1 to {count}")
    depth = arguments.layers or max(count // 2, 1)
    for name in names:
        plan = PLANS[name]
        if plan.bert_only and config.model_type != "bert":
            raise ValueError(f"--student {name} needs a BERT, and the teacher is a {config.model_type}; leave it out")
        if plan.applies_a_layer_often and not 2 <= depth < count:
            raise ValueError(f"--student {name} stores 2 layers or more, and fewer than it applies; {whose} to give")
    if arguments.no_fine_tune:
        plans = plans_of(names, arguments.ablations, controls=False)
        general = next((name for name, plan in plans.items() if plan.needs_pretrained), None)
        if general is not None:
            raise ValueError(
                f"--student {general} also learns from the encoder before it was fine-tuned; leave --no-fine-tune out"
            )
    sentence = next((name for name in names if PLANS[name].sentences_only), None)
    if sentence is not None:
        task = load_task(arguments.task, data_dir=arguments.data_dir)
        if task.kind not in ("classification", "regression"):
            raise ValueError(f"--student {sentence} gives one output a row, and {task.name} is of {task.kind}s")


def plans_of(names: list[str], ablations: bool, controls: bool) -> dict[str, Plan]:
    """Every plan to train, by a name that no other has."""
    found: dict[str, Plan] = {}
    for name in names:
        plan = PLANS[name]
        found[name] = plan
        if controls and plan.phases:
            control = hard_labels(plan)
            found[f"{control.shape}/labels"] = control
        if ablations:
            found.update({f"{name}/{key}": other for key, other in plan.ablations.items()})
    return found


def asked_of(bench: Bench) -> dict[str, Any]:
    """All that the numbers of a table depend on, seeds and students apart."""
    arguments = bench.arguments
    return {
        "task": bench.task.name,
        **subject_of(bench.task, bench.teacher),
        "seed": arguments.seed,
        "rows": len(bench.rows.examples),
        "steps": bench.steps,
        "layers": bench.depth,
        "kept layers": arguments.keep,
        "batch size": arguments.batch_size,
        "bfloat16": arguments.bf16,
        "learning rate": arguments.learning_rate,
        "text": arguments.text,
        "evaluation limit": arguments.eval_limit,
    }


def heading(bench: Bench) -> dict[str, Any]:
    """What a table says above and below its rows."""
    arguments = bench.arguments
    reference = bench.reference.primary
    other = f"; other domain: {bench.elsewhere.name}" if bench.elsewhere is not None else ""
    rate = f", rate {arguments.learning_rate:g}" if arguments.learning_rate else ""
    return {
        "task": bench.task.name,
        "data": bench.task.describe(),
        "metric": bench.task.primary_metric,
        "elsewhere": other,
        "budget": f"{bench.steps} steps of {arguments.batch_size} of {len(bench.rows.examples):,} rows{rate}"
        f"{', bfloat16' if arguments.bf16 else ''}",
        "teacher": {
            "score": reference,
            "retention": 100.0,
            "agreement": 100.0,
            "divergence": 0.0,
            "other domain": bench.evaluate_elsewhere(bench.teacher),
            "stored": bench.stored(bench.teacher),
            **bench.shape(bench.teacher),
        },
        "depths": {},
        "made by": provenance(),
    }


def add_bits_alone(bench: Bench, results: Record, limit: float) -> None:
    """The row of the teacher in at most `limit` bytes by bits alone."""
    from qbert import model_size, pack

    bits, tables = bench.bits_alone(limit)
    title = f"{bits} bits, tables {tables}, no training"
    if title in results or (bits, tables) in FORMS:
        return
    start = time.monotonic()
    packed = pack(bench.quantized(bench.teacher, bits, tables))
    row = bench.row(packed, time.monotonic() - start)
    speed = {key: value for key, value in bench.speed(bench.teacher, packed).items() if key.startswith("fused")}
    quality = {key: value for key, value in row.items() if key not in ("other domain", "minutes")}
    stored = {form_name(bits, tables): {**quality, "bytes": model_size(packed).total}}
    results.add(title, {**row, **speed, "stored": stored})


def main() -> None:
    """Train, measure, print the table."""
    import torch

    from qbert.extras import require
    from qbert.files import write_whole
    from qbert.tasks.training import check_bf16

    arguments = parse_arguments()
    require("accelerate", "the training")
    names = check_request(arguments)
    budgets_of(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    folder = prepare_run(arguments, "compress")
    check_bf16(arguments.bf16, torch.device(arguments.device))
    if not names:
        run_budgets(arguments, folder)
        return
    check_students(arguments, names)
    bench = Bench(arguments, folder)
    bench.record = results = Record(folder / "results.json", asked_of(bench), resume=arguments.resume)
    if "teacher" not in results.content:
        results.content.update(heading(bench))
        results.save()
    ways = results.content.get("depths searched", {})
    for count, rows in results.content["depths"].items():
        bench.depths[int(count)] = DepthTable.from_list(rows, ways.get(count))
    for name, plan in plans_of(names, arguments.ablations, not arguments.no_controls).items():
        done = {row["seed"] for row in results[plan.title]}
        seeds = arguments.seeds if plan.phases else arguments.seeds[:1]
        for seed in (seed for seed in seeds if seed not in done):
            row, student = bench.train(name, plan, seed)
            shape = {} if results[plan.title] else bench.shape(student)
            results.add(plan.title, {"seed": seed, **row, **shape, "stored": bench.stored(student)})
            bench.drop_checkpoints(name, seed)
            print(f"{plan.title}, seed {seed}: {row['score']:.2f}, {row['retention']:.1f} % of the teacher", flush=True)
        if name in names and not arguments.no_controls:
            for form in results[plan.title][0]["stored"].values():
                add_bits_alone(bench, results, form["bytes"])
    print(f"\n{text_table(*students_table(results.content))}\n\n{text_table(*forms_table(results.content))}\n")
    target = Path(arguments.report or folder / "students.md")
    write_whole(target, lambda aside: aside.write_text(report_text(results.content), encoding="utf-8"))
    print(f"written: {target}")


if __name__ == "__main__":
    run_script(main, resume_hint="the same command with --resume goes on from the last checkpoint")
