"""``qbert evaluate``: the official metrics of a task, beside another model's where one is named."""

from __future__ import annotations

from typing import Any

import click

from qbert.cli.options import (
    as_json,
    build_for,
    check_file,
    check_packed,
    keep_record,
    machine_options,
    set_machine,
    show,
    task_options,
)


@click.command()
@click.argument("model")
@task_options(required=True)
@click.option("--beside", help="Another model, such as the float one: its score, and how far the two agree.")
@click.option("--limit", type=click.IntRange(min=1), help="Score on at most this many held-out rows.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--optimize", is_flag=True, help="Run fused, as qbert.optimize_for_inference does (packed models).")
@click.option("--save", type=click.Path(dir_okay=False), help="JSON file of the scores, for qbert report.")
@machine_options
@as_json
def evaluate(model: str, task: str, data_dir: str | None, beside: str | None, save: str | None, **asked: Any) -> None:
    """Score MODEL (float or quantized; a folder or a hub name) on the held-out rows of a task.

    \b
      qbert evaluate out --task sst2 --data-dir DATA
      qbert evaluate out --task sst2 --beside my-model
    """
    import qbert
    from qbert.results import text_table
    from qbert.tasks import load_task
    from qbert.tasks.evaluation import evaluate as scores_of
    from qbert.tasks.evaluation import fidelity

    check_file("--save", save, {"MODEL": model, "--beside": beside})
    set_machine(asked["device"], asked["threads"])
    data = load_task(task, data_dir=data_dir)
    named = [model, *([beside] if beside else [])]
    labels = [f"{model}, fused" if asked["optimize"] else model, *named[1:]]
    if len(set(labels)) < len(labels):
        labels[1] += " (beside)"
    results = []
    for place, name in enumerate(named):
        loaded, tokenizer = build_for(data, name)
        loaded = loaded.to(asked["device"])
        if asked["optimize"] and place == 0:
            check_packed("MODEL", model, loaded)
            loaded = qbert.optimize_for_inference(loaded)
        options = {key: asked[key] for key in ("limit", "batch_size", "seed")}
        results.append(scores_of(loaded, data, tokenizer, progress=not asked["as_json"], **options))
    scored = [{"model": label, **result} for label, result in zip(labels, results, strict=True)]
    by_label = {label: dict(result) for label, result in zip(labels, results, strict=True)}
    content: dict[str, Any] = {"task": data.describe(), "scores": by_label}
    metrics = list(results[0])
    rows = [[row["model"], *(f"{row[metric]:.4g}" for metric in metrics)] for row in scored]
    lines = [data.describe(), text_table(["model", *metrics], rows)]
    if beside:
        found = fidelity(results[1].logits, results[0].logits)
        content["agreement"], content["divergence"] = found.agreement, found.divergence
        lines.append(f"beside {beside}: agreement {found.agreement:.1f} %, divergence {found.divergence:.4g}")
    if save:
        scored[0] |= {name: content[name] for name in ("agreement", "divergence") if name in content}
        settings = {"model": model, "task": task, "data_dir": data_dir, "beside": beside, **asked}
        keep_record(save, settings, scored, about=data.describe(), metric=data.primary_metric)
    show(content, "\n".join(lines), asked["as_json"])
