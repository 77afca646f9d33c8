"""Altered copies of a task's rows, for a teacher to label: a small student then sees more of what the teacher knows.

    >>> more = augmented(task, Lexical(mask_token=tokenizer.mask_token), copies=20)
    >>> more.task.splits["train"]      # the rows themselves, then their copies; a copy has the label of its row

The labels of copies are those of their rows and may be wrong, so a recipe that learns from the teacher's outputs alone
is the one to train on them (`qbert.distill.recipes.bilstm`).

Sources: Tang et al. 2019, section 3.2 (masking, words of the same class, n-grams; of a pair the first sentence, the
second and both are altered in turn); Jiao et al. 2020, TinyBERT, algorithm 1 (`qbert.tasks.candidates` finds its
candidates). Copies equal to another, and copies of which no word is left, are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from qbert.files import read_json, write_json
from qbert.progress import progress_bar
from qbert.tasks.task import Row, Task

# A word with its inner apostrophes and hyphens; what stands between words is never touched.
WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_FORMAT = "qbert augmented rows 1"
_MASK, _SAME_CLASS, _NGRAM, _LONGEST_NGRAM = 0.1, 0.1, 0.25, 5
Tagger = Callable[[Sequence[str]], Sequence[str]]


class Method(Protocol):
    """A way of altering a sentence."""

    def settings(self) -> dict[str, Any]:
        """All that its results depend on beside the texts, as JSON values."""

    def begin(self, texts: Sequence[str]) -> None:
        """Learn what it needs from all texts (the words of each class, candidates); called once, before `alter`."""

    def alter(self, text: str, generator: random.Random) -> str:
        """An altered copy of one of the texts, in which at least one of its words is left."""


@dataclass(frozen=True)
class Augmented:
    """What `augmented` returns.

    Attributes:
        task: the task with the longer training split.
        copies: number of rows that were added.
        seconds: what making them took; 0.0 from a cache.
        from_cache: whether they were found there.
    """

    task: Task
    copies: int
    seconds: float
    from_cache: bool

    def __str__(self) -> str:
        how = "from the cache" if self.from_cache else f"in {self.seconds:.1f} s"
        return f"{self.copies:,} copies of rows {how}: {len(self.task.splits['train']):,} training rows"


def augmented(
    task: Task,
    method: Method,
    *,
    copies: int = 20,
    limit: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Augmented:
    """`task` with altered copies behind its training rows: a function of rows, method, `copies`, `limit` and `seed`.

    Args:
        task: rows of one or two texts.
        method: `Lexical`, or `qbert.tasks.candidates.LikelyWords`.
        copies: drawn for each row; equal ones are dropped, so that fewer may be left of a short one.
        limit: stop at this many copies; the rows are then taken in turn, so that each has its share.
        seed: of every draw.
        cache: folder in which the copies are kept, found again by all that they depend on.
        progress: show a bar.

    Raises:
        ValueError: a task of words or spans, or `copies` or `limit` below 1.
    """
    if task.kind not in ("classification", "regression"):
        raise ValueError(f"task: {task.name!r} is of kind {task.kind}; only sentences and pairs of them can be altered")
    for name, value in (("copies", copies), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not possible; use at least 1")
    asked = {
        "format": _FORMAT,
        "rows": task.fingerprint("train"),
        "method": method.settings(),
        "copies": copies,
        "limit": limit,
        "seed": seed,
    }
    path = None
    if cache is not None:
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        path = Path(cache) / f"augmented-{task.name}-{digest[:16]}.json"
        if path.is_file():
            kept = read_json(path)
            if kept.get("asked") == asked:
                return Augmented(_longer(task, kept["copies"]), len(kept["copies"]), 0.0, True)
    start = time.monotonic()
    rows = _copies(task, method, copies, limit, seed, progress)
    if path is not None:
        write_json(path, {"asked": asked, "copies": rows})
    return Augmented(_longer(task, rows), len(rows), time.monotonic() - start, False)


def _longer(task: Task, copies: Sequence[Row]) -> Task:
    splits = {**task.splits, "train": [*task.splits["train"], *copies]}
    return replace(task, splits=splits, source=f"{task.source}; {len(copies):,} altered copies of training rows")


def _copies(task: Task, method: Method, copies: int, limit: int | None, seed: int, progress: bool) -> list[Row]:
    rows, fields = task.rows("train"), task.text_fields
    method.begin(list(dict.fromkeys(row[name] for row in rows for name in fields)))
    found: list[Row] = []
    seen = {tuple(row[name] for name in fields) for row in rows}
    with progress_bar(total=copies * len(rows), desc="altering rows", unit="copy", disable=not progress) as bar:
        for copy in range(copies):
            for index, row in enumerate(rows):
                bar.update()
                # By row and copy, so that no copy depends on which others there are.
                generator = random.Random(f"{seed} {copy} {index}")
                sides = _altered_sides(len(fields), copy)
                texts = {name: method.alter(row[name], generator) for i, name in enumerate(fields) if i in sides}
                altered = {**row, **texts}
                key = tuple(altered[name] for name in fields)
                if key in seen:
                    continue
                seen.add(key)
                found.append(altered)
                if len(found) == limit:
                    return found
    return found


def _altered_sides(texts: int, copy: int) -> tuple[int, ...]:
    """Which of the texts of a row are altered in a copy: of two the first, the second, both, in turn."""
    return (0,) if texts == 1 else ((0,), (1,), (0, 1))[copy % 3]


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return WORD.findall(text)


def with_words(text: str, words: Sequence[str]) -> str:
    """`text` with other words in the places of its own, all that stands between them as it was."""
    left = iter(words)
    return WORD.sub(lambda _: next(left), text)


def cut_to_words(text: str, first: int, count: int) -> str:
    """The part of `text` that holds `count` words from number `first` on."""
    places = list(WORD.finditer(text))
    return text[places[first].start() : places[first + count - 1].end()]


@dataclass
class Lexical:
    """Words masked, or exchanged for others of their class, and sentences cut to n-grams (Tang et al. 2019).

    For each word one number is drawn: with probability `mask` the word becomes the mask token, with `same_class`
    another word of the task that has its tag, else it stays. Then with probability `ngram` all but n neighbouring words
    are cut away, n from 1 to 5, every place being as likely.

    Attributes:
        mask_token: the tokenizer's.
        tagger: gives each word of a sentence its class (a part of speech); where None, no word is exchanged. No tagger
            whose model comes with its package could be had, so the library brings none.
        tagger_name: what tells this tagger from others in a cache.
    """

    mask_token: str
    tagger: Tagger | None = None
    tagger_name: str = ""
    mask: float = _MASK
    same_class: float = _SAME_CLASS
    ngram: float = _NGRAM
    _tags: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    _members: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.mask_token:
            raise ValueError("mask_token is empty; give the tokenizer's, or one that it knows")
        for name in ("mask", "same_class", "ngram"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; use a number from 0 to 1")
        if self.mask + self.same_class > 1:
            raise ValueError("mask and same_class are chances of the same draw; their sum must not exceed 1")
        if self.tagger is not None and not self.tagger_name:
            raise ValueError("tagger_name is missing; name the tagger, so that a cache can tell it from others")

    def settings(self) -> dict[str, Any]:
        """Probabilities, mask token and tagger."""
        chances = {"mask": self.mask, "same_class": self.same_class, "ngram": self.ngram}
        return {"name": "lexical", "mask_token": self.mask_token, "tagger": self.tagger_name, **chances}

    def begin(self, texts: Sequence[str]) -> None:
        """Tag all words."""
        if self.tagger is None:
            return
        members: dict[str, set[str]] = {}
        for text in texts:
            words = words_of(text)
            tags = tuple(self.tagger(words))
            if len(tags) != len(words):
                raise ValueError(f"tagger: it gave {len(tags)} tags for {len(words)} words; expected one a word")
            self._tags[text] = tags
            for word, tag in zip(words, tags, strict=True):
                members.setdefault(tag, set()).add(word)
        self._members = {tag: sorted(words) for tag, words in members.items()}

    def alter(self, text: str, generator: random.Random) -> str:
        """One altered copy."""
        words = words_of(text)
        if not words:
            return text
        tags = self._tags.get(text, ("",) * len(words))
        changed = [self._draw(word, tag, generator) for word, tag in zip(words, tags, strict=True)]
        cut = generator.random() < self.ngram
        count = min(generator.randint(1, _LONGEST_NGRAM), len(words)) if cut else len(words)
        first = generator.randint(0, len(words) - count)
        kept = range(first, first + count)
        if all(changed[i] != words[i] for i in kept):
            spared = generator.choice(kept)
            changed[spared] = words[spared]
        part = cut_to_words(text, first, count) if cut else text
        return with_words(part, [changed[i] for i in kept])

    def _draw(self, word: str, tag: str, generator: random.Random) -> str:
        drawn = generator.random()
        if drawn < self.mask:
            return self.mask_token
        if drawn < self.mask + self.same_class and self._members:
            return generator.choice(self._members[tag])
        return word


def drawn_words(
    words: Sequence[str],
    candidates: Mapping[int, Sequence[str]],
    chance: float,
    generator: random.Random,
) -> list[str]:
    """TinyBERT's draw: each word with candidates becomes one of them with probability `chance`; one word stays."""
    changed = list(words)
    for index, likely in candidates.items():
        if likely and generator.random() < chance:
            changed[index] = generator.choice(list(likely))
    if words and all(new != old for new, old in zip(changed, words, strict=True)):
        spared = generator.randrange(len(words))
        changed[spared] = words[spared]
    return changed
