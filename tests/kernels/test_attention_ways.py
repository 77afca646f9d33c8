"""What becomes of an attention that torch takes on and then has no plan for."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from qbert.kernels.gpu import attention_ways
from qbert.kernels.operands import Heads


def heads(length: int) -> Heads:
    query, key, value = torch.randn(length, 3, 2, 16).unbind(1)
    return Heads(query, key, value, torch.tensor([0, length], dtype=torch.int32), length, 0.25, uniform=True)


def test_a_shape_that_torch_refuses_takes_ours_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def refusing(given: Heads, *_: object) -> torch.Tensor:
        asked.append(given.longest)
        if given.longest == 257:
            raise RuntimeError("cuDNN Frontend error: No execution plans support the graph.\nmore")
        return given.query

    monkeypatch.delenv("QBERT_ATTENTION", raising=False)
    monkeypatch.setattr(attention_ways, "_way", lambda given: attention_ways.SDPA)
    monkeypatch.setattr(attention_ways, "_sdpa", refusing)
    monkeypatch.setattr(attention_ways, "_without_plan", set())
    monkeypatch.setattr(attention_ways, "attention", lambda given, *_: given.value)
    for length in (256, 257, 257):
        given = heads(length)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(attention_ways.attend(given), given.query if length == 256 else given.value)
    assert asked == [256, 257]
    assert [record.message for record in caplog.records] == [
        "torch's attention does not take (257, 2, 16): cuDNN Frontend error: No execution plans support the graph."
    ]
    monkeypatch.setenv("QBERT_ATTENTION", "sdpa")
    with pytest.raises(RuntimeError, match="No execution plans"):
        attention_ways.attend(heads(257))
