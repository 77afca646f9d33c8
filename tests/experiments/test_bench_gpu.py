"""The GPU benchmarks without a GPU: shapes, medians, bars, table and plot from made-up timings; a clear refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXPERIMENTS, run_here
from scripts import load_bench as load


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "bench"))


def test_medians_of_interleaved_rounds() -> None:
    timing = load("gpu_timing")
    calls: list[str] = []
    clocks = {"a": iter([1.0, 9.0, 2.0] * 4), "b": iter([10.0, 30.0, 20.0] * 4)}

    def timer(run: Any) -> float:
        run()
        return next(clocks[calls[-1]])

    engines = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert timing.interleaved_medians(engines, 12, timer, warm_up=2) == {"a": 2.0, "b": 20.0}
    rounds = ["".join(calls[place : place + 2]) for place in range(4, len(calls), 2)]
    assert calls[:4] == ["a", "a", "b", "b"] and len(rounds) == 12
    assert set(rounds) == {"ab", "ba"}  # no engine always follows the same one


def test_bars_name_the_worst_shape() -> None:
    timing = load("gpu_timing")
    times = {("x", 16): {"ours": 1.0, "theirs": 2.0}, ("y", 16): {"ours": 1.0, "theirs": 1.4}, ("x", 64): {"ours": 1.0}}
    lines = timing.check_bars(
        times,
        [
            timing.Bar("ours", "theirs", 1.5),
            timing.Bar("ours", "theirs", 1.4, 1, 16),
            timing.Bar("ours", "theirs", 1.0, 64),
        ],
    )
    assert "MISSED, 1.40x at worst (y, 16 tokens)" in lines[0] and "16 tokens: at least" in lines[1]
    assert "reached" in lines[1] and lines[2].endswith("not measured")


def test_kernel_page(tmp_path: Path) -> None:
    bench = load("low_bit_products")
    shapes = bench.layer_shapes(["BERT-base"])
    assert [s[1:] for s in shapes] == [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    for _, rows, columns in bench.layer_shapes(list(bench.MODELS)):
        copies = bench.copies_for(16, rows, columns)
        assert copies * rows * columns // 4 > 60 << 20  # the L2 cache of an H200
        assert 4 <= bench.copies_for(16384, rows, columns) <= 32
    row = {bench.CUBLAS: 0.016, bench.INT_MM: 0.009, "W8A8": 0.01, "W4A8": 0.008, "W2A8": 0.02, "W3A8": 0.0101}
    times = {("BERT-base qkv", 4096): row, ("BERT-base ffn in", 16): {bench.CUBLAS: 0.002, "W4A16": 0.001}}
    page = bench.render(times, {"gemlite W4A16": "not installed"}, "made by hand")
    assert "W4A8 against cuBLAS fp16, 4096 tokens and more: at least 1.60x: reached, 2.00x" in page
    assert "W2A8 against W8A8, 1 tokens and more: at least 0.97x: MISSED, 0.50x" in page
    assert "| BERT-base qkv | 4096 | 16.0 (1.00) |" in page and "8.0 (2.00)" in page and "gemlite W4A16 (not" in page
    bench.plot(times, bench.CUBLAS, str(tmp_path / "plot.png"), "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_own_engines_and_the_baseline_multiply() -> None:
    bench = load("low_bit_products")
    x = torch.randn(20, 128).half()
    quantized = bench.operators.quantize_rows(x)
    engines = [bench._ours_a8(*quantized, 64, 3, 2), bench._ours_a16(x, 64, 2), bench._cublas(x, 64, 2)]
    assert all(engine(1).shape == (20, 64) and engine(0).dtype == torch.float16 for engine in engines)
    assert bench._int_mm(quantized[0], 64, 2)(1).shape == (20, 64)


def test_encoder_page() -> None:
    bench = load("inference_gpu")
    assert [bench.parse_shape(s) for s in ("8x384", "32x128mixed")] == [(8, 384, False), (32, 128, True)]
    for bad in ("8", "8x0", "8x513", "8x16x2", "x16"):
        with pytest.raises(ValueError, match="is not batch x length"):
            bench.parse_shape(bad)
    batch = bench.make_batch(4, 64, True, torch.device("cpu"))
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [4, 24, 44, 64]
    assert list(bench.make_batch(2, 16, False, torch.device("cpu"))) == ["input_ids"]
    bench.MODELS["tiny"] = (1, 32, 2, 64)
    for ranges in ("static", "asymmetric"):
        engines = bench.build_engines("tiny", ranges, torch.device("cpu"))
        assert list(engines) == [bench.BASE, *bench.BITS]
        assert all(bench._call(engines[key], batch)().dtype == torch.float16 for key in bench.BITS)
    name = "BERT-base length 128"
    times = {(name, 128): {bench.BASE: 0.3, "W4A8": 0.16}, (name, 16384): {bench.BASE: 5.0, "W4A8": 3.2}}
    page = bench.render(times, "made by hand", "static")
    assert "W4A8 against fp16 compiled, 8193 tokens and more: at least 1.70x: MISSED, 1.56x" in page
    assert "W4A8, BERT-base length 128, 128 tokens: at most 170 us: reached, 160 us" in page
    assert "W4A8, BERT-large length 128, 16384 tokens: at most 10050 us: not measured" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["bench/low_bit_products.py", "bench/inference_gpu.py"])
def test_without_a_gpu_one_sentence_says_so(script: str) -> None:
    run = run_here(script)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "times a GPU and torch finds none here; run it on a machine with an NVIDIA GPU" in run.stderr
