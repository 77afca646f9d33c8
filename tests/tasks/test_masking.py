"""Unlabelled text in rows, and words that are masked anew in every batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_tasks import sentiment_rows, tiny_encoder
from transformers import AutoModel, AutoTokenizer

from qbert.tasks.candidates import MaskedWords, train_masked_words
from qbert.tasks.masking import MaskWords, language_model, text_rows
from qbert.tasks.streams import TextStream

TEXTS = [row["sentence"] for row in sentiment_rows(40)]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return tiny_encoder(tmp_path)


def test_long_texts_become_several_rows(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = text_rows([" ".join(TEXTS), "", *TEXTS[:8]], tokenizer, max_length=16)
    inside = [i for row in rows for i in row["input_ids"] if i not in tokenizer.all_special_ids]
    expected = tokenizer(" ".join([*TEXTS, *TEXTS[:8]]), add_special_tokens=False)["input_ids"]
    assert inside == expected and max(len(row["input_ids"]) for row in rows) == 16


def test_words_of_a_stream_are_counted_as_those_of_rows(encoder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    stream = TextStream([tmp_path / "text.txt"], tokenizer, batch_size=4, least_words=1)
    collate = MaskWords(tokenizer, stream)
    assert torch.equal(collate.chance, MaskWords(tokenizer, text_rows(TEXTS, tokenizer)).chance)
    assert (collate(list(stream)[:8])["labels"] != -100).any()
    with pytest.raises(ValueError, match="rows can be read only once"):
        MaskWords(tokenizer, iter(stream))


def test_only_the_first_words_of_a_long_stream_are_counted(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            while True:
                yield {"input_ids": [7, 8]}

    monkeypatch.setattr("qbert.tasks.masking._COUNTED", 9)
    chance = MaskWords(AutoTokenizer.from_pretrained(encoder), Stream(), smoothing=1.0).chance
    torch.testing.assert_close(chance[[7, 8]], torch.tensor([1 / 9, 1 / 9]))


def test_words_are_asked_for_where_labels_are_and_differ_between_batches(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = text_rows(TEXTS, tokenizer)
    collate = MaskWords(tokenizer, rows, share=0.2)
    one, two = collate(rows), collate(rows)
    true = tokenizer.pad([dict(row) for row in rows], return_tensors="pt")["input_ids"]
    for batch in (one, two):
        asked = batch["labels"] != -100
        assert torch.equal(batch["labels"][asked], true[asked]) and torch.equal(
            batch["input_ids"][~asked], true[~asked]
        )
        assert not torch.isin(true[asked], torch.tensor(tokenizer.all_special_ids)).any()
        assert int(asked.sum()) == round(0.2 * int(batch["attention_mask"].sum()))
        masked = (batch["input_ids"][asked] == tokenizer.mask_token_id).float().mean()
        assert 0.6 < float(masked) < 0.95
    assert not torch.equal(one["labels"], two["labels"])


def test_rare_tokens_are_asked_for_more_often(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = text_rows(TEXTS, tokenizer)
    ids = torch.tensor([i for row in rows for i in row["input_ids"]])
    counts = torch.bincount(ids, minlength=len(tokenizer))
    chance = MaskWords(tokenizer, rows, smoothing=0.5).chance
    kept = (counts > 0) & (chance > 0)
    torch.testing.assert_close(chance[kept], counts[kept].float() ** -0.5)


def test_a_trained_head_and_its_encoder_are_a_language_model_of_transformers(encoder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    head = MaskedWords(model)
    torch.nn.init.normal_(head.dense.weight, std=0.2)
    torch.nn.init.normal_(head.bias)
    inputs = dict(tokenizer(TEXTS[:3], padding=True, return_tensors="pt"))
    places = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = language_model(model, head)(**inputs).logits[places]
        torch.testing.assert_close(found, head.at(inputs, places), rtol=1e-4, atol=1e-4)


def test_too_little_text_and_impossible_shares_are_refused(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = text_rows(TEXTS, tokenizer)
    with pytest.raises(ValueError, match="3 rows of text are too few"):
        text_rows(TEXTS[:3], tokenizer)
    with pytest.raises(ValueError, match="max_length=4"):
        text_rows(TEXTS, tokenizer, max_length=4)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        MaskWords(tokenizer, rows, share=1.5)
    with pytest.raises(ValueError, match="rows is empty"):
        MaskWords(tokenizer, [])


def test_a_head_is_trained_on_an_encoder_in_half_precision(encoder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    half = train_masked_words(model.to(torch.bfloat16), tokenizer, TEXTS, steps=2, batch_size=2, progress=False)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
