"""Vocabularies cut to a corpus: the same outputs on it, and nothing that can no longer be read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

import qbert
from qbert.students.vocabulary import student_with_vocabulary
from qbert.tasks import build_sentence_model

TEXTS = ["The film was lovely.", "A dull, slow film!", "Nobody liked the unbelievable ending"]
UNSEEN = "Zebras quarrelled incomprehensibly, naïve 漢字 #42"


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    model, tokenizer = build_sentence_model()
    return model.backbone, tokenizer


def hidden(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state


def test_texts_of_the_corpus_give_the_same_outputs(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = encoder
    student, smaller = student_with_vocabulary(model, tokenizer, TEXTS)
    assert len(smaller) == student.config.vocab_size < 2_500 and model.config.vocab_size == len(tokenizer)
    assert torch.equal(hidden(student, smaller, TEXTS), hidden(model, tokenizer, TEXTS))
    student.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    again, loaded = type(student).from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert torch.equal(hidden(again, loaded, TEXTS), hidden(model, tokenizer, TEXTS))


def test_a_word_that_was_never_seen_is_cut_into_pieces_that_are_there(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    student, smaller = student_with_vocabulary(model, tokenizer, TEXTS)
    pieces = smaller.tokenize(UNSEEN)
    assert pieces.count(smaller.unk_token) == tokenizer.tokenize(UNSEEN).count(tokenizer.unk_token)
    joined = "".join(p.removeprefix("##") for p in pieces)
    assert joined == "".join(p.removeprefix("##") for p in tokenizer.tokenize(UNSEEN))
    assert bool(torch.isfinite(hidden(student, smaller, [UNSEEN])).all())
    for name in ("pad", "cls", "sep", "mask", "unk"):
        assert getattr(smaller, f"{name}_token") == getattr(tokenizer, f"{name}_token")
        assert smaller.convert_ids_to_tokens(getattr(smaller, f"{name}_token_id")) == getattr(
            tokenizer, f"{name}_token"
        )


def test_pairs_and_padding_keep_their_special_tokens(encoder: tuple[Any, Any]) -> None:
    _, smaller = student_with_vocabulary(*encoder, TEXTS)
    old, new = (t([TEXTS[0], "A"], [TEXTS[1], "film"], padding=True) for t in (encoder[1], smaller))
    for ours, theirs in zip(new["input_ids"], old["input_ids"], strict=True):
        assert smaller.convert_ids_to_tokens(ours) == encoder[1].convert_ids_to_tokens(theirs)
    assert new["token_type_ids"] == old["token_type_ids"] and new["attention_mask"] == old["attention_mask"]


def test_a_rarer_piece_goes_first(encoder: tuple[Any, Any]) -> None:
    once, twice = (student_with_vocabulary(*encoder, TEXTS, least_count=n)[1].get_vocab() for n in (1, 2))
    assert "film" in once and "film" in twice and "dull" in once and "dull" not in twice


def test_a_trimmed_model_is_quantized_packed_and_loaded(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    student, smaller = student_with_vocabulary(*encoder, TEXTS)
    packed = qbert.pack(qbert.quantize_model(student, qbert.BitsConfig(2, embedding_bits=4)))
    packed.save_pretrained(tmp_path)
    assert torch.equal(hidden(qbert.load(tmp_path), smaller, TEXTS), hidden(packed, smaller, TEXTS))


def test_a_tied_head_stays_tied(encoder: tuple[Any, Any]) -> None:
    tokenizer = encoder[1]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    student, smaller = student_with_vocabulary(model, tokenizer, TEXTS)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    kept = torch.tensor(tokenizer.convert_tokens_to_ids(smaller.convert_ids_to_tokens(range(len(smaller)))))
    with torch.no_grad():
        ours = student(**smaller(TEXTS, padding=True, return_tensors="pt")).logits
        theirs = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(ours, theirs[..., kept])


def test_what_cannot_be_trimmed_is_refused(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    with pytest.raises(ValueError, match="texts is empty"):
        student_with_vocabulary(model, tokenizer, [])
    with pytest.raises(TypeError, match="got one"):
        student_with_vocabulary(model, tokenizer, "a text")
    with pytest.raises(ValueError, match="before it is quantized"):
        student_with_vocabulary(qbert.quantize_model(model, 4), tokenizer, TEXTS)
    small = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="table has 50 rows"):
        student_with_vocabulary(small, tokenizer, TEXTS)
