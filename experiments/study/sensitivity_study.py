"""Which measure of sensitivity is right? Rank correlations with the truth, and the score each measure leads to.

    python experiments/study/sensitivity_study.py
    python experiments/study/sensitivity_study.py --data-dir DATA --tasks sst2 cola mnli wnut17
    python experiments/study/sensitivity_study.py --collect FOLDER1 FOLDER2 --report PAGE.md

For every encoder layer (or half layer, or matrix) and bit width, `qbert.sensitivity` puts Q-BERT's |mean| + std of the
top Hessian eigenvalue beside trace, quadratic form, Taylor expansion, plain weight error, and the true change of the
loss. Each measure then decides who gets the larger of two bit widths, by rank (the paper's rule) and by exact
minimisation of its predicted damage at the same size; the quantized models are scored on held-out data, beside all
other allocations of that size (or a random sample of them). Writes study.md and study.png over all tasks, and
study-<task>.json, study-<task>.png and sensitivity-<task>.json. ``--collect`` puts the finished studies of several
folders (of tasks with settings of their own) onto one page.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from allocation_compare import Scores, compare
from study_report import Study, page, plot, plot_summary, section

from qbert.cli.arguments import add_task_arguments, add_tuning_arguments, fine_tuned, positive, prepare_run, run_script
from qbert.extras import require
from qbert.results import provenance, refuse_foreign


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="several tasks, one after the other; default: that of --task")
    add_tuning_arguments(parser)
    parser.add_argument("--granularity", default="layer", choices=("layer", "block", "matrix"), help="default: layer")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="widths to measure; default: 2 3 4 8")
    parser.add_argument(
        "--pairs",
        nargs="*",
        default=["2/4", "3/4"],
        help="pairs of widths to allocate, half of the blocks each; none leaves it out; default: 2/4 3/4",
    )
    parser.add_argument("--samples", type=positive, default=256, help="training rows to measure on; default: 256")
    parser.add_argument("--runs", type=positive, default=5, help="random subsets for the eigenvalues; default: 5")
    parser.add_argument("--run-rows", type=positive, default=64, help="rows in such a subset; default: 64")
    parser.add_argument("--probes", type=positive, default=18, help="Hessian products for a trace; default: 18")
    parser.add_argument("--groups", type=positive, help="row groups a matrix; default: 128")
    parser.add_argument(
        "--held-out", action="store_true", help="measure the true loss change on as many other training rows"
    )
    parser.add_argument("--resume", action="store_true", help="take over what an interrupted run has finished")
    parser.add_argument(
        "--allocations",
        type=positive,
        default=20,
        help="score all allocations of a size, or this many random ones; default: 20",
    )
    parser.add_argument("--collect", nargs="+", metavar="FOLDER", help="measure nothing; join finished studies")
    parser.add_argument("--report", help="Markdown file to write, a picture beside it; default: <output-dir>/study.md")
    return parser.parse_args()


def parse_pairs(texts: list[str], measured: list[int]) -> list[tuple[int, int]]:
    """``["2/4"]`` -> ``[(2, 4)]``.

    Raises:
        ValueError: not two different widths, or one that --bits does not measure.
    """
    pairs = []
    for text in texts:
        parts = text.split("/")
        if len(parts) != 2 or not all(p.isdigit() for p in parts) or int(parts[0]) >= int(parts[1]):
            raise ValueError(f"--pairs {text} is not a pair of bit widths; write the smaller one first, such as 2/4")
        low, high = int(parts[0]), int(parts[1])
        missing = [b for b in (low, high) if b not in measured]
        if missing:
            raise ValueError(f"--pairs {text} needs {missing[0]} bits, which --bits does not measure; add it there")
        pairs.append((low, high))
    return pairs


def what_was_asked(arguments: argparse.Namespace, task: Any, model: Any) -> dict[str, Any]:
    """All that the numbers depend on, to tell whether files of an earlier run may be gone on from."""
    from qbert.hessian.checkpoint import model_fingerprint

    names = ["granularity", "bits", "samples", "runs", "run_rows", "probes", "groups", "seed"]
    names += ["train_limit", "eval_limit", *(["held_out"] if arguments.held_out else [])]
    rows = {split: task.fingerprint(split) for split in task.splits}
    return {"weights": model_fingerprint(model), "rows": rows} | {name: getattr(arguments, name) for name in names}


def measure(
    task: Any,
    model: Any,
    tokenizer: Any,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    folder: Path,
    asked: dict[str, Any],
) -> Any:
    """`Sensitivities` of the model, the finished parts of an interrupted run taken over."""
    from qbert.allocation.predictions import Sensitivities
    from qbert.allocation.sensitivity import sensitivity
    from qbert.hessian import hessian_spectrum
    from qbert.tasks import prepare

    done = folder / f"sensitivity-{task.name}.json"
    if arguments.resume and done.exists():
        report = Sensitivities.load(done)
        refuse_foreign(done, report.settings.get("asked"), asked)
        return report
    data = prepare(task, tokenizer, "train", limit=arguments.train_limit, seed=arguments.seed)
    spectrum = hessian_spectrum(
        model,
        data,
        granularity=arguments.granularity,
        collate_fn=data.collate,
        runs=arguments.runs,
        fraction=min(1.0, arguments.run_rows / len(data)),
        tol=1e-2,
        seed=arguments.seed,
        checkpoint=folder / f"spectrum-{task.name}.partial",
        resume=arguments.resume,
    )
    spectrum.save(folder / f"spectrum-{task.name}.json")
    report = sensitivity(
        model,
        data,
        bits=arguments.bits,
        spectrum=spectrum,
        collate_fn=data.collate,
        samples=arguments.samples,
        probes=arguments.probes,
        held_out=arguments.held_out,
        seed=arguments.seed,
        **settings,
    )
    report.settings["asked"] = asked
    report.save(done)
    return report


def main() -> None:
    """Measure, correlate, allocate, score, report; one task after the other."""
    arguments = parse_arguments()
    require("matplotlib", "the picture")
    pairs = parse_pairs(arguments.pairs, arguments.bits)
    folder = prepare_run(arguments, "sensitivity_study")
    target = Path(arguments.report) if arguments.report else folder / "study.md"
    if arguments.collect:
        write_page(collected(arguments.collect), target)
        return print(f"written to {target}")
    from qbert.allocation.damage import target_specs
    from qbert.allocation.sensitivity import quantized_widths
    from qbert.tasks import build_model, load_task

    quantized_widths(arguments.bits)
    if arguments.probes < 4:
        raise ValueError(f"--probes {arguments.probes} gives no error of the trace; use at least 4")
    settings = {"groups": arguments.groups} if arguments.groups else {}
    names = arguments.tasks or [arguments.task]
    tasks = [load_task(name, data_dir=arguments.data_dir) for name in names]
    target_specs(build_model(tasks[0], arguments.model)[0], 4, **settings)  # refuses groups that do not fit
    studies: list[Study] = []
    for task in tasks:
        print(task.describe())
        tuned = fine_tuned(task, arguments)
        model, tokenizer = tuned.model.eval(), tuned.tokenizer
        asked = what_was_asked(arguments, task, model)
        report = measure(task, model, tokenizer, arguments, settings, folder, asked)
        print(report)
        kept = folder / f"scores-{task.name}.json"
        scores = Scores(model, task, tokenizer, report, settings, arguments.eval_limit, kept, asked, arguments.resume)
        comparisons = [
            compare(report, model, scores, pair, settings, most=arguments.allocations, seed=arguments.seed)
            for pair in pairs
        ]
        study = Study(task.name, task.describe(), provenance(), task.primary_metric, scores.float, comparisons, report)
        study.save(folder)
        print("\n" + section(study))
        plot(study, folder / f"study-{task.name}.png")
        studies.append(study)
        write_page(studies, target)
    print(f"\nwritten to {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if p.name[0] != ".")))


def collected(folders: list[str]) -> list[Study]:
    """The finished studies in `folders`.

    Raises:
        ValueError: a folder without one, or a task that is in two of them.
    """
    studies: dict[str, Study] = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("study-*.json"))
        if not files:
            raise ValueError(f"--collect: {folder} holds no finished study (study-<task>.json); run one there")
        for file in files:
            task = file.stem.removeprefix("study-")
            if task in studies:
                raise ValueError(f"--collect: {task} was studied in two of the folders; leave one of them out")
            studies[task] = Study.load(folder, task)
    return list(studies.values())


def write_page(studies: list[Study], target: Path) -> None:
    """The page of all `studies`, and their common picture beside it."""
    from qbert.files import write_whole

    write_whole(target, partial(Path.write_text, data=page(studies), encoding="utf-8"))
    plot_summary(studies, target.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, "add --resume to go on from there")
