"""Sentence-order prediction: two neighbouring pieces of a paragraph, and whether they were exchanged.

A pre-training task that needs paragraphs and no labels, for a head with two classes: 0 as written, 1 exchanged.

    >>> rows = order_pairs(paragraphs, seed=0)
    >>> tokenizer([r["first"] for r in rows], [r["second"] for r in rows])

Source: Lan et al. 2019, ALBERT, section 3.1 ("inter-sentence coherence loss").
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, cut after full stops, question and exclamation marks."""
    return [s for s in (piece.strip() for piece in _SENTENCE_END.split(paragraph)) if s]


def order_pairs(paragraphs: Iterable[str], *, seed: int = 0) -> list[dict[str, str | int]]:
    """One pair for each paragraph of at least two sentences.

    Args:
        paragraphs: texts of several sentences.
        seed: of the cuts, at any sentence end, and of the exchanges, in half of the cases.

    Returns:
        Rows with ``first``, ``second`` and ``label`` (1: exchanged), in the order of the paragraphs.

    Raises:
        TypeError: if `paragraphs` is one string; ValueError: if none has two sentences.
    """
    if isinstance(paragraphs, str):
        raise TypeError("paragraphs: expected several texts, got one; pass a list of them")
    drawn = random.Random(seed)
    rows: list[dict[str, str | int]] = []
    for paragraph in paragraphs:
        parts = sentences(paragraph)
        if len(parts) < 2:
            continue
        cut = drawn.randrange(1, len(parts))
        pair = [" ".join(parts[:cut]), " ".join(parts[cut:])]
        label = drawn.randrange(2)
        first, second = reversed(pair) if label else pair
        rows.append({"first": first, "second": second, "label": label})
    if not rows:
        raise ValueError("paragraphs: none has two sentences to exchange; give paragraphs, not single sentences")
    return rows
