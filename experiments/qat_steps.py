"""How many steps of distillation do students need that start from nearest and from compensated codes?

    python experiments/qat_steps.py --task sst2 --data-dir DATA --bits 2 --bf16 --resume

From both starts, for each number of steps a training of its own (a schedule that ends there, on rows each seen once)
and for each seed, by the same recipe, rate and rows. The table has the divergence from the teacher on held-out rows,
before any step and after each number, and the steps after which a start is first as near to the teacher as the other
one at its end. Every training is kept when it is there; `--resume` goes on from it, and from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import qat_distill
from qat_comparison import Comparison, describe
from qat_table import spread

from qbert.cli.arguments import positive, prepare_run, run_script
from qbert.results import Record, markdown_table, provenance

_STARTS = ("nearest", "compensated")


def parse_arguments() -> argparse.Namespace:
    """The command line: that of ``qat_distill.py``, and the numbers of steps."""
    parser = qat_distill.command_line(__doc__ or "")
    parser.add_argument("--steps", type=positive, nargs="+", default=[25, 50, 100, 200], help="default: 25 50 100 200")
    return qat_distill.parsed(parser)


def asked_of(comparison: Comparison) -> dict[str, Any]:
    """All that the numbers depend on, starts, steps and seeds apart."""
    asked = qat_distill.asked_of(comparison)
    return {name: value for name, value in asked.items() if name not in ("rows", "start", "epochs", "bits")} | {
        "bits": {start: comparison.bits[start].to_dict() for start in _STARTS},
        "rows": len(comparison.examples),
    }


def train(comparison: Comparison, start: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """The row of one training of so many steps."""
    from qbert.tasks.task import subset

    arguments = comparison.arguments
    everything = comparison.examples
    arguments.start, arguments.epochs = start, 1.0
    comparison.examples = list(subset(everything, steps * arguments.batch_size, arguments.seed))
    comparison.mixed = comparison.with_other_domains(comparison.examples)
    comparison.folder = folder / f"{start}-{steps}"
    try:
        row, _, _ = comparison.train("kd", seed)
        comparison.drop_checkpoints("kd", seed)
    finally:
        comparison.examples = everything
    return row


def table(rows: Record, steps: list[int]) -> str:
    """Markdown: divergence from both starts by steps, mean and spread over seeds, and what they come to."""
    means: dict[str, dict[int, float]] = {}
    lines = []
    for start in _STARTS:
        found = {n: [row["divergence"] for row in rows[f"{start}, {n}"]] for n in (0, *steps)}
        scores = {n: [row["score"] for row in rows[f"{start}, {n}"]] for n in (0, *steps)}
        means[start] = {n: fmean(values) for n, values in found.items()}
        lines.append([f"{start}: divergence", *(spread(found[n], 4) for n in (0, *steps))])
        lines.append([f"{start}: score", *(spread(scores[n], 2) for n in (0, *steps))])
    told = [markdown_table(["start", *(f"{n} steps" for n in (0, *steps))], lines), ""]
    for start, other in (_STARTS, _STARTS[::-1]):
        goal = means[other][steps[-1]]
        enough = next((n for n, value in means[start].items() if value <= goal), None)
        after = "is not reached" if enough is None else f"is reached after {enough}"
        told.append(f"- from {start} codes, the divergence of {other} ones after {steps[-1]} steps {after}")
    return "\n".join(told)


def main() -> None:
    """Train from both starts and write the page."""
    import torch

    from qbert.extras import require
    from qbert.files import write_whole
    from qbert.tasks.training import check_bf16

    arguments = parse_arguments()
    require("accelerate", "the training")
    recipe, bits = qat_distill.check_request(arguments)
    arguments.steps = sorted(set(arguments.steps))
    folder = prepare_run(arguments, "qat_steps")
    check_bf16(arguments.bf16, torch.device(arguments.device))
    # The rows of students, not those of the teacher.
    arguments.teacher_rows = arguments.teacher_rows or arguments.train_limit
    arguments.train_limit = max(arguments.steps) * arguments.batch_size
    comparison = Comparison(arguments, recipe, bits, folder)
    if len(comparison.examples) < arguments.train_limit:
        raise ValueError(
            f"--steps {max(arguments.steps)} of {arguments.batch_size} rows need {arguments.train_limit}, but "
            f"{comparison.task.name} has {len(comparison.examples)}; ask for fewer steps"
        )
    rows = Record(folder / "steps.json", asked_of(comparison), resume=arguments.resume)
    for start in _STARTS:
        if f"{start}, 0" not in rows:
            rows.add(f"{start}, 0", comparison.row(comparison.quantized(comparison.bits[start]), 0.0))
        print(describe(f"{start} codes", rows[f"{start}, 0"][0]), flush=True)
    for steps in arguments.steps:
        for seed in arguments.seeds:
            for start in _STARTS:
                name = f"{start}, {steps}"
                if seed not in [row["seed"] for row in rows[name]]:
                    rows.add(name, {"seed": seed, **train(comparison, start, steps, seed, folder)})
    text = table(rows, arguments.steps)
    print(f"\n{text}")
    page = f"## {comparison.task.name}, {comparison.widths()} bits\n\n{text}\n\n{provenance()}\n"
    target = Path(arguments.report or folder / "steps.md")
    write_whole(target, lambda aside: aside.write_text(page, encoding="utf-8"))
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    run_script(main, resume_hint="the same command with --resume goes on from the last checkpoint")
