"""Whole files of a given size: what each form of the word table costs, and what an exact choice makes of the bytes.

    python experiments/file_budget.py --data-dir DATA --tasks sst2 stsb --report experiments/results/file_budget.md

First, with everything else in float, the word table in 8 to 2 bits, in different bits by rows, of low rank, and with
the vocabulary of the training sentences only. Then the whole model for several sizes of its file: `FilePlan` chooses
the bits of every matrix and the form of every table from unlabelled training rows, `quantize_model` rounds by the same
rows, and the packed file is written and measured; beside it the same bits for all matrices. Nothing is trained. Where
rows of other domains are at hand, which a trimmed vocabulary may have no pieces for, there is a column for each.
STS-B is scored with the published sentence encoder as it is, every other task with a fine-tuned one (cached). Held-out
rows are used for the figures only. A run that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptq_table import calibration_batches, load

from qbert.cli.arguments import (
    add_task_arguments,
    add_tuning_arguments,
    positive,
    prepare_run,
    run_script,
    subject_of,
)
from qbert.results import Record, markdown_table, provenance

_TABLE = "embeddings.word_embeddings"
_TABLES: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "3 bits, midrise": {"bits": 3, "scheme": "midrise"},
    "2 bits, midrise": {"bits": 2, "scheme": "midrise"},
    "rank 192 x 8 bits": {"bits": 8, "rank": 192},
    "rank 192 x 4 bits": {"bits": 4, "rank": 192},
    "rank 192 x 3 bits": {"bits": 3, "rank": 192},
    "rank 128 x 4 bits": {"bits": 4, "rank": 128},
}
_SPLITS = (2.05, 2.1, 2.25, 2.5, 3.0, 4.0)
_UNIFORM = {
    "2 bits, tables 8": (2, 8),
    "2 bits, tables 4": (2, 4),
    "3 bits, tables 4": (3, 4),
    "4 bits, tables 4": (4, 4),
}
_SIZES = (16.0, 12.0, 10.2, 8.0, 7.0, 6.1)
_TRIMMED_SIZES = (8.0, 6.1, 5.4, 4.7)
_CORPUS = 20_000  # training rows whose pieces make a vocabulary


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="several tasks, one after the other; default: that of --task")
    add_tuning_arguments(parser)
    parser.add_argument("--calibration-rows", type=positive, default=400, help="unlabelled training rows; default: 400")
    parser.add_argument(
        "--parts", nargs="+", choices=("tables", "files"), default=["tables", "files"], help="what to do"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has found")
    parser.add_argument("--report", help="Markdown file to write; default: <output-dir>/file_budget.md")
    return parser.parse_args()


def trimmed(task: Any, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and the tokenizer with the pieces of the training sentences only."""
    from qbert.students.vocabulary import student_with_vocabulary
    from qbert.tasks.heads import SentenceRegression
    from qbert.tasks.task import subset

    rows = subset(task.rows("train"), _CORPUS, 0)
    texts = [text for row in rows for key, text in row.items() if isinstance(text, str) and key != "label"]
    inner = model.backbone if isinstance(model, SentenceRegression) else model
    student, smaller = student_with_vocabulary(inner, tokenizer, texts)
    return (model.around(student) if inner is not model else student), smaller


def split_of(model: Any, batches: Any, mean: float) -> dict[str, Any]:
    """`row_bits` of the word table with about `mean` bits a value."""
    from qbert.allocation.whole_file import row_splits
    from qbert.encoders.targets import find_targets
    from qbert.usage import table_uses

    (target,) = [t for t in find_targets(model) if t.name == _TABLE]
    use = table_uses(model, batches, [target.module])[target.module]
    (split,) = row_splits(target.matrix.detach(), use, (2, 3, 4, 8), "midrise", (mean,))
    return {**split, "scheme": "midrise"}


def table_configurations(model: Any, batches: Any) -> Iterator[tuple[str, Any]]:
    """(label, configuration) of every form of the word table, everything else in float."""
    from qbert import BitsConfig

    def config(rule: dict[str, Any]) -> Any:
        return BitsConfig({_TABLE: rule}, embedding_bits=32)

    yield from ((label, config(rule)) for label, rule in _TABLES.items())
    for mean in _SPLITS:
        yield f"{mean:g} bits by rows, midrise", config(split_of(model, batches, mean))


def file_megabytes(student: Any) -> float:
    """MB of 10^6 bytes of the safetensors file of the packed student."""
    from safetensors.torch import save_model

    import qbert

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(qbert.pack(student), str(path), metadata={"format": "pt"})
        return path.stat().st_size / 1e6


