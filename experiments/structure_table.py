"""Low rank, corrections, zeros, heads and feed-forward columns beside bits, without any training.

    python experiments/structure_table.py --task sst2 --data-dir DATA --epochs 1 --train-limit 16000 --resume

A fine-tuned encoder (cached) is factorized, pruned and quantized in each way, on a few hundred unlabelled rows,
and compared with itself on held-out rows: score, agreement of classes, and mean KL divergence of the outputs. Only the
matrices of the encoder layers are changed; tables and activations stay in float, so that rows differ in one thing.
Bits a weight count everything that is stored of those matrices over the number of weights they had before: codes,
scales and zero points; of a matrix with zeros the codes that are not zero and the least a mask can take.

``--time`` adds milliseconds of the packed models (8 bits, optimized for inference), each beside the whole model in
turns, so that a loaded machine slows both.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qbert.cli.arguments import add_task_arguments, add_tuning_arguments, fine_tuned, positive, prepare_run, run_script
from qbert.results import Record, markdown_table, provenance

_RANKS = {"*": 96, "*.intermediate.dense": 153, "encoder.layer.?.output.dense": 153}
_CORRECTIONS = {"*": 15, "*.intermediate.dense": 25, "encoder.layer.?.output.dense": 25}
_SHAPES = ((1, 16), (32, 64))
_ROUNDS = 12


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    add_tuning_arguments(parser)
    parser.add_argument(
        "--calibration-rows", type=positive, default=384, help="unlabelled rows to look at; default: 384"
    )
    parser.add_argument("--only", nargs="+", help="leave out rows whose label holds none of these texts")
    parser.add_argument("--time", action="store_true", help="also time packed models of other shapes")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that are in the output folder")
    parser.add_argument("--report", help="Markdown file to write; default: <output-dir>/structure.md")
    return parser.parse_args()


def students(model: Any, data: Any) -> dict[str, Callable[[], Any]]:
    """Label -> maker of the student; what has bits is quantized by `quantize_model`."""
    import qbert
    from qbert.students.lowrank import quantize_with_correction

    def bits(number: int, rounding: str = "nearest") -> Any:
        return qbert.BitsConfig(number, embedding_bits=32, activation_bits=None, rounding=rounding)

    def quantized(student: Any, number: int, rounding: str = "nearest") -> Any:
        calibration = data if rounding == "compensated" else None
        return qbert.quantize_model(student, bits(number, rounding), calibration_data=calibration)

    def rounded(number: int, how: str) -> Any:
        return quantized(model, number, how)

    def factored(weighting: Any) -> Any:
        return quantized(qbert.factorize(model, _RANKS, weighting=weighting, data=data), 8)

    def corrected(how: str, rank: Any) -> Any:
        return quantize_with_correction(model, bits(2, how), rank, data=data)

    def sparse(pattern: Any, number: int | None, rounding: str, **options: Any) -> Any:
        student = qbert.prune(model, pattern=pattern, **options)
        return student if number is None else quantized(student, number, rounding)

    made: dict[str, Callable[[], Any]] = {}
    for number in (4, 3, 2):
        for how in ("nearest", "compensated"):
            made[f"bits: {number}, {how}"] = partial(rounded, number, how)
    for weighting in ("none", "activations", "both"):
        made[f"rank 96/153 by {weighting}, 8 bits"] = partial(factored, weighting)
    made["rank by budget 0.5, both, 8 bits"] = lambda: quantized(qbert.factorize(model, 0.5, data=data), 8)
    for how in ("nearest", "compensated"):
        made[f"2 bits {how} + rank 15/25 in 8 bits"] = partial(corrected, how, _CORRECTIONS)
    made["2 bits compensated + rank by budget 0.08 in 8 bits"] = partial(corrected, "compensated", 0.08)
    for pattern, name in (("2:4", "2:4"), (0.5, "half zero")):
        made[f"{name} by magnitude"] = partial(sparse, pattern, None, "")
        made[f"{name} by magnitude, 4 bits nearest"] = partial(sparse, pattern, 4, "nearest")
        made[f"{name}, scores alone"] = partial(sparse, pattern, None, "", data=data, compensate=False)
        made[f"{name}, compensated"] = partial(sparse, pattern, None, "", data=data)
        for number in (4, 3):
            label = f"{name}, compensated, {number} bits compensated"
            made[label] = partial(sparse, pattern, number, "compensated", data=data)
    ways: dict[str, dict[str, Any]] = {
        "by magnitude": {},
        "scores alone": {"data": data, "compensate": False},
        "compensated": {"data": data},
    }
    for what in ("heads", "ffn"):
        for share in (0.25, 0.5):
            for how, options in ways.items():
                made[f"{what} {share:.0%} out, {how}"] = partial(qbert.prune, model, **{what: share}, **options)
    made["heads 25% and ffn 50% out, compensated"] = lambda: qbert.prune(model, heads=0.25, ffn=0.5, data=data)
    return made


def bits_a_weight(student: Any, before: int) -> float:
    """Bits of all that is stored of the encoder's matrices, over the number of weights they had `before`."""
    from qbert import model_size
    from qbert.students.curvature import layer_matrices

    parts = [t for t in model_size(student).tensors if t.part == "encoder"]
    total = 8.0 * sum(t.weight_bytes + t.metadata_bytes for t in parts)
    quantized = {n: m for n, m in student.named_modules() if hasattr(m, "quantized_weight") and hasattr(m, "matrix")}
    matrices = [m.quantized_weight() for m in quantized.values()] or [t.matrix for t in layer_matrices(student)]
    wide = [m.weight_quantizer.bits for m in quantized.values()] or [32] * len(matrices)
    for matrix, bits in zip(matrices, wide, strict=True):
        zeros = int((matrix == 0).sum())
        share = zeros / matrix.numel()
        if share > 0.45 and bits > 2:  # pruned: on a grid of few levels nearest rounding makes zeros too
            runs = matrix.unflatten(1, (-1, 4)) if matrix.shape[1] % 4 == 0 else None
            in_runs = runs is not None and bool(((runs == 0).sum(2) >= 2).all())
            mask = math.log2(6) / 4 if in_runs else 1.0
            total -= zeros * bits - mask * matrix.numel()
    return total / before


