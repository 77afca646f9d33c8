"""Altered copies of rows: deterministic, valid, and never without a word of the original."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tasks import sentiment_rows, tiny_encoder
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from qbert.tasks.augment import Lexical, augmented, cut_to_words, with_words, words_of
from qbert.tasks.candidates import LikelyWords, MaskedWords, _spans, top_recall, train_masked_words
from qbert.tasks.task import Task

TEXTS = st.lists(st.sampled_from(["good", "film", "it's", ",", "2", "well-made", "--", "é", "."]), max_size=12).map(
    " ".join
)


def tags(words: Any) -> list[str]:
    return [word[-1] for word in words]


def lexical(**settings: Any) -> Lexical:
    return Lexical(mask_token="[MASK]", **{"tagger": tags, "tagger_name": "last letter", **settings})


def sentences(count: int = 12, pairs: bool = False) -> Task:
    rows = [{"sentence": row["sentence"], "label": row["label"]} for row in sentiment_rows(count)]
    fields: tuple[str, ...] = ("sentence",)
    if pairs:
        rows = [{**row, "other": rows[-i]["sentence"]} for i, row in enumerate(rows)]
        fields = ("sentence", "other")
    names = ("bad", "good")
    return Task("toy", "classification", fields, names, {"train": rows}, ("accuracy",), "accuracy", "test")


@given(
    text=TEXTS,
    seed=st.integers(0, 10**6),
    chances=st.sampled_from([(0.1, 0.1, 0.25), (1.0, 0.0, 1.0), (0.4, 0.6, 0.5)]),
)
def test_a_copy_is_a_run_of_the_sentence_with_some_word_left(
    text: str, seed: int, chances: tuple[float, float, float]
) -> None:
    method = lexical(mask=chances[0], same_class=chances[1], ngram=chances[2])
    method.begin([text, "good bad 3"])
    copy = method.alter(text, random.Random(seed))
    assert copy == method.alter(text, random.Random(seed))
    known = set(words_of(text)) | {"good", "bad", "3"}
    old, new = words_of(text), words_of(copy.replace("[MASK]", "MASK"))
    assert len(new) <= len(old) and set(new) <= known | {"MASK"}
    places = range(len(old) - len(new) + 1)
    assert not old or any(any(a == b for a, b in zip(old[at:], new, strict=False)) for at in places)


@given(text=TEXTS, data=st.data())
def test_words_are_put_back_where_they_stood(text: str, data: Any) -> None:
    words = words_of(text)
    assert with_words(text, words) == text
    assert words_of(with_words(text, [word.upper() for word in words])) == [word.upper() for word in words]
    if words:
        first = data.draw(st.integers(0, len(words) - 1))
        count = data.draw(st.integers(1, len(words) - first))
        assert words_of(cut_to_words(text, first, count)) == words[first : first + count]


def test_every_window_is_drawn_and_short_sentences_are_not_skipped() -> None:
    method = lexical(mask=0.0, same_class=0.0, ngram=1.0, tagger=None, tagger_name="")
    drawn = {method.alter("one two three", random.Random(seed)) for seed in range(300)}
    assert drawn == {"one", "two", "three", "one two", "two three", "one two three"}
    assert method.alter("alone", random.Random(0)) == "alone" and method.alter(" -- ", random.Random(0)) == " -- "
    more = augmented(sentences(), method, copies=5, progress=False)
    copied = {row["sentence"][:3] for row in more.task.splits["train"][12:]}
    assert copied and more.copies > 12  # a row with few words does not end the copies of others


def test_words_are_exchanged_for_those_of_their_class() -> None:
    method = lexical(mask=0.0, same_class=1.0, ngram=0.0)
    method.begin(["bad good mad", "red"])
    drawn = {method.alter("bad good mad", random.Random(seed)).split()[1] for seed in range(80)}
    assert drawn == {"bad", "good", "mad", "red"}


def test_without_a_tagger_no_word_is_exchanged() -> None:
    method = lexical(mask=0.0, same_class=1.0, ngram=0.0, tagger=None, tagger_name="")
    method.begin(["bad good"])
    assert method.alter("bad good", random.Random(0)) == "bad good"


@pytest.mark.parametrize("pairs", [False, True])
def test_copies_are_new_rows_of_the_same_kind(pairs: bool) -> None:
    task = sentences(pairs=pairs)
    more = augmented(task, lexical(), copies=6, progress=False)
    again = augmented(task, lexical(), copies=6, progress=False)
    rows = more.task.splits["train"]
    assert rows == again.task.splits["train"] and list(rows[:12]) == list(task.splits["train"])
    keys = [tuple(row[name] for name in task.text_fields) for row in rows]
    assert len(set(keys)) == len(keys) and more.copies == len(rows) - 12
    assert augmented(task, lexical(), copies=6, seed=1, progress=False).task.splits["train"] != rows
    fewer = augmented(task, lexical(), copies=6, limit=7, progress=False)
    assert fewer.task.splits["train"] == rows[:19]


def test_sentences_of_a_pair_are_altered_in_turn_and_never_mixed() -> None:
    task = sentences(1, pairs=True)
    row = task.splits["train"][0]
    method = Lexical(mask_token="[MASK]", mask=0.9, same_class=0.0, ngram=0.0)
    copies = augmented(task, method, copies=3, progress=False).task.splits["train"][1:]
    assert [copy["sentence"] != row["sentence"] for copy in copies] == [True, False, True]
    assert [copy["other"] != row["other"] for copy in copies] == [False, True, True]
    for copy in copies:
        for name in ("sentence", "other"):
            old, new = words_of(row[name]), copy[name].replace("[MASK]", "_MASK").split()
            assert all(word in old for word in words_of(" ".join(w for w in new if "_" not in w)))


def test_copies_are_kept_and_found_again_by_what_they_depend_on(tmp_path: Path) -> None:
    task = sentences()
    first = augmented(task, lexical(), copies=3, cache=tmp_path, progress=False)
    again = augmented(task, lexical(), copies=3, cache=tmp_path, progress=False)
    assert again.from_cache and not first.from_cache and again.task.splits == first.task.splits
    other = [replace(task, splits={"train": list(task.splits["train"][1:])}), lexical(mask=0.2)]
    assert not augmented(other[0], lexical(), copies=3, cache=tmp_path, progress=False).from_cache
    assert not augmented(task, other[1], copies=3, cache=tmp_path, progress=False).from_cache
    assert "copies of rows from the cache" in str(again)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tiny_encoder(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_words_and_their_pieces_are_found(masked: tuple[Any, Any]) -> None:
    _, tokenizer = masked
    (sentence,) = _spans(tokenizer, ["the filming , a superb anna"], 32)
    assert sentence.words == ["the", "filming", "a", "superb", "anna"]
    assert [count for _, count in sentence.pieces] == [1, 4, 1, 1, 1]
    assert tokenizer.convert_ids_to_tokens(sentence.ids[sentence.pieces[3][0]]) == "superb"
    (cut,) = _spans(tokenizer, ["the filming"], 4)
    assert [count for _, count in cut.pieces] == [1, 0]  # a word that was cut in two has no place of its own


def test_a_head_learns_which_words_are_likely(masked: tuple[Any, Any], tmp_path: Path) -> None:
    encoder, tokenizer = masked
    texts = [row["sentence"] for row in sentiment_rows(60)]
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    settings: Any = {"batch_size": 16, "progress": False, "cache": tmp_path}
    head = train_masked_words(encoder, tokenizer, texts, steps=60, **settings)
    untrained = MaskedWords(encoder).eval()
    top = {"top": 5}
    assert top_recall(head, tokenizer, texts, **top) > top_recall(untrained, tokenizer, texts, **top) + 20
    assert all(torch.equal(before[name], p) for name, p in encoder.state_dict().items())
    kept = train_masked_words(encoder, tokenizer, texts, steps=60, **settings)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), kept.state_dict().values(), strict=True))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("apart", [None, 2])
def test_likely_words_are_whole_words_and_stop_words_stay(masked: tuple[Any, Any], apart: int | None) -> None:
    encoder, tokenizer = masked
    method = LikelyWords(MaskedWords(encoder).eval(), tokenizer, chance=1.0, likely=4, apart=apart, progress=False)
    texts = ["The Film was superb and the filming in rome 2", "kind songs", "the"]
    method.begin(texts)
    found = method._found[texts[0]]
    assert set(found) == {1, 3, 6, 8}  # the, was, and, in and the number stay
    for word in (1, 3, 8):
        assert len(found[word]) == 4 and all(new.isalpha() and len(new) > 1 for new in found[word])
    assert all(new.istitle() for new in found[1]) and not {"superb"} & set(found[3])
    assert found[6] and all(new in {"film", "superb", "rome", "kind", "songs"} for new in found[6])
    copies = [method.alter(texts[0], random.Random(seed)) for seed in range(5)]
    assert len(set(copies)) > 1 and all(copy.split()[0] == "The" and copy.endswith(" 2") for copy in copies)
    assert method.alter("the", random.Random(0)) == "the"


def test_a_language_model_of_transformers_will_do(masked: tuple[Any, Any]) -> None:
    _, tokenizer = masked
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    method = LikelyWords(BertForMaskedLM(config).eval(), tokenizer, likely=3, progress=False)
    more = augmented(sentences(), method, copies=2, progress=False)
    assert more.copies > 4 and all(words_of(row["sentence"]) for row in more.task.splits["train"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augmented(sentences(), lexical(), copies=0), "copies=0 is not possible"),
        (lambda: augmented(sentences(), lexical(), limit=0), "limit=0 is not possible"),
        (lambda: augmented(replace(sentences(), kind="token"), lexical()), "is of kind token"),
        (lambda: Lexical(mask_token=""), "mask_token is empty"),
        (lambda: lexical(mask=1.5), "mask=1.5 is not a probability"),
        (lambda: lexical(mask=0.6, same_class=0.6), "must not exceed 1"),
        (lambda: Lexical(mask_token="[MASK]", tagger=tags), "tagger_name is missing"),
    ],
)
def test_what_cannot_work_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_too_little_text_for_a_head_is_refused(masked: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="2 are too few for a batch of 32"):
        train_masked_words(*masked, ["a b", "c d"])
