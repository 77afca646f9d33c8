"""Speed, error, memory and file size of encoders on a CPU: torch, ONNX Runtime, OpenVINO, CTranslate2, packed models.

Every engine runs the same shapes in turn, round after round, so that a busy machine slows all alike; the smallest CPU
time of the process counts (wall time with several threads), of calls that follow one by the same engine. The error is
that of the last hidden state over the tokens of real sentences, against torch in float32. Engines that are not
installed or fail are left out, and said to be, with the reason. What is measured is kept in a JSON file, from which
--resume goes on; --minutes ends a run in time. Notes below the mark in an older page are kept.

    python experiments/bench/inference.py --data-dir DIR --task stsb
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_engines import Engine, NotMeasured, Row, World, megabytes
from torch import Tensor, nn

import qbert
from qbert.cli.arguments import positive, run_script
from qbert.files import write_whole
from qbert.inference.engines import ENGINES, RUNTIMES
from qbert.results import Record, provenance
from qbert.tasks.embedded import embedded_encoder

# Variables that keep torch's libraries from using all of the processor's vector instructions.
_INSTRUCTION_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "FBGEMM_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
SHAPES = ("1x16", "1x128", "8x32", "32x64")
LAYERS = ("384x384", "384x1536", "768x768", "768x3072", "3072x768")
FEW_TOKENS = (1, 2, 4, 8)
_CALLS = 5  # calls of a single layer that are timed as one, since the clock itself takes half a microsecond
_FLOAT, _BFLOAT = "torch fp32", "model.bfloat16()"
NOTES = "<!-- notes by hand: what follows stays when this page is written again -->"


def main() -> None:
    """Parse the command line, measure, write the table."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    texts = sentences(arguments)
    asked = {
        "processor": provenance().split(" - ")[1].split(", ")[0],
        "torch": torch.__version__,
        **{name: getattr(arguments, name) for name in ("task", "sentences", "bits", "activations", "pairs", "engines")},
    }
    record = Record(arguments.record, asked, resume=arguments.resume)
    bench = Bench(arguments, record, time.monotonic() + 60 * arguments.minutes)
    torch.set_num_threads(arguments.threads[0])
    made_by = provenance()
    for source in arguments.model:
        bench.model(source, texts)
    layers = {shape: measure_layer(shape, arguments.activations) for shape in arguments.layers}
    limits = [f"{name}={os.environ[name]}" for name in _INSTRUCTION_LIMITS if name in os.environ]
    page = render(record, made_by + (f", with {' '.join(limits)}" if limits else ""), arguments.data, len(texts))
    page += render_layers(layers)
    page += notes_of(Path(arguments.output))
    print(page)
    write_whole(arguments.output, lambda aside: aside.write_text(page, encoding="utf-8"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["MiniLM-L6"],
        help="hub names, local folders, MiniLM-L6 (the embedded one), or layers x width of a BERT of random weights, "
        "such as 12x768; default: MiniLM-L6",
    )
    parser.add_argument(
        "--task", default="reviews", help="whose held-out sentences are read: reviews, stsb, ...; default: reviews"
    )
    parser.add_argument("--data-dir", help="folder with one sub-folder of jsonl(.gz) files a task; default: the hub")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[8, 4], help="weight bits; default: 8 4"
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=("dynamic", "asymmetric"),
        default=["dynamic", "asymmetric"],
        help="ranges of 8-bit activations, per token: symmetric (the library's default) or asymmetric; default: both",
    )
    parser.add_argument(
        "--shapes", nargs="*", type=shape, default=list(SHAPES), help="batch x length; default: %(default)s"
    )
    parser.add_argument(
        "--layers", nargs="*", type=shape, default=list(LAYERS), help="single layers, in x out; default: %(default)s"
    )
    parser.add_argument("--sentences", type=positive, default=64, help="real sentences for the error; default: 64")
    parser.add_argument(
        "--pairs", type=int, default=0, help="pairs of STS-B for Spearman, with --task stsb; default: none"
    )
    parser.add_argument(
        "--memory", action="store_true", help="load time and peak memory too, a process for each engine"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds a shape and engine; default: 3")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1], help="CPU threads; default: 1")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so many; default: 60")
    parser.add_argument(
        "--engines",
        nargs="*",
        choices=ENGINES + RUNTIMES,
        default=[],
        help="engines that the widest packed models are forced to as well, beside the one they choose; default: none",
    )
    parser.add_argument("--only", nargs="+", help="engines whose name contains one of these, and torch fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--torch-only", action="store_true", help="leave other runtimes out")
    parser.add_argument("--record", type=Path, default=Path("outputs/inference_cpu.json"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the record of an earlier run")
    parser.add_argument("--output", default="outputs/inference_cpu.md", help="table; default: %(default)s")
    return parser.parse_args()


def shape(text: str) -> str:
    """Two positive numbers with an x between them, for argparse."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers such as 8x32")
    return text


def sentences(arguments: argparse.Namespace) -> list[str]:
    """Real sentences, spread over the held-out rows; sets ``arguments.data`` to their name."""
    from qbert.tasks import load_task

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    arguments.data = "the embedded reviews" if task.name == "reviews" else task.name
    texts = [row[task.text_fields[0]] for row in task.rows("validation")]
    texts = [" ".join(text) if isinstance(text, list) else text for text in texts]
    return texts[:: max(len(texts) // arguments.sentences, 1)][: arguments.sentences]


class Bench:
    """Measurements of the command line, each kept in a record as soon as it is there.

    Args:
        arguments: the command line.
        record: rows ``MODEL/THREADS/COLUMN`` (engine -> milliseconds) and ``MODEL/about/ENGINE``.
        end: time.monotonic() after which nothing new is begun.
    """

    def __init__(self, arguments: argparse.Namespace, record: Record, end: float) -> None:
        self.arguments, self.record, self.end = arguments, record, end

    def model(self, source: str, texts: list[str]) -> None:
        """Measure all engines of one model, as far as time goes."""
        model, tokenizer = load(source)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        arguments = self.arguments
        real = f"real {ids.shape[0]}x{ids.shape[1]}, {100 * float(mask.float().mean()):.0f} % tokens"
        with tempfile.TemporaryDirectory() as folder:
            world = World(
                model,
                tokenizer,
                Path(folder),
                arguments.bits,
                arguments.activations,
                arguments.engines,
                arguments.torch_only,
                arguments.compile,
                (ids, mask),
            )
            rows = [row for row in world.rows() if self._wanted(row.name)]
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                engines = self._engines(source, rows, threads)
                if threads == arguments.threads[0]:
                    self._about(source, rows, engines, ids, mask)
                for shape in arguments.shapes:
                    self._column(source, threads, shape, engines, *full_batch(shape, model.config.vocab_size))
                self._column(source, threads, real, engines, ids, mask)
                self._column(source, threads, "real, sorted", by_length(engines, ids, mask), ids, mask)
            torch.set_num_threads(arguments.threads[0])
            if arguments.pairs and source.count("x") != 1:
                self._spearman(source, self._engines(source, rows, arguments.threads[0]), tokenizer)
            if arguments.memory:
                self._memory(source, rows)

    def _wanted(self, name: str) -> bool:
        only = self.arguments.only
        return name == _FLOAT or not only or any(part in name for part in only)

    def _engines(self, source: str, rows: list[Row], threads: int) -> dict[str, Engine]:
        engines = {}
        for row in rows:
            if time.monotonic() > self.end and row.name != _FLOAT:
                self._leave_out(source, row.name, "out of time")
                continue
            try:
                engines[row.name] = row.make(threads)
            except NotMeasured as reason:
                self._leave_out(source, row.name, str(reason))
            except Exception as error:  # whatever a runtime raises; the others go on
                self._leave_out(
                    source, row.name, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                )
        return engines

    def _leave_out(self, source: str, name: str, reason: str) -> None:
        key = f"{source}/missing/{name}"
        if key not in self.record:
            self.record.add(key, reason[:300])

    def _column(
        self, source: str, threads: int, name: str, engines: dict[str, Engine], ids: Tensor, mask: Tensor
    ) -> None:
        key = f"{source}/{threads}/{name}"
        if key in self.record or time.monotonic() > self.end:
            return
        times = measure_batch(engines, ids, mask, self.arguments.seconds)
        self.record.add(key, {engine: round(value, 3) for engine, value in times.items()})

    def _about(self, source: str, rows: list[Row], engines: dict[str, Engine], ids: Tensor, mask: Tensor) -> None:
        """Errors, file sizes, and the engines that were chosen."""
        keep = mask.bool()
        exact = engines[_FLOAT](ids, mask)[keep]
        for row in rows:
            key = f"{source}/about/{row.name}"
            if row.name not in engines or key in self.record:
                continue
            try:
                wrong = engines[row.name](ids, mask)[keep] - exact
            except Exception as error:  # as for those that cannot be made
                del engines[row.name]
                self._leave_out(
                    source, row.name, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                )
                continue
            worst = float((wrong.norm(dim=-1) / exact.norm(dim=-1)).max())
            about: dict[str, Any] = {"error": float(wrong.norm() / exact.norm()), "worst": worst}
            if row.file is not None and row.probe != "bf16":
                about["mb"] = megabytes(row.file)
            text = repr(getattr(engines[row.name], "model", None))
            chosen = [line.strip() for line in text.splitlines() if "fused layers:" in line or "runtime:" in line]
            if chosen:
                about["chosen"] = chosen[0].removeprefix("fused layers: ")
            self.record.add(key, about)

    def _spearman(self, source: str, engines: dict[str, Engine], tokenizer: Any) -> None:
        from qbert.tasks import load_task
        from qbert.tasks.metrics import correlation_scores

        task = load_task("stsb", data_dir=self.arguments.data_dir)
        rows = list(task.rows("validation"))
        rows = rows[:: max(len(rows) // self.arguments.pairs, 1)][: self.arguments.pairs]
        first, second = task.text_fields
        texts = [row[first] for row in rows] + [row[second] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        for name, run in engines.items():
            key = f"{source}/spearman/{name}"
            if key in self.record or time.monotonic() > self.end:
                continue
            vectors = pooled(run, batch["input_ids"], batch["attention_mask"])
            first_half, second_half = vectors.chunk(2)
            cosines = torch.cosine_similarity(first_half, second_half)
            scores = correlation_scores(cosines.tolist(), [float(row["label"]) for row in rows])
            self.record.add(key, scores["spearman"])

    def _memory(self, source: str, rows: list[Row]) -> None:
        for row in rows:
            key = f"{source}/memory/{row.name}"
            if not row.probe or key in self.record or time.monotonic() > self.end:
                continue
            if row.file is None or not row.file.exists():
                continue
            script = str(Path(__file__).with_name("cpu_memory.py"))
            done = subprocess.run([sys.executable, script, row.probe, str(row.file)], capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            if done.returncode == 0 and lines:
                self.record.add(key, json.loads(lines[-1]))
            else:
                reason = (done.stderr.strip() or "it said nothing").splitlines()[-1]
                self._leave_out(source, f"memory of {row.name}", reason)


def load(source: str) -> tuple[Any, Any]:
    """A float encoder and a tokenizer for it."""
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    embedded = str(embedded_encoder())
    name = embedded if source == "MiniLM-L6" else source
    layers, _, width = source.partition("x")
    if layers.isdecimal() and width.isdecimal():
        if int(width) % 64:
            raise ValueError(f"--model {source}: the width is not a multiple of 64, the width of a head")
        tokenizer = AutoTokenizer.from_pretrained(embedded, trust_remote_code=False)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=int(layers),
            hidden_size=int(width),
            num_attention_heads=int(width) // 64,
            intermediate_size=4 * int(width),
        )
        random = BertModel(config).eval()
        random.weights_are_random = True
        return random, tokenizer
    model = AutoModel.from_pretrained(name, trust_remote_code=False).eval()
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def full_batch(shape: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random tokens of `shape`, none of them padding."""
    batch, length = (int(n) for n in shape.split("x"))
    lowest, end = min(1000, vocabulary // 2), min(20000, vocabulary)
    ids = torch.randint(lowest, end, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def sorted_parts(ids: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, ids and mask by length, `size` sentences at a time, cut to their longest."""
    for rows in mask.sum(1).argsort(descending=True).split(size):
        longest = int(mask[rows].sum(1).max())
        yield rows, ids[rows, :longest].contiguous(), mask[rows, :longest].contiguous()


def by_length(engines: dict[str, Engine], ids: Tensor, mask: Tensor) -> dict[str, Engine]:
    """The same engines on the same sentences by length, in batches of 16."""
    batches = [(part, seen) for _, part, seen in sorted_parts(ids, mask, 16)]

    def whole(run: Engine) -> Engine:
        return lambda *_: torch.cat([run(*batch).flatten() for batch in batches])

    return {name: whole(run) for name, run in engines.items()}


def pooled(run: Engine, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states of each sentence's tokens [N, H]."""
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for rows, part, seen in sorted_parts(ids, mask, 32):
        keep = seen.unsqueeze(-1)
        means = (run(part, seen) * keep).sum(1) / keep.sum(1)
        for row, mean in zip(rows.tolist(), means, strict=True):
            found[row] = mean
    return torch.stack(found)


def measure_batch(engines: dict[str, Engine], ids: Tensor, mask: Tensor, seconds: float) -> dict[str, float]:
    """Smallest milliseconds for one batch, engines in turn: CPU time of the process, or wall time of several threads.

    An engine that fails is left out of what is returned.
    """
    best = {name: float("inf") for name in engines}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds * len(engines)
    while time.perf_counter() < end or min(best.values()) == float("inf"):
        for name in list(best):
            run = engines[name]
            try:
                run(ids, mask)  # not timed, so that none pays for the caches that another library has left behind
                start = clock()
                run(ids, mask)
            except Exception:  # a length that a runtime cannot take; a dash in the table
                del best[name]
                continue
            best[name] = min(best[name], (clock() - start) * 1e3)
    return best


def measure_layer(shape: str, activations: list[str]) -> dict[int, tuple[float, str]]:
    """By number of tokens: the smallest ratio of float's time to a packed layer's, and which layer that was."""
    inputs, outputs = (int(n) for n in shape.split("x"))
    plain = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    layers: dict[str, nn.Module] = {"float": plain[0]}
    for bits in (2, 3, 4, 8):
        for ranges in activations:
            config = qbert.BitsConfig(bits, activation_range=ranges, range_method="minmax")
            packed = qbert.pack(qbert.quantize_model(plain, config))
            layers[f"{bits}-bit {ranges}"] = qbert.optimize_for_inference(packed, exact=False)[0]
    slowest = {}
    for tokens in FEW_TOKENS:
        x, best = torch.randn(tokens, inputs), {name: float("inf") for name in layers}
        end = time.perf_counter() + 1.0
        with torch.inference_mode():
            while time.perf_counter() < end:
                for name, layer in layers.items():
                    layer(x)
                    start = time.thread_time()
                    for _ in range(_CALLS):
                        layer(x)
                    best[name] = min(best[name], time.thread_time() - start)
        plain_time = best.pop("float")
        slowest[tokens] = min((plain_time / seconds, name) for name, seconds in best.items())
    return slowest


def render_layers(layers: dict[str, dict[int, tuple[float, str]]]) -> str:
    """The second table of the page."""
    if not layers:
        return ""
    header = "| in x out | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in FEW_TOKENS) + " |"
    rows = [
        f"| {shape} | " + " | ".join(f"{ratio:.2f} ({name})" for ratio, name in slowest.values()) + " |"
        for shape, slowest in layers.items()
    ]
    title = "Single layers of few tokens, times as fast as torch fp32: the slowest of 2, 3, 4 and 8 bits (exact=False)."
    return "\n".join(["", title, "", header, "|---|" + "---|" * len(FEW_TOKENS), *rows]) + "\n"


def render(record: Record, made_by: str, data: str, count: int) -> str:
    """The results page in Markdown."""
    lines = ["# Inference on a CPU", "", made_by, ""]
    lines.append(
        "Times as fast as torch fp32 (milliseconds), batch x length. The last two columns of a table are "
        f"{count} sentences of {data}: padded to the longest, and by length in batches of 16. Error: of the last "
        "hidden state on those sentences, relative to torch fp32, and of the worst token. One thread: CPU time of the "
        "process; several: wall time. Load and peak: seconds to load the file, and memory of a process that does "
        "nothing but load and run it, with all its libraries."
    )
    sources = list(dict.fromkeys(key.partition("/about/")[0] for key in record if "/about/" in key))
    for source in sources:
        lines += render_model(record, source)
    return "\n".join(lines).rstrip() + "\n"


def render_model(record: Record, source: str) -> list[str]:
    """The tables of one model."""
    named = "BERT of random weights, " if source.partition("x")[0].isdecimal() else ""
    lines = ["", f"## {named}{source}"]
    about = under(record, f"{source}/about/")
    threads = list(dict.fromkeys(k.split("/")[-2] for k in record if k.startswith(f"{source}/") and _is_time(k)))
    for number in threads:
        columns = under(record, f"{source}/{number}/")
        lines += ["", f"{number} thread{'s' * (number != '1')}:", ""]
        lines += ["| engine | " + " | ".join(columns) + " | error |", "|---|" + "---|" * (len(columns) + 1)]
        for name, facts in about.items():
            cells = [
                f"{times[_FLOAT] / times[name]:.2f} ({times[name]:.1f})" if name in times else "-"
                for times in columns.values()
            ]
            lines.append(f"| {name} | " + " | ".join([*cells, f"{facts['error']:.3f}"]) + " |")
        lines += ["", *least_gains(columns, about)]
    spearman, memory = under(record, f"{source}/spearman/"), under(record, f"{source}/memory/")
    lines += [
        "",
        "| engine | error | worst token | Spearman | file MB | load s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in about.items():
        probe = memory.get(name, {})
        cells = [
            f"{facts['error']:.3f}",
            f"{facts['worst']:.2f}",
            *(f"{v:.2f}" if v is not None else "-" for v in (spearman.get(name),)),
            *(f"{v:.1f}" if v is not None else "-" for v in (facts.get("mb"),)),
            *(f"{v:.2f}" if v is not None else "-" for v in (probe.get("load_s"),)),
            *(f"{v:.0f}" if v is not None else "-" for v in (probe.get("peak_mb"),)),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"Not measured: {name} ({why})." for name, why in under(record, f"{source}/missing/").items())]
    chosen = {name: facts["chosen"] for name, facts in about.items() if "chosen" in facts and "engine=" not in name}
    if chosen:
        lines += ["", "Engines that packed models chose:", "", *(f"- {name}: {why}" for name, why in chosen.items())]
    return lines


def least_gains(columns: dict[str, dict[str, float]], names: Iterable[str]) -> list[str]:
    """How packed models compare with the faster of torch's two kinds of float where they compare worst."""
    lines = []
    for name in names:
        gains = {
            column: min(times[_FLOAT], times.get(_BFLOAT, times[_FLOAT])) / times[name]
            for column, times in columns.items()
            if name in times and name.startswith("qbert ") and "engine=" not in name
        }
        if gains:
            worst = min(gains, key=lambda column: gains[column])
            lines.append(
                f"{name}: at least {gains[worst]:.2f} times as fast as the faster of {_FLOAT} and {_BFLOAT} ({worst})."
            )
    return lines


def under(record: Record, prefix: str) -> dict[str, Any]:
    """What the record has under keys that begin so, by the rest of the key."""
    return {key.removeprefix(prefix): record[key][-1] for key in record if key.startswith(prefix)}


def _is_time(key: str) -> bool:
    return key.split("/")[-2].isdecimal()


def notes_of(page: Path) -> str:
    """The notes of an older page, with their mark."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return f"\n{NOTES}{text.partition(NOTES)[2] or chr(10)}"


if __name__ == "__main__":
    run_script(main)
