"""What the parts of a GPU session share: the device or what stands for it, time limits, result lines.

The environment variable QBERT_GPU_SESSION says where a session runs:

    gpu       (default) on the CUDA device
    dry       on CPU tensors, small shapes, no kernel launched: finds typos before they cost time on a GPU
    compile   on CPU tensors, real shapes, kernels compiled for sm_90 and not launched: fills Triton's cache
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MODE = os.environ.get("QBERT_GPU_SESSION", "gpu")
ON_GPU = MODE == "gpu"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
OUT = Path(os.environ.get("OUT", "outputs/gpu_session"))
compiled: list[str] = []  # kernels compiled by this process
forks = [True]  # whether `in_processes` may fork


def deadline() -> float:
    """When the session ends, in seconds of `time.time`."""
    return float(os.environ.get("QBERT_DEADLINE", time.time() + 3600))


def left() -> float:
    """Seconds until the session ends."""
    return deadline() - time.time()


def say(*words: Any) -> None:
    """A line of the session's log, at once and whole: several processes write to it."""
    os.write(sys.stdout.fileno(), (" ".join(map(str, words)) + "\n").encode())


def record(**row: Any) -> None:
    """One line of `results.jsonl`."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """Inside, an environment variable has this value, or none."""
    kept = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if kept is not None:
            os.environ[name] = kept


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds, or when the session ends."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    handler, start = signal.signal(signal.SIGALRM, ring), time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(0.1, min(seconds, left())))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, outer - time.monotonic() + start) if outer else 0)


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def kernels_digest() -> str:
    """Of the sources that kernels are compiled from: Triton's cache serves these alone."""
    root = Path(__file__).parents[2] / "kernels"
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()


def in_processes(cases: dict[str, Callable[[], int]], at_once: int, seconds: float) -> dict[str, int]:
    """Exit codes of the cases, each run in a process of its own, so that a fault of one leaves the others alone.

    Processes are forked from this one, which has imported everything and must not have touched the GPU; where that
    does not work (`forks`), cases run one by one in this process. A case gives its number of failures; 99 stands for
    an exception, -9 for one stopped after `seconds` for all.
    """
    if not forks[0]:
        return {name: _guarded(case, min(seconds, left())) for name, case in cases.items()}
    codes: dict[str, int] = {}
    running: dict[int, str] = {}
    waiting, end = list(cases), min(time.time() + seconds, deadline())
    while waiting or running:
        while waiting and len(running) < at_once and time.time() < end:
            name = waiting.pop(0)
            running[_forked(cases[name])] = name
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            elif time.time() > end:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process, signal.SIGKILL)
        if time.time() > end:
            codes |= dict.fromkeys(waiting, -9)
            waiting.clear()
        time.sleep(0.02)
    return codes


def _forked(case: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(process, process)
        return process
    os.setpgid(0, 0)
    code = _guarded(case, max(left(), 1))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(min(code, 99))


def _guarded(case: Callable[[], int], seconds: float) -> int:
    try:
        with limited(seconds):
            return case() or 0
    except BaseException as error:
        import traceback

        say("EXCEPTION", brief(error), "|", " < ".join(traceback.format_exc().splitlines()[-6:-1])[:600])
        return 99


def stand_in() -> None:
    """Puts something in the place of the GPU, by the mode; nothing on a GPU."""
    if ON_GPU:
        return
    import gpu_timing
    import triton.testing
    from triton.runtime.jit import JITFunction

    from qbert.kernels.gpu import tune

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    gpu_timing.event_timer = timed
    gpu_timing.captured = lambda run: run
    gpu_timing.ColdTimer = lambda device: timed  # type: ignore[assignment, misc, return-value]
    triton.testing.do_bench_cudagraph = tune.do_bench_cudagraph = lambda run, **options: timed(run)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.get_device_name = lambda *_: "no GPU"
    # A CPU's knows no scales a row.
    torch._scaled_mm = lambda a, b, *scales, out_dtype, **options: (a.float() @ b.float()).to(out_dtype)
    if MODE == "dry":
        JITFunction.run = lambda self, *arguments, **options: None
    else:
        _compile_only()


class _OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked to be made on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Inside, code that insists on a CUDA device runs on CPU tensors; on a GPU nothing is changed."""
    if ON_GPU:
        yield
        return
    kept = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        with _OnCpu():
            yield
    finally:
        torch.cuda.is_available = kept


def _compile_only() -> None:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import qbert.inference.gpu
    from qbert.kernels import dispatch
    from qbert.kernels.gpu import attention, dependent, tiles
    from qbert.kernels.gpu.products import matmul_a8, matmul_a8_mixed, matmul_a16

    class Absent:
        """What Triton asks of a driver before it compiles."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Absent())
    launched = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launched(self, *arguments, grid=grid, warmup=True, **options)

    def note(*arguments: Any, **options: Any) -> None:
        if not (options.get("cache_hit") if "cache_hit" in options else arguments[-1]):
            compiled.append("")

    JITFunction.run = compile_only
    knobs.compilation.listener = note
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    dependent._can_depend = lambda x: True
    modules: list[Any] = [tiles, matmul_a8, matmul_a8_mixed, matmul_a16, attention]
    for module in modules:
        if hasattr(module, "registers_option"):
            module.registers_option = lambda tile, x: {"maxnreg": tile.registers} if tile.registers else {}
        if hasattr(module, "asm_kind"):
            module.asm_kind = lambda asm, x: int(asm) if x.dtype == torch.int8 else 2 if asm else 3
    modules = [dispatch, qbert.inference.gpu]
    for module in modules:
        module.implementation = lambda device: "triton"
