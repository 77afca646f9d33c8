"""What students that are no transformers share: words from the teacher's table, sentences apart, a small head.

The student reads the ids that the teacher reads, so one tokenizer and one batch serve both. Of a pair that the teacher
reads as one sequence it takes the two sentences apart again, reads both with the same encoder, and compares
[h1, h2, h1 * h2, |h1 - h2|] (Tang et al. 2019, section 3.2). Padding, on whichever side, never changes its outputs.

The families (`bilstm`, `cnn`) only say how a sentence becomes a vector; `adabert` reads the two of a pair together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from qbert.distill.losses import task_loss
from qbert.encoders.targets import base_model
from qbert.students.vocabulary import word_table

TableKind = Literal["frozen", "trained"]
Student = TypeVar("Student", bound="SentenceStudent")
_SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_PAIR_PARTS = 4


class SentenceStudentConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of a student.

    Attributes:
        vocab_size, embedding_size: rows and width D of the word table.
        embedding_rank: width of the stored table where it is a product of two factors; None: it is stored whole.
        train_table: whether the word table is trained.
        dense: width of the hidden layer behind the sentence vectors.
        dropout: rate before and behind it.
        pairs: whether rows are pairs of sentences.
        special_ids: ids of tokens that are no words (class, separator), which are not read.
        separator_id: the token between the two sentences, where the tokenizer gives no ``token_type_ids``.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        embedding_rank: int | None = None,
        train_table: bool = False,
        dense: int = 200,
        dropout: float = 0.1,
        pairs: bool = False,
        special_ids: list[int] | None = None,
        separator_id: int | None = None,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.embedding_size, self.embedding_rank = vocab_size, embedding_size, embedding_rank
        self.train_table, self.dense, self.dropout, self.pairs = train_table, dense, dropout, pairs
        self.special_ids, self.separator_id = special_ids or [], separator_id
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)


class SentenceStudent(PreTrainedModel):  # type: ignore[misc]
    """Words, a sentence encoder, and a classifier or regression on the vectors.

    Attributes:
        words: table [V, D], or [V, rank] with `widen` behind it.
        encoder: the family's layers, then the hidden layer: in a list, as encoder layers are elsewhere, so that all of
            them are quantized where the library quantizes an encoder.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    config: Any
    words: Any
    vector_size: ClassVar[Any]  # of a config: width of the vector of one sentence

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stored = config.embedding_rank or config.embedding_size
        self.words = nn.Embedding(config.vocab_size, stored, padding_idx=config.pad_token_id)
        self.widen = nn.Linear(stored, config.embedding_size, bias=False) if config.embedding_rank else None
        self.encoder = nn.ModuleList([*self.encoder_layers(config), nn.Linear(self.features(config), config.dense)])
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dense, config.num_labels)
        self.post_init()

    @staticmethod
    def encoder_layers(config: Any) -> list[nn.Module]:
        """The layers that turn words into a vector."""
        raise NotImplementedError

    @classmethod
    def features(cls, config: Any) -> int:
        """Width of what the hidden layer is given."""
        return cls.vector_size(config) * (_PAIR_PARTS if config.pairs else 1)  # type: ignore[no-any-return]

    def vectors(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Word vectors [B, T, D], of which the first `lengths` [B] (from 1 on) count, to sentence vectors [B, F]."""
        raise NotImplementedError

    def train(self: Student, mode: bool = True) -> Student:
        """Training or evaluation mode; a frozen table stays frozen, however the model came to be loaded."""
        weight = self.words._parameters.get("weight")
        if weight is not None and not self.config.train_table:
            weight.requires_grad_(False)
        return super().train(mode)  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and not isinstance(module, nn.Embedding):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        """The stored word table."""
        return self.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchange the stored word table."""
        self.words = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, C] of ids [B, T], and the task's loss where labels are given ([B], or [B, C] for many labels).

        Raises:
            ValueError: pairs without ``token_type_ids``, and no separator is known. Where it is known it takes the
                place of types that are 0 in all of a row.
        """
        encoded = self.vectors(*self.read(input_ids, attention_mask, token_type_ids))
        if self.config.pairs:
            first, second = encoded.chunk(2)
            encoded = torch.cat([first, second, first * second, (first - second).abs()], -1)
        logits = self.head(encoded)
        return SequenceClassifierOutput(loss=self.loss_of(logits, labels), logits=logits)

    def loss_of(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        """The task's own loss of logits [B, C]; None without labels."""
        return None if labels is None else task_loss(logits, labels, self.config.problem_type)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, D] of what a row says, and how many of them count [B]; [2 B, ...] of pairs."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sides = self._sides(input_ids, real.bool(), token_type_ids)
        ids = input_ids if len(sides) == 1 else input_ids.repeat(len(sides), 1)
        ids, lengths = moved_to_the_left(ids, torch.cat(sides), self.config.pad_token_id)
        words = self.words(ids)
        return (words if self.widen is None else self.widen(words)), lengths

    def head(self, features: Tensor) -> Tensor:
        """Logits [B, C] of features [B, F]."""
        hidden = torch.relu(self.encoder[-1](self.dropout(features)))
        return self.classifier(self.dropout(hidden))  # type: ignore[no-any-return]

    def _sides(self, ids: Tensor, real: Tensor, types: Tensor | None) -> list[Tensor]:
        """bool [B, T] for each sentence of a row: which tokens are its words."""
        words = real
        for special in self.config.special_ids:
            words = words & (ids != special)
        if not self.config.pairs:
            return [words]
        if self.config.separator_id is None:
            if types is None:
                raise ValueError(
                    "token_type_ids are missing, so the two sentences of a pair cannot be told apart; give them, or "
                    "make the student with the tokenizer= of the teacher"
                )
            second = types > 0
        else:
            separators = (ids == self.config.separator_id) & real
            second = separators.cumsum(1) - separators.long() > 0  # a separator ends its own sentence
            if types is not None:  # RoBERTa's are 0 in both sentences
                second = torch.where((types > 0).any(1, keepdim=True), types > 0, second)
        return [words & ~second, words & second]


