"""Which engine multiplies on this CPU: chosen by measurement, for each shape and number of tokens, and remembered.

Five engines can compute an encoder layer or a single linear map:

    native    int8 products and all around them in one C++ library (`qbert.kernels.cpu.native`)
    fbgemm    int8 products of torch, with torch operators around them (`qbert.kernels.cpu.chains`)
    onednn    the same with oneDNN's products, which know AMX
    bf16      bfloat16 products, weights expanded from their codes; inputs are not rounded to 8 bits
    fp32      the same in float32

The first three compute what the packed layers do. The other two round less, so they are nearer to the float model, not
to the packed one; they are taken only where they are more than a twentieth faster, so that no model is slower than it
would be in bfloat16 or float32 by more than that. Candidates run in turn, round after round, so that load on the
machine slows all alike, and the smallest time counts. The four products of an encoder layer choose
together, because changing between kinds of numbers inside of a layer costs passes over memory.

What was found is written to ``engines/`` in the cache folder, under a key of processor, versions, threads and shape:
the same cache gives the same engines, and what another machine has found is not used. A measurement that was disturbed,
because others had the processor or the times of one candidate lie far apart, serves its own process only: the next one
measures again.

    >>> choice = choose(layer_key, {"native": ..., "fbgemm": ...})
    >>> choice.at(16)
    'native'
"""

from __future__ import annotations

import functools
import hashlib
import logging
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from qbert.extras import require
from qbert.files import cache_folder, read_json, write_json
from qbert.kernels.cpu import native
from qbert.kernels.cpu.gemm import runs
from qbert.version import __version__

logger = logging.getLogger(__name__)

ENGINES = ("native", "fbgemm", "onednn", "bf16", "fp32")
# Other runtimes, for a whole encoder and where they are asked for only (`qbert.inference.runtime`).
RUNTIMES = ("openvino", "onnxruntime")
INT8 = ("native", "fbgemm", "onednn")
# Tokens that are measured, and up to how many tokens the answer holds; the last holds for all.
TOKENS, LIMITS = (16, 96, 384), (32, 192)
_ROUNDS, _MORE_ROUNDS = 4, 12
_HOPELESS = 1.6  # times as slow as the best in the first round: not measured again
_GAIN = 1.05  # how much faster an engine must be that computes something else than the packed layers do
# Wall time over CPU time from which others had the processor; the middle of a candidate's times over the smallest,
# beside what the clock is off by, from which something else slowed them, such as a neighbour of the core.
_DISTURBED, _SPREAD, _TICK = 1.5, 1.3, 5e-6
_BUSY = "measured on a busy machine, the smallest of several rounds"
# What was measured in this process and could not be kept for others.
_passing: dict[str, Choice] = {}

Run = Callable[[], object]


class Choice(NamedTuple):
    """Engines by number of tokens, and why.

    engines: one for each of `TOKENS`; microseconds: what each candidate took, for each of `TOKENS`, empty if forced;
    note: what to know about the measurement.
    """

    engines: tuple[str, ...]
    microseconds: tuple[Mapping[str, float], ...]
    note: str

    def at(self, tokens: int) -> str:
        """The engine for so many tokens."""
        return self.engines[bisect_left(LIMITS, tokens)] if len(self.engines) > 1 else self.engines[0]

    def __str__(self) -> str:
        if not self.microseconds:
            return f"{self.engines[0]} ({self.note})"
        texts = []
        for place, (engine, times) in enumerate(zip(self.engines, self.microseconds, strict=True)):
            limit = f"to {LIMITS[place]} tokens" if place < len(LIMITS) else "beyond"
            listed = ", ".join(f"{name} {value:.0f}" for name, value in sorted(times.items(), key=lambda t: t[1]))
            texts.append(f"{limit} {engine} (us at {TOKENS[place]}: {listed})")
        return "; ".join(texts) + (f"; {self.note}" if self.note else "")


def reason_not(engine: str) -> str:
    """Why `engine` cannot run on this machine; empty if it can."""
    if engine == "native":
        return native.reason_not_native()
    if engine in ("fbgemm", "onednn"):
        return "" if runs(engine) else f"this build of torch has no int8 product of {engine} for this CPU"
    if engine == "bf16":
        return "" if has_bf16() else "this processor has no bfloat16 instructions (AVX512-BF16 or AMX)"
    return ""


