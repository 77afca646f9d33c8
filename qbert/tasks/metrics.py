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


def classification_scores(predictions: Any, references: Any, classes: int | None = None) -> dict[str, float]:
    """Accuracy, F1 of class 1 (macro F1 beyond two classes) and Matthews.

    Args:
        predictions: classes [N] or scores [N, C].
        references: classes [N].
        classes: how many the task has; C, or one more than the largest that occurs, where None. Macro F1 is the mean
            over those that occur among predictions or references: of the others nothing is known.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses, truth = np.asarray(predictions), np.asarray(references)
    if guesses.ndim == 2:
        classes = classes or guesses.shape[1]
        guesses = guesses.argmax(axis=1)
    binary = (classes or 1 + max(int(guesses.max()), int(truth.max()))) <= 2
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


# Every alphabet of places in an entity (BIO, BILOU, BIOES, BMES, BMEWO) in the one that seqeval reads.
_PLACES = {"B": "B", "I": "I", "M": "I", "L": "E", "E": "E", "U": "S", "S": "S", "W": "S"}
_TAG_PATTERNS = (re.compile(r"(?P<place>[BIMLEUSW])[-_](?P<type>.+)", re.I),
                 re.compile(r"(?P<type>.+)[-_](?P<place>[BIMLEUSW])", re.I))  # fmt: skip


def entity_tags(label_names: Sequence[str]) -> dict[str, str] | None:
    """What each tag of a task says about entities, as a BIOES tag; ``None`` for tags that every word has one of.

    Read as entities: tags with the place in the entity before or after its type (B-PER, L_PER, PER-I; BIO, BILOU,
    BIOES, BMES), and types without a place beside a tag O (PER, ORG), where neighbours of one type are one entity. Tags
    without O and places, such as parts of speech, are no entities.

    Raises:
        ValueError: some tags have a place and others none; names both.
    """
    outside = next((name for name in ("O", "o") if name in label_names), None)
    types = [name for name in label_names if name != outside]
    for pattern in _TAG_PATTERNS:
        parts = [pattern.fullmatch(name) for name in types]
        if types and all(parts):
            found = [(part["place"].upper(), part["type"]) for part in parts if part]
            tags = {name: f"{_PLACES[place]}-{kind}" for name, (place, kind) in zip(types, found, strict=True)}
            return tags if outside is None else {outside: "O", **tags}
        placed = [name for name, part in zip(types, parts, strict=True) if part and part["place"] in "BI"]
        if placed and pattern is _TAG_PATTERNS[0]:
            other = next(name for name, part in zip(types, parts, strict=True) if not part)
            raise ValueError(
                f"tag {placed[0]!r} names a place in an entity (B, I, ...) and tag {other!r} none; write all in one "
                "scheme, such as BIO"
            )
    return None if outside is None else {outside: "O", **{name: f"I-{name}" for name in types}}


def tag_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], label_names: Sequence[str]
) -> dict[str, float]:
    """Entity scores, or where the task's tags name no entities (`entity_tags`) word accuracy and macro F1 of the tags.

    Args:
        predictions, references: a list of tags a sentence.
        label_names: all tags of the task.
    """
    tags = entity_tags(label_names)
    if tags is None:
        return _word_scores(predictions, references, label_names)
    found, wanted = ([[tags.get(tag, "O") for tag in row] for row in rows] for rows in (predictions, references))
    return entity_scores(found, wanted) | {"accuracy": _word_accuracy(predictions, references)}


def _word_accuracy(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
    return 100.0 * sum(guess == tag for guess, tag in pairs) / max(len(pairs), 1)


def _word_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], label_names: Sequence[str]
) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    guesses, truth = ([tag for row in rows for tag in row] for rows in (predictions, references))
    seen = {*guesses, *truth}
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, guesses, labels=[name for name in label_names if name in seen], average="macro", zero_division=0.0
    )
    scores = {"f1": f1, "precision": precision, "recall": recall}
    return {name: 100.0 * float(value) for name, value in scores.items()} | {
        "accuracy": _word_accuracy(predictions, references)
    }


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged entity precision, recall and F1 over BIO or BIOES tag lists: span and type have to agree."""
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
