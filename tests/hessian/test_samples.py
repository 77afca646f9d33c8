"""Rows put together anew: nothing of the loss is lost with the padding, and cuts by length are the cheapest."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build
from transformers import LayoutLMConfig, LayoutLMForSequenceClassification

from qbert.hessian import HessianOperator, hessian_spectrum, parameter_blocks
from qbert.hessian.batches import BATCH_COST, BatchSamples, DatasetSamples, micro_batches


def padded(lengths: list[int], width: int = 12) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded to `width` with a token that is not the model's padding."""
    ids = torch.randint(5, 100, (len(lengths), width))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 2}


class Lengths(DatasetSamples):
    """Samples that are nothing but their length."""

    def __init__(self, lengths: list[int]):
        super().__init__(lengths, lambda rows: {"x": torch.tensor(rows)}, 100)

    def length(self, index: int) -> int:
        return int(self.dataset[index])


@pytest.mark.parametrize("cost", [0, 3, 20, 1000])
@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [1, 9, 2, 9, 30, 4, 5, 28], [5, 5, 6, 6, 7, 7, 40]])
def test_cuts_are_the_cheapest_of_all(lengths: list[int], cost: int) -> None:
    found = micro_batches(Lengths(lengths), range(len(lengths)), 100, batch_cost=cost)
    groups = [batch["x"].tolist() for batch in found]
    assert list(itertools.chain(*groups)) == sorted(lengths)

    def price(parts: list[list[int]]) -> int:
        return sum(len(part) * max(part) + cost for part in parts)

    ordered, inner = sorted(lengths), range(1, len(lengths))
    every = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(len(lengths)))
    cheapest = min(price([ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))]) for cuts in every)
    assert price(groups) == cheapest
    assert len(micro_batches(Lengths(lengths), range(len(lengths)), 100)) == 1  # without a cost: as few as can be


def test_rows_lose_the_padding_that_they_came_with_and_the_hessian_does_not_change() -> None:
    model = build("bert", hidden_size=8, num_attention_heads=2, intermediate_size=12).double().eval()
    batch = padded([3, 12, 5, 4])
    samples = BatchSamples([batch], trim=True)
    assert [samples.length(i) for i in range(4)] == [3, 12, 5, 4]
    (three,) = samples.collate([0, 2, 3])
    assert three["input_ids"].shape == (3, 5) and three["attention_mask"].sum() == 12
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    whole, cut = (
        HessianOperator(model, batches, blocks)
        for batches in ([batch], micro_batches(samples, range(4), 4, batch_cost=1))
    )
    assert len(cut.batches) > 1
    for name in blocks:
        v = torch.randn(whole.size(name), dtype=torch.float64)
        torch.testing.assert_close(cut.product(name, v), whole.product(name, v), rtol=1e-9, atol=1e-12)


def test_what_carries_labels_or_cannot_be_padded_is_kept() -> None:
    batch = padded([3, 6], width=8)
    batch["labels"] = torch.full((2, 8), -100)
    batch["labels"][0, 5] = 1  # a labelled token outside of the mask still counts in the loss
    samples = BatchSamples([batch], trim=True)
    assert [samples.length(i) for i in range(2)] == [6, 6]
    left = padded([8, 8], width=8)
    left["attention_mask"][0, :5] = 0  # padding on the left stays where it is
    assert [BatchSamples([left], trim=True).length(i) for i in range(2)] == [8, 8]
    unknown = {**padded([3, 6], width=8), "something_by_token": torch.randn(2, 8)}
    assert [BatchSamples([unknown], trim=True).length(i) for i in range(2)] == [8, 8]
    spans = {k: v for k, v in padded([3, 6], width=8).items() if k != "labels"}
    spans["start_positions"] = spans["end_positions"] = torch.tensor([1, 2])  # their softmax runs over the padding
    assert [BatchSamples([spans], trim=True).length(i) for i in range(2)] == [8, 8]
    assert [BatchSamples([padded([3, 6], width=8)]).length(i) for i in range(2)] == [8, 8]  # unless asked to
    nothing = padded([3, 6], width=8)
    nothing["attention_mask"][0] = 0
    assert [BatchSamples([nothing], trim=True).length(i) for i in range(2)] == [8, 6]


