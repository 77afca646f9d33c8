"""Metrics against their definitions, hand-made cases and the rules of the SQuAD script."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert.tasks.metrics import (
    classification_scores,
    correlation_scores,
    entity_scores,
    entity_tags,
    normalize_answer,
    squad_scores,
    tag_scores,
)
from qbert.tasks.task import Task

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@settings(deadline=None)
@given(binary)
def test_binary_metrics_follow_their_definitions(pairs: list[tuple[int, int]]) -> None:
    guesses, truth = (np.array(column) for column in zip(*pairs, strict=True))
    tp, fp = int(((guesses == 1) & (truth == 1)).sum()), int(((guesses == 1) & (truth == 0)).sum())
    fn, tn = int(((guesses == 0) & (truth == 1)).sum()), int(((guesses == 0) & (truth == 0)).sum())
    scores = classification_scores(guesses, truth)
    assert scores["accuracy"] == pytest.approx(100 * (tp + tn) / len(truth))
    assert scores["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert scores["matthews"] == pytest.approx(100 * (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0)


def test_scores_of_classes_and_of_logits_agree() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    truth = [0, 1, 2, 1]
    assert classification_scores(logits, truth) == classification_scores(logits.argmax(1), truth)
    assert classification_scores(logits, truth)["accuracy"] == 75.0


def test_f1_is_macro_beyond_two_classes_whichever_occur() -> None:
    truth, guess = [0, 1, 1, 0], [0, 1, 0, 0]
    renamed = [[{0: 1, 1: 2}[label] for label in labels] for labels in (guess, truth)]
    expected = 100 * (2 * 2 / 5 + 2 / 3) / 2  # F1 of class 0 (TP 2, FP 1) and of class 1 (TP 1, FN 1)
    three = Task("t", "classification", ("text",), ("a", "b", "c"), {}, ("f1",), "f1", "nowhere")
    assert three.score(guess, truth)["f1"] == pytest.approx(expected)
    assert three.score(*renamed)["f1"] == pytest.approx(expected)
    assert classification_scores(np.eye(3)[guess], truth)["f1"] == pytest.approx(expected)
    two = Task("t", "classification", ("text",), ("a", "b"), {}, ("f1",), "f1", "nowhere")
    assert two.score(guess, truth)["f1"] == pytest.approx(100 * 2 / 3)
    assert two.score([0, 0], [0, 0])["f1"] == 0.0


def test_correlations_follow_their_definitions() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=200), generator.normal(size=200)
    y += x
    scores = correlation_scores(x, y)
    assert scores["pearson"] == pytest.approx(100 * np.corrcoef(x, y)[0, 1])
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    assert scores["spearman"] == pytest.approx(100 * ranks)


def test_correlation_of_a_collapsed_model_is_zero() -> None:
    assert correlation_scores([0.5] * 10, list(range(10))) == {"pearson": 0.0, "spearman": 0.0}


def test_entities_count_only_when_span_and_type_agree() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"]]
    guess = [["B-PER", "I-PER", "O", "B-ORG", "O", "O"]]  # one of two found, three wanted
    scores = entity_scores(guess, truth)
    assert scores["precision"] == pytest.approx(50.0)
    assert scores["recall"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(40.0)
    shortened = [["B-PER", "O", "O", "B-LOC", "O", "B-ORG"]]
    assert entity_scores(shortened, truth)["precision"] == pytest.approx(200 / 3)
    assert entity_scores([["O"] * 6], truth)["f1"] == 0.0


def test_adjacent_entities_of_one_type_are_two() -> None:
    assert entity_scores([["B-PER", "I-PER"]], [["B-PER", "B-PER"]])["f1"] == 0.0


# Each tagging of the sentence "w x y z": one entity of two words and one of one word, of type T and U.
SCHEMES = {
    "BIO": (["B-T", "I-T", "O", "B-U"], ["B-T", "B-T", "O", "B-U"]),
    "BILOU": (["B-T", "L-T", "O", "U-U"], ["U-T", "U-T", "O", "U-U"]),
    "BIOES": (["B-T", "E-T", "O", "S-U"], ["S-T", "S-T", "O", "S-U"]),
    "BMES": (["B_T", "E_T", "O", "S_U"], ["S_T", "S_T", "O", "S_U"]),
    "place last": (["T-B", "T-I", "O", "U-B"], ["T-B", "T-B", "O", "U-B"]),
    "lower case": (["b-t", "i-t", "o", "b-u"], ["b-t", "b-t", "o", "b-u"]),
    "types": (["T", "T", "O", "U"], ["T", "O", "O", "U"]),
}


@pytest.mark.parametrize(("gold", "guess"), SCHEMES.values(), ids=SCHEMES)
def test_entities_are_the_same_in_every_scheme(gold: list[str], guess: list[str]) -> None:
    names = sorted({*gold, *guess})
    assert tag_scores([gold], [gold], names)["f1"] == 100.0
    scores = tag_scores([guess], [gold], names)
    wrong = 2 if guess[1].upper() not in ("O",) else 1  # the entity of two words is found as two, or in part
    assert scores["precision"] == pytest.approx(100 / (wrong + 1))
    assert scores["recall"] == pytest.approx(50.0)
    shifted = [gold[2], gold[3], gold[0], gold[1]]
    assert tag_scores([shifted], [gold], names)["f1"] == 0.0


def test_entities_in_bilou_end_where_their_tags_say() -> None:
    names = ["O", "B-T", "I-T", "L-T", "U-T"]
    assert tag_scores([["B-T", "L-T", "B-T", "L-T"]], [["B-T", "I-T", "I-T", "L-T"]], names)["f1"] == 0.0
    assert tag_scores([["U-T", "B-T", "L-T"]], [["U-T", "B-T", "L-T"]], names)["f1"] == 100.0


def test_tags_of_every_word_are_scored_by_word() -> None:
    names = ["NOUN", "VERB", "DET"]
    gold, guess = [["DET", "NOUN", "NOUN"], ["VERB"]], [["DET", "NOUN", "VERB"], ["VERB"]]
    assert entity_tags(names) is None
    scores = tag_scores(guess, gold, names)
    assert scores["accuracy"] == 75.0
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


def test_tags_of_two_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tag 'B-PER' names a place in an entity .* and tag 'MISC' none"):
        entity_tags(["O", "B-PER", "I-PER", "MISC"])
    assert entity_tags(["O", "E-mail", "phone"]) == {"O": "O", "E-mail": "I-E-mail", "phone": "I-phone"}


@pytest.mark.parametrize(
    ("raw", "normalized"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  an  apple,  a day ", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("the", ""),
    ],
)
def test_answers_are_normalized_as_in_the_squad_script(raw: str, normalized: str) -> None:
    assert normalize_answer(raw) == normalized


def test_squad_takes_the_best_of_the_accepted_answers() -> None:
    scores = squad_scores(["the Denver Broncos", "in July 1969"], [["Broncos", "Denver Broncos"], ["1969"]])
    assert scores["exact_match"] == 50.0
    # second: guess "in july 1969" against "1969": precision 1/3, recall 1, F1 1/2
    assert scores["f1"] == pytest.approx(100 * (1.0 + 0.5) / 2)


def test_squad_counts_repeated_words_once_each() -> None:
    # guess "new new york", answer "new york": 2 shared, precision 2/3, recall 1
    assert squad_scores(["new new york"], [["new york"]])["f1"] == pytest.approx(80.0)


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_squad_scores_stay_in_range_and_an_accepted_answer_is_exact(guess: str, answers: list[str]) -> None:
    scores = squad_scores([guess], [answers])
    assert 0.0 <= scores["f1"] <= 100.0
    assert squad_scores([answers[-1]], [answers])["exact_match"] == 100.0


def test_scoring_needs_as_many_predictions_as_references() -> None:
    task = Task("t", "classification", ("text",), ("a", "b"), {}, ("accuracy",), "accuracy", "nowhere")
    with pytest.raises(ValueError, match="got 2 and 1"):
        task.score([0, 1], [0])
    with pytest.raises(ValueError, match="at least one"):
        task.score([], [])
    assert task.score([0, 1], [0, 0]) == {"accuracy": 50.0}
