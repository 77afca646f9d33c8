"""Top Hessian eigenvalues of a fine-tuned encoder's layers: this library beside PyHessian, curvlinops and eigenthings.

    python experiments/bench/hessian.py --task sst2 --data-dir DATA
    python experiments/bench/hessian.py --quick

The model is MiniLM-L6 fine-tuned on the task (cached), the data are random subsets of real training sentences, and
every tool looks for the eigenvalue of largest magnitude of each of the six layers. Counted for every tool:

- Hessian products, and matrix-product FLOPs (torch's FlopCounterMode) in units of one forward pass of the subset;
- CPU seconds of the process, the best of several rounds in which the tools take turns;
- the true error, against Lanczos in float64 from a random start to a relative residual of 1e-4 (error about 1e-7);
- memory: the peak of the resident set (VmHWM) less what was resident before, every tool in a process of its own.

On later subsets this library starts from what it knows of the earlier ones; their products are counted apart. Finished
parts are kept in ``parts.json`` in the output folder, so that an interrupted benchmark goes on. Tools that are not
installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hessian_peers import INSTALL, TOOLS, Found
from torch import Tensor

from qbert.cli.arguments import add_task_arguments, fine_tuned, positive, prepare_run, run_script
from qbert.results import Record, provenance

_POOL = 512  # training rows that subsets are drawn from
_WARM_UP_ROWS = 2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"To install the others: {INSTALL}", formatter_class=argparse.RawTextHelpFormatter
    )
    add_task_arguments(parser)
    parser.add_argument("--epochs", type=positive, default=3, help="passes over the training data; default: 3")
    parser.add_argument("--train-limit", type=positive, default=3000, help="tune on so many rows; default: 3000")
    parser.add_argument("--sentences", type=positive, default=16, help="rows in a subset; default: 16")
    parser.add_argument("--subsets", type=positive, default=3, help="subsets this library goes through; default: 3")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative error asked for; default: 0.001")
    parser.add_argument("--rounds", type=positive, default=2, help="timed rounds; default: 2")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="4 sentences, 2 subsets, 1 round: to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep the finished parts of an interrupted benchmark")
    parser.add_argument("--report", help="Markdown file to write; default: <output-dir>/hessian.md")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # tool, round, file: one measurement
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sentences, arguments.subsets, arguments.rounds = 4, 2, 1
    return arguments


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, fine-tuned encoder, training rows that subsets are drawn from)."""
    from qbert.tasks import load_task, prepare

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    tuned = fine_tuned(task, arguments)
    data = prepare(task, tuned.tokenizer, "train", limit=_POOL, seed=arguments.seed)
    return task, tuned, data


def subset(data: Any, arguments: argparse.Namespace, run: int) -> dict[str, Tensor]:
    """The rows that run number `run` of `hessian_spectrum` draws, as one batch."""
    from qbert.hessian.batches import as_samples, draw, micro_batches

    samples = as_samples(data, collate_fn=data.collate)
    chosen = draw(len(samples), fraction=share(data, arguments), seed=arguments.seed, run=run)
    (batch,) = micro_batches(samples, chosen, len(chosen), seed=arguments.seed + run)
    return {name: value.to(arguments.device) for name, value in batch.items()}


def share(data: Any, arguments: argparse.Namespace) -> float:
    """Share of the rows in a subset."""
    return min(1.0, arguments.sentences / len(data))


def flops(call: Any) -> tuple[Any, int]:
    """(result of `call`, FLOPs of its matrix products)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def forward_flops(model: Any, batch: dict[str, Tensor]) -> int:
    """FLOPs of one forward pass; fused attention would not be counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        return flops(lambda: model(**batch))[1]


def memory(entry: str) -> float:
    """A line of /proc/self/status in MiB; nan where there is no such file."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(entry + ":")), float("nan"))


def work(arguments: argparse.Namespace) -> None:
    """One measurement in this process: round 0 counts FLOPs, the others count seconds and memory."""
    from qbert.files import write_json

    name, round_number, path = arguments.worker
    _, tuned, data = load(arguments)
    model, batch = tuned.model.eval(), subset(data, arguments, 0)
    few = {key: value[:_WARM_UP_ROWS] for key, value in batch.items()}
    model(**few).loss.backward()  # first calls set up the libraries
    model.zero_grad()
    torch.manual_seed(arguments.seed)
    tool = TOOLS[name]

    def measure() -> list[Found]:
        return tool.measure(model, batch, arguments.tol)

    record: dict[str, Any] = {}
    if round_number == "0":
        found, counted = flops(measure)
        record["forwards"] = counted / forward_flops(model, batch)
    else:
        before, start = memory("VmRSS"), time.process_time()
        found = measure()
        record["seconds"] = time.process_time() - start
        record["mebibytes"] = memory("VmHWM") - before if before == before else None
    for field in ("value", "products", "converged"):
        record[field] = [getattr(f, field) for f in found]
    write_json(path, record)


def reference(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Top eigenvalue of every layer, in float64 and converged far beyond what is compared."""
    import copy

    from qbert.hessian import HessianOperator, lanczos, parameter_blocks

    double = copy.deepcopy(model).double()
    blocks = {block.name: block.parameters for block in parameter_blocks(double, "layer")}
    operator = HessianOperator(double, [batch], blocks, retain=True)
    values = []
    for name in blocks:
        size = operator.size(name)
        pair = lanczos(partial(operator.product, name), size, tol=1e-4, confidence=None, max_products=400)
        if not pair.converged:
            raise ArithmeticError(f"the reference of {name} did not converge (residual {pair.residual:.1e})")
        values.append(pair.value)
    return values


