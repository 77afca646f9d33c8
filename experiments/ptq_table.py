"""Post-training quantization on real tasks: bits, ranges and the paper's ablation over group counts, in one table each.

    python experiments/ptq_table.py --data-dir DATA --tasks stsb sst2 --report experiments/results/ptq.md

STS-B is scored with the published sentence encoder as it is (Spearman of the cosine), every other task with a
fine-tuned one (cached). Rows compare three ways to set the grid: one min-max range a tensor, min-max ranges of row
groups (Q-BERT, section 3.3), and row groups with least-squares ranges (the library's default). Embeddings and
activations have 8 bits everywhere. Reference: Shen et al. 2020, tables 1 and 3.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qbert.cli.arguments import add_task_arguments, add_tuning_arguments, fine_tuned, positive, prepare_run, run_script
from qbert.results import provenance

_BITS = (8, 4, 3, 2)
_METHODS: dict[str, dict[str, Any]] = {
    "min-max, 1 group": {"groups": 1, "range_method": "minmax"},
    "min-max, 128 groups": {"range_method": "minmax"},
    "least squares, 128 groups": {"range_method": "mse"},
}
_GROUPS = (1, 12, 128, 768)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="several tasks, one after the other; default: that of --task")
    add_tuning_arguments(parser)
    parser.add_argument(
        "--groups", type=positive, nargs="+", default=list(_GROUPS), help="group counts of the ablation"
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


def configurations(group_counts: list[int]) -> dict[str, Any]:
    """Label -> configuration, over bits x methods and then over group counts."""
    from qbert import BitsConfig

    configs = {f"{b} bits, {name}": BitsConfig(b, **settings) for b in _BITS for name, settings in _METHODS.items()}
    for method, name in (("minmax", "min-max"), ("mse", "least squares")):
        for bits in (4, 3):
            for groups in group_counts:
                label = f"{bits} bits, {name}, {groups} group{'s' if groups > 1 else ''}"
                configs.setdefault(label, BitsConfig(bits, groups=groups, range_method=method))
    return configs


def sections(results: list[Any], metric: str, group_counts: list[int]) -> str:
    """Markdown: the comparison by bits, then the ablation over groups."""
    from ptq import ptq_table

    from qbert.results import markdown_table

    by_label = {r.label: r for r in results}
    header, rows = ptq_table([r for r in results if r.label == "float" or _is_comparison(r.label)], metric)
    parts = [
        markdown_table(header, rows),
        "",
        "Score by groups of output rows a matrix (MiniLM's have 384 or 1,536 rows; more groups than rows: one a row):",
        "",
    ]
    ablation = []
    for name in ("min-max", "least squares"):
        for bits in (4, 3):
            labels = [f"{bits} bits, {name}, {g} group{'s' if g > 1 else ''}" for g in group_counts]
            ablation.append([f"{bits} bits, {name}", *(f"{by_label[x].score:.2f}" for x in labels)])
            if all(by_label[x].agreement is not None for x in labels):
                agreements = (f"{by_label[x].agreement:.1f} %" for x in labels)
                ablation.append([f"{bits} bits, {name}, same class as float", *agreements])
    return "\n".join([*parts, markdown_table(["", *map(str, group_counts)], ablation)])


def _is_comparison(label: str) -> bool:
    return any(label == f"{b} bits, {name}" for b in _BITS for name in _METHODS)


def main() -> None:
    """Score every configuration on every task and write the page."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "ptq_table")
    from ptq import ptq_report

    from qbert.files import write_whole
    from qbert.tasks import evaluate

    page = ["# Post-training quantization", "", provenance(), ""]
    page += ["Weights as stated, embeddings 8 bits (a range per row), activations 8 bits (a range per token)."]
    for name in arguments.tasks or [arguments.task]:
        task, model, tokenizer = load(name, arguments)
        print(task.describe())

        def score(candidate: Any, task: Any = task, tokenizer: Any = tokenizer) -> Any:
            split = task.evaluation_splits[0]
            return evaluate(candidate, task, tokenizer, split=split, limit=arguments.eval_limit, progress=False)

        results = ptq_report(model, configurations(arguments.groups), score, progress=True)
        text = sections(results, task.primary_metric, arguments.groups)
        print(text)
        page += ["", f"## {task.name}", "", task.describe(), "", text]
    target = Path(arguments.report) if arguments.report else folder / "ptq.md"
    write_whole(target, lambda aside: aside.write_text("\n".join(page) + "\n", encoding="utf-8"))
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    run_script(main)
