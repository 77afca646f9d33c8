r"""Post-training quantization on real tasks: bits, rounding, ranges, and the paper's ablation over group counts.

    python experiments/ptq_table.py --data-dir DATA --tasks stsb sst2 --report experiments/results/ptq.md

STS-B is scored with the published sentence encoder as it is (Spearman of the cosine), every other task with a
fine-tuned one (cached). Rows compare one min-max range a tensor, min-max ranges of row groups (Q-BERT, section 3.3),
row groups with least-squares ranges (the library's default), and the same with error-compensated rounding on
unlabelled training rows: first with weights, tables and activations quantized, then with weights alone. Divergence is
the mean KL to the float model's outputs (for numbers the mean squared difference), hidden error the relative error of
the last hidden states, 1 - cosine that of the rows' mean states to the float ones, MB the bytes of the whole packed
model; where rows of another domain are at hand (the embedded reviews for SST-2, mismatched genres and RTE for MNLI, QQP
for MRPC), the score there has a column of its own. Every row is kept when it is there, and `--resume` goes on from it.
With several `--calibration-rows` compensated rows are made for each, and with `--calibration-text` on lines of a file
instead of the task's own rows:

    python experiments/ptq_table.py --task sst2 --data-dir DATA --methods "compensated, 128 groups" --bits 2 3 \
        --groups --calibration-rows 32 128 384 1024 --calibration-text DATA/wikitext2/valid.txt.gz

With `--peers`, GPTQ as published and, where they are installed, HQQ and quanto stand in the table of weights alone,
calibrated and scored on the same rows; with `--choose-grid`, compensated rounding on grids that are chosen matrix by
matrix in each.

Reference: Shen et al. 2020, tables 1 and 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qbert.cli.arguments import (
    add_task_arguments,
    add_tuning_arguments,
    fine_tuned,
    positive,
    prepare_run,
    run_script,
    subject_of,
)
from qbert.results import provenance

_BITS = (8, 4, 3, 2)
_METHODS: dict[str, dict[str, Any]] = {
    "min-max, 1 group": {"groups": 1, "range_method": "minmax"},
    "min-max, 128 groups": {"range_method": "minmax"},
    "least squares, 128 groups": {"range_method": "mse"},
    "compensated, 128 groups": {"rounding": "compensated"},
    "compensated, real offset": {"rounding": "compensated", "scheme": "offset"},
    "compensated, midrise": {"rounding": "compensated", "scheme": "midrise"},
    "compensated, groups of 64 inputs": {"rounding": "compensated", "groups": 768, "input_group_size": 64},
}
_DEFAULT_METHODS = list(_METHODS)[:4]
_GROUPS = (1, 12, 128, 768)
# What is quantized -> end of the label, configuration, title.
_PARTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "whole": ("", {"embedding_bits": 8}, "Weights, tables (8 bits) and activations:"),
    "file": (", tables in 4 bits", {"embedding_bits": 4}, "Weights, tables (4 bits) and activations:"),
    "weights": (", alone", {"embedding_bits": 32, "activation_bits": None}, "Weights alone, the rest in float:"),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="several tasks, one after the other; default: that of --task")
    add_tuning_arguments(parser)
    parser.add_argument(
        "--groups",
        type=positive,
        nargs="*",
        default=list(_GROUPS),
        help="group counts of the ablation; none leaves it out",
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=_BITS, default=list(_BITS), help="bits to compare")
    parser.add_argument(
        "--methods", nargs="+", choices=list(_METHODS), default=_DEFAULT_METHODS, help="methods to compare"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(_PARTS),
        default=["whole", "weights"],
        help="what is quantized; default: whole weights",
    )
    parser.add_argument(
        "--calibration-rows",
        type=positive,
        nargs="+",
        default=[384],
        help="training rows for compensated rounding; several are compared; default: 384",
    )
    parser.add_argument(
        "--calibration-text", help="calibrate on lines of this text file (.gz) instead of training rows"
    )
    parser.add_argument(
        "--choose-grid", action="store_true", help="compensated rounding on grids chosen matrix by matrix as well"
    )
    parser.add_argument(
        "--peers", action="store_true", help="quantize by GPTQ, HQQ and quanto too, weights alone, on the same rows"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the rows that an interrupted run has kept")
    parser.add_argument("--report", help="Markdown file to write; default: <output-dir>/ptq.md")
    return parser.parse_args()


def load(name: str, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, float model, tokenizer)."""
    from qbert.tasks import build_sentence_model, load_task

    task = load_task(name, data_dir=arguments.data_dir)
    if task.kind == "regression":
        model, tokenizer = build_sentence_model(arguments.model)
        return task, model.to(arguments.device).eval(), tokenizer
    tuned = fine_tuned(task, arguments)
    return task, tuned.model, tuned.tokenizer


