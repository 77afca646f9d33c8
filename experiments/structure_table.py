"""Low rank, corrections, zeros, heads and feed-forward columns beside bits, without any training.

    python experiments/structure_table.py --task sst2 --data-dir DATA --epochs 1 --train-limit 16000 --resume

A fine-tuned encoder (cached) is factorized, pruned and quantized in each way, on a few hundred unlabelled rows,
and compared with itself on held-out rows: score, agreement of classes, and mean KL divergence of the outputs; where
rows of other domains are at hand, its score there has a column of its own. Only the matrices of the encoder layers are
changed; tables and activations stay in float, so that rows differ in one thing.
Bits a weight count everything that is stored of those matrices over the number of weights they had before: codes,
scales and zero points; of a matrix with zeros the codes that are not zero and what tells their places.

``--time`` adds milliseconds of packed models (8 bits, optimized for inference) beside the float model, all in turns,
so that a loaded machine slows all; its rows are named "time: ..." for ``--only``, and ``--only time`` makes no others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
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
from qbert.results import Record, markdown_table, provenance

_RANKS = {"*": 96, "*.intermediate.dense": 153, "encoder.layer.?.output.dense": 153}
_CORRECTIONS = {"*": 15, "*.intermediate.dense": 25, "encoder.layer.?.output.dense": 25}
_SHAPES = ((1, 16), (1, 128), (8, 32), (32, 64))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    add_tuning_arguments(parser)
    parser.add_argument(
        "--calibration-rows", type=positive, default=384, help="unlabelled rows to look at; default: 384"
    )
    parser.add_argument("--only", nargs="+", help="leave out rows whose label holds none of these texts")
    parser.add_argument("--steps", type=positive, help="also train a few of the students for so many steps")
    parser.add_argument("--time", action="store_true", help="also time packed models of other shapes, on one core")
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
                made[f"{what} {share:.0%} out, {how}"] = partial(qbert.prune, model, **{what: share, **options})
    made["heads 25% and ffn 50% out, compensated"] = lambda: qbert.prune(model, heads=0.25, ffn=0.5, data=data)
    return made


def trained_students(model: Any, data: Any) -> dict[str, Callable[[], Any]]:
    """Label -> maker of those that are also trained for a few steps."""
    import qbert
    from qbert import students

    depth = model.config.num_hidden_layers
    kept = [0, *range(depth - depth // 2 + 1, depth)]  # a fine-tuned teacher's first and last layers
    return {
        "ffn 50% out, compensated": lambda: qbert.prune(model, ffn=0.5, data=data),
        "ffn 50% out, by magnitude": lambda: qbert.prune(model, ffn=0.5),
        "sandwich": lambda: students.share_layers(model, "sandwich", data=data),
        f"{len(kept)} layers ({', '.join(map(str, kept))})": lambda: students.depth(model, kept),
    }


def train(student: Any, teacher: Any, task: Any, tokenizer: Any, steps: int, folder: Path, seed: int) -> Any:
    """The student after some steps of logits, hidden states and scores on 16 training rows each, without labels."""
    from transformers import TrainingArguments

    from qbert.distill import Distiller, recipes
    from qbert.tasks import prepare

    same_depth = student.config.num_hidden_layers == teacher.config.num_hidden_layers
    data = prepare(task, tokenizer, "train", limit=16 * steps, seed=seed)
    Distiller(
        teacher=teacher,
        student=student,
        recipe=recipes.qbert_kd() if same_depth else recipes.tinybert(projection=False),
        args=TrainingArguments(
            str(folder / "training"),
            per_device_train_batch_size=16,
            max_steps=steps,
            learning_rate=2e-4,
            warmup_steps=0.1,
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data.examples,
        data_collator=data.collate,
        processing_class=tokenizer,
        check_teacher=False,
    ).train()
    return student.eval()


def bits_a_weight(student: Any, before: int) -> float:
    """Bits of all that is stored of the encoder's matrices, over the number of weights they had `before`.

    Of a matrix with zeros, those are left out, and what tells their places is added: of packed 2:4 codes as their
    files do, of other zeros the least that can.
    """
    from qbert import model_size
    from qbert.encoders.targets import base_model
    from qbert.encoders.zeros import noted_zeros
    from qbert.quantizers.sparsity import Pattern

    total = 8.0 * sum(t.weight_bytes + t.metadata_bytes for t in model_size(student).tensors if t.part == "encoder")
    _, base = base_model(student)
    for name, noted in noted_zeros(student).items():
        module: Any = base.get_submodule(name)
        pattern = Pattern.parse(noted)
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and pattern == Pattern.parse("2:4"):
            continue  # counted without its zeros
        places = math.log2(math.comb(pattern.of, pattern.zeros)) / pattern.of if pattern.of else 1.0
        total -= module.weight.numel() * (pattern.share * (quantizer.bits if quantizer else 32) - places)
    return total / before


def row_of(
    student: Any, score: Callable[[Any], Any], reference: Any, before: int, domains: Sequence[Any]
) -> dict[str, Any]:
    """What is told of one student, its scores on other domains included."""
    from other_domains import scores_elsewhere

    from qbert.tasks.evaluation import fidelity

    result = score(student)
    near = fidelity(reference.logits, result.logits)
    return {
        "score": result.primary,
        "retention": 100 * result.primary / reference.primary,
        "agreement": near.agreement,
        "divergence": near.divergence,
        "bits": bits_a_weight(student, before),
        "elsewhere": scores_elsewhere(domains, student),
    }


def told(found: dict[str, Any]) -> str:
    """A row in a line."""
    flat = {k: v for k, v in found.items() if k != "elsewhere"} | found["elsewhere"]
    return ", ".join(f"{k} {v:.4g}" for k, v in flat.items())


def timed_students(model: Any, data: Any) -> dict[str, Callable[[], Any]]:
    """Label -> maker of those whose packed models are timed; which heads and columns are taken out is no matter."""
    import qbert

    made: dict[str, Callable[[], Any]] = {"bits alone": lambda: model}
    for heads, ffn in itertools.product((0.0, 0.25, 0.5), (0.0, 0.25, 0.5, 0.75)):
        label = " and ".join(f"{what} {share:.0%} out" for what, share in (("heads", heads), ("ffn", ffn)) if share)
        if label:
            made[label] = partial(qbert.prune, model, heads=heads, ffn=ffn)
    made["rank by budget 0.5"] = lambda: qbert.factorize(model, 0.5, data=data)
    return {f"time: {label}": make for label, make in made.items()}


def times(model: Any, students: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """By label and shape the CPU milliseconds on one core of a student in 8 bits and of the float model, in turns."""
    from compress_bench import milliseconds, one_thread

    import qbert
    from qbert.encoders.targets import base_model

    found: dict[str, dict[str, tuple[float, float]]] = {label: {} for label in students}
    with one_thread():
        packed = (qbert.pack(qbert.quantize_model(student, 8)) for student in students.values())
        fast = [base_model(m)[1] for m in (model, *(qbert.optimize_for_inference(m) for m in packed))]
        for batch, length in _SHAPES:
            whole, *taken = milliseconds(fast, batch, length, 1000)
            for label, ms in zip(found, taken, strict=True):
                found[label][f"{batch}x{length}"] = (ms, whole)
    return found


def page(record: Record, task: Any, arguments: argparse.Namespace) -> str:
    """The tables in Markdown."""
    domains = list(dict.fromkeys(name for label in record for name in record[label][0].get("elsewhere", ())))
    header = ["", "bits a weight", "KL", "agreement %", f"{task.primary_metric}", "% of the teacher", *domains]
    rows, fast = [], []
    for label in record:
        (found,) = record[label]
        if "bits" in found:
            cells = [f"{found['bits']:.2f}", f"{found['divergence']:.4f}", f"{found['agreement']:.1f}"]
            there = found.get("elsewhere", {})
            cells += [f"{found['score']:.2f}", f"{found['retention']:.1f}"]
            rows.append([label, *cells, *(f"{there[name]:.2f}" if name in there else "" for name in domains)])
        else:
            fast.append(
                [label.removeprefix("time: "), *(f"{ms:.2f} ({whole / ms:.1f})" for ms, whole in found.values())]
            )
            whole_times = [f"{whole:.2f}" for _, whole in found.values()]
    text = [provenance(), "", task.describe()]
    text += ["", markdown_table(header, rows)] if rows else []
    if fast:
        shapes = ["", *(f"{batch}x{length}" for batch, length in _SHAPES)]
        text += ["", "CPU milliseconds of one core, packed in 8 bits and fused, in turns with the float model"]
        text += ["(times its speed):", "", markdown_table(shapes, [["float", *whole_times], *fast])]
    return "\n".join(text)


def main() -> None:
    """Make, measure and print every student."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "structure_table")
    from other_domains import other_domains, scores_elsewhere
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
        return evaluate(candidate, task, tuned.tokenizer, split=split, limit=arguments.eval_limit)

    asked = {
        "task": arguments.task,
        **subject_of(task, model),
        "seed": arguments.seed,
        "eval_limit": arguments.eval_limit,
        "calibration_rows": arguments.calibration_rows,
    }
    record = Record(folder / "structure.json", asked, resume=arguments.resume)
    reference = score(model)
    domains = other_domains(task, tuned.tokenizer, data_dir=arguments.data_dir, limit=arguments.eval_limit or 1000)
    there = scores_elsewhere(domains, model)
    print(f"float: {reference.primary:.2f}" + "".join(f", {value:.2f} on {name}" for name, value in there.items()))
    float_row = {"score": reference.primary, "retention": 100.0, "agreement": 100.0, "divergence": 0.0, "bits": 32.0}
    if "float" not in record:
        record.add("float", {**float_row, "elsewhere": there})
    before = sum(t.matrix.numel() for t in layer_matrices(model))
    for label, make in students(model, data).items():
        if label in record or (arguments.only and not any(text in label for text in arguments.only)):
            continue
        start = time.process_time()
        student = make()
        took = time.process_time() - start
        found = row_of(student, score, reference, before, domains)
        record.add(label, {**found, "cpu_seconds": took})
        print(f"{label}: {told(found)} ({took:.0f} CPU s)", flush=True)
    for label, make in trained_students(model, data).items() if arguments.steps else ():
        name = f"{label}, {arguments.steps} steps"
        if name in record or (arguments.only and not any(text in name for text in arguments.only)):
            continue
        start = time.process_time()
        student = train(make(), model, task, tuned.tokenizer, arguments.steps, folder, arguments.seed)
        found = row_of(student, score, reference, before, domains)
        record.add(name, {**found, "cpu_seconds": time.process_time() - start})
        print(f"{name}: {told(found)}", flush=True)
    wanted = {
        label: make()
        for label, make in timed_students(model, data).items()
        if arguments.time and label not in record and (not arguments.only or any(t in label for t in arguments.only))
    }
    for label, found in times(model, wanted).items() if wanted else ():
        record.add(label, found)
        print(label, ", ".join(f"{shape}: {ms:.2f} ms" for shape, (ms, _) in found.items()), flush=True)
    text = page(record, task, arguments)
    target = Path(arguments.report) if arguments.report else folder / "structure.md"
    write_whole(target, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    run_script(main)