def test_boxes_of_tokens_are_cut_and_padded_with_them() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
    config = LayoutLMConfig(**sizes, intermediate_size=12, max_position_embeddings=16, max_2d_position_embeddings=64)
    model = LayoutLMForSequenceClassification(config).eval()
    batch = padded([3, 12, 5, 4])
    batch["bbox"] = torch.randint(1, 60, (4, 12, 1)).expand(-1, -1, 4).contiguous()
    samples = BatchSamples([batch], trim=True)
    (merged,) = samples.collate([0, 2])
    assert merged["bbox"].shape == (2, 5, 4) and not merged["bbox"][0, 3:].any()
    assert torch.equal(merged["bbox"][0, :3], batch["bbox"][0, :3])
    settings: Any = {"runs": 1, "fraction": 1.0, "tol": 1e-4, "progress": False}
    cut = hessian_spectrum(model, [batch], micro_batch_size=1, **settings)
    whole = hessian_spectrum(model, [batch], loss_fn=lambda model, batch: model(**batch).loss, **settings)
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-5)
    unknown = {**padded([3, 6], width=8), "something_by_token": torch.randn(2, 8, 3)}
    assert [BatchSamples([unknown], trim=True).length(i) for i in range(2)] == [8, 8]


def test_positions_for_all_rows_may_come_first_or_last() -> None:
    batch, positions = padded([8, 8, 8], width=8), torch.arange(8)[None]
    for given in ({"position_ids": positions, **batch}, {**batch, "position_ids": positions}):
        samples = BatchSamples([given], trim=True)
        assert len(samples) == 3
        (two,) = samples.collate([0, 2])
        assert torch.equal(two["position_ids"], positions.expand(2, -1))
        assert torch.equal(two["input_ids"], batch["input_ids"][[0, 2]])
    with pytest.raises(ValueError, match="'labels' has the shape"):
        BatchSamples([{**batch, "labels": torch.zeros(2)}])


@pytest.mark.parametrize("labels", [np.array(["a", "b"]), ["a", "b"], [0, 1]], ids=["numpy", "strings", "numbers"])
def test_labels_that_are_no_tensor_are_refused_by_name(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"'labels' is a list of .*; make a tensor of it"):
        BatchSamples([{**padded([3, 6], width=8), "labels": labels}])
    BatchSamples([{**padded([3, 6], width=8), "text": np.array(["a", "b"])}])


def test_spectra_are_the_same_however_batches_are_cut(monkeypatch: Any) -> None:
    model, batch = build("bert"), padded([3, 12, 5, 4, 4, 3])
    settings: Any = {"runs": 1, "fraction": 1.0, "tol": 1e-4, "progress": False}
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    monkeypatch.setitem(BATCH_COST, "cpu", 1)
    cut = hessian_spectrum(model, [batch], **settings)
    assert len(set(widths)) > 1 and max(widths) == 12
    widths.clear()
    monkeypatch.delitem(BATCH_COST, "cpu")
    whole = hessian_spectrum(model, [batch], **settings)
    assert set(widths) == {12}
    np.testing.assert_allclose(cut.eigenvalues, whole.eigenvalues, rtol=2e-4)
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-6)


def test_losses_of_the_users_own_see_their_batches_as_they_are() -> None:
    model, batch = build("bert"), padded([3, 12, 5, 4])
    widths: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Any:
        widths.append(batch["input_ids"].shape[1])
        return model(**batch).loss

    hessian_spectrum(model, [batch], runs=1, fraction=1.0, tol=0.1, loss_fn=loss_fn, progress=False)
    assert set(widths) == {12}
