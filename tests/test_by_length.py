"""Calibration rows by length: the same rows, with less padding, for every model that does not read it."""

from typing import Any

import pytest
import torch
from encoders import build, outputs
from torch import nn

import qbert
from qbert.calibration import by_length, run_batch


def padded_batches(pad: int = 0, types: bool = False, pairs: bool = False) -> list[dict[str, torch.Tensor]]:
    """Three batches of four rows of 2 to 11 tokens in rooms of 11 and 12."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for room in (11, 12, 11):
        shape = (4, 2) if pairs else (4,)
        lengths = torch.randint(2, 12, shape, generator=generator)
        mask = (torch.arange(room) < lengths.unsqueeze(-1)).long()
        ids = torch.randint(5, 90, (*shape, room), generator=generator) * mask + pad * (1 - mask)
        batches.append(
            {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": mask * (ids % 2)} if types else {})
        )
    return batches


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    """Ids and types of the tokens of every row, without padding."""
    found = []
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"]):
            entries = [batch[name][row][mask.bool()].tolist() for name in sorted(batch) if name != "attention_mask"]
            found.append(tuple(value for entry in entries for value in entry))
    return sorted(found)


@pytest.mark.parametrize(("family", "pad"), [("bert", 0), ("roberta", 1), ("distilbert", 0), ("mpnet", 1)])
def test_the_same_rows_give_the_same_outputs_in_fewer_places(family: str, pad: int) -> None:
    model = build(family).eval()
    given = padded_batches(pad, types=family == "bert")
    found = by_length(model, given)
    assert rows_of(found) == rows_of(given) and [len(b["input_ids"]) for b in found] == [4, 4, 4]
    lengths = [n for batch in found for n in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)
    assert all(batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] for batch in found)
    for got, expected in zip(*(sorted(outputs_by_row(model, batches)) for batches in (found, given)), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def outputs_by_row(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[list[float]]:
    return [row.flatten().tolist() for batch in batches for row in outputs(model, batch)]


def test_rounding_does_not_depend_on_how_rows_were_batched() -> None:
    model, given = build("bert").eval(), padded_batches()
    config = qbert.BitsConfig(3, rounding="compensated")
    first, second = (
        qbert.quantize_model(model, config, calibration_data=data) for data in (given, by_length(model, given))
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_pairs_of_texts_stay_together() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build("bert").bert.eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            states = self.backbone(input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1))[0]
            return {"sentence_embedding": states[:, 0].unflatten(0, (-1, 2))}

    given = padded_batches(pairs=True)
    found = by_length(Pairs(), given)
    assert found[0]["input_ids"].shape[1] == 2 and found[0]["input_ids"].shape[2] < 11
    assert rows_of(found) == rows_of(given)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_ids": torch.full((4, 11), 100)}, "the id 100 is none of the model's 100"),
        ({"input_ids": torch.full((4, 11), -1)}, "the id -1 is none of the model's 100"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.long)}, r"a batch has input_ids \[0, 8\]; leave empty"),
        ({"input_ids": torch.ones(8, dtype=torch.long)}, r"input_ids has the shape \[8\] instead of \[B, T\]"),
        ({"token_type_ids": torch.full((4, 11), 7)}, "the token type 7 is none of the model's 2; tokenize"),
        ({"position_ids": torch.full((4, 11), 999)}, "the position 999 is none of the model's .*; leave position_ids"),
    ],
)
def test_rows_that_no_model_could_read_are_refused(change: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        qbert.quantize_model(build("bert"), 3, calibration_data=[padded_batches()[0] | change])


class _Wrapped(nn.Module):
    """Takes fewer keys than labelled batches have, or passes all of them on."""

    def __init__(self, catches: bool = False) -> None:
        super().__init__()
        self.inner = build("bert").eval()
        if catches:
            self.forward = self.caught  # type: ignore[method-assign, assignment]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, attention_mask=attention_mask).logits

    def caught(self, input_ids: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, **others).logits


@pytest.mark.parametrize(
    "config", [qbert.BitsConfig(4, activation_range="static"), qbert.BitsConfig(3, rounding="compensated")]
)
def test_keys_that_forward_does_not_take_are_left_out(config: qbert.BitsConfig) -> None:
    model, ids = _Wrapped(), torch.randint(5, 90, (4, 11))  # no padding, so that neither form is put together anew
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labelled = {**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
    one, other = (
        qbert.quantize_model(model, config, calibration_data=[given]).state_dict() for given in (batch, labelled)
    )
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


def test_what_a_catch_all_passes_on_is_kept_and_what_forward_lacks_is_named() -> None:
    batch, wrapped = padded_batches()[0], _Wrapped(catches=True)
    with torch.no_grad():
        assert torch.equal(run_batch(wrapped, batch), wrapped.inner(**batch).logits)
    with pytest.raises(ValueError, match=r"the forward of _Wrapped needs 'attention_mask'"):
        qbert.quantize_model(_Wrapped(), 4, calibration_data=[{"input_ids": batch["input_ids"]}])


class _ReadsPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.table(input_ids).mean(1)}


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (_ReadsPadding(), {}),
        (build("bert").eval(), {"labels": torch.zeros(4)}),
        (build("bert").eval(), {"attention_mask": torch.tensor([0] + [1] * 10).repeat(4, 1)}),
    ],
    ids=["a model that reads padding", "labels", "padding on the left"],
)
def test_other_batches_come_back_as_they_are(model: nn.Module, change: dict[str, torch.Tensor]) -> None:
    given = [batch | change for batch in padded_batches()[::2]]
    found = by_length(model, given)
    assert all(a is b for a, b in zip(found, given, strict=True))
