"""Bring a low-bit encoder back to its teacher's score: post-training quantization, plain QAT and KD-aware QAT compared.

    python experiments/qat_distill.py --bits 4
    python experiments/qat_distill.py --bits 2 --task sst2 --data-dir DATA --train-limit 8000 --seeds 0 1 2
    python experiments/qat_distill.py --bits-config outputs/hessian_spectrum-reviews/bits.json

The teacher is fine-tuned on the task (or loaded from the cache, or given: --no-fine-tune --model FOLDER) and scored
first. Plain QAT learns from the labels, KD-aware QAT from the teacher alone. Both start from the same codes
(compensated on training rows without labels, unless --start nearest) and get the same rows in the same order and the
same steps, each at its recipe's learning rate; the weights of the last step count. Where rows of another domain are
at hand, students are scored there too. The first KD student is packed, saved, loaded again and scored again.
qat_table.py puts several results together.
Reference: Shen et al. 2020 (Q-BERT, the bits); Zhang et al. 2020 (TernaryBERT, distillation for QAT).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from qat_comparison import METHODS, POST_TRAINING, Comparison, describe, save_packed
from qat_table import comparison_table

from qbert.cli.arguments import (
    add_task_arguments,
    check_training,
    positive,
    prepare_run,
    run_script,
    subject_of,
)
from qbert.results import Record, provenance


def command_line(description: str) -> argparse.ArgumentParser:
    """The arguments of a comparison of trainings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--bits", type=int, default=4, help="bits of the encoder's matrices: 2, 3, 4 or 8; default: 4")
    parser.add_argument(
        "--embedding-bits", type=int, default=8, help="bits of the tables, where --bits is given; default: 8"
    )
    bits.add_argument("--bits-config", help="JSON file with bits by layer, as the spectrum experiment writes it")
    parser.add_argument("--recipe", default="qbert_kd", help="what the student learns from; default: qbert_kd")
    parser.add_argument(
        "--start",
        choices=list(POST_TRAINING),
        default="compensated",
        help="codes that training starts from; default: compensated",
    )
    add_training_arguments(parser)
    parser.add_argument("--unlabelled", nargs="+", default=[], help="tasks or text folders to distil on as well")
    parser.add_argument(
        "--unlabelled-share", type=float, default=0.25, help="share of those among the rows of KD-QAT; default: 0.25"
    )
    parser.add_argument("--learning-rate", type=float, help="peak rate of KD-QAT; default: the recipe's")
    parser.add_argument("--min-tokens", type=positive, help="train students on rows of at least this many tokens")
    parser.add_argument(
        "--hold-out", type=positive, help="score on this many training rows instead, to choose settings by"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="what to train; default: kd qat")
    parser.add_argument("--float-control", action="store_true", help="also train a float student for the same steps")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/qat.md")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for."""
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [arguments.seed]
    return arguments


def _rows(text: str) -> int | str:
    return text if text == "all" else positive(text)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """How the teacher and its students are trained and scored, with their help."""
    parser.add_argument(
        "--calibration-rows", type=positive, default=384, help="training rows for compensated rounding; default: 384"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of data order and dropout; default: that of --seed")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the rows for QAT and KD-QAT; default: 2")
    parser.add_argument("--batch-size", type=positive, default=16, help="rows a step; default: 16")
    parser.add_argument("--no-fine-tune", action="store_true", help="--model is a tuned teacher; use it as it is")
    parser.add_argument("--teacher-epochs", type=positive, help="passes for the teacher; default: by task")
    parser.add_argument(
        "--teacher-rows", type=_rows, help="train the teacher on this many, or all; default: --train-limit"
    )
    parser.add_argument("--teacher-bf16", action="store_true", help="train the teacher in bfloat16 as well")
    parser.add_argument("--train-limit", type=positive, help="train students, and the teacher, on this many rows")
    parser.add_argument("--bf16", action="store_true", help="train students in bfloat16, where the device does")
    parser.add_argument("--eval-limit", type=positive, help="score on at most this many rows")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of this command stopped")


def check_seeds(seeds: list[int]) -> None:
    """Refuse a seed that is named twice.

    Raises:
        ValueError: naming the seeds.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))} names a seed twice; name each once")


def check_request(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(recipe, bits configuration), refused before any work.

    Raises:
        ValueError, FileNotFoundError: naming the argument and the choices.
    """
    from qbert import BitsConfig
    from qbert.distill.recipes import RECIPES

    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe {arguments.recipe} is not known; use one of {', '.join(sorted(RECIPES))}")
    check_training(arguments)
    check_seeds(arguments.seeds)
    if not 0 < arguments.unlabelled_share < 1:
        raise ValueError(f"--unlabelled-share {arguments.unlabelled_share:g} is not possible; use a share such as 0.25")
    recipe = RECIPES[arguments.recipe]()
    if arguments.unlabelled and any(stage.uses_labels for stage in recipe.stages):
        raise ValueError(f"--unlabelled: recipe {arguments.recipe} learns from labels; use one that does not")
    if arguments.bits_config:
        if not Path(arguments.bits_config).is_file():
            raise FileNotFoundError(f"--bits-config {arguments.bits_config} is no file; write one with BitsConfig.save")
        return recipe, BitsConfig.load(arguments.bits_config)
    return recipe, BitsConfig(arguments.bits, embedding_bits=arguments.embedding_bits)


