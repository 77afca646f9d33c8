"""A convolution over the teacher's word pieces, and the largest value of each filter: the smallest useful student.

    >>> student = cnn(teacher, windows=(3, 4, 5), filters=100, tokenizer=tokenizer)

Sources: Kim 2014, "Convolutional Neural Networks for Sentence Classification" (windows of 3, 4 and 5 words, 100 filters
each, the largest over time); Wasserblat et al. 2020, "Exploring the Boundaries of Low-Resource BERT Distillation" (as a
student of BERT). Windows may reach beyond the ends of a sentence, where words are zeros, so that any sentence has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.students.sentences import (
    SentenceStudent,
    SentenceStudentConfig,
    TableKind,
    make_student,
)


class CnnConfig(SentenceStudentConfig):
    """Shape of a convolutional student: `filters` for each of `windows`, beside what all have."""

    model_type = "qbert_cnn"

    def __init__(self, windows: Sequence[int] = (3, 4, 5), filters: int = 100, **kwargs: Any) -> None:
        self.windows, self.filters = list(windows), filters
        super().__init__(**kwargs)


class CnnForSequenceClassification(SentenceStudent):
    """Sentences to classes or values by convolutions."""

    config_class = CnnConfig

    @staticmethod
    def vector_size(config: CnnConfig) -> int:
        """The filters of all windows."""
        return len(config.windows) * config.filters

    @staticmethod
    def encoder_layers(config: CnnConfig) -> list[nn.Module]:
        """A convolution for each window."""
        return [
            nn.Conv1d(config.embedding_size, config.filters, window, padding=window - 1) for window in config.windows
        ]

    def vectors(self, words: Tensor, lengths: Tensor) -> Tensor:
        """The largest value of each filter over the windows that hold a word, [B, T, D] -> [B, windows * filters]."""
        length = words.shape[1]
        inside = torch.arange(length, device=words.device) < lengths.unsqueeze(1)
        channels = (words * inside.unsqueeze(-1)).transpose(1, 2)
        largest = []
        for convolution, window in zip(self.encoder[:-1], self.config.windows, strict=True):
            values = convolution(channels)  # [B, filters, T + window - 1]
            ends = torch.arange(values.shape[-1], device=words.device)
            beyond = ends >= (lengths + window - 1).unsqueeze(1)
            largest.append(values.masked_fill(beyond.unsqueeze(1), -torch.inf).amax(-1))
        return torch.relu(torch.cat(largest, -1))


def cnn(
    teacher: nn.Module,
    *,
    windows: Sequence[int] = (3, 4, 5),
    filters: int = 100,
    dense: int = 200,
    dropout: float = 0.5,
    table: TableKind = "frozen",
    dimensions: int | None = None,
    rank: int | None = None,
    pairs: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
) -> CnnForSequenceClassification:
    """Convolutions that read what `teacher` reads and have its labels.

    Args:
        teacher: a float encoder with a head for sequences; stays as it is.
        windows: how many words each kind of filter sees.
        filters: filters of each kind.
        dense, dropout, table, dimensions, rank, pairs, tokenizer, seed: as of `bilstm`.

    Returns:
        The student in evaluation mode; a transformers model with ``save_pretrained`` and ``from_pretrained``.

    Raises:
        ValueError: a size that cannot work, or a teacher without a float word table.
    """
    if not windows or min(windows) < 1 or filters < 1:
        raise ValueError(f"windows={tuple(windows)} and filters={filters} are not possible; use at least 1 of each")
    return make_student(
        CnnForSequenceClassification,
        teacher,
        seed,
        {"windows": windows, "filters": filters},
        table=table,
        dimensions=dimensions,
        rank=rank,
        pairs=pairs,
        tokenizer=tokenizer,
        dense=dense,
        dropout=dropout,
    )
