"""`optimize_for_inference(engine="openvino" | "onnxruntime")`: the base model elsewhere, its promises kept."""

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for, outputs, same_state
from torch import nn

import qbert
from qbert.extras import MissingPackageError, is_installed
from qbert.inference.runtime import RuntimeModel
from qbert.runtimes.onnx import onnx_twin
from qbert.runtimes.recorded import record_model

NEEDS = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxruntime")}
ENGINES = [
    pytest.param(
        engine,
        marks=pytest.mark.skipif(
            not all(map(is_installed, packages)), reason=f"needs {' and '.join(packages)}, which are not installed"
        ),
    )
    for engine, packages in NEEDS.items()
]


@cache
def made(engine: str) -> tuple[Any, Any]:
    """A packed classifier, and what runs in `engine`; activations stay in float, so that all compute alike."""
    torch.manual_seed(0)
    model = build("bert").eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    return packed, qbert.optimize_for_inference(packed, engine=engine)


def base_calls(fast: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that the runtime gets from here on."""
    calls: list[int] = []
    session = fast.bert.forward._session
    monkeypatch.setattr(fast.bert.forward, "_session", lambda: calls.append(1) or session())
    return calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_are_those_of_the_packed_model(engine: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, fast = made(engine)
    calls = base_calls(fast, monkeypatch)
    batch = inputs_for("bert", 3, 11)
    if side == "left":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["token_type_ids"] = (torch.arange(11) > 4).long().expand(3, 11)
    wanted = outputs(packed, batch)
    got = fast(**batch, labels=torch.tensor([0, 1, 1]))  # with gradients on, which a frozen base does not want
    assert got.loss is not None and calls == [1]
    assert (got.logits - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_and_types_may_be_int32(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = made(engine)
    batch = inputs_for("bert", 3, 11)
    batch["token_type_ids"] = (torch.arange(11) > 4).long().expand(3, 11)
    wanted = outputs(fast, batch)
    calls = base_calls(fast, monkeypatch)
    assert (outputs(fast, {name: value.int() for name, value in batch.items()}) - wanted).norm() < 1e-3 * wanted.norm()
    assert calls == [1]
    with pytest.raises((IndexError, RuntimeError)):
        outputs(fast, {"input_ids": batch["input_ids"].float()})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_has_the_same_embedding_in_any_batch(engine: str) -> None:
    _, fast = made(engine)
    lengths = torch.tensor([9, 3, 7, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape)
    with torch.no_grad():
        together = fast.bert(ids, mask)[0]
        for row, length in enumerate(lengths):
            alone = fast.bert(ids[row : row + 1, :length])[0][0]
            assert (together[row, :length] - alone).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_runtime_does_not_give_comes_from_the_packed_model(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, fast = made(engine)
    calls = base_calls(fast, monkeypatch)
    batch = inputs_for("bert")
    empty = {"input_ids": batch["input_ids"], "attention_mask": torch.zeros_like(batch["input_ids"])}
    with torch.no_grad():
        got, wanted = (m(**batch, output_hidden_states=True).hidden_states for m in (fast, packed))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert torch.equal(fast(**empty).logits, packed(**empty).logits)
        for wrong in ({"input_ids": torch.tensor([[100]])}, {"input_ids": torch.ones(1, 600, dtype=torch.int64)}):
            with pytest.raises((IndexError, RuntimeError)):
                fast(**wrong)
    assert not calls


@pytest.mark.parametrize("engine", ENGINES)
def test_it_says_who_computes_can_be_copied_and_saved_and_is_packed_still(engine: str, tmp_path: Path) -> None:
    packed, fast = made(engine)
    assert f"runtime: {engine} (as asked), relative error " in repr(fast)
    batch = inputs_for("bert")
    assert torch.equal(outputs(copy.deepcopy(fast), batch), outputs(fast, batch))
    fast.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    assert same_state(loaded, packed) and torch.equal(outputs(loaded, batch), outputs(packed, batch))
    again = qbert.optimize_for_inference(fast, engine="fp32")
    assert "runtime:" not in repr(again) and "fused layers:" in repr(again)
    trainable = qbert.unpack(fast)
    assert "runtime" not in repr(trainable) and not isinstance(trainable.bert.forward, RuntimeModel)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_refused_but_a_head_can_be_trained(engine: str) -> None:
    fast = copy.deepcopy(made(engine)[1])
    fast(**inputs_for("bert"), labels=torch.tensor([0, 1])).loss.backward()
    assert fast.classifier.weight.grad is not None
    fast.bert.embeddings.LayerNorm.weight.requires_grad_()
    with pytest.raises(RuntimeError, match=rf"engine='{engine}' computes no gradients.*torch\.no_grad"):
        fast(**inputs_for("bert"))


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_are_those_of_torch(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = copy.deepcopy(made(engine)[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    outputs(fast, inputs_for("bert"))
    assert 3 in fast.bert.forward._sessions


@pytest.mark.parametrize(("engine", "packages"), NEEDS.items(), ids=NEEDS)
def test_a_missing_runtime_is_one_sentence_with_the_command(
    engine: str, packages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = qbert.pack(qbert.quantize_model(nn.Sequential(nn.Linear(8, 8)), 8))
    monkeypatch.setattr("qbert.extras.is_installed", lambda package: package != packages[-1])
    with pytest.raises(MissingPackageError, match=rf"engine='{engine}' needs .*; run: pip install {packages[-1]}"):
        qbert.optimize_for_inference(layer, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_text_encoder_is_refused(engine: str) -> None:
    layer = qbert.pack(qbert.quantize_model(nn.Sequential(nn.Linear(8, 8)), 8))
    with pytest.raises(ValueError, match=rf"engine='{engine}' cannot run Sequential: .*; use engine='auto'"):
        qbert.optimize_for_inference(layer, engine=engine)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_the_longest_text_is_known_and_checked(family: str) -> None:
    model = build(family, max_position_embeddings=40).eval()
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(4, activation_bits=None)))
    base = packed.base_model
    twin_of = partial(onnx_twin, quantize_activations=False)
    record = record_model(copy.deepcopy(base), twin_of, ("input_ids", "attention_mask"))
    most = 40 if family == "bert" else 38
    assert record.longest == most and [*record.shapes()][-1] == (1, most)
    ids = torch.ones(1, most, dtype=torch.int64) + 4
    with torch.no_grad():
        base(ids)
        with pytest.raises((IndexError, RuntimeError)):
            base(torch.ones(1, most + 1, dtype=torch.int64) + 4)