def print_cost(comparison: Comparison, left: list[tuple[str, int]]) -> None:
    """Measure a step of each method and say how long the trainings that are left will take."""
    total = 0.0
    for method in dict.fromkeys(method for method, _ in left):
        cost = comparison.distiller(method, comparison.arguments.seeds[0]).estimate()
        total += cost["seconds"] * sum(m == method for m, _ in left)
        print(f"{METHODS[method]}: {cost['steps']:.0f} steps of {cost['seconds_per_step']:.2f} s")
    print(f"training will take about {total / 60:.1f} min for all seeds; --epochs and --train-limit shorten it")


def learning_rates(comparison: Comparison) -> dict[str, float]:
    """The peak rate of each method: its recipe's, or for KD-QAT the one that was asked for."""
    from qbert.distill import recipes

    given = comparison.arguments.learning_rate or comparison.recipe.arguments["learning_rate"]
    return {METHODS["kd"]: given, METHODS["qat"]: recipes.qat().arguments["learning_rate"]}


def asked_of(comparison: Comparison) -> dict[str, Any]:
    """All that the numbers of a comparison depend on, seeds apart."""
    arguments = comparison.arguments
    return {
        "task": comparison.task.name,
        **subject_of(comparison.task, comparison.teacher),
        "seed": arguments.seed,
        "rows": len(comparison.examples),
        "epochs": arguments.epochs,
        "shortest row": arguments.min_tokens,
        "batch size": arguments.batch_size,
        "bfloat16": arguments.bf16,
        "learning rate": learning_rates(comparison),
        "recipe": arguments.recipe,
        "start": arguments.start,
        "calibration rows": arguments.calibration_rows,
        "unlabelled": {"from": arguments.unlabelled, "share": arguments.unlabelled_share},
        "rows held out": arguments.hold_out,
        "bits": comparison.bits[arguments.start].to_dict(),
        "evaluation limit": arguments.eval_limit,
    }


def main() -> None:
    """Run the comparison."""
    import torch

    from qbert.distill.progress import curves_of, plot_curves
    from qbert.extras import require
    from qbert.tasks.training import check_bf16

    arguments = parsed(command_line(__doc__ or ""))
    require("matplotlib", "the picture")
    require("accelerate", "the training")
    recipe, bits = check_request(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    folder = prepare_run(arguments, "qat_distill")
    check_bf16(arguments.bf16, torch.device(arguments.device))
    comparison = Comparison(arguments, recipe, bits, folder)
    results = Record(folder / "results.json", asked_of(comparison), resume=arguments.resume)
    for rounding, name in POST_TRAINING.items():
        if name not in results:
            results.add(name, comparison.post_training_row(rounding), **heading(comparison))
        print(describe(name, results[name][0]), flush=True)
    methods = arguments.methods or ["kd", "qat"] + (["float"] if arguments.float_control else [])
    done = {(method, row["seed"]) for method in methods for row in results[METHODS[method]]}
    left = [(method, seed) for seed in arguments.seeds for method in methods if (method, seed) not in done]
    print_cost(comparison, left)
    histories: dict[str, Any] = {}
    for method, seed in left:
        row, student, history = comparison.train(method, seed)
        sizes = {}
        if method == "kd" and "packed MB" not in results.content:
            sizes["packed MB"] = save_packed(comparison, student)
        results.add(METHODS[method], {"seed": seed, **row}, **sizes)
        comparison.drop_checkpoints(method, seed)
        histories.setdefault(METHODS[method], curves_of(history))
    if histories:
        plot_curves(histories, folder / "curves.png")
    write_report(Path(arguments.report or folder / "qat.md"), results.content)
    print(f"curves: {folder / 'curves.png'}; student: {folder / 'student'}")


def heading(comparison: Comparison) -> dict[str, Any]:
    """What a table says above its rows."""
    arguments = comparison.arguments
    rows = f"{len(comparison.examples):,} rows"
    rows += f" of at least {arguments.min_tokens} tokens" if arguments.min_tokens else ""
    if arguments.unlabelled:
        rows += f" ({arguments.unlabelled_share:.0%} of those of KD-QAT from {' and '.join(arguments.unlabelled)})"
    steps = f"{rows}, {arguments.epochs:g} epochs of batches of {arguments.batch_size}"
    rates = " and ".join(f"{rate:g} ({name})" for name, rate in learning_rates(comparison).items())
    return {
        "task": comparison.task.name,
        "data": comparison.task.describe(),
        "metric": comparison.task.primary_metric,
        "widths": comparison.widths(),
        "start": arguments.start,
        "budget": f"{steps}, rate {rates}, recipe {arguments.recipe}, {comparison.bits[arguments.start]}",
        "teacher": comparison.reference.primary,
        "elsewhere": {domain.name: result.primary for domain, result in comparison.elsewhere},
        "float MB": sum(p.numel() * p.element_size() for p in comparison.teacher.parameters()) / 1e6,
        "made by": provenance(),
    }


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Print the table, and write it with all that is needed to make it again."""
    from qbert.files import write_whole
    from qbert.results import markdown_table, text_table

    header, lines = comparison_table([content])
    print(f"\n{text_table(header, lines)}\n")
    text = (
        f"## {content['task']}, {content['widths']} bits\n\n{markdown_table(header, lines)}\n\n"
        f"{content['data']}. Students: {content['budget']}. {content['made by']}\n"
    )
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    run_script(main, resume_hint="the same command with --resume goes on from the last checkpoint")
