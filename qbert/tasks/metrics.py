"""Official metrics of the tasks, 0 to 100, by the libraries that the field uses.

Accuracy, F1 and Matthews by scikit-learn, Pearson and Spearman by scipy, entity F1 by seqeval (the conlleval rules),
SQuAD exact match and F1 after the normalisation of the SQuAD v1.1 evaluation script (Rajpurkar et al. 2016,
section 6.1): lower case, no punctuation, no articles, single spaces; the best of the accepted answers counts.

    >>> squad_scores(["the Eiffel tower"], [["Eiffel Tower", "tower"]])
    {'exact_match': 100.0, 'f1': 100.0}
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classification_scores(predictions: Any, references: Any) -> dict[str, float]:
    """Accuracy, F1 of class 1 (macro F1 beyond two classes) and Matthews; predictions [N] or scores [N, C]."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses, truth = np.asarray(predictions), np.asarray(references)
    if guesses.ndim == 2:
        guesses = guesses.argmax(axis=1)
    binary = max(int(guesses.max()), int(truth.max())) <= 1
    average = {"average": "binary", "pos_label": 1} if binary else {"average": "macro"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class only: F1 and Matthews are 0, and the numbers say so
        return {
            "accuracy": 100.0 * float(accuracy_score(truth, guesses)),
            "f1": 100.0 * float(f1_score(truth, guesses, zero_division=0.0, **average)),
            "matthews": 100.0 * float(matthews_corrcoef(truth, guesses)),
        }


def correlation_scores(predictions: Any, references: Any) -> dict[str, float]:
    """Pearson and Spearman of two vectors [N]; 0 where one of them is constant, as a collapsed model's output is."""
    from scipy.stats import pearsonr, spearmanr

    guesses = np.asarray(predictions, dtype=np.float64).reshape(-1)
    truth = np.asarray(references, dtype=np.float64).reshape(-1)
    if np.ptp(guesses) == 0 or np.ptp(truth) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # near-constant input: the value is still the defined one
        return {
            "pearson": 100.0 * float(pearsonr(guesses, truth).statistic),
            "spearman": 100.0 * float(spearmanr(guesses, truth).statistic),
        }


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged entity precision, recall and F1 over BIO tag lists: an entity counts when span and type agree."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    guesses, truth = [list(tags) for tags in predictions], [list(tags) for tags in references]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no entity predicted at all: 0, and the number says so
        return {
            "f1": 100.0 * float(f1_score(truth, guesses, zero_division=0)),
            "precision": 100.0 * float(precision_score(truth, guesses, zero_division=0)),
            "recall": 100.0 * float(recall_score(truth, guesses, zero_division=0)),
        }


def normalize_answer(text: str) -> str:
    """Lower case, punctuation and articles removed, white space collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD v1.1 exact match and token F1; `references` holds the accepted answers of every question."""
    exact = overlap = 0.0
    for guess, answers in zip(predictions, references, strict=True):
        exact += max(float(normalize_answer(guess) == normalize_answer(answer)) for answer in answers)
        overlap += max(_token_f1(guess, answer) for answer in answers)
    return {"exact_match": 100.0 * exact / len(references), "f1": 100.0 * overlap / len(references)}


def _token_f1(guess: str, answer: str) -> float:
    guessed, wanted = normalize_answer(guess).split(), normalize_answer(answer).split()
    shared = sum((Counter(guessed) & Counter(wanted)).values())
    return 2.0 * shared / (len(guessed) + len(wanted)) if shared else 0.0