def configurations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Label -> configuration, over bits x methods, whole and weights alone, and then over group counts."""
    from qbert import BitsConfig

    configs: dict[str, Any] = {}
    for part in arguments.parts:
        alone, defaults, _ = _PARTS[part]
        for bits in arguments.bits:
            for name in arguments.methods:
                configs[f"{bits} bits, {name}{alone}"] = BitsConfig(bits, **_METHODS[name], **defaults)
    for method, name in (("minmax", "min-max"), ("mse", "least squares")):
        for bits in (4, 3):
            for groups in arguments.groups:
                label = f"{bits} bits, {name}, {groups} group{'s' if groups > 1 else ''}"
                configs.setdefault(label, BitsConfig(bits, embedding_bits=8, groups=groups, range_method=method))
    return configs


def made_otherwise(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Part -> label -> what makes the model, of what is no configuration: chosen grids, and peers."""
    made = {}
    for part in arguments.parts if arguments.choose_grid else ():
        alone, defaults, _ = _PARTS[part]
        made[part] = {
            f"{bits} bits, compensated, grid by matrix{alone}": partial(on_chosen_grids, model, bits, defaults, batches)
            for bits in arguments.bits
        }
    made.setdefault("weights", {}).update(peers_of(model, batches, arguments))
    return made


def on_chosen_grids(model: Any, bits: int, defaults: dict[str, Any], batches: list[Any]) -> tuple[Any, float]:
    """The model rounded on the grids that `choose_grid` finds matrix by matrix, and its size in MB."""
    from qbert import BitsConfig, choose_grid, model_size, quantize_model

    choice = choose_grid(model, BitsConfig(bits, rounding="compensated", **defaults), batches, by_matrix=True)
    print(choice, flush=True)
    student = quantize_model(model, choice.config, calibration_data=batches)
    return student, model_size(student).mb


