"""Whole encoders on a GPU beside fp16 and FP8 compiled by torch, every one in a CUDA graph.

A baseline compiles one layer, whose code all layers share, and captures the whole model in one graph: compiling whole
models for every shape would take longer than a session lasts. FP8 is what a user gets from torch: e4m3 weights with a
scale a row, activations quantized per token, `torch._scaled_mm`, all compiled. Rows go to `results.jsonl`.

    python experiments/bench/gpu_encoders.py BERT-base 32x128,1x128
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_timing
import torch
from gpu_machine import DEVICE, MODE, ON_GPU, brief, compiled, left, limited, record, say, stand_in, variable
from inference_gpu import MODELS, make_batch, parse_shape
from torch import Tensor, nn

import qbert
from qbert.inference.graphs import Bucket, Buffers, Graph, Run
from qbert.kernels.operands import Spans

BASE = "fp16 compiled"
FP8 = "fp8 compiled"
NO_PDL = "W4A8, no PDL"  # each kernel launched when the one before has ended, as it always is beyond 2,048 tokens
ENGINES: dict[str, dict[str, Any]] = {
    "W8A8": {"bits": 8},
    "W4A8": {"bits": 4},
    NO_PDL: {"bits": 4},
    "W2A8": {"bits": 2},
    "W4 e4m3": {"bits": 4, "operands": "e4m3"},
    "W2 e4m3": {"bits": 2, "operands": "e4m3"},
}
_F8_MAX = 448.0


class Float8Linear(nn.Module):
    """A linear layer as torch computes it in FP8: both operands e4m3, one scale a row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / _F8_MAX
        self.register_buffer("weight", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in bfloat16."""
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / _F8_MAX
        codes = (rows.float() / scale).to(torch.float8_e4m3fn)
        product = torch._scaled_mm(
            codes, self.weight.T, scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return (product + self.bias).reshape(*x.shape[:-1], -1)


def in_float8(model: nn.Module) -> nn.Module:
    """`model` with its linear layers in FP8, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, Float8Linear(child))
        else:
            in_float8(child)
    return model


def forward_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids [B, L] to the last hidden state through embeddings and layers, with nothing around them."""

    def run(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            hidden = model.embeddings(input_ids=ids)
            for layer in model.encoder.layer:
                out = layer(hidden)
                hidden = out[0] if isinstance(out, tuple) else out
            return hidden

    return run


def random_model(name: str, few_layers: bool = not ON_GPU) -> Any:
    """A BERT of this size, randomly initialised, without pooler; `few_layers` launch the same kernels as all."""
    from transformers import BertConfig, BertModel

    layers, width, heads, inner = MODELS[name]
    if MODE == "dry":
        layers, width, heads, inner = 2, 64, 2, 128
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=2 if few_layers else layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=30522 if ON_GPU else 2100,  # neither is a multiple of 16
    )
    return BertModel(config, add_pooling_layer=False).eval()


def baselines(model: Any, autotune: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """fp16 and FP8, each layer compiled; with `autotune` torch tries Triton's products beside cuBLAS."""
    mode = "max-autotune-no-cudagraphs" if autotune else None
    half = copy.deepcopy(model).half().to(DEVICE)
    # Not the other way round: .bfloat16() would convert e4m3 weights too.
    eight = in_float8(copy.deepcopy(model).bfloat16()).to(DEVICE)
    eager = copy.deepcopy(half)
    if ON_GPU:
        models: list[Any] = [half, eight]
        for one in models:
            for layer in one.encoder.layer:
                layer.compile(mode=mode, dynamic=False)
    tuned = ", max-autotune" if autotune else ""
    found = {BASE + tuned: forward_of(half), FP8 + tuned: forward_of(eight)}
    return found if autotune else {"fp16 eager": forward_of(eager)} | found


def packed_encoder(model: Any, bits: int, ranges: str = "static", operands: str = "int8") -> Any:
    """`model` packed in fp16 with a fast forward."""
    data = [make_batch(4, 32 if MODE == "dry" else 128, False, torch.device("cpu")) for _ in range(2)]
    for one in data:
        one["input_ids"] %= 2000
    held = model.to(DEVICE)
    data = [{key: value.to(DEVICE) for key, value in one.items()} for one in data]
    config = qbert.BitsConfig(bits, activation_range=ranges, range_method="minmax")
    student = qbert.quantize_model(held, config, calibration_data=data if ranges == "static" else None)
    packed = qbert.pack(student).to(torch.float16)
    if ON_GPU:
        return qbert.optimize_for_inference(packed, inplace=True, operands=operands)
    from qbert.inference.gpu import GpuEncoder

    packed.forward = GpuEncoder(packed, operands=operands, capture=_instead_of_a_graph if MODE == "dry" else None)
    return packed


def _instead_of_a_graph(run: Run, bucket: Bucket, buffers: Buffers) -> tuple[Callable[[], Any], Tensor]:
    spans = Spans(buffers.starts, bucket.longest, bucket.uniform)
    return partial(run, buffers.inputs, spans), run(buffers.inputs, spans)


def warm(name: str, shapes: Sequence[str], engine: str) -> int:
    """Compiles what an encoder launches into Triton's cache, for the processes that measure it later."""
    encoder = packed_encoder(random_model(name, few_layers=True), **ENGINES[engine])
    for text in shapes[:1] if MODE == "dry" else shapes:
        size, length, mixed = parse_shape("2x8" if MODE == "dry" else text)
        batch = make_batch(size, length, mixed, DEVICE)
        batch["input_ids"] %= 2000
        with _launches(engine):
            _call(encoder, batch)()
    torch.cuda.synchronize()
    return 0


