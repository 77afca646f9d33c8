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
    normalize_answer,
    squad_scores,
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
