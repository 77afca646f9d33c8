"""``qbert spectrum``: top Hessian eigenvalues of every layer of a tuned model, over many data subsets."""

from __future__ import annotations

from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    build_for,
    check_file,
    check_picture,
    machine_options,
    set_machine,
    show,
    task_options,
)


@click.command()
@click.argument("model")
@task_options(required=True)
@click.option("--save", type=click.Path(dir_okay=False), help="JSON file for qbert allocate.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Picture of all runs (png, pdf, svg).")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Random data subsets.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True)
@click.option(
    "--granularity", type=click.Choice(["layer", "block", "matrix", "group"]), default="layer", show_default=True
)
@click.option("--method", type=click.Choice(["lanczos", "power", "ggn"]), default="lanczos", show_default=True)
@click.option("--tol", type=float, default=1e-2, show_default=True, help="Relative error of an eigenvalue.")
@click.option("--resume/--anew", default=True, show_default=True, help="Go on from SAVE.partial after an interrupt.")
@machine_options
@as_json
def spectrum(model: str, task: str, data_dir: str | None, save: str | None, plot: str | None, **asked: Any) -> None:
    """Measure MODEL, tuned for the task: the top eigenvalue of the Hessian of the loss in every layer.

    Ten subsets of a tenth of the training rows, as in the paper, take hours on a large task: a smaller --fraction
    takes minutes. With --save an interrupted run goes on where it stopped.

    \b
      qbert spectrum my-model --task sst2 --fraction 0.001 --save spectrum.json --plot spectrum.png
    """
    import shutil

    import qbert
    from qbert.tasks import load_task, prepare
    from qbert.tasks.evaluation import wants_pairs

    check_picture(plot)
    check_file("--save", save)
    set_machine(asked["device"], asked["threads"])
    data = load_task(task, data_dir=data_dir)
    loaded, tokenizer = build_for(data, model)
    rows = prepare(data, tokenizer, "train", as_pairs=wants_pairs(loaded))
    partial = beside(save, ".partial") if save else None
    names = ("runs", "fraction", "granularity", "method", "tol", "seed")
    found = qbert.hessian_spectrum(
        loaded.to(asked["device"]),
        rows,
        collate_fn=rows.collate,
        checkpoint=partial,
        resume=asked["resume"] and partial is not None and partial.exists(),
        **{name: asked[name] for name in names},
    )
    if save:
        found.save(save)
        shutil.rmtree(partial, ignore_errors=True)  # type: ignore[arg-type]
    if plot:
        found.plot(plot)
    content = {
        "names": list(found.names),
        "mean": found.mean.tolist(),
        "std": found.std.tolist(),
        "sensitivity": found.sensitivity.tolist(),
        "ranking": found.ranking(),
    }
    show(content, str(found), asked["as_json"])