def moved_to_the_left(ids: Tensor, kept: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The kept ids of each row of [B, T] at its beginning, in their order, then padding; and their numbers [B].

    A row without any counts one token of padding; what stands behind the longest row is cut off.
    """
    counts = kept.sum(1)
    lengths = counts.clamp_min(1)
    longest = int(lengths.max())
    if not bool((kept[:, 1:] <= kept[:, :-1]).all()):  # else they stand at the beginning already
        order = torch.argsort(~kept, dim=1, stable=True)[:, :longest]
        ids = ids.gather(1, order)
    ids = ids[:, :longest]
    inside = torch.arange(longest, device=ids.device) < counts.unsqueeze(1)
    return torch.where(inside, ids, padding), lengths


def make_student(
    kind: type[Student], teacher: nn.Module, seed: int, sizes: Mapping[str, Any], **common: Any
) -> Student:
    """A student in evaluation mode: drawn by `seed`, then the teacher's words put in.

    Args:
        kind: its class.
        teacher: whose words and labels it has.
        sizes: what the config of its family alone says.
        **common: as of `common_settings`.

    Raises:
        ValueError: naming the argument that cannot work.
    """
    settings = common_settings(teacher, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config: Any = kind.config_class
        student = kind(config(**sizes, **settings))
    return with_words_of(student, teacher)


def common_settings(
    teacher: nn.Module,
    *,
    table: TableKind,
    dimensions: int | None,
    rank: int | None,
    pairs: bool,
    tokenizer: Any,
    dense: int,
    dropout: float,
) -> dict[str, Any]:
    """What every family's config says about table, head and labels; the arguments are those of the families.

    Raises:
        ValueError: naming the argument that cannot work.
    """
    rows, width = word_table(teacher).weight.shape
    if table not in ("frozen", "trained"):
        raise ValueError(f"table={table!r} is not possible; use 'frozen' or 'trained'")
    for name, value in (("dimensions", dimensions), ("rank", rank)):
        if value is not None and not 1 <= value <= width:
            raise ValueError(f"{name}={value} does not fit the teacher's table of width {width}; use 1 to {width}")
    if dimensions is not None and rank is not None:
        raise ValueError("dimensions and rank both shrink the table; give one of them")
    if dense < 1 or not 0 <= dropout < 1:
        raise ValueError(f"dense={dense} and dropout={dropout} are not possible; use at least 1, and a rate below 1")
    config: Any = getattr(teacher, "config", None)
    _, base = base_model(teacher)
    found = [getattr(tokenizer if tokenizer is not None else base.config, name, None) for name in _SPECIAL]
    separator = getattr(tokenizer, "sep_token_id", None) if tokenizer is not None else found[-1]
    padding = getattr(tokenizer, "pad_token_id", None) if tokenizer is not None else None
    if padding is None:
        padding = getattr(base.config, "pad_token_id", None) or 0
    return {
        "vocab_size": rows,
        "embedding_size": dimensions or width,
        "embedding_rank": rank,
        "train_table": table == "trained",
        "dense": dense,
        "dropout": dropout,
        "pairs": pairs,
        "special_ids": sorted({i for i in found if isinstance(i, int) and i != padding}),
        "separator_id": separator,
        "pad_token_id": padding,
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
        "problem_type": getattr(config, "problem_type", None),
    }


@torch.no_grad()
def with_words_of(student: Student, teacher: nn.Module) -> Student:
    """`student` with the teacher's table: whole, its principal components, or its two best factors.

    The table is scaled to a mean square of 1, since that of an encoder is followed by a normalization and is far
    smaller. Principal components are those of the table without its mean, which says nothing about a word.
    """
    config = student.config
    table = word_table(teacher).weight.detach().to(device="cpu", dtype=torch.float64)
    if config.embedding_rank or config.embedding_size < table.shape[1]:
        centred = table - table.mean(0)
        kept = config.embedding_rank or config.embedding_size
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :kept]  # [D, kept]
        table = centred @ basis
        if student.widen is not None:
            student.widen.weight.copy_(basis)
    elements = config.embedding_size / table.shape[1]  # of a product of factors the square of all D counts
    table = table / (table.square().mean() / elements).sqrt()
    student.words.weight.copy_(table)
    student.words.weight[config.pad_token_id] = 0
    return student.eval()