def row_of(student: Any, score: Callable[[Any], Any], reference: Any, before: int) -> dict[str, float]:
    """What is told of one student."""
    from qbert.tasks.evaluation import fidelity

    result = score(student)
    near = fidelity(reference.logits, result.logits)
    return {
        "score": result.primary,
        "retention": 100 * result.primary / reference.primary,
        "agreement": near.agreement,
        "divergence": near.divergence,
        "bits": bits_a_weight(student, before),
    }


def times(model: Any, student: Any) -> dict[str, float]:
    """Milliseconds of both, packed at 8 bits and optimized, at each shape: medians of calls in turns."""
    import torch

    import qbert

    fast = [qbert.optimize_for_inference(qbert.pack(qbert.quantize_model(m, 8))) for m in (model, student)]
    found: dict[str, float] = {}
    for batch, length in _SHAPES:
        ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        taken: list[list[float]] = [[], []]
        with torch.inference_mode():
            for turn in range(_ROUNDS + 3):
                for which, each in enumerate(fast):
                    calls = 20 if batch == 1 else 1
                    start = time.process_time()
                    for _ in range(calls):
                        each(**inputs)
                    if turn >= 3:
                        taken[which].append((time.process_time() - start) / calls)
        whole, small = (sorted(t)[len(t) // 2] * 1e3 for t in taken)
        found |= {f"ms whole {batch}x{length}": whole, f"ms {batch}x{length}": small}
    return found


def page(record: Record, task: Any, arguments: argparse.Namespace) -> str:
    """The tables in Markdown."""
    header = ["", "bits a weight", "KL", "agreement %", f"{task.primary_metric}", "% of the teacher"]
    timed = ["ms 1x16", "ms 32x64", "x whole 1x16", "x whole 32x64"]
    rows, fast = [], []
    for label in record:
        (found,) = record[label]
        if "bits" in found:
            cells = [f"{found['bits']:.2f}", f"{found['divergence']:.4f}", f"{found['agreement']:.1f}"]
            rows.append([label, *cells, f"{found['score']:.2f}", f"{found['retention']:.1f}"])
        else:
            pairs = [(found[f"ms {b}x{t}"], found[f"ms whole {b}x{t}"]) for b, t in _SHAPES]
            fast.append([label, *(f"{m:.2f}" for m, _ in pairs), *(f"{w / m:.2f}" for m, w in pairs)])
    text = [provenance(), "", task.describe(), "", markdown_table(header, rows)]
    if fast:
        text += [
            "",
            "CPU time of packed models (8 bits, optimized), one thread:",
            "",
            markdown_table(["", *timed], fast),
        ]
    return "\n".join(text)


def main() -> None:
    """Make, measure and print every student."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "structure_table")
    from ptq_table import calibration_batches

    from qbert.files import write_whole
    from qbert.students.curvature import layer_matrices
    from qbert.tasks import evaluate, load_task

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    tuned = fine_tuned(task, arguments)
    model = tuned.model.eval()
    data = calibration_batches(task, model, tuned.tokenizer, arguments.calibration_rows, arguments.seed)

    def score(candidate: Any) -> Any:
        split = task.evaluation_splits[0]
        return evaluate(candidate, task, tuned.tokenizer, split=split, limit=arguments.eval_limit, progress=False)

    asked = {
        "task": arguments.task,
        "model": arguments.model,
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "train_limit": arguments.train_limit,
        "eval_limit": arguments.eval_limit,
        "calibration_rows": arguments.calibration_rows,
    }
    record = Record(folder / "structure.json", asked, resume=arguments.resume)
    reference = score(model)
    print(f"float: {reference.primary:.2f}")
    before = sum(t.matrix.numel() for t in layer_matrices(model))
    for label, make in students(model, data).items():
        if label in record or (arguments.only and not any(text in label for text in arguments.only)):
            continue
        start = time.process_time()
        student = make()
        took = time.process_time() - start
        found = row_of(student, score, reference, before)
        record.add(label, {**found, "cpu_seconds": took})
        print(f"{label}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()) + f" ({took:.0f} CPU s)", flush=True)
    if arguments.time:
        import qbert

        shapes = {
            "rank by budget 0.5": lambda: qbert.factorize(model, 0.5, data=data),
            "ffn 25% out": lambda: qbert.prune(model, ffn=0.25),
            "ffn 50% out": lambda: qbert.prune(model, ffn=0.5),
            "heads 25% out": lambda: qbert.prune(model, heads=0.25),
            "heads 50% out": lambda: qbert.prune(model, heads=0.5),
            "heads 25% and ffn 50% out": lambda: qbert.prune(model, heads=0.25, ffn=0.5),
        }
        for label, make in shapes.items():
            if f"time: {label}" not in record:
                found = times(model, make())
                record.add(f"time: {label}", found)
                print(label, ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
    text = page(record, task, arguments)
    target = Path(arguments.report) if arguments.report else folder / "structure.md"
    write_whole(target, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    run_script(main)
