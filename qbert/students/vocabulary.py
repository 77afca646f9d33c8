"""Students with the word pieces of one corpus: the table of a small encoder is half of its bytes.

    >>> student, tokenizer = student_with_vocabulary(teacher, tokenizer, texts)
    >>> student.save_pretrained("small"); tokenizer.save_pretrained("small")

Kept are the pieces that occur in the texts, the special tokens, every piece of one character, and those that no pieces
of one character can stand for, so that a word that was never seen is still cut into pieces that are there (smaller ones
than before). Rows and ids are numbered anew,
in the old order. Texts whose pieces were all kept give the outputs that they gave before.

Reference: Abdaoui et al. 2020, "Load what you need".
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
_TEXTS_AT_ONCE = 1000
_NEVER_MADE = re.compile(r"\[unused\d+\]")  # places that BERT keeps free


def student_with_vocabulary(
    teacher: Model, tokenizer: Any, texts: Iterable[str], *, least_count: int = 1
) -> tuple[Model, Any]:
    """A copy of `teacher` whose word table holds the pieces of a corpus alone, and the tokenizer that belongs to it.

    Args:
        teacher: a float encoder, with or without a head; a table tied to a language-model head stays tied to it.
        tokenizer: its fast tokenizer, of WordPiece kind (BERT, DistilBERT, ELECTRA, MPNet, MiniLM).
        texts: the corpus, strings: all texts of the task that there are, labelled or not.
        least_count: how often a piece must occur to be kept.

    Returns:
        (student in evaluation mode, tokenizer), both of the classes given, both with `save_pretrained`.

    Raises:
        ValueError: no texts, another kind of tokenizer, a model that is quantized or whose table has not the
            tokenizer's rows, or an output over the vocabulary that is not tied to the table.
        TypeError: if `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected several strings, got one; pass a list of them")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    if state.get("model", {}).get("type") != "WordPiece":
        kind = state.get("model", {}).get("type", f"no fast tokenizer ({type(tokenizer).__name__})")
        raise ValueError(f"tokenizer: its kind is {kind}, but only WordPiece vocabularies can be cut; keep it whole")
    table = word_table(teacher)
    counts = _counts(tokenizer, texts, len(table.weight))
    kept = _kept_ids(state, tokenizer, counts, least_count)
    if max(kept) >= len(table.weight):
        raise ValueError(
            f"teacher: its table has {len(table.weight)} rows, but the tokenizer has the id {max(kept)}; give the "
            "model's own tokenizer"
        )
    new_id = {old: new for new, old in enumerate(kept)}
    student = _with_rows(teacher, table, kept, new_id)
    return student, _with_ids(tokenizer, state, new_id)


def word_table(teacher: nn.Module) -> nn.Embedding:
    """The float word table [V, D] of an encoder.

    Raises:
        ValueError: the model has none, or it is quantized.
    """
    find = getattr(teacher, "get_input_embeddings", None)
    table = find() if callable(find) else None
    if type(table) is not nn.Embedding:
        raise ValueError(
            f"teacher: {type(teacher).__name__} has no float word table; give a transformers encoder before it is "
            "quantized"
        )
    return table


def _counts(tokenizer: Any, texts: Iterable[str], rows: int) -> torch.Tensor:
    """How often each id occurs in the texts, [rows] int64."""
    counts = torch.zeros(rows, dtype=torch.int64)
    pending: list[str] = []
    seen = False

    def count() -> None:
        ids = [i for row in tokenizer(pending, add_special_tokens=False)["input_ids"] for i in row]
        counts.add_(torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=rows)[:rows])
        pending.clear()

    for text in texts:
        seen = True
        pending.append(text)
        if len(pending) == _TEXTS_AT_ONCE:
            count()
    if not seen:
        raise ValueError("texts is empty; give the sentences whose word pieces are to be kept")
    if pending:
        count()
    return counts


def _kept_ids(state: Mapping[str, Any], tokenizer: Any, counts: torch.Tensor, least_count: int) -> list[int]:
    """The ids to keep, ascending."""
    prefix = state["model"].get("continuing_subword_prefix") or ""
    vocabulary: dict[str, int] = state["model"]["vocab"]
    special = {token["id"] for token in state.get("added_tokens", [])} | set(tokenizer.all_special_ids)

    def replaceable(piece: str) -> bool:
        """Whether pieces of one character, which are kept, can stand for it."""
        inner = prefix if prefix and piece.startswith(prefix) else ""
        characters = piece.removeprefix(inner)
        alone = [inner + characters[:1], *(prefix + c for c in characters[1:])]
        return len(characters) > 1 and all(c in vocabulary for c in alone)

    kept = {
        i
        for piece, i in vocabulary.items()
        if not _NEVER_MADE.fullmatch(piece)
        and (i >= len(counts) or int(counts[i]) >= least_count or not replaceable(piece))
    }
    return sorted(kept | special)


def _with_rows(teacher: Model, table: nn.Embedding, kept: list[int], new_id: Mapping[int, int]) -> Model:
    student = copy.deepcopy(teacher).eval()
    rows = torch.tensor(kept, device=table.weight.device)
    own = student.get_input_embeddings()  # type: ignore[operator]
    padding = None if table.padding_idx is None else new_id[table.padding_idx]
    smaller = nn.Embedding(len(kept), table.embedding_dim, padding, device="meta")
    smaller.weight = nn.Parameter(own.weight.detach()[rows].clone(), requires_grad=own.weight.requires_grad)
    head = student.get_output_embeddings() if hasattr(student, "get_output_embeddings") else None  # type: ignore[operator]
    if head is not None:
        if head.weight is not own.weight:
            raise ValueError("teacher: its output over the vocabulary is not tied to the table; give the base model")
        head.weight, head.out_features = smaller.weight, len(kept)
        # BERT's heads hold their bias twice, under two names.
        biases = {id(b): b for m in student.modules() for b in m._parameters.values() if b is not None and b.dim() == 1}
        for bias in biases.values():
            if len(bias) == len(own.weight):
                bias.data = bias.data[rows].clone()
    student.set_input_embeddings(smaller.train(own.training))  # type: ignore[operator]
    config: Any = student.config
    config.vocab_size = len(kept)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        old = getattr(config, name, None)
        if isinstance(old, int):
            setattr(config, name, new_id.get(old))
    return student


def _with_ids(tokenizer: Any, state: dict[str, Any], new_id: Mapping[int, int]) -> Any:
    """A tokenizer of the same class with the kept pieces under their new ids."""
    from tokenizers import Tokenizer

    state["model"]["vocab"] = {p: new_id[i] for p, i in state["model"]["vocab"].items() if i in new_id}
    _renumber(state.get("added_tokens"), new_id)
    _renumber(state.get("post_processor"), new_id)
    if state.get("padding"):
        state["padding"]["pad_id"] = new_id[state["padding"]["pad_id"]]
    options = {k: v for k, v in tokenizer.init_kwargs.items() if k not in ("tokenizer_file", "vocab_file", "vocab")}
    options.pop("added_tokens_decoder", None)
    options.pop("tokenizer_object", None)
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


def _renumber(part: Any, new_id: Mapping[int, int]) -> None:
    """Give the ids in the JSON of added tokens or of a post-processor their new numbers, in place."""
    if isinstance(part, list):
        for entry in part:
            _renumber(entry, new_id)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "id" and isinstance(value, int):
                part[key] = new_id[value]
            elif key == "ids":
                part[key] = [new_id[i] for i in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                part[key] = [value[0], new_id[value[1]]]
            else:
                _renumber(value, new_id)
