"""``qbert compress``: run a pipeline of steps on a model, with a score, a size and a time after each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from qbert.cli.options import as_json, build_for, machine_options, set_machine, show, task_options


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
@machine_options
@as_json
def compress(model: str, out: str, task: str, data_dir: str | None, plan_file: str, **asked: Any) -> None:
    """Make MODEL smaller by the steps of a plan, as qbert plan or Pipeline.save wrote it; the result lies in OUT.

    The model after every step is kept and scored. Interrupted, the same command goes on after the last whole step.

    \b
      qbert compress my-model out --task sst2 --plan plan.json
    """
    from qbert.pipeline import Pipeline
    from qbert.pipeline import compress as run
    from qbert.tasks import load_task

    set_machine(asked["device"], asked["threads"])
    try:
        plan = Pipeline.load(plan_file)
    except ValueError as error:
        raise ValueError(f"--plan {plan_file}: {error}; qbert plan --save writes one") from error
    data = load_task(task, data_dir=data_dir)
    loaded, tokenizer = build_for(data, model)
    options = {name: asked[name] for name in ("train_limit", "eval_limit", "seed", "bf16")}
    done = run(loaded.to(asked["device"]), tokenizer, data, plan, folder=out, progress=not asked["as_json"], **options)
    content = {"folder": str(done.folder), "steps": [asdict(result) for result in done.record.results]}
    show(content, f"{done.record}\n\nthe model: {done.folder}", asked["as_json"])
