"""What fake quantization adds to a training step: forward, backward and AdamW of a QAT step against the plain one.

    python experiments/bench/qat_step.py
    python experiments/bench/qat_step.py --device cuda --batch-size 128 --tokens 64 --compile

Shapes are those of MiniLM-L6 (6 x 384, random weights: time does not depend on them). Variants are run in turn, round
by round, so that other load on the machine hits all alike, and each step is compared with the plain step of its own
round. On a CPU seconds are those of the processor, on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qbert.cli.arguments import positive, run_script
from qbert.results import provenance


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4], help="bits of the matrices; default: 2 4")
    parser.add_argument("--batch-size", type=positive, default=16, help="default: 16")
    parser.add_argument("--tokens", type=positive, default=32, help="length of every row; default: 32")
    parser.add_argument("--rounds", type=positive, default=8, help="timed steps of each variant; default: 8")
    parser.add_argument("--device", default="cpu", help="torch device; default: cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--compile", action="store_true", help="also time every variant under torch.compile")
    parser.add_argument("--distill", action="store_true", help="also time a KD step, with its teacher")
    parser.add_argument("--report", help="Markdown file to write")
    return parser.parse_args()


def build() -> Any:
    """A MiniLM-L6-shaped classifier with random weights."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def variants(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name -> model to train."""
    import qbert
    from qbert.distill.step_sizes import quantized_matrices

    found = {"float": build()}
    for bits in arguments.bits:
        for learned in (False, True):
            model = qbert.quantize_model(build(), bits)
            for module in quantized_matrices(model) if learned else ():
                module.weight_quantizer.learn()
            found[f"{bits}-8-8{', learned steps' if learned else ''}"] = model
    return found


def step_of(model: Any, batch: dict[str, torch.Tensor], compiled: bool) -> Callable[[], None]:
    """One training step as a function."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        forward(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def distill_step(batch: dict[str, torch.Tensor], bits: int, device: str) -> Callable[[], None]:
    """One step of `qbert_kd`: teacher, student, all terms."""
    import qbert
    from qbert.distill import recipes
    from qbert.distill.objective import Distillation

    teacher = build().to(device)
    model = Distillation(qbert.quantize_model(teacher, bits), teacher, recipes.qbert_kd(), dict(batch))

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            return argparse.Namespace(loss=self.inner(**inputs)["loss"])

    return step_of(WithLoss(), batch, compiled=False)


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant, by round: of the processor on a CPU, which other processes disturb least."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_number:  # the first round warms up
                times[name].append(clock() - start)
    return times


def main() -> None:
    """Measure and print."""
    from qbert.files import write_whole
    from qbert.results import markdown_table, text_table

    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    ids = torch.randint(1000, 30000, (arguments.batch_size, arguments.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    models = {name: model.to(arguments.device) for name, model in variants(arguments).items()}
    steps = {name: step_of(model, batch, compiled=False) for name, model in models.items()}
    if arguments.compile:
        steps |= {f"{name}, compiled": step_of(model, batch, compiled=True) for name, model in models.items()}
    if arguments.distill:
        steps |= {f"{b}-8-8, KD with teacher": distill_step(batch, b, arguments.device) for b in arguments.bits}
    times = measure(steps, arguments.rounds, arguments.device)
    header = ["step", "best ms", "median ms", "best / float", "median of the rounds' ratios"]
    plain = times["float"]
    rows = [
        [
            name,
            f"{1e3 * min(found):.1f}",
            f"{1e3 * statistics.median(found):.1f}",
            f"{min(found) / min(plain):.2f}",
            f"{statistics.median(ours / theirs for ours, theirs in zip(found, plain, strict=True)):.2f}",
        ]
        for name, found in times.items()
    ]
    print(text_table(header, rows))
    if arguments.report:
        text = f"# Cost of a QAT step\n\n{markdown_table(header, rows)}\n\n{provenance()}\n"
        write_whole(Path(arguments.report), lambda aside: aside.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