def engines(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Packed encoders by name; one that cannot be made is said and left out."""
    found: dict[str, Any] = {}
    for name in names:
        start = time.time()
        try:
            same = [found[n] for n in found if ENGINES[n] == ENGINES[name]]
            made = copy.deepcopy(same[0]) if same else packed_encoder(copy.deepcopy(model), **ENGINES[name])
            found[name] = made
            say(f"{name} made in {time.time() - start:.1f} s")
        except Exception as error:
            say(f"{name} FAILED to be made: {brief(error)}")
    return found


def measure(
    name: str, shapes: Sequence[str], names: Sequence[str], autotune: bool = False, profile: Sequence[str] = ()
) -> int:
    """Times everything at each shape ("batch x length") and prints and records it; the number of failures."""
    torch._dynamo.config.cache_size_limit = 64
    torch.set_float32_matmul_precision("high")
    timer = gpu_timing.ColdTimer(DEVICE)
    model = random_model(name)
    failures = 0
    seen: dict[str, Callable[[], Any]] = {}
    shapes = shapes[:1] if MODE == "dry" else shapes
    names = [name for name in names if name != NO_PDL or any(map(_few, shapes))]
    ours = engines(model, names)
    failures += len(names) - len(ours)
    theirs = {} if MODE == "compile" else baselines(model, False) | (baselines(model, True) if autotune else {})
    for text in shapes:
        if left() < 10:
            say(f"{name} {text} left out: {left():.0f} s left")
            continue
        size, length, mixed = parse_shape(text)
        if MODE == "dry":
            size, length = 2, 8
        batch = make_batch(size, length, mixed, DEVICE)
        batch["input_ids"] %= 2000
        runs: dict[str, Callable[[], Any]] = {}
        start = time.time()
        for key, run in theirs.items():
            if mixed:
                continue
            try:
                with limited(60 if "autotune" in key else 40):
                    runs[key] = _graphed(run, batch["input_ids"])
            except Exception as error:
                failures += 1
                say(f"{name} {text} {key} FAILED: {brief(error)}")
        alone: dict[str, Callable[[], Any]] = {}
        around: dict[str, float] = {}
        for key, encoder in ours.items():
            if key == NO_PDL and not _few(text):
                continue
            try:
                user = _call(encoder, batch)
                with _launches(key):  # as they are captured here, they are replayed
                    for _ in range(3):
                        user()
                runs[key] = user
                graphs = encoder.forward.graphs
                if graphs is not None and len(graphs):
                    graph = list(graphs._graphs.values())[-1]
                    alone[f"{key} graph alone"] = graph.replay
                    around[key] = _around(user, graph)
                    if not mixed:
                        masked = _call(encoder, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
                        masked()
                        around[f"{key} with a mask"] = _around(masked, graph)
            except Exception as error:
                failures += 1
                say(f"{name} {text} {key} FAILED: {brief(error)}")
        if MODE == "compile":
            say(f"{name} {text}: {len(compiled)} kernels compiled so far")
            continue
        runs |= alone
        ready = time.time() - start
        row = gpu_timing.interleaved_medians(runs, 15 if ON_GPU else 1, timer)
        base = min((v for k, v in row.items() if k.startswith(BASE)), default=row.get("fp16 eager", 0.0))
        eight = min((v for k, v in row.items() if k.startswith(FP8)), default=0.0)
        say(
            f"{name} {text} (ready in {ready:.0f} s; times as fast as compiled fp16 / FP8): "
            + "  ".join(f"{k} {1e3 * v:.0f} us ({base / v:.2f}/{eight / v:.2f})" for k, v in row.items())
        )
        record(kind="encoder", model=name, shape=text, tokens=size * length, ms=row)
        if around:
            say(f"{name} {text} around its graph: " + "  ".join(f"{k} {1e3 * v:.0f} us" for k, v in around.items()))
            record(kind="around", model=name, shape=text, ms=around)
        seen |= {f"{name} {text} {key}": runs[key] for key in profile if key in runs}
    for what, call in seen.items():
        if left() > 6:
            _profile(what, call)
    return failures


def _few(shape: str) -> bool:
    """Whether a batch has no more tokens than are launched early."""
    size, length, _ = parse_shape(shape)
    return size * length <= 2048


def _launches(engine: str) -> contextlib.AbstractContextManager[None]:
    return variable("QBERT_PDL", "0") if engine == NO_PDL else contextlib.nullcontext()


def _graphed(run: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], Any]:
    for _ in range(2):
        run(ids)
    torch.cuda.synchronize()
    return gpu_timing.captured(lambda: run(ids))


def _call(model: Any, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(**batch)[0]

    return run


def _around(user: Callable[[], Any], graph: Graph) -> float:
    """Milliseconds of a call with its graph left out, on the host's clock: Python, and what else it launches."""
    replay, graph.replay = graph.replay, lambda: None
    try:
        times = []
        for _ in range(50):
            torch.cuda.synchronize()
            start = time.perf_counter()
            user()
            times.append(time.perf_counter() - start)
    finally:
        graph.replay = replay
    return 1e3 * statistics.median(times)


def _profile(what: str, run: Callable[[], Any]) -> None:
    """The kernels of one call, by their time."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    rows = [
        (getattr(e, "device_time_total", 0) if ON_GPU else e.cpu_time_total, e.count, e.key)
        for e in seen.key_averages()
    ]
    total = sum(time_ for time_, _, _ in rows)
    say(f"kernels of {what}: {total:.0f} us in all")
    for time_, count, key in sorted(rows, reverse=True)[:12]:
        say(f"  {time_:8.0f} us  {count:4d} x {time_ / count:7.1f}  {key[:90]}")
    record(kind="profile", what=what, us={key: time_ for time_, _, key in rows})


if __name__ == "__main__":
    stand_in()
    sys.exit(measure(sys.argv[1], sys.argv[2].split(","), list(ENGINES)))
