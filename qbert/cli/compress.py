"""``qbert compress``: run a pipeline of steps on a model, with a score, a size and a time after each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    build_for,
    check_out,
    keep_record,
    machine_options,
    resumable,
    save_result,
    set_machine,
    show,
    task_options,
)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False))
@task_options(required=True)
@click.option(
    "--plan", "plan_file", required=True, type=click.Path(exists=True, dir_okay=False), help="JSON of the steps."
)
@click.option("--train-limit", type=click.IntRange(min=1), help="Use at most this many training rows.")
@click.option("--eval-limit", type=click.IntRange(min=1), help="Score on at most this many held-out rows.")
@click.option("--bf16", is_flag=True, help="Train in bfloat16.")
@click.option("--force", is_flag=True, help="Write into OUT even if it holds something.")
@machine_options
@as_json
def compress(model: str, out: str, task: str, data_dir: str | None, plan_file: str, **asked: Any) -> None:
    """Make MODEL smaller by the steps of a plan, which qbert plan or Pipeline.save wrote, into the folder OUT.

    The model is scored after every step. Interrupted, the same command goes on after the last whole step, kept in
    OUT.partial.

    \b
      qbert compress my-model out --task sst2 --plan plan.json
    """
    from qbert.pipeline import Pipeline
    from qbert.pipeline import compress as run
    from qbert.tasks import load_task

    check_out(out, asked["force"], {"MODEL": model})
    work = beside(out, ".partial")
    set_machine(asked["device"], asked["threads"])
    try:
        plan = Pipeline.load(plan_file)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--plan {plan_file}: {error}; qbert plan --save writes one") from error
    data = load_task(task, data_dir=data_dir)
    loaded, tokenizer = build_for(data, model)
    names = ("train_limit", "eval_limit", "seed", "bf16")
    options = {name: asked[name] for name in names}
    kept = {"command": "compress", "model": model, "plan": plan.to_dict(), "task": task, **options}
    with resumable(work, kept):
        options["progress"] = not asked["as_json"]
        done = run(loaded.to(asked["device"]), tokenizer, data, plan, folder=work, **options)
        save_result(done.model.to("cpu"), tokenizer, out)
    metric = done.record.metric
    names_shown = {"score": metric, "megabytes": "MB"}
    rows = [{names_shown.get(key, key): value for key, value in asdict(r).items()} for r in done.record.results]
    keep_record(out, {"model": model, **kept, **asked}, rows, about=data.describe(), metric=metric)
    content = {"folder": out, "steps": [asdict(result) for result in done.record.results]}
    show(content, f"{done.record}\n\n{out}: look at it with: qbert inspect {out}", asked["as_json"])
