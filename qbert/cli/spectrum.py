"""``qbert spectrum``: top Hessian eigenvalues of every layer of a tuned model, over many data subsets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    build_for,
    check_file,
    check_picture,
    goes_on_from,
    machine_options,
    made_by,
    on_interrupt,
    set_machine,
    show,
    task_options,
)

_MOST_ROWS = 32
_TIMED_ROWS = 16
# What a block of one run takes, in gradients of the whole model on its rows: measured on MiniLM-L6 on a CPU.
_GRADIENTS = {"lanczos": 3.0, "power": 5.0}
_GRADIENTS_OF_A_RUN = 5.0  # method ggn: all blocks at once


@click.command()
@click.argument("model")
@task_options(required=True)
@click.option("--save", type=click.Path(dir_okay=False), help="JSON file for qbert allocate.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Picture of all runs (png, pdf, svg).")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Random data subsets.")
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Share of the training rows in a subset; default: 0.1, at most {_MOST_ROWS} rows.",
)
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

    Ten subsets of a tenth of the training rows (--fraction 0.1), as in the paper, take hours on a large task, the 32
    rows of the default minutes; how long is said before. With --save an interrupted run goes on where it stopped.

    \b
      qbert spectrum my-model --task sst2 --save spectrum.json --plot spectrum.png
    """
    import qbert
    from qbert.hessian.checkpoint import Checkpoint
    from qbert.tasks import load_task, prepare
    from qbert.tasks.evaluation import wants_pairs

    check_picture(plot)
    check_file("--save", save, {"MODEL": model})
    set_machine(asked["device"], asked["threads"])
    data = load_task(task, data_dir=data_dir)
    loaded, tokenizer = build_for(data, model)
    rows = prepare(data, tokenizer, "train", as_pairs=wants_pairs(loaded))
    if asked["fraction"] is None:
        asked["fraction"] = min(0.1, _MOST_ROWS / len(rows))
    partial = beside(save, ".partial") if save else None
    if partial is None:
        on_interrupt("nothing is kept without --save; run it again with --save FILE, and it can go on")
    else:
        goes_on_from(partial)
    loaded = loaded.to(asked["device"])
    resumed = asked["resume"] and partial is not None and partial.exists()
    subset = max(1, round(asked["fraction"] * len(rows)))
    seconds = _seconds(loaded, rows, subset, asked)
    click.echo(
        f"{asked['runs']} subsets of {subset} of {len(rows)} training rows: about {_in_words(seconds)}, by one timed "
        f"gradient{f', less what {partial} holds' if resumed else ''}",
        err=True,
    )
    names = ("runs", "fraction", "granularity", "method", "tol", "seed")
    found = qbert.hessian_spectrum(
        loaded,
        rows,
        collate_fn=rows.collate,
        checkpoint=partial,
        resume=resumed,
        **{name: asked[name] for name in names},
    )
    found = replace(found, settings={"model": model, "task": task, **found.settings, "made by": made_by()})
    if save:
        found.save(save)
        Checkpoint(partial, {}, resume=False).clear()  # type: ignore[arg-type]
        with contextlib.suppress(OSError):  # what else lies there stays
            partial.rmdir()  # type: ignore[union-attr]
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


def _seconds(model: Any, rows: Any, subset: int, asked: Mapping[str, Any]) -> float:
    """About what all runs will take, by the time of one gradient on a few of the rows.

    Raises:
        ValueError: a model that has no Hessian, or no such blocks.
    """
    import torch

    from qbert.hessian.blocks import parameter_blocks
    from qbert.hessian.measure import check_finite

    blocks = len(parameter_blocks(model, asked["granularity"]))
    check_finite(model)
    count = min(subset, _TIMED_ROWS)
    batch = rows.collate([rows[i * len(rows) // count] for i in range(count)])
    batch = {name: value.to(asked["device"]) for name, value in batch.items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    taken = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        gradients = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
        float(next(g for g in gradients if g is not None).sum())  # waits for a GPU
        taken.append(time.perf_counter() - start)
    method = asked["method"]
    gradients_of_a_run = _GRADIENTS_OF_A_RUN if method == "ggn" else _GRADIENTS[method] * blocks
    return float(asked["runs"] * gradients_of_a_run * min(taken) * subset / count)


def _in_words(seconds: float) -> str:
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
