"""``qbert plan``: what to drop, narrow and store in how many bits, under a budget."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    check_file,
    check_picture,
    float_model,
    in_fours,
    keep_record,
    load_tokenizer,
    machine_options,
    on_interrupt,
    resumable,
    set_machine,
    show,
    task_options,
    unlabelled_batches,
)


@click.command()
@click.argument("model")
@click.option("--size-mb", type=float, help="Largest file, 10^6 bytes.")
@click.option("--latency-ms", type=float, help="Longest call of the packed, fused model, measured here.")
@click.option(
    "--within", type=float, help="Share of rows, such as 0.01, whose answer may change: the smallest such model."
)
@click.option("--shape", default="1x128", show_default=True, help="Sequences x tokens that --latency-ms is about.")
@click.option(
    "--texts", type=click.Path(exists=True, dir_okay=False), help="Text like that to come, a sentence a line."
)
@task_options(required=False)
@click.option("--rows", type=click.IntRange(min=4), default=384, show_default=True, help="Rows to plan on.")
@click.option("--save", type=click.Path(dir_okay=False), help="JSON file for qbert compress --plan.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Picture of the front (png, pdf, svg).")
@machine_options
@as_json
def plan(model: str, shape: str, save: str | None, plot: str | None, **asked: Any) -> None:
    """Plan the compression of MODEL, a float model in a folder or on the hub: structure, bits and tables at once.

    Every way to store every matrix and table is measured on text of yours, without labels (--texts, or the training
    rows of --task), and the least damaged model within the budget is found exactly. Beside --save plan.json lies
    plan.record.json, which tells qbert report what was tried. Interrupted, a plan with --save goes on after the last
    structure that was measured, kept in plan.json.partial, by the same command or by one with another budget.

    \b
      qbert plan my-model --size-mb 10 --texts sentences.txt --save plan.json --plot front.png
      qbert plan my-model --within 0.01 --task sst2
    """
    from qbert.pipeline.plan import plan as make_plan

    set_machine(asked["device"], asked["threads"])
    rows_and_tokens = _shape(shape)
    if bool(asked["texts"]) == bool(asked["task"]):
        raise ValueError("give --texts FILE or --task NAME; a plan is made on one of them")
    if all(asked[name] is None for name in ("size_mb", "latency_ms", "within")):
        raise ValueError("give --size-mb, --latency-ms or --within; a plan needs a budget")
    check_picture(plot)
    check_file("--save", save, {"MODEL": model, "--texts": asked["texts"]})
    loaded = float_model(model)
    tokenizer = getattr(loaded, "tokenizer", None) or load_tokenizer(model)
    batches = unlabelled_batches(asked, tokenizer, loaded)
    loaded = loaded.to(asked["device"])
    options = {name: asked[name] for name in ("size_mb", "latency_ms", "within")}
    options |= {"shape": rows_and_tokens, "progress": not asked["as_json"]}
    with contextlib.ExitStack() as stack:
        if save:
            # The budget is left out, since what is measured serves any.
            source = {name: asked[name] for name in ("texts", "task", "data_dir", "rows", "seed")}
            options["checkpoint"] = work = beside(save, ".partial")
            stack.enter_context(resumable(work, {"command": "plan", "model": model, **source}, result="--save"))
        else:
            on_interrupt("nothing is kept without --save; run it again with --save FILE, and it can go on")
        found = make_plan(loaded, in_fours(batches), **options)
        if save:
            found.pipeline.save(save)
            _record(Path(save).with_suffix(".record.json"), found, {"model": model, "shape": shape, **asked})
    if plot:
        found.plot(plot)
    content = {
        "budget": found.budget,
        "pipeline": found.pipeline.to_dict(),
        "candidates": [
            {k: v for k, v in asdict(c).items() if k not in ("config", "structure")} | {"structure": c.name}
            for c in found.candidates
        ],
    }
    show(content, str(found), asked["as_json"])


def _record(path: Path, found: Any, settings: dict[str, Any]) -> None:
    rows = [
        {
            "plan": c.name,
            "MB": c.megabytes,
            **({} if c.latency_ms is None else {"ms": c.latency_ms}),
            "predicted": c.predicted,
            "measured": c.measured,
            "agreement": c.agreement,
            "chosen": "*" if c is found.best else "",
        }
        for c in found.candidates
    ]
    curves = {"x": "MB", "y": "predicted divergence", "lines": found.front}
    keep_record(path, settings, rows, about=f"Plan for {found.budget}", metric="measured", curves=curves)


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, tokens = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise ValueError(f"--shape {text} is no shape; write sequences x tokens, such as 1x128") from error
    if rows < 1 or tokens < 1:
        raise ValueError(f"--shape {text} is not possible; use numbers of at least 1")
    return rows, tokens
