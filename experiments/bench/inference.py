"""Speed, error and file size of encoders on a CPU: torch, its int8 and bfloat16, ONNX Runtime, OpenVINO, packed models.

Every engine runs the same shapes in turn, round after round, so that a busy machine slows all alike; the smallest CPU
time of the calling thread counts, of calls that follow one by the same engine. The error is the relative error of the
last hidden state over the tokens of real sentences, against torch in float32. Engines that are not installed are left
out, and said to be.

    python experiments/bench/inference.py --data-dir DIR --task stsb
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qbert
from qbert.cli.arguments import positive, run_script
from qbert.files import write_whole
from qbert.inference.engines import ENGINES
from qbert.kernels.cpu.gemm import available_engine, saturates
from qbert.results import provenance
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
Engine = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Parse the command line, measure, write the table."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModel, AutoTokenizer

    source = arguments.model or str(embedded_encoder())
    model = AutoModel.from_pretrained(source, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    texts = sentences(arguments)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with tempfile.TemporaryDirectory() as folder:
        engines, sizes, missing = build_engines(model, arguments, Path(folder))
        errors = relative_errors(engines, batch["input_ids"], batch["attention_mask"])
        vocabulary = model.config.vocab_size
        times = {shape: measure(engines, shape, arguments.seconds, vocabulary) for shape in arguments.shapes}
        times["real"] = measure_batch(engines, batch["input_ids"], batch["attention_mask"], arguments.seconds)
        times["sorted"] = measure_sorted(engines, batch["input_ids"], batch["attention_mask"], arguments.seconds)
    layers = {shape: measure_layer(shape, arguments.activations) for shape in arguments.layers}
    limits = [f"{name}={os.environ[name]}" for name in _INSTRUCTION_LIMITS if name in os.environ]
    made_by = provenance() + (f", with {' '.join(limits)}" if limits else "")
    page = render(times, errors, sizes, missing, f"{len(texts)} sentences of {arguments.data}", batch, made_by)
    page += render_layers(layers)
    page += render_choices(engines)
    print(page)
    write_whole(arguments.output, lambda aside: aside.write_text(page, encoding="utf-8"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="hub name or local folder; default: the embedded MiniLM-L6")
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
        "--shapes", nargs="+", type=shape, default=list(SHAPES), help="batch x length; default: %(default)s"
    )
    parser.add_argument(
        "--layers", nargs="*", type=shape, default=list(LAYERS), help="single layers, in x out; default: %(default)s"
    )
    parser.add_argument("--sentences", type=positive, default=64, help="real sentences for the error; default: 64")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds a shape and engine; default: 3")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; default: 1")
    parser.add_argument(
        "--engines",
        nargs="*",
        choices=ENGINES,
        default=[],
        help="engines that the widest packed models are forced to as well, beside the one they choose; default: none",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--torch-only", action="store_true", help="leave ONNX Runtime out")
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


def build_engines(
    model: nn.Module, arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Engine], dict[str, float], list[str]]:
    """Engines by name, their file sizes in MB where they have a file, and what is missing."""
    engines: dict[str, Engine] = {"torch fp32": as_engine(model)}
    sizes: dict[str, float] = {
        "torch fp32": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
    }
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    engines["torch dynamic int8"] = as_engine(dynamic)
    engines["model.bfloat16()"] = as_engine(copy.deepcopy(model).bfloat16())
    missing = []
    if arguments.compile:
        engines["torch.compile, bfloat16"] = as_engine(torch.compile(copy.deepcopy(model).bfloat16(), dynamic=True))
    else:
        missing.append("torch.compile (ask with --compile)")
    if arguments.torch_only:
        missing.append("ONNX Runtime (left out on request)")
    elif all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        found, found_sizes = onnx_engines(model, folder, arguments.threads)
        engines |= found
        sizes |= found_sizes
        if importlib.util.find_spec("openvino"):
            engines |= openvino_engines(folder / "fp32.onnx", arguments.threads)
        else:
            missing.append("OpenVINO (not installed: pip install openvino)")
    else:
        missing.append("ONNX Runtime (not installed: pip install onnx onnxruntime)")
    for bits in arguments.bits:
        for ranges in arguments.activations:
            packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(bits, activation_range=ranges)))
            name = f"qbert {bits}-bit" + (", asymmetric" if ranges == "asymmetric" else "")
            packed.save_pretrained(folder / name)  # type: ignore[operator]
            sizes[name] = (folder / name / "model.safetensors").stat().st_size / 1e6
            engines[name] = as_engine(qbert.optimize_for_inference(packed, skip_padding=True))
            for forced in arguments.engines if bits == max(arguments.bits) else ():
                fast = qbert.optimize_for_inference(packed, skip_padding=True, engine=forced)
                engines[f"{name}, engine={forced}"] = as_engine(fast)
            if bits == 8 and saturates(available_engine()):
                fast = qbert.optimize_for_inference(packed, exact=False, skip_padding=True)
                engines[f"{name}, exact=False"] = as_engine(fast)
    return engines, sizes, missing


def as_engine(model: Any) -> Engine:
    """A torch model as a function of ids and mask to float32."""

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)[0].float()  # type: ignore[no-any-return]

    run.model = model  # type: ignore[attr-defined]
    return run


def openvino_engines(path: Path, threads: int) -> dict[str, Engine]:
    """OpenVINO in float32 and bfloat16."""
    import openvino

    core = openvino.Core()
    engines: dict[str, Engine] = {}
    for name, hint in (("OpenVINO fp32", "f32"), ("OpenVINO bf16", "bf16")):
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = core.compile_model(str(path), "CPU", settings).create_infer_request()

        def run(ids: Tensor, mask: Tensor, request: Any = request) -> Tensor:
            done = request.infer([ids.numpy(), mask.numpy()], share_inputs=True)
            return torch.from_numpy(next(iter(done.values())))

        engines[name] = run
    return engines


def onnx_engines(model: nn.Module, folder: Path, threads: int) -> tuple[dict[str, Engine], dict[str, float]]:
    """ONNX Runtime in float and with its own dynamic int8 quantization, weights per channel."""
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class LastHidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask)[0]  # type: ignore[no-any-return]

    ids = torch.randint(5, 1000, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask", "out")}
    plain, small = str(folder / "fp32.onnx"), str(folder / "int8.onnx")
    torch.onnx.export(
        LastHidden().eval(),
        (ids, mask),
        plain,
        input_names=["ids", "mask"],
        output_names=["out"],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
    options = SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    engines: dict[str, Engine] = {}
    sizes = {}
    for name, path in (("ONNX Runtime fp32", plain), ("ONNX Runtime dynamic int8", small)):
        session: Any = InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(ids: Tensor, mask: Tensor, session: Any = session) -> Tensor:
            return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

        engines[name], sizes[name] = run, Path(path).stat().st_size / 1e6
    return engines, sizes


def relative_errors(engines: dict[str, Engine], ids: Tensor, mask: Tensor) -> dict[str, float]:
    """Relative error of the last hidden state over real tokens, against the first engine."""
    keep = mask.bool()
    outputs = {name: run(ids, mask)[keep] for name, run in engines.items()}
    exact = next(iter(outputs.values()))
    return {name: float((y - exact).norm() / exact.norm()) for name, y in outputs.items()}


def measure(engines: dict[str, Engine], shape: str, seconds: float, vocabulary: int) -> dict[str, float]:
    """Milliseconds of a full batch of random tokens."""
    batch, length = (int(n) for n in shape.split("x"))
    lowest, end = min(1000, vocabulary // 2), min(20000, vocabulary)
    ids = torch.randint(lowest, end, (batch, length), generator=torch.Generator().manual_seed(0))
    return measure_batch(engines, ids, torch.ones_like(ids), seconds)


def measure_sorted(engines: dict[str, Engine], ids: Tensor, mask: Tensor, seconds: float) -> dict[str, float]:
    """Smallest milliseconds of the same sentences by length, in batches of 16 cut to their longest."""
    order = mask.sum(1).argsort(descending=True)
    parts = [(ids[rows, : int(mask[rows].sum(1).max())], mask[rows]) for rows in order.split(16)]
    batches = [(part, seen[:, : part.shape[1]]) for part, seen in parts]

    def whole(run: Engine) -> Engine:
        return lambda *_: torch.cat([run(*batch).flatten() for batch in batches])

    return measure_batch({name: whole(run) for name, run in engines.items()}, ids, mask, seconds)


def measure_batch(engines: dict[str, Engine], ids: Tensor, mask: Tensor, seconds: float) -> dict[str, float]:
    """Smallest CPU milliseconds of the calling thread for one batch, engines in turn."""
    best = {name: float("inf") for name in engines}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds * len(engines)
    while time.perf_counter() < end or min(best.values()) == float("inf"):
        for name, run in engines.items():
            run(ids, mask)  # not timed, so that none pays for the caches that another library has left behind
            start = clock()
            run(ids, mask)
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


def render_choices(engines: dict[str, Engine]) -> str:
    """What packed models say about the engines they chose."""
    lines = []
    for name, run in engines.items():
        text = repr(getattr(run, "model", None))
        chosen = [line.strip() for line in text.splitlines() if "fused layers:" in line]
        if chosen and "engine=" not in name:
            lines.append(f"- {name}: {chosen[0].removeprefix('fused layers: ')}")
    return "\n".join(["", "Engines that packed models chose:", "", *lines]) + "\n" if lines else ""


def render(
    times: dict[str, dict[str, float]],
    errors: dict[str, float],
    sizes: dict[str, float],
    missing: list[str],
    data: str,
    batch: Any,
    made_by: str,
) -> str:
    """The results page in Markdown."""
    real = batch["attention_mask"]
    named = {"real": f"real {real.shape[0]}x{real.shape[1]}", "sorted": "real, sorted"}
    columns = [named.get(s, s) for s in times]
    lines = [
        "# Inference on a CPU",
        "",
        made_by,
        "",
        f"Times as fast as torch fp32 (milliseconds), batch x length. The last two are {data}: padded to the longest, "
        f"{100 * float(real.float().mean()):.0f} % of the tokens real, and by length in batches of 16. Error: of the "
        "last hidden state on those sentences, relative to torch fp32.",
        "",
        "| engine | " + " | ".join(columns) + " | error | file MB |",
        "|---|" + "---|" * (len(times) + 2),
    ]
    for name, error in errors.items():
        speeds = [f"{t['torch fp32'] / t[name]:.2f} ({t[name]:.1f})" for t in times.values()]
        size = f"{sizes[name]:.1f}" if name in sizes else "-"
        lines.append(f"| {name} | " + " | ".join(speeds) + f" | {error:.3f} | {size} |")
    lines += ["", *(f"Not measured: {m}." for m in missing)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    run_script(main)
