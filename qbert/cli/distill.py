"""``qbert distill``: train a small or low-bit student on its teacher's outputs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    build_for,
    check_out,
    configuration_of,
    file_megabytes,
    keep_record,
    machine_options,
    resumable,
    save_result,
    set_machine,
    show,
    task_options,
    unlabelled_batches,
)


@click.command()
@click.argument("teacher")
@click.argument("out", type=click.Path(file_okay=False))
@task_options(required=True)
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), help="The student: the teacher in these bits.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="JSON of a BitsConfig.")
@click.option("--student", help="Another model as the student (folder or hub name); with --bits it is quantized first.")
@click.option("--recipe", default="qbert_kd", show_default=True, help="What the student learns from.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Optimizer steps.")
@click.option("--learning-rate", type=click.FloatRange(0, 1, min_open=True), help="Peak rate; default: the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows a step.")
@click.option(
    "--rounding",
    type=click.Choice(["compensated", "nearest"]),
    help="Codes that training starts from; default: compensated with --bits, nearest if --config names none.",
)
@click.option("--rows", type=click.IntRange(min=1), default=384, show_default=True, help="Rows for compensated codes.")
@click.option("--train-limit", type=click.IntRange(min=1), help="Use at most this many training rows.")
@click.option("--eval-limit", type=click.IntRange(min=1), help="Score on at most this many held-out rows.")
@click.option("--bf16", is_flag=True, help="Train in bfloat16.")
@click.option("--force", is_flag=True, help="Write into OUT even if it holds something.")
@machine_options
@as_json
def distill(teacher: str, out: str, task: str, data_dir: str | None, **asked: Any) -> None:
    """Train a student of TEACHER, a model tuned for the task, and write it to the folder OUT, packed if quantized.

    The student is TEACHER itself in few bits (--bits or --config), or a smaller model (--student). Recipes are
    published ways of distilling: qbert_kd, ternarybert, tinybert, minilm, pkd, distilbert, ..., and qat, which learns
    from the labels alone. Both are scored on held-out rows. Interrupted, the same command goes on from the last
    checkpoint, in OUT.partial.

    \b
      qbert distill my-model out --task sst2 --bits 2
      qbert distill my-model out --task sst2 --config bits.json --recipe ternarybert --steps 1000
      qbert distill my-model out --task sst2 --student six-layers --recipe minilm
    """
    from qbert.distill.recipes import RECIPES
    from qbert.pipeline.steps import Context, Distill
    from qbert.saving.records import is_quantized
    from qbert.tasks import evaluate, load_task, prepare
    from qbert.tasks.evaluation import fidelity, wants_pairs

    work, quiet = beside(out, ".partial"), asked["as_json"]
    check_out(out, asked["force"], {"TEACHER": teacher, "--student": asked["student"]})
    if asked["bits"] and not asked["config_file"]:
        asked["rounding"] = asked["rounding"] or "compensated"
    step = Distill(asked["recipe"], asked["steps"], asked["learning_rate"], asked["batch_size"])
    config = _configuration(asked, RECIPES[asked["recipe"]]())
    set_machine(asked["device"], asked["threads"])
    data = load_task(task, data_dir=data_dir)
    loaded, tokenizer = build_for(data, teacher)
    loaded = loaded.to(asked["device"])
    student = build_for(data, asked["student"])[0].to(asked["device"]) if asked["student"] else loaded
    if wants_pairs(loaded) != wants_pairs(student):
        reads = {True: "the two sentences of a pair apart", False: "both sentences of a pair in one row"}
        raise ValueError(
            f"--student {asked['student']} reads {reads[wants_pairs(student)]}, and TEACHER {teacher} "
            f"{reads[wants_pairs(loaded)]}; give a student of the teacher's kind"
        )
    unimportant = ("device", "threads", "as_json", "force", "eval_limit")
    kept = {name: value for name, value in asked.items() if name not in unimportant}
    kept |= {"command": "distill", "teacher": teacher, "task": task, "data": data.fingerprint("train")}
    if asked["config_file"]:
        kept["config"] = config.to_dict()
    with resumable(work, kept):
        rows = prepare(
            data, tokenizer, "train", limit=asked["train_limit"], seed=asked["seed"], as_pairs=wants_pairs(loaded)
        )
        start = time.perf_counter()
        if config is not None:
            import qbert

            source = {**asked, "texts": None, "task": task, "data_dir": data_dir}
            specs = config.resolve(student).values()
            needed = any(spec.needs_data for spec in specs)
            batches = unlabelled_batches(source, tokenizer, student) if needed else None
            student = qbert.quantize_model(
                student, config, calibration_data=batches, checkpoint=work / "rounding", progress=not quiet
            )
        context = Context(loaded, tokenizer, rows, rows.collate, work, asked["seed"], asked["bf16"], not quiet)
        student = step.apply(student, context)
        seconds = time.perf_counter() - start

        def score(model: Any) -> Any:
            split = data.evaluation_splits[0]
            return evaluate(model, data, tokenizer, split=split, limit=asked["eval_limit"], progress=not quiet)

        wanted, found = score(loaded), score(student)
        if is_quantized(student):
            import qbert

            student = qbert.pack(student)
        save_result(student.to("cpu"), tokenizer, out)
        losses = _losses(work)
    alike = fidelity(wanted.logits, found.logits, getattr(loaded.config, "problem_type", None))
    content = {
        "teacher": teacher,
        "out": out,
        "metric": data.primary_metric,
        "teacher_score": wanted.primary,
        "score": found.primary,
        "agreement": alike.agreement,
        "divergence": alike.divergence,
        "file_mb": file_megabytes(out),
        "seconds": seconds,
    }
    rows_shown = [
        {"model": teacher, data.primary_metric: wanted.primary},
        {
            "model": out,
            data.primary_metric: found.primary,
            **{name: content[name] for name in ("agreement", "divergence", "seconds")},
            "MB": content["file_mb"],
        },
    ]
    curves = {"x": "step", "y": "loss", "lines": losses} if losses else None
    settings = {"teacher": teacher, "task": task, "data_dir": data_dir, **asked}
    keep_record(out, settings, rows_shown, about=data.describe(), metric=data.primary_metric, curves=curves)
    text = (
        f"{data.primary_metric} {found.primary:.2f}, the teacher's {wanted.primary:.2f}; agreement "
        f"{alike.agreement:.1f} %, divergence {alike.divergence:.4g}\n"
        f"{out}: {content['file_mb']:.2f} MB in its files; look at it with: qbert inspect {out}"
    )
    show(content, text, quiet)


def _configuration(asked: dict[str, Any], recipe: Any) -> Any:
    """The student's `BitsConfig`, with the recipe's own grids where bits are a number; None where it stays as it is."""
    from qbert.bits import BitsConfig

    if asked["config_file"] and asked["bits"]:
        raise ValueError("--config says all; leave out --bits")
    if asked["config_file"]:
        return configuration_of(asked["config_file"], asked["rounding"])
    if asked["bits"]:
        return recipe.adapt(BitsConfig(int(asked["bits"]), rounding=asked["rounding"]))
    if asked["rounding"]:
        raise ValueError("--rounding is for a student in few bits; add --bits or --config, or leave it out")
    if not asked["student"]:
        raise ValueError("there is no student; give --bits 2, --config bits.json, or --student MODEL")
    return None


def _losses(work: Path) -> dict[str, list[tuple[int, float]]]:
    """Name of a loss -> (step, value) pairs, of the whole training: the last checkpoint has what came before it too."""
    from qbert.distill.checkpoint import last_good_checkpoint
    from qbert.files import read_json

    checkpoint = last_good_checkpoint(work)
    if checkpoint is None:
        return {}
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in read_json(checkpoint / "trainer_state.json")["log_history"]:
        for name, value in entry.items():
            if "loss" in name and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((entry["step"], value))
    return found
