"""A table or a figure of the Q-BERT paper, made again from a recipe: data that say task, rows and methods.

    python experiments/paper.py --table 1                            on the embedded corpus, minutes
    python experiments/paper.py --table 1 --data-dir DATA            on SST-2, MNLI, WNUT-17, SQuAD, on stated subsets
    python experiments/paper.py --table 2 --tasks sst2 --data-dir DATA --seeds 0 1 2 --resume
    python experiments/paper.py --table 1 --whole --model bert-base-uncased --device cuda --tasks sst2 mnli
    torchrun --nproc_per_node=2 experiments/paper.py --figure 1 --data-dir DATA --fraction 0.1

``paper.json`` beside this script holds the recipes and each task's budget (rows to train and to score on); ``--recipe``
takes another such file, options given here go before the budget, and ``--whole`` leaves it out. What the work will take
is said before it starts. Every finished row is kept, and ``--resume`` goes on from it, or from the last checkpoint of a
training. Writes a page and its picture (table-1.md, table-1.png, ...). Runs that name one --output-dir and the same
Hessian settings share the spectra of their teachers.
Reference: Shen et al. 2020 (Q-BERT), tables 1-3, figures 1-3.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hessian_spectrum import add_hessian_arguments, check_hessian, landscapes, measure, title_of
from qat_comparison import METHODS, POST_TRAINING, Comparison, teacher_limit
from qat_distill import add_training_arguments, asked_of, check_seeds
from qat_table import spread

from qbert.cli.arguments import (
    add_task_arguments,
    check_training,
    fine_tuned,
    first_rank_first,
    prepare_run,
    process_group,
    run_script,
)
from qbert.results import Record, markdown_table, provenance, refuse_foreign, text_table

_BUDGET = ("teacher_epochs", "teacher_rows", "epochs", "train_limit", "eval_limit", "calibration_rows")
_METHODS = ("qat", "kd", "ptq")
# Of the time of a training step in float: a step of a student with its teacher, a forward pass, a Hessian product, and
# compensated rounding.
_STUDENT, _FORWARD, _PRODUCT, _ROUNDING = 1.6, 0.35, 0.35, 2.5
_PRODUCTS = 5  # for an eigenvalue
_STEPS = 21  # points along an axis of a landscape


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", help="1, 2, 3, activations, allocation, or another one of the recipe file")
    what.add_argument("--figure", help="1 (eigenvalues of every layer) or 2 (landscapes)")
    parser.add_argument("--recipe", default=Path(__file__).with_suffix(".json"), type=Path, help="file of the recipes")
    parser.add_argument("--tasks", nargs="+", help="default: the recipe's with --data-dir, the embedded one without")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="only the rows whose labels begin so")
    parser.add_argument("--whole", action="store_true", help="all rows of every task, and the usual passes over them")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do and how long it will take")
    add_task_arguments(parser)
    add_training_arguments(parser)
    add_hessian_arguments(parser)
    parser.set_defaults(epochs=None, calibration_rows=None, tol=5e-2)
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [arguments.seed]
    arguments.learning_rate, arguments.min_tokens, arguments.hold_out = None, None, None
    arguments.unlabelled, arguments.unlabelled_share, arguments.recipe_file = [], 0.25, arguments.recipe
    arguments.recipe, arguments.start = "qbert_kd", "compensated"
    return arguments


def read_recipe(path: Path, kind: str, name: str) -> dict[str, Any]:
    """The recipe of a table or figure, its file's budgets under ``budgets``.

    Raises:
        FileNotFoundError: no such file; ValueError: no such recipe, or one that says something unknown.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {path} is no file; copy experiments/paper.json and change it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content[kind + "s"]
        recipe = dict(known.get(name, {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--recipe {path} is no file of recipes ({error!r}); copy experiments/paper.json") from error
    if not recipe:
        raise ValueError(f"--{kind} {name} is not in {path.name}; it has {', '.join(known)}")
    for row in recipe.get("rows", ()):
        check_row(row)
    return {**recipe, "budgets": content.get("budgets", {})}


def check_row(row: dict[str, Any]) -> None:
    """Refuse a row that says too little, or what nobody reads.

    Raises:
        ValueError: naming the row.
    """
    label, fields = row.get("label"), {"label", "bits", "mixed", "by", "settings", "embedding_bits", "method", "start"}
    unknown = sorted(set(row) - fields)
    if unknown:
        raise ValueError(f"row {label!r} of the recipe says {unknown[0]!r}; it may say {', '.join(sorted(fields))}")
    if not label or ("bits" in row) == ("mixed" in row):
        raise ValueError(f"row {label!r} of the recipe needs a label, and either bits or mixed")
    if row.get("method") not in _METHODS or row.get("start", "compensated") not in POST_TRAINING:
        raise ValueError(
            f"row {label!r} of the recipe: method is one of {', '.join(_METHODS)}, start one of "
            f"{', '.join(POST_TRAINING)}"
        )


def for_task(arguments: argparse.Namespace, recipe: dict[str, Any], name: str) -> argparse.Namespace:
    """The command line for one task, with its budget where nothing else was asked for."""
    budget = {} if arguments.whole else {**recipe["budgets"].get("*", {}), **recipe["budgets"].get(name, {})}
    given = {key: getattr(arguments, key) for key in _BUDGET}
    chosen = {key: budget.get(key) if value is None else value for key, value in given.items()}
    chosen["epochs"], chosen["calibration_rows"] = chosen["epochs"] or 2.0, chosen["calibration_rows"] or 384
    return argparse.Namespace(**{**vars(arguments), **chosen, "task": name})


def bits_of(row: dict[str, Any], model: Any, spectrum: Any) -> Any:
    """The `BitsConfig` of a row."""
    import qbert
    from qbert.encoders.targets import encoder_layers

    settings = row.get("settings", {})
    tables = row.get("embedding_bits", 8)
    if "bits" in row:
        return qbert.BitsConfig(row["bits"], embedding_bits=tables, **settings)
    names = [name for name, _ in encoder_layers(model)]
    by, _, seed = row.get("by", "spectrum").partition(" ")
    order = list(range(len(names)))
    if by == "random":
        random.Random(int(seed)).shuffle(order)
    elif by not in ("spectrum", "lower", "upper"):
        raise ValueError(f"row {row['label']!r}: by {by!r} is unknown; use spectrum, lower, upper or random SEED")
    ranks = {name: float(i if by == "upper" else len(names) - i) for name, i in zip(names, order, strict=True)}
    measured = spectrum if by == "spectrum" else ranks
    return qbert.allocate_bits(
        measured, bits=tuple(row["mixed"]), model=model, embedding_bits=tables, progress=False, **settings
    )


def spectrum_of(
    task: Any, model: Any, tokenizer: Any, arguments: argparse.Namespace, folder: Path, rank: int = 0
) -> Any:
    """The spectrum of a task's teacher, measured once and kept; under torchrun the first process writes."""
    from qbert import HessianSpectrum
    from qbert.files import read_json, write_json
    from qbert.hessian.checkpoint import model_fingerprint

    names = ("runs", "fraction", "granularity", "method", "tol", "bound", "confidence", "seed")
    asked = {"weights": model_fingerprint(model), **{name: getattr(arguments, name) for name in names}}
    kept, question = folder / "spectrum.json", folder / "spectrum-asked.json"
    if arguments.resume and kept.is_file() and question.is_file():
        refuse_foreign(question, read_json(question), asked)
        return HessianSpectrum.load(kept)
    _, spectrum = measure(task, model, tokenizer, arguments, folder)
    if rank > 0:
        return spectrum
    spectrum.save(kept)
    write_json(question, asked)
    shutil.rmtree(folder / "spectrum.partial", ignore_errors=True)
    return spectrum


def fill(arguments: argparse.Namespace, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All rows of one task that are still missing; returns the task's record."""
    from qbert.distill.recipes import RECIPES
    from qbert.sizes import model_size

    comparison = Comparison(arguments, RECIPES["qbert_kd"](), bits_of({"bits": 8}, None, None), folder)
    asked = {key: value for key, value in asked_of(comparison).items() if key not in ("bits", "start", "learning rate")}
    record = Record(folder / f"table-{arguments.table}.json", asked, resume=arguments.resume)
    for row in recipe["rows"]:
        for kept in record[row["label"]]:
            refuse_foreign(record.path, kept["recipe"], row)
    left = _left(arguments, recipe, record.content["rows"])
    spectrum = None
    if any(_needs_spectrum(row) for row, _ in left):
        spectrum = spectrum_of(comparison.task, comparison.teacher, comparison.tokenizer, arguments, folder)
    start = time.monotonic()
    for number, (row, seed) in enumerate(left):
        method, label = row["method"], row["label"]
        spent = time.monotonic() - start
        rest = f", about {spent / number * (len(left) - number) / 60:.0f} min left" if number else ""
        print(f"\n[{number + 1}/{len(left)}] {label}{rest}", flush=True)
        trained = RECIPES["qbert_kd" if method == "kd" else "qat"]()
        bits = bits_of(row, comparison.teacher, spectrum)
        own = comparison.asking(trained, bits, row.get("start", "compensated"), folder / _slug(label))
        if method == "ptq":
            student = own.quantized(own.bits[own.arguments.start])
            found = own.row(student, 0.0)
        else:
            found, student, _ = own.train(method, seed)
        beside = {"recipe": row, "seed": seed, "MB": model_size(student).mb, "widths": own.widths()}
        record.add(label, {**found, **beside}, **_heading(comparison))
        own.drop_checkpoints(method, seed)
    return record.content


def _seeds(row: dict[str, Any], arguments: argparse.Namespace) -> list[int]:
    return arguments.seeds[:1] if row["method"] == "ptq" else arguments.seeds


def _left(
    arguments: argparse.Namespace, recipe: dict[str, Any], kept: dict[str, list[dict[str, Any]]]
) -> list[tuple[dict[str, Any], int]]:
    """Rows of the recipe and their seeds that are not among the `kept` ones."""
    done = {(label, row["seed"]) for label, rows in kept.items() for row in rows}
    work = [(row, seed) for row in recipe.get("rows", ()) for seed in _seeds(row, arguments)]
    return [(row, seed) for row, seed in work if (row["label"], seed) not in done]


def _needs_spectrum(row: dict[str, Any]) -> bool:
    return "mixed" in row and row.get("by", "spectrum") == "spectrum"


def _slug(label: str) -> str:
    return re.sub(r"\W+", "-", label).strip("-")


def _heading(comparison: Comparison) -> dict[str, Any]:
    arguments = comparison.arguments
    limit = f"{arguments.eval_limit:,}" if arguments.eval_limit else "all"
    return {
        "task": comparison.task.name,
        "metric": comparison.task.primary_metric,
        "data": comparison.task.describe(),
        "teacher": comparison.reference.primary,
        "elsewhere": {domain.name: result.primary for domain, result in comparison.elsewhere},
        "budget": f"students trained on {len(comparison.examples):,} rows, {arguments.epochs:g} epochs of batches of "
        f"{arguments.batch_size}, scored on {limit} held-out rows",
        "made by": provenance(),
    }


def estimate(arguments: argparse.Namespace, recipe: dict[str, Any], folder: Path) -> float:
    """Say how long the rest of one task will take, by a step of the untrained model; returns its minutes."""
    from qbert.encoders.targets import encoder_layers
    from qbert.files import read_json
    from qbert.tasks import build_model, load_task, prepare
    from qbert.tasks.training import default_settings

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    model, tokenizer = build_model(task, arguments.model)
    rows = len(task.rows("train"))
    data = prepare(task, tokenizer, "train", limit=4 * arguments.batch_size, seed=arguments.seed)
    step = _step_seconds(model.to(arguments.device).train(), data.batches(arguments.batch_size)[:3])
    students = min(rows, arguments.train_limit or rows) / arguments.batch_size * arguments.epochs * step * _STUDENT
    scored = len(task.rows(task.evaluation_splits[0]))
    scoring = min(scored, arguments.eval_limit or scored) / arguments.batch_size * step * _FORWARD
    rounding = arguments.calibration_rows / arguments.batch_size * step * _ROUNDING
    finished = folder / f"table-{arguments.table}.json"
    kept = read_json(finished)["rows"] if arguments.resume and finished.is_file() else {}
    work = _left(arguments, recipe, kept)
    trained = sum(row["method"] != "ptq" for row, _ in work)
    compensated = sum(row.get("start", "compensated") == "compensated" for row, _ in work)
    seconds = trained * students + compensated * rounding + (len(work) + 1) * scoring
    measured = arguments.resume and (folder / "spectrum.json").is_file()
    if arguments.figure and recipe["kind"] == "landscape":
        seconds += 2 * _STEPS**2 * 16 / arguments.batch_size * step * _FORWARD
    if not measured and (arguments.figure or any(_needs_spectrum(row) for row, _ in work)):
        sample = (arguments.fraction or min(0.1, 32 / rows)) * rows / arguments.batch_size
        seconds += arguments.runs * len(encoder_layers(model)) * _PRODUCTS * sample * step * _PRODUCT
    settings = default_settings(
        task, model.config.hidden_size, epochs=arguments.teacher_epochs, train_limit=teacher_limit(arguments)
    )
    teacher = min(rows, settings.train_limit or rows) / arguments.batch_size * settings.epochs * step
    teacher *= not arguments.no_fine_tune
    print(
        f"{task.name}: about {seconds / 60:.0f} min"
        + ("" if arguments.figure else f" for {len(work)} rows, {trained} of them trained")
        + f" ({step:.2f} s a step in float)"
        + (f", and {teacher / 60:.0f} min for the teacher unless it is in the cache" if teacher else "")
    )
    return float(seconds + teacher) / 60


def _step_seconds(model: Any, batches: list[dict[str, Any]]) -> float:
    times = []
    for batch in batches:
        start = time.perf_counter()
        model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
        times.append(time.perf_counter() - start)
    return fmean(times[1:] or times)


def table_of(content: dict[str, Any], labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): the teacher and every row that is there; mean and standard deviation over seeds."""
    domains = content["elsewhere"]
    header = ["", content["metric"], "of the teacher", "agreement", "divergence"]
    header += [f"{name}: of the teacher" for name in domains] + ["bits", "MB", "method", "seeds"]
    lines = [["teacher", f"{content['teacher']:.2f}", "100 %", "", "", *("100 %" for _ in domains), "32", "", "", ""]]
    for label in labels:
        rows = content["rows"].get(label)
        if not rows:
            continue
        elsewhere = [[row["elsewhere"][name]["retention"] for row in rows] for name in domains]
        how = rows[0]["recipe"]
        start = how.get("start", "compensated")
        lines.append(
            [
                label,
                spread([row["score"] for row in rows], 2),
                spread([row["retention"] for row in rows], 1) + " %",
                spread([row["agreement"] for row in rows], 1) + " %",
                spread([row["divergence"] for row in rows], 4),
                *(spread(values, 1) + " %" for values in elsewhere),
                rows[0]["widths"],
                f"{rows[0]['MB']:.1f}",
                POST_TRAINING[start] if how["method"] == "ptq" else f"{METHODS[how['method']]}, {start} codes",
                str(len(rows)),
            ]
        )
    return header, lines


def plot_table(contents: list[dict[str, Any]], labels: list[str], path: Path) -> None:
    """Percent of the teacher's score by row, one panel a task; bars are standard deviations over seeds."""
    from qbert.files import write_whole
    from qbert.plots import new_figure

    figure = new_figure(3.4 + 2.8 * len(contents), 1.4 + 0.3 * len(labels))
    panels = figure.subplots(1, len(contents), squeeze=False, sharey=True)[0]
    several = False
    for axis, content in zip(panels, contents, strict=True):
        axis.axvline(100, color="0.6", linewidth=0.8, linestyle="--")
        for place, label in enumerate(labels):
            values = [row["retention"] for row in content["rows"].get(label, ())]
            if values:
                several |= len(values) > 1
                error = stdev(values) if len(values) > 1 else None
                color = {"kd": "tab:red", "qat": "tab:blue"}.get(content["rows"][label][0]["recipe"]["method"], "0.4")
                axis.errorbar(fmean(values), place, xerr=error, marker="o", capsize=3, color=color)
        axis.set_title(f"{content['task']} (teacher: {content['metric']} {content['teacher']:.1f})", fontsize="medium")
        axis.set_xlabel("% of the teacher's score")
        axis.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    kinds = "red: KD-QAT, blue: QAT, grey: untrained"
    figure.suptitle(kinds + ("; bars: standard deviation over seeds" if several else ""), fontsize="small")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def lowered(title: str) -> str:
    """A title inside of a sentence."""
    return title[:1].lower() + title[1:]


def write_page(recipe: dict[str, Any], heading: str, parts: list[str], path: Path) -> None:
    """The page with title, reference and note above its parts."""
    from qbert.files import write_whole

    head = [f"# {heading}: {lowered(recipe['title'])}", "", f"After {recipe['reference']}. {recipe.get('note', '')}"]
    text = "\n".join([*head, "", *parts]).rstrip() + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def make_table(
    arguments: argparse.Namespace, recipe: dict[str, Any], tasks: list[str], folder: Path, page: Path
) -> None:
    """Every task's rows, the page after each, and the picture."""
    contents: list[dict[str, Any]] = []
    labels = [row["label"] for row in recipe["rows"]]
    for name in tasks:
        contents.append(fill(for_task(arguments, recipe, name), recipe, folder / name))
        parts = []
        if len(contents) > 1:
            summary = [[x, *(spread([r["score"] for r in c["rows"][x]], 2) for c in contents)] for x in labels]
            first = ["teacher", *(f"{c['teacher']:.2f}" for c in contents)]
            parts += [markdown_table(["", *(f"{c['task']} {c['metric']}" for c in contents)], [first, *summary]), ""]
        for content in contents:
            header, lines = table_of(content, labels)
            parts += [f"## {content['task']}", "", markdown_table(header, lines), ""]
            parts += [f"{content['data']}; {content['budget']}. {content['made by']}", ""]
        print(f"\n{text_table(*table_of(contents[-1], labels))}")
        write_page(recipe, f"Table {arguments.table}", parts, page)
        plot_table(contents, labels, page.with_suffix(".png"))


def teacher_of(task: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer): tuned on the task, or as it is; for STS-B that is a sentence encoder without a head."""
    from qbert.tasks import build_model, build_sentence_model

    if arguments.no_fine_tune:
        print(f"model  {arguments.model}, as it is")
        if task.kind == "regression":
            model, tokenizer = build_sentence_model(arguments.model)
        else:
            model, tokenizer = build_model(task, arguments.model, tuned=True)
        return model.to(arguments.device).eval(), tokenizer
    changed = {"epochs": arguments.teacher_epochs, "train_limit": teacher_limit(arguments)}
    tuned = fine_tuned(task, argparse.Namespace(**{**vars(arguments), **changed, "bf16": arguments.teacher_bf16}))
    return tuned.model.eval(), tuned.tokenizer


def make_figure(
    arguments: argparse.Namespace, recipe: dict[str, Any], tasks: list[str], folder: Path, page: Path
) -> None:
    """Spectrum, and landscapes where they are asked for, of every task's teacher; under torchrun the work is shared."""
    from qbert.tasks import load_task, prepare
    from qbert.tasks.evaluation import wants_pairs

    parts: list[str] = []
    with process_group(arguments) as rank:
        for name in tasks:
            own = for_task(arguments, recipe, name)
            here = folder / name
            here.mkdir(parents=True, exist_ok=True)
            task = load_task(name, data_dir=own.data_dir)
            with first_rank_first(rank):
                model, tokenizer = teacher_of(task, own)
            spectrum = spectrum_of(task, model, tokenizer, own, here, rank)
            if rank > 0:
                continue
            picture = here / f"{recipe['kind']}.png"
            about = title_of(own.model, name)
            if recipe["kind"] == "landscape":
                landscapes(
                    model,
                    prepare(task, tokenizer, "train", as_pairs=wants_pairs(model)),
                    spectrum,
                    own,
                    picture,
                    about,
                    _STEPS,
                )
            else:
                spectrum.plot(picture, title=about)
            print(spectrum)
            parts += [f"## {name}", "", f"![{recipe['title']}]({name}/{picture.name})", ""]
            parts += ["```", str(spectrum), "```", "", f"{task.describe()}. {provenance()}", ""]
            write_page(recipe, f"Figure {arguments.figure}", parts, page)


def main() -> None:
    """Read the recipe, say what it will take, make it."""
    from qbert.extras import require
    from qbert.tasks.training import check_bf16

    arguments = parse_arguments()
    kind = "table" if arguments.table else "figure"
    name = arguments.table or arguments.figure
    recipe = read_recipe(arguments.recipe_file, kind, name)
    if kind == "figure" and arguments.rows:
        raise ValueError(f"--rows {' '.join(arguments.rows)} chooses rows of a --table; leave it out with --figure")
    check_hessian(arguments)
    if arguments.rows:
        recipe["rows"] = [row for row in recipe["rows"] if row["label"].startswith(tuple(arguments.rows))]
        if not recipe["rows"]:
            raise ValueError(f"--rows {' '.join(arguments.rows)} leaves no row of table {name}")
    if kind == "table" and "LOCAL_RANK" in os.environ:
        raise ValueError("torchrun shares the work of --figure only; run --table as one process")
    require("matplotlib", "the picture")
    require("accelerate", "the training")
    tasks = arguments.tasks or (recipe["tasks"] if arguments.data_dir else ["reviews"])
    check_seeds(arguments.seeds)
    for task in tasks:
        check_training(for_task(arguments, recipe, task))
    import torch

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    arguments.task = f"{kind}-{name}"
    folder = prepare_run(arguments, "paper")
    check_bf16(arguments.bf16, torch.device(arguments.device))
    print(f"{kind} {name}: {lowered(recipe['title'])}; on {', '.join(tasks)}")
    if os.environ.get("RANK", "0") == "0":
        minutes = [estimate(for_task(arguments, recipe, task), recipe, folder / task) for task in tasks]
        shorten = "--train-limit, --eval-limit, --rows" if kind == "table" else "--fraction, --runs, --teacher-rows"
        print(f"in all about {sum(minutes):.0f} min, teachers included; {shorten} and --tasks shorten it\n")
    if arguments.dry_run:
        return
    make = make_table if kind == "table" else make_figure
    page = folder / f"{kind}-{name}.md"
    make(arguments, recipe, tasks, folder, page)
    print(f"\nwritten: {page}" + (f", {page.with_suffix('.png')}" if kind == "table" else ""))


if __name__ == "__main__":
    run_script(main, resume_hint="the same command with --resume goes on from the rows that are there")