def later_subsets(model: Any, data: Any, arguments: argparse.Namespace, bound: str) -> dict[str, Any]:
    """`hessian_spectrum` over all subsets: products and values [subsets][layers], CPU seconds."""
    from qbert.hessian import hessian_spectrum

    start = time.process_time()
    spectrum = hessian_spectrum(
        model,
        data,
        collate_fn=data.collate,
        runs=arguments.subsets,
        fraction=share(data, arguments),
        micro_batch_size=arguments.sentences,
        tol=arguments.tol,
        bound=bound,
        seed=arguments.seed,
    )
    found = {"seconds": time.process_time() - start, "converged": bool(spectrum.converged.all())}
    return found | {"values": spectrum.eigenvalues.tolist(), "products": spectrum.products.tolist()}


def part(parts: Record, name: str, make: Callable[[], Any]) -> Any:
    """The part of the benchmark called `name`, made unless it is there."""
    if name not in parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        parts.add(name, make())
    return parts[name][0]


def measured_apart(name: str, round_number: int) -> Any:
    """What `work` finds in a process of its own."""
    from qbert.files import read_json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        worker = ["--worker", name, str(round_number), str(path)]
        done = subprocess.run([sys.executable, *sys.argv, *worker], capture_output=True, text=True)
        if done.returncode:
            raise ArithmeticError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
        return read_json(path)


def measure_all(arguments: argparse.Namespace, parts: Record, tuned: Any, data: Any) -> dict[str, Any]:
    """Everything measured: ``references``, ``tools`` (name -> list of rounds), ``subsets`` (bound -> record)."""
    model = tuned.model.eval()
    batches = [subset(data, arguments, run) for run in range(arguments.subsets)]
    tools: dict[str, list[Any]] = {name: [] for name in arguments.tools if not TOOLS[name].missing}
    for number in range(arguments.rounds + 1):
        for name, rounds in tools.items():
            rounds.append(part(parts, f"{name.replace(' ', '_')}-{number}", partial(measured_apart, name, number)))
    return {
        "tools": tools,
        "subsets": {
            bound: part(parts, f"subsets-{bound}", partial(later_subsets, model, data, arguments, bound))
            for bound in ("residual", "gap")
        },
        "references": [
            part(parts, f"reference-{run}", partial(reference, model, batch)) for run, batch in enumerate(batches)
        ],
        "tokens": [int(batch["attention_mask"].sum()) for batch in batches],
    }


def main() -> None:
    """Measure every tool in turn and write the page."""
    arguments = parse_arguments()
    if arguments.worker:
        prepare_run(arguments, "bench_hessian")
        return work(arguments)
    folder = prepare_run(arguments, "bench_hessian")
    from hessian_page import page

    from qbert.files import write_whole
    from qbert.hessian.checkpoint import model_fingerprint

    for name in (n for n in arguments.tools if TOOLS[n].missing):
        print(f"{name} is left out: {TOOLS[name].package} is not installed; {INSTALL}")
    task, tuned, data = load(arguments)
    names = ("sentences", "subsets", "tol", "seed", "device")
    asked = {"weights": model_fingerprint(tuned.model)} | {name: getattr(arguments, name) for name in names}
    parts = Record(folder / "parts.json", asked, resume=arguments.resume)
    found = measure_all(arguments, parts, tuned, data)
    scores = ", ".join(f"{metric} {tuned.scores[metric]:.2f}" for metric in task.metric_names)
    text = page(found, arguments, f"{task.describe()}; fine-tuned model: {scores} on held-out data", provenance())
    print(text)
    target = Path(arguments.report) if arguments.report else folder / "hessian.md"
    write_whole(target, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"written to {target}")


if __name__ == "__main__":
    run_script(main, "add --resume to go on from there")