class Comparison:
    """Scores quantized forms of one task's model against the float one; rows are kept as they are found."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        from ptq import bootstrap

        from qbert.tasks.task import subset

        self.task, self.model, self.tokenizer = load(name, arguments)
        self.arguments = arguments
        settings = {"rows": arguments.calibration_rows, "limit": arguments.eval_limit, "seed": arguments.seed}
        asked = {"task": name, **subject_of(self.task, self.model), **settings}
        self.record = Record(folder / f"{name}.json", asked, resume=arguments.resume)
        self.error = bootstrap(
            self.task, subset(self.task.rows(self.task.evaluation_splits[0]), arguments.eval_limit, 0)
        )
        self.reference = self._scored(self.model, self.tokenizer)
        self.elsewhere = self._elsewhere(self.model, self.tokenizer)

    def _elsewhere(self, model: Any, tokenizer: Any) -> dict[str, float]:
        from other_domains import other_domains, scores_elsewhere

        limit = self.arguments.eval_limit or 1000
        domains = other_domains(self.task, tokenizer, data_dir=self.arguments.data_dir, limit=limit)
        return scores_elsewhere(domains, model)

    def batches(self, model: Any, tokenizer: Any) -> list[Any]:
        """Unlabelled training rows."""
        seed = self.arguments.seed
        return calibration_batches(self.task, model, tokenizer, self.arguments.calibration_rows, seed)

    def _scored(self, model: Any, tokenizer: Any) -> Any:
        from qbert.tasks import evaluate

        split, limit = self.task.evaluation_splits[0], self.arguments.eval_limit
        return evaluate(model, self.task, tokenizer, split=split, limit=limit)

    def add(self, key: str, student: Any, tokenizer: Any, **more: Any) -> None:
        """Score one student."""
        from qbert.tasks.evaluation import fidelity

        result = self._scored(student, tokenizer)
        like = fidelity(self.reference.logits, result.logits)
        row = {
            "score": result.primary,
            "error": self.error(result),
            "of_float": 100 * result.primary / self.reference.primary,
            "agreement": like.agreement,
            "divergence": like.divergence,
            "elsewhere": self._elsewhere(student, tokenizer),
            **more,
        }
        self.record.add(key, row)
        print(key, {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def compare_tables(comparison: Comparison) -> None:
    """Every form of the word table, everything else in float."""
    from qbert import BitsConfig, model_size, quantize_model

    for kept in (True, False):
        model, tokenizer = comparison.model, comparison.tokenizer
        if not kept:
            model, tokenizer = trimmed(comparison.task, model, tokenizer)
        batches = comparison.batches(model, tokenizer)
        rest = model_size(model).total - model.get_submodule(_table_path(model)).weight.numel() * 4
        forms = list(table_configurations(model, batches)) if kept else [
            (f"vocabulary of {model.config.vocab_size:,} pieces, float", None),
            ("the same, 4 bits", BitsConfig({_TABLE: 4}, embedding_bits=32)),
            ("the same, 3 bits by rows", BitsConfig({_TABLE: split_of(model, batches, 3.0)}, embedding_bits=32)),
            ("the same, rank 192 x 4 bits", BitsConfig({_TABLE: {"bits": 4, "rank": 192}}, embedding_bits=32)),
        ]  # fmt: skip
        for label, config in forms:
            if f"table: {label}" in comparison.record:
                continue
            student = model if config is None else quantize_model(model, config, calibration_data=batches)
            comparison.add(f"table: {label}", student, tokenizer, megabytes=(model_size(student).total - rest) / 1e6)


def _table_path(model: Any) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith("word_embeddings"))


def compare_files(comparison: Comparison) -> None:
    """Whole files: uniform bits, and the exact choice for several sizes, with and without the whole vocabulary."""
    from qbert import BitsConfig, quantize_model
    from qbert.allocation.whole_file import FilePlan

    model, tokenizer = comparison.model, comparison.tokenizer
    batches = comparison.batches(model, tokenizer)
    for label, (bits, tables) in _UNIFORM.items():
        if f"file: {label}" not in comparison.record:
            config = BitsConfig(bits, embedding_bits=tables, rounding="compensated")
            student = quantize_model(model, config, calibration_data=batches)
            comparison.add(f"file: {label}", student, tokenizer, megabytes=file_megabytes(student))
    for kept, sizes in ((True, _SIZES), (False, _TRIMMED_SIZES)):
        keys = {size: f"file: {'exact' if kept else 'exact, trimmed vocabulary'}, {size:g} MB" for size in sizes}
        if all(key in comparison.record for key in keys.values()):
            continue
        if not kept:
            model, tokenizer = trimmed(comparison.task, model, tokenizer)
            batches = comparison.batches(model, tokenizer)
        plan = FilePlan(model, batches)
        for size, key in keys.items():
            if key in comparison.record:
                continue
            picked = plan.choose(size)
            student = quantize_model(model, plan.config(size), calibration_data=batches)
            more: dict[str, Any] = {"predicted": plan.damage(picked), "matrices": mean_bits(plan, picked)}
            more["table"] = told(table_rule(plan, picked))
            comparison.add(key, student, tokenizer, megabytes=file_megabytes(student), **more)


def table_rule(plan: Any, picked: Any) -> Any:
    """What a choice says of the word table."""
    return next(i.options[p].rule for i, p in zip(plan.items, picked, strict=True) if i.names == (_TABLE,))


def told(rule: dict[str, Any]) -> str:
    """One form of a table in words."""
    scheme = "" if rule.get("scheme", "asymmetric") == "asymmetric" else f", {rule['scheme']}"
    if rule.get("rank"):
        return f"rank {rule['rank']} x {rule['bits']} bits{scheme}"
    if rule.get("row_bits"):
        more = ", ".join(f"{rows:,} rows {bits} bits" for bits, rows in rule["row_bits"])
        return f"{more}, the others {rule['bits']}{scheme}"
    return f"{rule['bits']} bits{scheme}"


def mean_bits(plan: Any, picked: Any) -> float:
    """Mean bits of the matrices in the layers."""
    from qbert.encoders.targets import find_targets

    total = weights = 0
    sizes = {t.name: t.weight.numel() for t in find_targets(plan.model)}
    for item, index in zip(plan.items, picked, strict=True):
        if ".layer." in item.names[0]:
            total += item.options[index].rule["bits"] * sizes[item.names[0]]
            weights += sizes[item.names[0]]
    return total / weights


def section(comparison: Comparison) -> list[str]:
    """Markdown of one task."""
    metric = comparison.task.primary_metric
    reference = comparison.reference
    lines = ["", f"## {comparison.task.name}", "", comparison.task.describe(), ""]
    there = "".join(f"; on {name} {value:.2f}" for name, value in comparison.elsewhere.items())
    lines += [f"Float: {metric} {reference.primary:.2f} +- {comparison.error(reference):.2f}{there}.", ""]
    for part, title in (("table", "The word table, everything else in float:"), ("file", "Whole files:")):
        header = [part, metric, "of float", "same class or 100 r", "divergence", *comparison.elsewhere, "MB"]
        header += ["predicted", "bits of matrices", "word table"] if part == "file" else []
        rows = []
        for key, kept in comparison.record.content["rows"].items():
            if not key.startswith(f"{part}: "):
                continue
            row = kept[0]
            cells = [key.removeprefix(f"{part}: "), f"{row['score']:.2f} +- {row['error']:.2f}"]
            cells += [f"{row['of_float']:.1f} %", f"{row['agreement']:.1f}", f"{row['divergence']:.4f}"]
            known = row.get("elsewhere", {})
            cells += [f"{known[name]:.2f}" if name in known else "" for name in comparison.elsewhere]
            cells += [f"{row['megabytes']:.2f}"]
            if part == "file":
                exact = "predicted" in row
                cells += [f"{row['predicted']:.4f}", f"{row['matrices']:.2f}", row["table"]] if exact else [""] * 3
            rows.append(cells)
        if rows:
            lines += [title, "", markdown_table(header, rows), ""]
    return lines


def main() -> None:
    """Make every comparison and write the page."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "file_budget")
    from qbert.files import write_whole

    page = ["# Everything in the file is in the budget", "", provenance(), ""]
    for name in arguments.tasks or [arguments.task]:
        comparison = Comparison(name, arguments, folder)
        if "tables" in arguments.parts:
            compare_tables(comparison)
        if "files" in arguments.parts:
            compare_files(comparison)
        page += section(comparison)
    target = Path(arguments.report) if arguments.report else folder / "file_budget.md"
    write_whole(target, lambda aside: aside.write_text("\n".join(page) + "\n", encoding="utf-8"))
    print(f"written to {target}")


if __name__ == "__main__":
    run_script(main)
