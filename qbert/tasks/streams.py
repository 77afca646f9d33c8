"""Unlabelled text of any size, read and tokenized on the way: what general stages of a distillation train on.

    >>> stream = TextStream(["wiki.txt.gz"], tokenizer, unit="paragraph", batch_size=32)
    >>> Distiller(teacher, student, recipes.tinybert(general=True), args, train_dataset=stream, ...)

A stream is read in pools of some thousand texts. Inside of a pool the order is drawn, texts of like length are put
into the same batch, and the batches are drawn too; so neighbouring examples fit into a batch with little padding, and
no more than a pool is ever in memory. The order is a function of files, seed and epoch alone: an interrupted training
finds the same examples again, and `from_example` skips to one of them without tokenizing what comes before. The workers
of a DataLoader each give every n-th batch, so that a loader of the same `batch_size` has the batches of one without
workers, in their order; each worker tokenizes all text, so that more than one seldom pays.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

_POOL_BATCHES = 64
_LONGEST_LINE = 2**24  # characters; a compressed file of a megabyte can hold a gigabyte without a line break


class TextStream(IterableDataset):  # type: ignore[type-arg]
    """Examples ``{"input_ids", "attention_mask", ...}`` without padding, from text files, in an order fit for batches.

    Long texts are cut into pieces of `words` words before they are tokenized, so that none is lost to `max_length`.

    Args:
        files: UTF-8 text, plain or .gz, read in turn.
        tokenizer: makes the examples.
        unit: what a text is: a ``line``, or a ``paragraph`` (lines up to an empty one).
        max_length: longest example in tokens; what is longer is cut off.
        words: longest piece of a text in words; three quarters of `max_length` where None.
        least_words: shorter texts, such as headings, are left out.
        batch_size: rows of like length that stand together.
        seed: of the order.
        epoch: of the order; `set_epoch` changes it (a Trainer does).

    Raises:
        ValueError: a number that cannot work, no files, or files without a text that is long enough.
        FileNotFoundError: naming the file.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        tokenizer: Any,
        *,
        unit: Literal["line", "paragraph"] = "line",
        max_length: int = 128,
        words: int | None = None,
        least_words: int = 5,
        batch_size: int = 32,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        if isinstance(files, str | os.PathLike):
            files = [files]
        self.files = [Path(file) for file in files]
        self.words = words if words is not None else max(3 * max_length // 4, 1)
        if not self.files:
            raise ValueError("files is empty; name at least one text file")
        if unit not in ("line", "paragraph"):
            raise ValueError(f"unit={unit!r} is not possible; use 'line' or 'paragraph'")
        if max_length < 8 or batch_size < 1 or least_words < 1 or self.words < least_words:
            raise ValueError(
                f"max_length={max_length}, words={self.words}, least_words={least_words} and batch_size={batch_size} "
                "are not possible; use a max_length of at least 8, and pieces of at least least_words words"
            )
        missing = next((file for file in self.files if not file.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"files: {missing} is no file; name a text file, plain or .gz")
        self.tokenizer, self.unit, self.max_length = tokenizer, unit, max_length
        self.least_words, self.batch_size, self.seed, self.epoch = least_words, batch_size, seed, epoch
        self._first = 0
        if next(self.texts(), None) is None:
            names = ", ".join(str(file) for file in self.files)
            raise ValueError(f"files: {names} have no text of at least {least_words} words; give more text")

    def set_epoch(self, epoch: int) -> None:
        """Read in the order of another epoch."""
        self.epoch = epoch

    def from_example(self, number: int) -> TextStream:
        """The same stream from example `number` (from 0) of the epoch on; whole pools before it are not tokenized."""
        if number < 0:
            raise ValueError(f"number={number} is not possible; examples are numbered from 0")
        later = TextStream.__new__(TextStream)
        later.__dict__.update(self.__dict__)
        later._first = number
        return later

    def texts(self) -> Iterator[str]:
        """The pieces of text, in the order of the files."""
        for file in self.files:
            for text in _units(file, self.unit):
                words = text.split()
                for start in range(0, len(words), self.words):
                    piece = words[start : start + self.words]
                    if len(piece) >= self.least_words:
                        yield " ".join(piece)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        share, shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, example in enumerate(self._examples()):
            if index // self.batch_size % shares == share:
                yield example

    def _examples(self) -> Iterator[dict[str, Any]]:
        size, skip = _POOL_BATCHES * self.batch_size, self._first
        for number, pool in enumerate(_pools(self.texts(), size)):
            if skip >= len(pool):  # one example a text, whatever its length
                skip -= len(pool)
                continue
            yield from self._ordered(pool, number)[skip:]
            skip = 0

    def _ordered(self, pool: list[str], number: int) -> list[dict[str, Any]]:
        encoded = self.tokenizer(pool, truncation=True, max_length=self.max_length)
        generator = np.random.default_rng([self.seed, self.epoch, number])
        order = generator.permutation(len(pool))
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        order = order[np.argsort(lengths[order], kind="stable")]
        whole = len(order) // self.batch_size
        batches = np.split(order, [self.batch_size * i for i in range(1, whole + 1)])
        # The last batch of a pool may be short, and must then stay last, or no later one would begin where it should.
        drawn = [*(batches[i] for i in generator.permutation(whole)), *batches[whole:]]
        return [{key: values[i] for key, values in encoded.items()} for batch in drawn for i in batch.tolist()]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the texts and of all that the order depends on, the epoch apart."""
        digest = hashlib.sha256(f"{self.max_length} {self.batch_size} {self.seed}".encode())
        for text in self.texts():
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()


def _pools(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    pool: list[str] = []
    for text in texts:
        pool.append(text)
        if len(pool) == size:
            yield pool
            pool = []
    if pool:
        yield pool


def _units(file: Path, unit: str) -> Iterator[str]:
    """Lines, or paragraphs as one line each, without white space around them; empty ones are left out."""
    lines: list[str] = []
    for line in _lines(file):
        if line and unit == "line":
            yield line
        elif line:
            lines.append(line)
        elif lines:
            yield " ".join(lines)
            lines = []
    if lines:
        yield " ".join(lines)


def _lines(file: Path) -> Iterator[str]:
    opener: Any = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), ""), start=1):
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"line {number} of {file} is longer than {_LONGEST_LINE} characters; break it")
                yield line.strip()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or no UTF-8 text ({error}); fetch it again") from None