@functools.cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself, and torch was not told to leave that alone."""
    flags = native.processor()[1]
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool({"avx512_bf16", "amx_bf16"} & flags)


def check_engine(engine: str) -> None:
    """Raises ValueError for an engine that is unknown or cannot run here, MissingPackageError for lack of a package."""
    if engine in RUNTIMES:
        for package in ("openvino",) if engine == "openvino" else ("onnx", "onnxruntime"):
            require(package, f"engine={engine!r}")
        return
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; use 'auto' or one of {', '.join(ENGINES + RUNTIMES)}")
    reason = "" if engine == "auto" else reason_not(engine)
    if reason:
        raise ValueError(f"engine={engine!r} cannot run here: {reason}; use engine='auto'")


def forced(engine: str, note: str = "as asked") -> Choice:
    """The choice of one engine for all numbers of tokens."""
    return Choice((engine,), (), note)


def choose(shape: str, candidates: Mapping[str, Callable[[int], tuple[Run, Callable[[], Run]]]]) -> Choice:
    """The fastest of `candidates` for each of `TOKENS`, from the cache or by measurement.

    Args:
        shape: names what is computed: sizes, ranges, everything that decides about time.
        candidates: by engine a function of the number of tokens that gives a call as it is, and a function that gives
            the same call compiled.
    """
    key = f"{_machine()}, {torch.get_num_threads()} threads, {shape}, of {' '.join(candidates)}"
    path = _remembered(key)
    found = None if path is None else _read(path, key)
    found = found or _passing.get(key)
    if found is not None:
        return found
    times, disturbed = [], False
    for tokens in TOKENS:
        made = {engine: candidate(tokens) for engine, candidate in candidates.items()}
        rough, busy = measure({engine: run for engine, (run, _) in made.items()}, rounds=1)
        least = min(rough.values())
        near = [engine for engine, value in rough.items() if value <= _HOPELESS * least]
        if len(near) > 1:
            fine, later = measure({engine: made[engine][1]() for engine in near}, rounds=_ROUNDS)
            rough |= fine
            busy |= later
        times.append({engine: round(value * 1e6, 2) for engine, value in rough.items()})
        disturbed |= busy
    choice = Choice(tuple(map(best, times)), tuple(times), _BUSY if disturbed else "")
    if path is None or disturbed:
        _passing[key] = choice
    else:
        write_json(path, {"key": key, "engines": choice.engines, "microseconds": choice.microseconds, "note": ""})
    if disturbed:
        logger.info("the machine was busy while engines were measured, which are not remembered: %s: %s", shape, choice)
    return choice


def best(times: Mapping[str, float]) -> str:
    """The engine to take from times in any unit: the fastest in int8, unless another is over a twentieth faster."""
    exact = [engine for engine in times if engine in INT8]
    first = min(times, key=lambda engine: times[engine])
    if not exact or first in exact:
        return first
    least = min(exact, key=lambda engine: times[engine])
    return first if times[first] * _GAIN <= times[least] else least


def measure(calls: Mapping[str, Run], rounds: int) -> tuple[dict[str, float], bool]:
    """Smallest seconds of each call, in turn, and whether the measurement was disturbed (then more rounds ran)."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for run in calls.values():
            for _ in range(2 if rounds == 1 else 3):  # a compiled program is made in its first calls
                run()
        start, own = time.perf_counter(), time.process_time()
        done = 0
        while done < rounds:
            for name, run in calls.items():
                run()  # not timed: the one before left the caches to itself
                before = clock()
                run()
                seconds[name].append(clock() - before)
            done += 1
            shared = time.perf_counter() - start > _DISTURBED * (time.process_time() - own)
            disturbed = shared or _far_apart(seconds)
            if disturbed and done == rounds and rounds == _ROUNDS:
                rounds = _MORE_ROUNDS
    return {name: min(times) for name, times in seconds.items()}, disturbed


def _far_apart(seconds: Mapping[str, list[float]]) -> bool:
    """Whether the times of one of the two fastest candidates, between which the choice is, differ much."""
    fastest = sorted(seconds.values(), key=min)[:2]
    return any(statistics.median(times) > _SPREAD * min(times) + _TICK for times in fastest)


@functools.cache
def _machine() -> str:
    try:
        instructions = native.instruction_set()
    except RuntimeError:
        instructions = "no native engine"
    reached = torch.backends.cpu.get_cpu_capability()
    source = hashlib.sha256(Path(native.__file__).with_name("native.cpp").read_bytes()).hexdigest()[:8]
    name = native.processor()[0]
    return f"{name}, {reached}, {instructions} {source}, torch {torch.__version__}, qbert {__version__}"


def _remembered(key: str) -> Path | None:
    try:
        return cache_folder() / "engines" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    except PermissionError as error:
        logger.info("engines are measured anew each time: %s", error)
        return None


def _read(path: Path, key: str) -> Choice | None:
    try:
        content = read_json(path)
        if content["key"] != key:
            raise ValueError(f"it is about {content['key']}")
        times = tuple(dict(t) for t in content["microseconds"])
        engines = tuple(content["engines"])
        if len(engines) != len(TOKENS) or len(times) != len(TOKENS) or engines != tuple(map(best, times)):
            raise ValueError("it is not of this version")
        if content["note"] not in ("", None):
            raise ValueError("it was measured on a busy machine")
        return Choice(engines, times, content["note"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        logger.info("the engines in %s are measured again: %s", path, error)
        return None
