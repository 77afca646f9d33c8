"""The choice of engines: what is taken from which times, what is remembered and refused, and what each computes."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from torch import nn
from transformers import AutoModel

import qbert
from qbert.inference import engines
from qbert.inference.cpu import optimize_for_inference
from qbert.inference.engines import ENGINES, INT8, LIMITS, TOKENS, Choice, best, choose, reason_not
from qbert.packing import pack

RUN = [e for e in ENGINES if not reason_not(e)]


def encoder(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(build("bert").config).eval()
    return pack(qbert.quantize_model(model, qbert.BitsConfig(4, **settings)))


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize("engine", RUN)
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric"])
def test_each_engine_computes_the_packed_model(engine: str, ranges: str) -> None:
    packed, batch = encoder(activation_range=ranges), inputs_for("bert", 3, 11)
    unrounded = encoder(activation_bits=None)  # of the same weights
    fast = optimize_for_inference(packed, engine=engine)
    assert f"fused layers: {engine} (as asked)" in repr(fast)
    expected = hidden(packed if engine in INT8 else unrounded, batch)
    limit = 0.02 if engine != "fp32" else 1e-5
    assert (hidden(fast, batch) - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("engine", RUN)
def test_no_engine_looks_at_padding_or_at_the_rest_of_the_batch(engine: str) -> None:
    packed = encoder(activation_range="asymmetric")
    lengths = torch.tensor([9, 3, 7, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape)
    for skip in (False, True):
        fast = optimize_for_inference(packed, engine=engine, skip_padding=skip)
        with torch.no_grad():
            together = fast(ids, mask)[0]
            others = fast(torch.where(mask.bool(), ids, 7), mask)[0]
            for row, length in enumerate(lengths):
                alone = fast(ids[row : row + 1, :length])[0][0]
                for got in (together[row, :length], others[row, :length]):
                    assert (got - alone).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize("engine", RUN)
def test_a_single_layer_runs_by_each_engine(engine: str) -> None:
    layer = pack(qbert.quantize_model(nn.Sequential(nn.Linear(48, 24)), 8))
    x = torch.randn(2, 5, 48)
    expected, fast = layer(x), optimize_for_inference(layer, engine=engine)
    for dtype in (torch.float32, torch.bfloat16):
        got = fast(x.to(dtype))
        assert got.dtype == dtype and got.shape == (2, 5, 24)
        assert (got.float() - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))


@pytest.mark.skipif("native" not in RUN, reason=reason_not("native"))
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_students_with_fewer_heads_and_columns_run_by_the_native_engine(family: str) -> None:
    torch.manual_seed(0)
    teacher = AutoModel.from_config(build(family).config).eval()
    student = qbert.prune(teacher, heads=[0.5, 0.25], ffn=[0.0, 0.4])
    packed = pack(qbert.quantize_model(student, qbert.BitsConfig(4, activation_range="asymmetric")))
    mask = (torch.arange(9) < torch.tensor([[9], [3], [7], [1]])).long()
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    expected = hidden(packed, batch)
    assert "native" in repr(optimize_for_inference(packed))
    for skip in (False, True):
        fast = optimize_for_inference(packed, engine="native", skip_padding=skip)
        assert (hidden(fast, batch) - expected).norm() < 0.02 * expected.norm()


def test_what_another_engine_computes_is_taken_where_it_is_over_a_twentieth_faster() -> None:
    assert best({"native": 3.0, "fbgemm": 2.0, "bf16": 1.92}) == "fbgemm"
    assert best({"native": 3.0, "fbgemm": 2.0, "bf16": 1.9}) == "bf16"
    assert best({"native": 1.0, "fp32": 0.99}) == "native"
    assert best({"fp32": 1.1}) == "fp32"


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_slower_than_bf16_or_fp32_by_more_than_a_few_percent(seed: int) -> None:
    values = torch.rand(5, generator=torch.Generator().manual_seed(seed)).add(0.5).tolist()
    times = dict(zip(ENGINES, values, strict=True))
    assert times[best(times)] <= 1.05 * min(times["bf16"], times["fp32"])


def test_the_number_of_tokens_decides() -> None:
    choice = Choice(("native", "fbgemm", "bf16"), ({}, {}, {}), "")
    assert [choice.at(n) for n in (1, LIMITS[0], LIMITS[0] + 1, LIMITS[1], LIMITS[1] + 1, 10**6)] == [
        "native", "native", "fbgemm", "fbgemm", "bf16", "bf16"
    ]  # fmt: skip


def measured(monkeypatch: pytest.MonkeyPatch, busy: bool = False) -> list[str]:
    """Makes times up instead of measuring them, and tells what was asked."""
    asked: list[str] = []

    def times(calls: Any, rounds: int) -> tuple[dict[str, float], bool]:
        for name, run in calls.items():
            run()
            asked.append(name)
        return {name: 1e-6 * (1 + place / 4) for place, name in enumerate(calls)}, busy

    monkeypatch.setattr(engines, "measure", times)
    monkeypatch.setattr(engines, "_passing", {})
    return asked


CALLS: Any = {name: lambda tokens: (lambda: tokens, lambda: lambda: tokens) for name in ("fbgemm", "fp32")}


def test_what_was_measured_is_remembered_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    asked, calls = measured(monkeypatch), CALLS
    first = choose("some shape", calls)
    assert first.engines == ("fbgemm",) * len(TOKENS) and "busy machine" not in str(first) and len(asked) == 12
    assert choose("some shape", calls) == first and len(asked) == 12
    (path,) = (tmp_path / "engines").iterdir()
    content = json.loads(path.read_text())
    del content["file_sha256"]
    for damage in (
        {"key": "another machine"},
        {"engines": ["fbgemm"]},
        {"engines": ["warp"] * 3},
        {"engines": ["fp32"] * 3},
        {"note": "measured on a busy machine"},
        {"note": None, "x": 1},
    ):
        altered = {**content, **damage}
        altered.pop("note" if "x" in damage else "x", None)
        path.write_text(json.dumps(altered))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="qbert.inference.engines"):
            assert choose("some shape", calls) == first
        assert "are measured again" in caplog.text
    path.write_text("{")
    assert choose("some shape", calls) == first
    monkeypatch.setattr(engines, "_machine", lambda: "another machine")
    before = len(asked)
    choose("some shape", calls)
    assert len(asked) > before and len(list((tmp_path / "engines").iterdir())) == 2


def test_what_a_busy_machine_measured_serves_its_own_process_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    asked = measured(monkeypatch, busy=True)
    with caplog.at_level(logging.INFO, logger="qbert.inference.engines"):
        first = choose("some shape", CALLS)
    assert "busy machine" in str(first) and "are not remembered: some shape" in caplog.text
    assert not (tmp_path / "engines").exists()
    assert choose("some shape", CALLS) == first and len(asked) == 12
    asked = measured(monkeypatch)  # another process, on a machine at rest
    choose("some shape", CALLS)
    assert len(asked) == 12 and len(list((tmp_path / "engines").iterdir())) == 1


class Clock:
    """A processor whose calls take what they are told, and which others have for `load` times as long."""

    def __init__(self, load: float) -> None:
        self.load, self.own, self.counts = load, 0.0, dict[str, int]()

    def call(self, name: str, *seconds: float) -> Any:
        """A call that takes these seconds in turn."""

        def run() -> None:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.own += seconds[self.counts[name] // 2 % len(seconds)]  # every second call is timed

        return run

    def perf_counter(self) -> float:
        return self.own * self.load

    def process_time(self) -> float:
        return self.own

    thread_time = process_time


@pytest.mark.parametrize(
    ("load", "seconds", "disturbed"),
    [
        (1.0, (0.01,), False),
        (1.4, (0.01, 0.011), False),
        (1.6, (0.01,), True),
        (1.0, (0.01, 0.02, 0.02), True),
        (1.0, (1e-6, 4e-6, 4e-6), False),
    ],
    ids=["at rest", "nearly at rest", "shared", "times far apart", "no more than the clock is off by"],
)
def test_a_disturbed_measurement_is_noticed_and_takes_more_rounds(
    load: float, seconds: tuple[float, ...], disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(load)
    monkeypatch.setattr(engines, "time", clock)
    monkeypatch.setattr(engines.torch, "get_num_threads", lambda: 1)
    calls = {"a": clock.call("a", *seconds), "b": clock.call("b", 0.005), "slow": clock.call("slow", 1.0, 3.0, 3.0)}
    found, noticed = engines.measure(calls, rounds=4)
    assert noticed == disturbed
    assert found["a"] == pytest.approx(min(seconds), rel=1e-3, abs=1e-9) and found["b"] == pytest.approx(0.005)
    assert clock.counts["a"] == 3 + 2 * (12 if disturbed else 4)


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path / "file"))
    measured(monkeypatch)
    assert choose("shape", {"fp32": lambda tokens: (lambda: 0, lambda: lambda: 0)}).at(5) == "fp32"


def test_a_measurement_runs_every_candidate_and_takes_the_smallest_time() -> None:
    counts = dict.fromkeys("ab", 0)

    def call(name: str) -> Any:
        return lambda: counts.__setitem__(name, counts[name] + 1)

    seconds, _ = engines.measure({name: call(name) for name in "ab"}, rounds=2)
    assert counts["a"] == counts["b"] >= 7 and all(0 <= value < 1 for value in seconds.values())


def test_engines_that_cannot_run_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = encoder()
    with pytest.raises(ValueError, match=r"engine='warp' is unknown; use 'auto' or one of native, fbgemm"):
        optimize_for_inference(packed, engine="warp")
    with pytest.raises(ValueError, match=r"engine='bf16' cannot run these layers: some of its products are in float"):
        optimize_for_inference(encoder(activation_bits=None), engine="bf16")
    monkeypatch.setattr(engines.native, "reason_not_native", lambda: "no compiler today")
    with pytest.raises(ValueError, match=r"engine='native' cannot run here: no compiler today; use engine='auto'"):
        optimize_for_inference(packed, engine="native")
    monkeypatch.setattr(engines, "has_bf16", lambda: False)
    with pytest.raises(ValueError, match="no bfloat16 instructions"):
        optimize_for_inference(packed, engine="bf16")
    with pytest.raises(ValueError, match=r"warp_up|warm_up: \(0, 3\) is not a batch and a length"):
        optimize_for_inference(packed, warm_up=[(0, 3)])


def test_without_a_compiler_torchs_operators_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, batch = encoder(activation_range="asymmetric"), inputs_for("bert")
    monkeypatch.setattr(engines.native, "reason_not_native", lambda: "no compiler today")
    fast = optimize_for_inference(packed, warm_up=[(2, 9)])
    assert "native" not in repr(fast)
    expected = hidden(packed, batch)
    assert (hidden(fast, batch) - expected).norm() < 0.06 * expected.norm()