def peers_of(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Label -> what makes the model in the way of another library, of those that are installed."""
    from ptq_peers import asked_peers, missing, quantized_by

    if not arguments.peers or "weights" not in arguments.parts:
        return {}
    absent = missing()
    for name, package in absent.items():
        print(f"left out: {name}, because {package} is not installed")
    return {
        f"{bits} bits, {name}, alone": partial(quantized_by, name, model, bits, batches)
        for name, bits in asked_peers(arguments.bits)
        if name not in absent
    }


def sections(results: list[Any], metric: str, arguments: argparse.Namespace, others: Mapping[str, Any]) -> str:
    """Markdown: the comparison by bits, whole and weights alone, then the ablation over groups."""
    from ptq import ptq_table

    from qbert.results import markdown_table

    by_label = {r.label: r for r in results}
    parts = []
    for part in arguments.parts:
        alone, _, title = _PARTS[part]
        wanted = [f"{b} bits, {name}{alone}" for b in arguments.bits for name in arguments.methods]
        wanted += others.get(part, ())
        chosen = [by_label["float"], *(replace(by_label[x], label=x.removesuffix(alone)) for x in wanted)]
        parts += [title, "", markdown_table(*ptq_table(chosen, metric)), ""]
    if not arguments.groups:
        return "\n".join(parts)
    parts += [
        "Score by groups of output rows a matrix (MiniLM's have 384 or 1,536 rows; more groups than rows: one a row):",
        "",
    ]
    ablation = []
    for name in ("min-max", "least squares"):
        for bits in (4, 3):
            labels = [f"{bits} bits, {name}, {g} group{'s' if g > 1 else ''}" for g in arguments.groups]
            ablation.append([f"{bits} bits, {name}", *(f"{by_label[x].score:.2f}" for x in labels)])
            if all(by_label[x].agreement is not None for x in labels):
                agreements = (f"{by_label[x].agreement:.1f} %" for x in labels)
                ablation.append([f"{bits} bits, {name}, same class as float", *agreements])
    return "\n".join([*parts, markdown_table(["", *map(str, arguments.groups)], ablation)])


def calibration_batches(task: Any, model: Any, tokenizer: Any, rows: int, seed: int) -> list[Any]:
    """Batches of training rows without their labels."""
    from qbert.encoders.inputs import without_labels
    from qbert.tasks.encoding import prepare
    from qbert.tasks.evaluation import wants_pairs

    data = prepare(task, tokenizer, "train", limit=rows, seed=seed, as_pairs=wants_pairs(model))
    return [without_labels(batch) for _, batch in data.by_length(64)]


def text_batches(path: str, model: Any, tokenizer: Any, rows: int, seed: int) -> list[Any]:
    """Batches of random lines of a text file, headings and empty ones left out; in pairs for a sentence encoder."""
    import gzip

    from qbert.tasks.evaluation import wants_pairs
    from qbert.tasks.task import subset

    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if len(line.split()) > 4 and not line.lstrip().startswith("=")]
    chosen = sorted((row["text"] for row in subset([{"text": line} for line in lines], rows, seed)), key=len)
    batches = []
    for at in range(0, len(chosen), 64):
        batch = tokenizer(chosen[at : at + 64], padding=True, truncation=True, max_length=128, return_tensors="pt")
        whole = {k: v[: len(v) // 2 * 2] for k, v in batch.items()} if wants_pairs(model) else dict(batch)
        batches.append({k: v.unflatten(0, (-1, 2)) for k, v in whole.items()} if wants_pairs(model) else whole)
    return batches


def compare(name: str, arguments: argparse.Namespace, folder: Path) -> str:
    """Markdown of one task: every configuration under every number of calibration rows."""
    from other_domains import other_domains
    from ptq import bootstrap, ptq_report

    from qbert.bits import JSON_FORMAT
    from qbert.results import Record
    from qbert.tasks import evaluate
    from qbert.tasks.task import subset

    task, model, tokenizer = load(name, arguments)
    print(task.describe())
    split = task.evaluation_splits[0]

    def score(candidate: Any) -> Any:
        return evaluate(candidate, task, tokenizer, split=split, limit=arguments.eval_limit)

    domains = other_domains(task, tokenizer, data_dir=arguments.data_dir, limit=arguments.eval_limit or 1000)
    parts = []
    for count in arguments.calibration_rows:
        if arguments.calibration_text:
            batches = text_batches(arguments.calibration_text, model, tokenizer, count, arguments.seed)
        else:
            batches = calibration_batches(task, model, tokenizer, count, arguments.seed)
        asked = {
            **subject_of(task, model),
            "rows": arguments.eval_limit,
            "calibration": [count, arguments.calibration_text, arguments.seed],
            "defaults of": JSON_FORMAT,
        }
        others = made_otherwise(model, batches, arguments)
        results = ptq_report(
            model,
            configurations(arguments),
            score,
            elsewhere={domain.name: domain.evaluate for domain in domains},
            calibration_data=batches,
            standard_error=bootstrap(task, subset(task.rows(split), arguments.eval_limit, 0)),
            hidden=True,
            record=Record(folder / f"ptq-{name}-{count}.json", asked, resume=arguments.resume),
            others={label: make for of_part in others.values() for label, make in of_part.items()},
            progress=True,
        )
        source = Path(arguments.calibration_text).name if arguments.calibration_text else "training rows"
        heading = f"Compensated rounding on {count} of {source}, without labels."
        parts += [heading, "", sections(results, task.primary_metric, arguments, others), ""]
    text = "\n".join(parts).rstrip()
    print(text)
    return "\n".join([f"## {task.name}", "", task.describe(), "", text])


def main() -> None:
    """Score every configuration on every task and write the page."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "ptq_table")
    from qbert.files import write_whole

    page = ["# Post-training quantization", "", provenance(), ""]
    page += [
        "Weights as stated; tables in 8 bits unless said (a range per row), activations in 8 bits (an asymmetric range "
        "per token)."
    ]
    for name in arguments.tasks or [arguments.task]:
        page += ["", compare(name, arguments, folder)]
    target = Path(arguments.report) if arguments.report else folder / "ptq.md"
    write_whole(target, lambda aside: aside.write_text("\n".join(page) + "\n", encoding="utf-8"))
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    run_script(main, "add --resume to go on from the rows that are there")
