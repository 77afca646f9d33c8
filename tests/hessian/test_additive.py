"""The spectrum of a subset is that of the model's own loss on it, however it is cut and whatever the loss averages."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qbert.hessian import hessian_spectrum, hessian_traces
from qbert.hessian.losses import MeasuredLoss

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 10,
}
CLASSES = torch.tensor([0, 1, 1, 0, 1, 1])
OUTSIDE = 99  # a position beyond the text, which the loss of a span ignores


def weighted(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], weight=torch.tensor([0.1, 0.9]).double())


def problem(kind: str) -> tuple[Any, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    name = {"two terms": "PreTraining", "spans": "QuestionAnswering", "words": "MaskedLM"}.get(
        kind, "SequenceClassification"
    )
    model = getattr(transformers, f"BertFor{name}")(transformers.BertConfig(**CONFIG)).double().eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    ids = torch.randint(1, 40, (6, 40))
    mask = (torch.arange(40)[None] < torch.tensor([40, 38, 36, 6, 5, 4])[:, None]).long()
    words = torch.full_like(ids, -100)  # rows without any labelled word among them
    words[0, 1:20], words[4, 1] = 3, 5
    spans = torch.tensor([1, 2, OUTSIDE, 3, OUTSIDE, 4])
    extra = {
        "two terms": {"labels": words, "next_sentence_label": CLASSES},
        "words": {"labels": words},
        "spans": {"start_positions": spans, "end_positions": spans + 1},
    }.get(kind, {"labels": CLASSES})
    batch = {"input_ids": ids, "attention_mask": mask, **extra}
    return model, batch, weighted if kind == "class weights" else None


def dense_top(model: Any, batch: dict[str, Tensor], loss_fn: Any) -> float:
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        used = list(model.bert.encoder.layer[0].parameters())
        loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, used, create_graph=True)])
        rows = [torch.autograd.grad(x, used, retain_graph=True) for x in flat]
    hessian = torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    return float(values[values.abs().argmax()])


@pytest.mark.parametrize("kind", ["classes", "words", "two terms", "spans", "class weights"])
def test_however_it_is_cut(kind: str) -> None:
    model, batch, loss_fn = problem(kind)
    expected = dense_top(model, batch, loss_fn)
    for size in (None, 3, 1):
        found = hessian_spectrum(
            model,
            [batch],
            runs=1,
            fraction=1.0,
            tol=1e-6,
            micro_batch_size=size,
            loss_fn=loss_fn,
            progress=False,
        )
        assert found.eigenvalues[0, 0] == pytest.approx(expected, rel=1e-4)


def test_traces_too() -> None:
    model, batch, loss_fn = problem("class weights")
    whole, cut = (
        hessian_traces(model, [batch], loss_fn=loss_fn, micro_batch_size=size, probes=6, progress=False)
        for size in (6, 1)
    )
    assert whole["encoder.layer.0"].value == pytest.approx(cut["encoder.layer.0"].value, rel=1e-9)


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]


def test_a_mean_stays_cut_and_parts_without_a_label_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, batch, _ = problem("words")
    assert [len(part["input_ids"]) for part in MeasuredLoss(model, rows_of(batch)).additive().batches] == [1, 1]
    model, batch, _ = problem("classes")
    assert len(MeasuredLoss(model, rows_of(batch)).additive().batches) == 6
    assert not caplog.records


def test_what_cannot_be_cut_goes_through_at_once_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, batch, loss_fn = problem("class weights")
    (together,) = MeasuredLoss(model, rows_of(batch), loss_fn).additive().batches
    assert len(together["input_ids"]) == 6
    assert "go through the model at once" in caplog.text
    others = [*rows_of(batch), {**rows_of(batch)[0], "token_type_ids": torch.zeros(1, 40, dtype=torch.long)}]
    with pytest.raises(ValueError, match="their rows do not fit into one batch"):
        MeasuredLoss(model, others, loss_fn).additive()


@pytest.mark.parametrize("kind", ["two terms", "class weights"])
def test_gauss_newton_matrices_of_samples_are_refused_where_they_do_not_add_up(kind: str) -> None:
    model, batch, loss_fn = problem(kind)
    with pytest.raises(ValueError, match="use method='lanczos'"):
        hessian_spectrum(model, [batch], runs=1, fraction=1.0, method="ggn", loss_fn=loss_fn, progress=False)
