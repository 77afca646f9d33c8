"""A BiLSTM on the teacher's word pieces: the distilled BiLSTM.

    >>> student = bilstm(teacher, hidden=150, dimensions=300, tokenizer=tokenizer)
    >>> Distiller(teacher, student, recipes.bilstm(), ...).train()

Source: Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks": one layer of 150
units a direction, the last states of both joined, a hidden layer of 200 with ReLU, dropout .1. Difference: word pieces
and their table come from the teacher, not from word2vec, so that both read the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from qbert.students.sentences import (
    SentenceStudent,
    SentenceStudentConfig,
    TableKind,
    make_student,
)


class BiLSTMConfig(SentenceStudentConfig):
    """Shape of a BiLSTM student: `hidden_size` units a direction, beside what all have."""

    model_type = "qbert_bilstm"

    def __init__(self, hidden_size: int = 150, **kwargs: Any) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class BiLSTMForSequenceClassification(SentenceStudent):
    """Sentences to classes or values by a BiLSTM."""

    config_class = BiLSTMConfig

    @staticmethod
    def vector_size(config: BiLSTMConfig) -> int:
        """The last states of two directions."""
        return 2 * config.hidden_size

    @staticmethod
    def encoder_layers(config: BiLSTMConfig) -> list[nn.Module]:
        """One LSTM of two directions."""
        return [nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True)]

    def vectors(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Last states of both directions, [B, T, D] -> [B, 2 H]."""
        packed = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (state, _) = self.encoder[0](packed)
        return torch.cat([state[0], state[1]], -1)


def bilstm(
    teacher: nn.Module,
    *,
    hidden: int = 150,
    dense: int = 200,
    dropout: float = 0.1,
    table: TableKind = "frozen",
    dimensions: int | None = None,
    rank: int | None = None,
    pairs: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
) -> BiLSTMForSequenceClassification:
    """A BiLSTM that reads what `teacher` reads and has its labels.

    Args:
        teacher: a float encoder with a head for sequences; stays as it is.
        hidden: units of each direction.
        dense: width of the hidden layer.
        dropout: rate around the hidden layer.
        table: ``frozen`` (the teacher's words stay what they are) or ``trained``.
        dimensions: keep this many principal components of the table; all where None.
        rank: store the table as a product of factors of this rank instead.
        pairs: rows are pairs of sentences, told apart by ``token_type_ids`` or by the tokenizer's separator.
        tokenizer: the teacher's; its class and separator tokens are then not read as words.
        seed: of the new weights.

    Returns:
        The student in evaluation mode; a transformers model with ``save_pretrained`` and ``from_pretrained``.

    Raises:
        ValueError: a size that cannot work, or a teacher without a float word table.
    """
    if hidden < 1:
        raise ValueError(f"hidden={hidden} is not possible; use at least 1 unit a direction")
    return make_student(
        BiLSTMForSequenceClassification,
        teacher,
        seed,
        {"hidden_size": hidden},
        table=table,
        dimensions=dimensions,
        rank=rank,
        pairs=pairs,
        tokenizer=tokenizer,
        dense=dense,
        dropout=dropout,
    )
