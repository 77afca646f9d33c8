"""Timing on a GPU: cold caches, interleaved rounds, medians of CUDA events; and the bars that results have to reach."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

COLD_BYTES = 128 << 20  # more than any L2 cache holds
Timer = Callable[[Callable[[], Any]], float]


class Bar(NamedTuple):
    """A ratio of two engines' times that is promised for some numbers of tokens: `slow` / `fast` >= `wanted`."""

    fast: str
    slow: str
    wanted: float
    fewest: int = 1
    most: int = 1 << 62


def require_gpu() -> torch.device:
    """The current CUDA device. Raises ValueError where there is none, or none that the kernels run on."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark times a GPU and torch finds none here; run it on a machine with an NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    from qbert.kernels.dispatch import implementation

    if implementation(device) != "triton":
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"the kernels do not run on {name}; they need Triton and compute capability 8.0 or later")
    return device


def event_timer(run: Callable[[], Any]) -> float:
    """Milliseconds of one call on the current stream, between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class ColdTimer:
    """`event_timer` after the L2 cache has been overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._waste = torch.empty(4 * COLD_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self._waste.zero_()
        torch.cuda.synchronize()
        return event_timer(run)


def interleaved_medians(
    engines: Mapping[str, Callable[[], Any]], rounds: int, timer: Timer, warm_up: int = 3
) -> dict[str, float]:
    """Median of `timer` over the rounds for every engine; each runs once a round, so that all share a busy moment.

    In another order every round: after an engine that draws much power the next one runs at a lower clock.
    """
    for run in engines.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in engines}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(engines), len(engines)):
            times[name].append(timer(engines[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph. Raises RuntimeError where it cannot be captured.

    The replay keeps `run`, and with it the tensors that the graph reads: a graph knows their addresses alone.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> None:
    graph.replay()


def check_bars(times: Mapping[tuple[str, int], Mapping[str, float]], bars: Sequence[Bar]) -> list[str]:
    """One line a bar: the smallest ratio over the shapes (name, tokens) in its range, and whether that is enough."""
    lines = []
    for bar in bars:
        ratios = {
            key: row[bar.slow] / row[bar.fast]
            for key, row in times.items()
            if bar.fewest <= key[1] <= bar.most and bar.fast in row and bar.slow in row
        }
        limits = f"{bar.fewest} to {bar.most} tokens" if bar.most < 1 << 62 else f"{bar.fewest} tokens and more"
        what = f"{bar.fast} against {bar.slow}, {limits}: at least {bar.wanted:.2f}x"
        if not ratios:
            lines.append(f"- {what}: not measured")
            continue
        worst = min(ratios, key=lambda key: ratios[key])
        verdict = "reached" if ratios[worst] >= bar.wanted else "MISSED"
        lines.append(f"- {what}: {verdict}, {ratios[worst]:.2f}x at worst ({worst[0]}, {worst[1]} tokens)")
    return lines


def table(times: Mapping[tuple[str, int], Mapping[str, float]], base: str) -> list[str]:
    """Markdown lines: microseconds of every engine for every shape, and how many times as fast as `base`."""
    names = list(dict.fromkeys(name for row in times.values() for name in row))
    lines = ["| shape | tokens | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for (shape, tokens), row in times.items():
        cells = []
        for name in names:
            ratio = f" ({row[base] / row[name]:.2f})" if base in row and name in row else ""
            cells.append(f"{1e3 * row[name]:.1f}{ratio}" if name in row else "-")
        lines.append(f"| {shape} | {tokens} | " + " | ".join(cells) + " |")
    return lines


def plot(times: Mapping[tuple[str, int], Mapping[str, float]], base: str, path: str, title: str) -> None:
    """One panel a shape: how many times as fast as `base` each engine is, over the number of tokens."""
    from qbert.files import write_whole
    from qbert.plots import new_figure

    shapes = list(dict.fromkeys(shape for shape, _ in times))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = new_figure(4.5 * columns, 3.2 * rows)
    figure.suptitle(title)
    for index, shape in enumerate(shapes):
        axes = figure.add_subplot(rows, columns, index + 1)
        measured = {tokens: row for (name, tokens), row in times.items() if name == shape}
        for name in dict.fromkeys(name for row in measured.values() for name in row):
            found = [t for t in measured if name in measured[t] and base in measured[t]]
            axes.plot(found, [measured[t][base] / measured[t][name] for t in found], marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set_title(shape, fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"times as fast as {base}")
        axes.axhline(1.0, color="grey", linewidth=0.5)
    figure.axes[0].legend(fontsize=7)
    write_whole(path, lambda aside: figure.savefig(aside, format="png", dpi=120))
