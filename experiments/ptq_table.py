"""Post-training quantization on real tasks: bits, rounding, ranges, and the paper's ablation over group counts.

    python experiments/ptq_table.py --data-dir DATA --tasks stsb sst2 --report experiments/results/ptq.md

STS-B is scored with the published sentence encoder as it is (Spearman of the cosine), every other task with a
fine-tuned one (cached). Rows compare one min-max range a tensor, min-max ranges of row groups (Q-BERT, section 3.3),
row groups with least-squares ranges (the library's default), and the same with error-compensated rounding on
unlabelled training rows: first with weights, tables and activations quantized, then with weights alone. Divergence is
the mean KL to the float model's outputs (for numbers the mean squared difference), hidden error the relative error of
the last hidden states, MB the bytes of the whole packed model; where rows of another domain are at hand (the embedded
reviews for SST-2, mismatched genres and RTE for MNLI, QQP for MRPC), the score there has a column of its own.
Reference: Shen et al. 2020, tables 1 and 3.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbert.cli.arguments import add_task_arguments, add_tuning_arguments, fine_tuned, positive, prepare_run, run_script
from qbert.results import provenance

_BITS = (8, 4, 3, 2)
_METHODS: dict[str, dict[str, Any]] = {
    "min-max, 1 group": {"groups": 1, "range_method": "minmax"},
    "min-max, 128 groups": {"range_method": "minmax"},
    "least squares, 128 groups": {"range_method": "mse"},
    "compensated, 128 groups": {"rounding": "compensated"},
}
_GROUPS = (1, 12, 128, 768)
# What is quantized -> end of the label, configuration, title.
_PARTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "whole": ("", {}, "Weights, tables and activations:"),
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
        "--methods", nargs="+", choices=list(_METHODS), default=list(_METHODS), help="methods to compare; default: all"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="what is quantized; default: both"
    )
    parser.add_argument(
        "--calibration-rows", type=positive, default=384, help="training rows for compensated rounding; default: 384"
    )
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
                configs.setdefault(label, BitsConfig(bits, groups=groups, range_method=method))
    return configs


def sections(results: list[Any], metric: str, arguments: argparse.Namespace) -> str:
    """Markdown: the comparison by bits, whole and weights alone, then the ablation over groups."""
    from ptq import ptq_table

    from qbert.results import markdown_table

    by_label = {r.label: r for r in results}
    parts = []
    for part in arguments.parts:
        alone, _, title = _PARTS[part]
        wanted = [f"{b} bits, {name}{alone}" for b in arguments.bits for name in arguments.methods]
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
    from qbert.tasks.encoding import prepare
    from qbert.tasks.evaluation import wants_pairs

    data = prepare(task, tokenizer, "train", limit=rows, seed=seed, as_pairs=wants_pairs(model))
    return [{k: v for k, v in batch.items() if k != "labels"} for _, batch in data.by_length(64)]


def main() -> None:
    """Score every configuration on every task and write the page."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "ptq_table")
    from other_domains import other_domains
    from ptq import bootstrap, ptq_report

    from qbert.files import write_whole
    from qbert.tasks import evaluate
    from qbert.tasks.task import subset

    page = ["# Post-training quantization", "", provenance(), ""]
    page += [
        "Weights as stated; where tables and activations are quantized, both have 8 bits (a range per row; a range per "
        f"token). Compensated rounding saw {arguments.calibration_rows} training rows without labels."
    ]
    for name in arguments.tasks or [arguments.task]:
        task, model, tokenizer = load(name, arguments)
        print(task.describe())

        def score(candidate: Any, task: Any = task, tokenizer: Any = tokenizer) -> Any:
            split = task.evaluation_splits[0]
            return evaluate(candidate, task, tokenizer, split=split, limit=arguments.eval_limit, progress=False)

        rows = subset(task.rows(task.evaluation_splits[0]), arguments.eval_limit, 0)
        domains = other_domains(task, tokenizer, data_dir=arguments.data_dir, limit=arguments.eval_limit or 1000)
        results = ptq_report(
            model,
            configurations(arguments),
            score,
            elsewhere={domain.name: domain.evaluate for domain in domains},
            calibration_data=calibration_batches(task, model, tokenizer, arguments.calibration_rows, arguments.seed),
            standard_error=bootstrap(task, rows),
            hidden=True,
            progress=True,
        )
        text = sections(results, task.primary_metric, arguments)
        print(text)
        page += ["", f"## {task.name}", "", task.describe(), "", text]
    target = Path(arguments.report) if arguments.report else folder / "ptq.md"
    write_whole(target, lambda aside: aside.write_text("\n".join(page) + "\n", encoding="utf-8"))
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    run_script(main)
