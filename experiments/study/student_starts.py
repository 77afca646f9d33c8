"""How near smaller students are to their teacher before any training: fewer layers, narrower ones, both.

    python experiments/study/student_starts.py
    python experiments/study/student_starts.py --task sst2 --data-dir DATA --train-limit 16000 --teacher-epochs 1

Half and two thirds of the layers are chosen by `qbert.students.compare_depths` on unlabelled training rows, and its
tables are printed too; narrower students are projections on the same rows. Writes student_starts.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbert.cli.arguments import add_task_arguments, fine_tuned, positive, prepare_run, run_script

_HEADER = ["student", "layers", "width", "parameters, M", "score", "agreement", "KL"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument(
        "--teacher-epochs", dest="epochs", type=positive, help="passes for the teacher; default: by task"
    )
    parser.add_argument("--train-limit", type=positive, help="tune the teacher on at most this many rows")
    parser.add_argument("--eval-limit", type=positive, help="score on at most this many held-out rows")
    parser.add_argument("--rows", type=positive, default=192, help="unlabelled training rows; default: 192")
    parser.add_argument("--report", help="Markdown file to write; default: OUTPUT_DIR/student_starts.md")
    return parser.parse_args()


def starts(teacher: Any, batches: list[Any], tables: list[Any]) -> Iterator[tuple[str, Any]]:
    """(what it is, student), one after the other; the tables of layers are added to `tables`."""
    from qbert import students

    config = teacher.config
    widths = [round(config.hidden_size * share / config.num_attention_heads) * config.num_attention_heads
              for share in (312 / 384, 1 / 2)]  # fmt: skip
    for width in widths:
        yield "narrower", students.narrow(teacher, width, batches)
    depth = config.num_hidden_layers
    for kept in dict.fromkeys((max(depth * 2 // 3, 1), max(depth // 2, 1))):
        table = students.compare_depths(teacher, batches, kept, sandwiches=False)
        tables.append(table)
        print(f"\n{table}\n", flush=True)
        shallow = students.depth(teacher, table.best.layers)
        yield "fewer layers " + " ".join(map(str, table.best.layers)), shallow
        yield "fewer and narrower", students.narrow(shallow, widths[0], batches)
    yield "DistilBERT, head fitted", students.distilbert(teacher, batches)
    yield "DistilBERT, head of the pooler", students.distilbert(teacher)


def main() -> None:
    """Measure, print and write."""
    from qbert.encoders.targets import base_model
    from qbert.files import write_whole
    from qbert.results import markdown_table, provenance, text_table
    from qbert.tasks import evaluate, load_task, prepare
    from qbert.tasks.evaluation import fidelity

    arguments = parse_arguments()
    folder = prepare_run(arguments, "student_starts")
    task = load_task(arguments.task, data_dir=arguments.data_dir)
    print(f"task: {task.describe()}")
    tuned = fine_tuned(task, arguments)
    data = prepare(task, tuned.tokenizer, "train", limit=arguments.rows, seed=arguments.seed)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in data.batches(32, seed=None)]
    split = task.evaluation_splits[0]

    def measured(model: Any) -> Any:
        return evaluate(model, task, tuned.tokenizer, split=split, limit=arguments.eval_limit)

    reference = measured(tuned.model)
    lines: list[list[Any]] = []
    tables: list[Any] = []
    for name, model in itertools.chain([("teacher", tuned.model)], starts(tuned.model, batches, tables)):
        result = reference if model is tuned.model else measured(model)
        likeness = fidelity(reference.logits, result.logits, tuned.model.config.problem_type)
        config: Any = base_model(model)[1].config
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
        row = [name, config.num_hidden_layers, config.hidden_size, size, f"{result.primary:.2f}"]
        lines.append([*row, f"{likeness.agreement:.1f} %", f"{likeness.divergence:.4f}"])
        print("  ".join(map(str, lines[-1])), flush=True)
    print(f"\n{text_table(_HEADER, lines)}")
    text = f"## {task.name}, before any training\n\n{markdown_table(_HEADER, lines)}\n\n{task.describe()}. Score: "
    text += f"{task.primary_metric} on {int(reference['examples'])} rows. {arguments.rows} unlabelled training rows. "
    text += f"{provenance()}\n" + "".join(f"\n```\n{table}\n```\n" for table in tables)
    target = Path(arguments.report or folder / "student_starts.md")
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written: {target}")


if __name__ == "__main__":
    run_script(main)
