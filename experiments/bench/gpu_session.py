"""A session on a lent GPU, the most valuable first, each part in a process and a time of its own (`gpu_session.sh`).

python experiments/bench/gpu_session.py 1 330      # facts, exactness, first numbers of encoders and products
python experiments/bench/gpu_session.py 2 420      # exactness, tuning, all numbers again, memory checks, KD-QAT
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

START = time.time()
# Finding out whether there is a GPU must not start CUDA in the process that the others are forked from.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if len(sys.argv) > 2:
    os.environ["QBERT_DEADLINE"] = str(START + float(sys.argv[2]))

import gpu_checks  # noqa: E402
import gpu_encoders  # noqa: E402
import gpu_products  # noqa: E402
import gpu_timing  # noqa: E402
import torch  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401  once for all parts
from gpu_machine import (  # noqa: E402
    DEVICE,
    MODE,
    ON_GPU,
    OUT,
    brief,
    forks,
    in_processes,
    kernels_digest,
    left,
    record,
    say,
    stand_in,
)
from safetensors.torch import load_file, save_file  # noqa: E402

import qbert  # noqa: E402

RESERVE = 4.0  # seconds for the summary


def part(name: str, seconds: float, run: Callable[[], int]) -> int:
    """Runs one part in a process of its own for at most so many seconds; its exit code."""
    room = left() - RESERVE
    if room < 8:
        say(f"== [{time.time() - START:.0f} s] {name}: left out, {left():.0f} s left")
        return -1
    say(f"== [{time.time() - START:.0f} s] {name}, at most {min(seconds, room):.0f} s")
    os.environ["QBERT_DEADLINE"], kept = str(time.time() + min(seconds, room)), os.environ["QBERT_DEADLINE"]
    try:
        code = in_processes({name: run}, 1, min(seconds, room))[name]
    finally:
        os.environ["QBERT_DEADLINE"] = kept
    if code:
        say(f"== {name} ended with {code}")
    return code


def facts() -> int:
    """The machine, its peaks, and whether our operators run at all."""
    import triton
    from triton.runtime.cache import triton_key

    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        memory, cache = properties.total_memory >> 20, properties.L2_cache_size >> 20
        say(f"{properties.name}: {properties.multi_processor_count} processors, {memory} MiB, L2 {cache} MiB")
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    say(versions, "qbert", qbert.__version__)
    key, expected = hashlib.sha256(triton_key().encode()).hexdigest(), os.environ.get("QBERT_TRITON_KEY", "")
    verdict = "the carried cache's" if key == expected else f"NOT the carried cache's {expected[:16]}"
    say(f"Triton's key {key[:16]} is {verdict}")
    carried = Path(os.environ.get("QBERT_CARRIED", ".gpu")) / "kernels_digest"
    if carried.exists() and carried.read_text() != kernels_digest():
        say("the carried cache is of OTHER KERNELS: all of them compile here; fill it on the commit that travels")
    from qbert.kernels import formats, operators
    from qbert.kernels.operands import ProductWeight

    start = time.time()
    packed = formats.pack(torch.randint(-8, 8, (64, 256), dtype=torch.int8), 4).to(DEVICE)
    xq, x_scale, row_sum = operators.quantize_rows(torch.randn(8, 256, device=DEVICE).half())
    operators.matmul_a8(xq, x_scale, row_sum, ProductWeight([packed], [4], torch.rand(64, device=DEVICE)))
    torch.cuda.synchronize()
    say(f"operators run; the first two took {time.time() - start:.1f} s")
    gpu = torch.cuda.get_device_name()
    record(kind="machine", gpu=gpu, **versions)
    for what, run, per_second in _peaks():
        try:
            run()
            torch.cuda.synchronize()
            times = [gpu_timing.event_timer(run) for _ in range(5 if ON_GPU else 1)]
            say(f"{what}: {per_second / min(times) / 1e9:.4g} T/s")
            record(kind="peak", what=what, tera_per_second=per_second / min(times) / 1e9)
        except Exception as error:
            say(f"{what} FAILED: {brief(error)}")
    return 0


def _peaks() -> list[tuple[str, Callable[[], object], float]]:
    found: list[tuple[str, Callable[[], object], float]] = []
    source = torch.empty(1 << 31 if ON_GPU else 1 << 20, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    found.append(("copy, bytes", partial(target.copy_, source), 2.0 * source.numel()))
    for n in (8192, 4096) if ON_GPU else (32,):
        a, b = (torch.randn(n, n, device=DEVICE).half() for _ in "ab")
        found.append((f"fp16 {n}", partial(torch.matmul, a, b), 2.0 * n**3))
        i, j = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=DEVICE) for _ in "ij")
        found.append((f"_int_mm {n}", partial(torch._int_mm, i, j.T), 2.0 * n**3))
        f, g = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        r, c = torch.ones(n, 1, device=DEVICE), torch.ones(1, n, device=DEVICE)
        multiply = partial(torch._scaled_mm, f, g.T, r, c, out_dtype=torch.bfloat16, use_fast_accum=True)
        found.append((f"_scaled_mm {n}", multiply, 2.0 * n**3))
    return found


def command(name: str, seconds: float, *words: str, **environment: str) -> None:
    """A command of its own, its output among ours."""
    room = min(seconds, left() - RESERVE)
    if room < 15:
        say(f"== {name}: left out, {left():.0f} s left")
        return
    say(f"== [{time.time() - START:.0f} s] {name}, at most {room:.0f} s: {' '.join(words)}")
    code = subprocess.run(
        ["timeout", "-k", "3", f"{room:.0f}", *words], env=os.environ | environment, stderr=subprocess.STDOUT
    ).returncode
    say(f"== {name} ended with {code}")


def first_call() -> None:
    """What must be known first."""
    part("facts", 40, facts)
    say(f"== [{time.time() - START:.0f} s] exactness")
    gpu_checks.check_all(seconds=min(100, left() - RESERVE), beside=_warmed())
    names = list(gpu_encoders.ENGINES)
    shapes = ["32x128", "1x128"]
    part("encoders", 75, partial(gpu_encoders.measure, "BERT-base", shapes, names, profile=_profiled()))
    part("encoders", 60, partial(gpu_encoders.measure, "BERT-base", ["128x384"], names, profile=_profiled()))
    part("products", 30, partial(gpu_products.measure, ["BERT-base"], [4096, 49152]))
    part("encoders", 35, partial(gpu_encoders.measure, "MiniLM", shapes, names))


def second_call() -> None:
    """Exactness again, tuning, and all numbers with the tuned tiles."""
    part("facts", 30, facts)
    say(f"== [{time.time() - START:.0f} s] exactness, and the candidate tiles compiled beside it")
    beside = gpu_products.candidates_to_compile() | _warmed()
    gpu_checks.check_all(at_once=15, seconds=min(80, left() - RESERVE), beside=beside)
    part("tuning", 95, gpu_products.tune_all)
    names = list(gpu_encoders.ENGINES)
    measure = gpu_encoders.measure
    part("encoders", 60, partial(measure, "BERT-base", ["32x128", "1x128"], names, profile=_profiled()))
    part("encoders", 50, partial(measure, "BERT-base", ["128x384"], names, profile=_profiled()))
    part("encoders", 30, partial(measure, "MiniLM", ["32x128", "1x128"], names))
    say(f"== [{time.time() - START:.0f} s] exactness with the tuned tiles")
    tuned = [name for name in gpu_checks.cases() if name.startswith(("integers", "e4m3", "attention", "rows"))]
    gpu_checks.check_all(tuned, at_once=15, seconds=min(30, left() - RESERVE))
    say(f"== [{time.time() - START:.0f} s] products")
    gpu_products.measure(["BERT-base"], [4096, 49152], seconds=min(40, left() - RESERVE))
    checks = [sys.executable, str(Path(__file__).with_name("gpu_checks.py")), "rows"]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    # Else an access past a tensor lands in the allocator's own block and is not seen.
    command("sanitizer", 50, *sanitizer, *checks, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    distil()


def distil() -> None:
    """KD-QAT and QAT in 2 bits on SST-2, where model and data travelled along; half of its rows if that is tuned.

    Tuning a teacher on all rows takes 90 s of an H200: then no student comes to its end in what is left.
    """
    carried = Path(os.environ.get("QBERT_CARRIED", ".gpu"))
    if not (carried / "model").is_dir() or not (carried / "data" / "sst2").is_dir():
        say(f"== KD-QAT: left out, {carried} holds no model/ and data/sst2/")
        return
    # It travels in half precision, and is trained in full.
    scratch = Path(tempfile.mkdtemp())
    model = scratch / "model"
    shutil.copytree(carried / "model", model, dirs_exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    whole = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(whole, model / "model.safetensors", {"format": "pt"})
    script = str(Path(__file__).parents[1] / "qat_distill.py")
    words = f"--task sst2 --data-dir {carried / 'data'} --model {model} --device {DEVICE.type} --bits 2"
    tuned = "ForSequenceClassification" in (model / "config.json").read_text()
    words += " --epochs 0.5 --no-fine-tune" if tuned else " --epochs 1 --teacher-epochs 1"
    words += f" --batch-size 64 --output-dir {scratch} --report {OUT / 'qat.md'}"
    words += " --bf16" if ON_GPU else " --train-limit 64 --eval-limit 16"
    command("KD-QAT", 110, sys.executable, script, *words.split(), TOKENIZERS_PARALLELISM="true")


def _warmed() -> dict[str, Callable[[], int]]:
    shapes = {"BERT-base": ["32x128", "128x384", "1x128"], "MiniLM": ["32x128", "1x128"]}
    return {
        f"compiling {name} {engine}": partial(gpu_encoders.warm, name, shapes[name], engine)
        for name in shapes
        for engine in gpu_encoders.ENGINES
    }


def _profiled() -> list[str]:
    return [gpu_encoders.BASE, "W8A8", "W4 e4m3"]


def main() -> None:
    """Run one of the two calls."""
    stand_in()
    if ON_GPU and torch.cuda.is_initialized():
        raise RuntimeError("CUDA was started by an import; parts cannot be forked")
    OUT.mkdir(parents=True, exist_ok=True)
    say(f"== [{time.time() - START:.0f} s] imported; {left():.0f} s, mode {MODE}")
    forks[0] = in_processes({"a first tensor": lambda: int(torch.ones(1, device=DEVICE).item() != 1)}, 1, 60) == {
        "a first tensor": 0
    }
    if not forks[0]:
        say("a forked process cannot use the GPU: all parts share this one, and a fault of one ends the session")
    for call in sys.argv[1].split(","):
        {"1": first_call, "2": second_call}[call]()
    say(f"== [{time.time() - START:.0f} s] done")


if __name__ == "__main__":
    main()
