"""Is what a plan predicts what is measured? By matrix and table, and in sum, on rows that the plan did not see.

    python experiments/study/plan_predictions.py --task sst2 --data-dir DATA --size-mb 10.2 6.1 4.7

Each matrix or table is put alone into the float model as its plan stores it, everything else in float, and the
divergence from the float model is measured on further training rows and on held-out rows; then all of them together
without and with rounded activations. Sums of the parts are held against both. It stands alone since it judges plans,
which `compress.py` makes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress_budget import Budget, add_budget_arguments, load_float_model

from qbert.cli.arguments import add_task_arguments, positive, prepare_run, run_script
from qbert.results import markdown_table, provenance, text_table

_ROWS = 384  # of each kind that is measured on
_FACTOR = 2.0
_KINDS = ("training rows", "held-out rows")
_PARTS, _WHOLE = "all parts", "whole, activations too"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("--no-fine-tune", action="store_true", help="--model is a tuned teacher; use it as it is")
    parser.add_argument("--teacher-epochs", type=positive, help="passes for the teacher; default: by task")
    parser.add_argument("--train-limit", type=positive, help="rows that the teacher was tuned on")
    parser.add_argument("--rows", type=positive, default=_ROWS, help=f"rows to measure on; default: {_ROWS}")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/predictions.md")
    add_budget_arguments(parser)
    parser.set_defaults(size_mb=[10.2, 6.1], resume=True, bf16=False)
    parser.add_argument("--eval-limit", type=positive, help="score the float model on at most this many rows")
    return parser.parse_args()


class Judge:
    """One float model and rows to measure divergences from it on.

    Args:
        bench: teacher, calibration rows and record.
        rows: of each kind to measure on.
    """

    def __init__(self, bench: Budget, rows: int) -> None:
        from qbert.pipeline.answers import Answers
        from qbert.tasks import prepare
        from qbert.tasks.evaluation import wants_pairs

        (variant,) = bench.variants
        self.record, self.model, self.planner = (
            bench.record,
            variant.model,
            bench.planner(variant, structures=[], further=False),
        )
        split, pairs = bench.task.evaluation_splits[0], wants_pairs(self.model)
        held_out = prepare(bench.task, variant.tokenizer, split, limit=rows, as_pairs=pairs).batches(32)
        further = bench.drawn(self.model, variant.tokenizer, rows, skip=bench.arguments.calibration_rows)
        kinds = dict(zip(_KINDS, (further, held_out), strict=True))
        self.wanted = {name: Answers(self.model, batches) for name, batches in kinds.items()}

    def measured(self, model: Any) -> dict[str, float]:
        """Divergence from the float model by kind of rows."""
        return {name: wanted.likeness(model)[0] for name, wanted in self.wanted.items()}

    def judge(self, size_mb: float) -> None:
        """Keep the rows of one size: every part alone, all parts, and all parts with rounded activations."""
        from qbert import quantize_model

        if _key(size_mb, _WHOLE) in self.record:
            return
        unit, files = self.planner.unit, self.planner.part(()).files
        picked = files.choose(size_mb)
        config = files.configuration(picked)
        for item, index in zip(files.items, picked, strict=True):
            key, option = _key(size_mb, item.names[0]), item.options[index]
            if key not in self.record:
                found = self.measured(self._rounded(dict.fromkeys(item.names, option.rule), files.settings))
                self.record.add(key, {"predicted": unit * option.damage, "bits": option.rule["bits"], **found})
        total = unit * files.damage(picked)
        self.record.add(
            _key(size_mb, _PARTS),
            {"predicted": total, **self.measured(self._rounded(config.rules, files.settings))},
        )
        prediction = self.planner.calibrated((), size_mb)
        made = quantize_model(self.model, config, calibration_data=self.planner.rest)
        total = prediction(files.damage(picked))
        self.record.add(_key(size_mb, _WHOLE), {"predicted": total, "trial": str(prediction), **self.measured(made)})

    def _rounded(self, rules: Any, settings: Any) -> Any:
        """The float model with some parts rounded as a plan says, activations as they are.

        By `quantize_model` and not by another weight alone, since compensated rounding moves biases too, and fits what
        comes later to what came before.
        """
        from qbert import BitsConfig, quantize_model

        config = BitsConfig(dict(rules), embedding_bits=32, **{**settings, "activation_bits": None})
        return quantize_model(self.model, config, calibration_data=self.planner.rest)


def _key(size_mb: float, name: str) -> str:
    return f"{size_mb:g} MB: {name}"


def judged(rows: dict[str, list[dict[str, Any]]], sizes: list[float]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): what was predicted and measured of each size, by part and in sum."""
    header = ["MB", "", "predicted", *(f"on {kind}" for kind in _KINDS), "within a factor of 2"]
    lines = []
    for size in sizes:
        prefix = _key(size, "")
        found = {key.removeprefix(prefix): row[0] for key, row in rows.items() if key.startswith(prefix)}
        sums = {name: found.pop(name) for name in (_PARTS, _WHOLE)}
        ratios = [sorted(row[kind] / max(row["predicted"], 1e-12) for row in found.values()) for kind in _KINDS]
        near = [sum(1 / _FACTOR <= ratio <= _FACTOR for ratio in each) for each in ratios]
        spans = [f"{each[0]:.2f} to {each[-1]:.2f}, median {median(each):.2f}" for each in ratios]
        lines.append([f"{size:g}", "each part alone, measured / predicted", "1", *spans, f"{near} of {len(found)}"])
        for name, row in sums.items():
            told = [f"{row[kind]:.4f} ({row[kind] / row['predicted']:.2f})" for kind in _KINDS]
            fits = [1 / _FACTOR <= row[kind] / row["predicted"] <= _FACTOR for kind in _KINDS]
            lines.append(
                [f"{size:g}", name, f"{row['predicted']:.4f}", *told, " and ".join("yes" if f else "no" for f in fits)]
            )
    return header, lines


def parts_table(rows: dict[str, list[dict[str, Any]]], size: float) -> tuple[list[str], list[list[str]]]:
    """(header, lines): every matrix and table of one size."""
    prefix = _key(size, "")
    found = {key.removeprefix(prefix): row[0] for key, row in rows.items() if key.startswith(prefix)}
    return ["part", "bits", "predicted", *(f"on {kind}" for kind in _KINDS)], [
        [name, str(row["bits"]), f"{row['predicted']:.2e}", *(f"{row[kind]:.2e}" for kind in _KINDS)]
        for name, row in found.items()
        if name not in (_PARTS, _WHOLE)
    ]


def main() -> None:
    """Measure, print the table."""
    from qbert.files import write_whole

    arguments = parse_arguments()
    folder = prepare_run(arguments, "predictions")
    bench = Budget(arguments, folder, *load_float_model(arguments))
    judge = Judge(bench, arguments.rows)
    for size in arguments.size_mb:
        judge.judge(size)
    rows = bench.record.content["rows"]
    table = judged(rows, arguments.size_mb)
    print(f"\n{text_table(*table)}\n")
    parts = [f"{size:g} MB:\n\n{markdown_table(*parts_table(rows, size))}" for size in arguments.size_mb]
    text = (
        "\n\n".join([f"# Predictions of plans, {bench.task.name}", markdown_table(*table), provenance(), *parts]) + "\n"
    )
    target = Path(arguments.report or folder / "predictions.md")
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written: {target}")


if __name__ == "__main__":
    run_script(main)
