"""TinyBERT's altered copies: words exchanged for those that a masked language model, or their neighbours, put there.

It stands alone because it proposes words; `masking` exchanges them.

    >>> head = train_masked_words(encoder, tokenizer, texts)        # an encoder without a language-model head gets one
    >>> more = augmented(task, LikelyWords(head, tokenizer), copies=20)

Source: Jiao et al. 2020, TinyBERT, algorithm 1, and ``data_augmentation.py`` of huawei-noah's code: a word of one piece
is masked and has the K = 15 likeliest words as candidates, one of several pieces its K nearest by word vectors; each
word is exchanged with probability .4; stop words and numbers stay. Differences: word vectors are the mean
of the encoder's own states over the task's texts, not GloVe, and words `apart` places from each other are masked
together, which takes a fifth of the passes. A likely word may have the opposite sense ("good" for "bad"), which does no
harm where the teacher labels the copies.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qbert.encoders.inputs import accepted_inputs
from qbert.files import check_tensors, write_tensors
from qbert.progress import progress_bar
from qbert.tasks.augment import WORD, drawn_words, with_words

_MASKED = 0.15
_BATCH = 32
_NEIGHBOURS_AT_ONCE = 512
# Words that carry grammar; exchanging them makes no new sentence of the same sense.
_STOP_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both
but by can did do does doing don't down during each few for from further had has have having he her here hers
him his how i if in into is it it's its itself just me more most my myself no nor not now of off on once only or
other our out over own s same she should so some such t than that the their them then there these they this
those through to too under until up very was we were what when where which while who whom why will with you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


class MaskedWords(nn.Module):
    """A masked language model on a frozen encoder: dense, GELU, LayerNorm, and the encoder's own table as the decoder.

    Args:
        encoder: gives ``last_hidden_state`` [B, T, H]; H is the width of its word table.
    """

    encoder: Any

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        object.__setattr__(self, "encoder", encoder)  # not a part of the head: it is neither trained nor saved with it
        rows, width = encoder.get_input_embeddings().weight.shape
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(rows))
        nn.init.eye_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The encoder's last hidden states [B, T, H] in the head's dtype, without a gradient."""
        with torch.no_grad():
            states: Tensor = self.encoder(**accepted_inputs(self.encoder, inputs)).last_hidden_state
        return states.to(self.bias.dtype)

    def at(self, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        """Logits over the vocabulary [N, V] of the N places where bool [B, T] is true, row by row."""
        hidden = self.norm(F.gelu(self.dense(self.states(inputs)[places])))
        table = self.encoder.get_input_embeddings().weight.detach()
        return F.linear(hidden, table.to(hidden.dtype), self.bias)


def train_masked_words(
    encoder: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    steps: int = 600,
    batch_size: int = _BATCH,
    learning_rate: float = 2e-3,
    max_length: int = 128,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MaskedWords:
    """A language-model head for an encoder that has none, trained on `texts` with 15 % of the words masked.

    The encoder stays as it is. `top_recall` tells how good the head is.

    Args:
        texts: unlabelled, of the kind that is to be altered.
        cache: folder that keeps the head, found again by all that it depends on.

    Raises:
        ValueError: too little text for a batch, no step, or a tokenizer without a mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: it has no mask token, so no word can be masked; use another encoder")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} are not possible; use at least 1")
    if len(texts) < batch_size:
        raise ValueError(f"texts: {len(texts)} are too few for a batch of {batch_size}; give more text")
    head = MaskedWords(encoder.eval())
    settings = [steps, batch_size, learning_rate, max_length, seed]
    path = None
    if cache is not None:
        path = Path(cache) / f"masked-words-{_digest(encoder, texts, settings)[:16]}.safetensors"
        if path.is_file():
            check_tensors(path)
            head.load_state_dict(load_file(path))
            return head.eval()
    generator = torch.Generator().manual_seed(seed)
    counts = torch.ones_like(head.bias)
    for start in range(0, len(texts), 1000):
        ids = tokenizer(list(texts[start : start + 1000]), truncation=True, max_length=max_length)["input_ids"]
        flat = torch.tensor([i for row in ids for i in row])
        counts += torch.bincount(flat, minlength=len(counts))[: len(counts)]
    head.bias.data.copy_((counts / counts.sum()).log())  # the words' own frequency is where a head should start
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    special = torch.tensor(tokenizer.all_special_ids)
    with progress_bar(total=steps, desc="training a language-model head", unit="step", disable=not progress) as bar:
        for _ in range(steps):
            chosen = torch.randint(len(texts), (batch_size,), generator=generator).tolist()
            batch = _encoded(tokenizer, [texts[i] for i in chosen], max_length)
            ids = batch["input_ids"]
            words = batch["attention_mask"].bool() & ~torch.isin(ids, special)
            places = words & (torch.rand(ids.shape, generator=generator) < _MASKED)
            if not bool(places.any()):
                places = words & (words.cumsum(1) == 1)
            if not bool(places.any()):
                continue
            batch["input_ids"] = torch.where(places, tokenizer.mask_token_id, ids)
            loss = F.cross_entropy(head.at(batch, places), ids[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{float(loss.detach()):.2f}", refresh=False)
    if path is not None:
        write_tensors(path, {name: tensor.contiguous() for name, tensor in head.state_dict().items()})
    return head.eval()


@torch.no_grad()
def top_recall(model: Any, tokenizer: Any, texts: Sequence[str], *, top: int = 15, max_length: int = 128) -> float:
    """Percent of the words of one piece that are among the `top` likeliest when they are masked, every fifth at once.

    This, not the loss, is what candidates depend on.

    Raises:
        ValueError: no such word in `texts`.
    """
    right = seen = 0
    for inputs, places, truth in _masked_batches(tokenizer, _spans(tokenizer, texts, max_length), 5, keep_stops=True):
        best = logits_at(model, inputs, places).topk(top, -1).indices
        right += int((best == truth.unsqueeze(1)).any(1).sum())
        seen += len(truth)
    if not seen:
        raise ValueError("texts: none has a word of one piece that could be masked; give other texts")
    return 100 * right / seen


def logits_at(model: Any, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """Logits [N, V] of a `MaskedWords`, or of any masked language model of transformers, where bool [B, T] is true."""
    if isinstance(model, MaskedWords):
        return model.at(inputs, places)
    return model(**accepted_inputs(model, inputs)).logits[places]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Sentence:
    """Where the words of a text stand.

    Attributes:
        ids: tokens with the special ones around them.
        words: the words.
        pieces: (first token, number of tokens) of each; 0 tokens for what was cut off or has none of its own.
    """

    ids: list[int]
    words: list[str]
    pieces: list[tuple[int, int]]


@dataclass
class LikelyWords:
    """TinyBERT's way of altering a sentence, for `qbert.tasks.augment.augmented`.

    Attributes:
        model: a `MaskedWords`, or a masked language model of transformers, in evaluation mode.
        tokenizer: its fast tokenizer.
        chance: that a word with candidates is exchanged.
        likely: candidates of a word.
        apart: words this many places from each other are masked together; None masks one at a time, as published, which
            takes a pass for every word.
        max_length: longest text in tokens; words beyond it stay.
    """

    model: Any
    tokenizer: Any
    chance: float = 0.4
    likely: int = 15
    apart: int | None = 5
    max_length: int = 128
    progress: bool = True
    _found: dict[str, dict[int, list[str]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: candidates need a fast one (offsets), got {type(self.tokenizer).__name__}")
        if self.tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: it has no mask token, so no word can be masked; use another encoder")
        if not 0 <= self.chance <= 1 or self.likely < 1 or (self.apart is not None and self.apart < 1):
            raise ValueError(
                f"chance={self.chance}, likely={self.likely}, apart={self.apart} are not possible; use a probability "
                "and whole numbers of at least 1"
            )

    def settings(self) -> dict[str, Any]:
        """Numbers, and a digest of the language model."""
        encoder = self.model.encoder if isinstance(self.model, MaskedWords) else None
        return {
            "name": "likely words",
            "model": _digest(self.model, [], []) + (_digest(encoder, [], []) if encoder is not None else ""),
            **{name: getattr(self, name) for name in ("chance", "likely", "apart", "max_length")},
        }

    @torch.no_grad()
    def begin(self, texts: Sequence[str]) -> None:
        """Find the candidates of every word of `texts`."""
        sentences = _spans(self.tokenizer, texts, self.max_length)
        self._found = {text: {} for text in texts}
        self._ask_model(texts, sentences)
        self._ask_neighbours(texts, sentences)

    def alter(self, text: str, generator: random.Random) -> str:
        """One altered copy of a text that `begin` has seen."""
        words = WORD.findall(text)
        return with_words(text, drawn_words(words, self._found[text], self.chance, generator))

    def _ask_model(self, texts: Sequence[str], sentences: list[_Sentence]) -> None:
        whole = _whole_words(self.tokenizer, _vocabulary_size(self.model))
        bar = progress_bar(desc="asking for likely words", unit="word", disable=not self.progress)
        with bar:
            batches = _masked_batches(self.tokenizer, sentences, self.apart, keep_stops=False, with_owners=True)
            for inputs, places, truth, owners in batches:
                logits = logits_at(self.model, inputs, places)
                logits = logits.masked_fill(~whole, -math.inf).scatter(1, truth.unsqueeze(1), -math.inf)
                for (text, word), ids in zip(owners, logits.topk(self.likely, -1).indices.tolist(), strict=True):
                    old = sentences[text].words[word]
                    likely = [_as_written(token, old) for token in self.tokenizer.convert_ids_to_tokens(ids)]
                    self._found[texts[text]][word] = [new for new in likely if new != old]
                bar.update(len(owners))

    def _ask_neighbours(self, texts: Sequence[str], sentences: list[_Sentence]) -> None:
        wanted = {
            (text, word)
            for text, sentence in enumerate(sentences)
            for word, (_, count) in enumerate(sentence.pieces)
            if count > 1 and not _stays(sentence.words[word])
        }
        if not wanted:
            return
        vectors = self._word_vectors(sentences)
        names = list(vectors)
        matrix = F.normalize(torch.stack([vectors[name] for name in names]), dim=-1)
        asked = sorted({sentences[text].words[word].lower() for text, word in wanted} & vectors.keys())
        index = {name: i for i, name in enumerate(names)}
        nearest: dict[str, list[str]] = {}
        for start in range(0, len(asked), _NEIGHBOURS_AT_ONCE):
            part = asked[start : start + _NEIGHBOURS_AT_ONCE]
            similar = matrix[[index[name] for name in part]] @ matrix.T
            similar[torch.arange(len(part)), [index[name] for name in part]] = -2
            for name, best in zip(part, similar.topk(min(self.likely, len(names) - 1), -1).indices, strict=True):
                nearest[name] = [names[i] for i in best.tolist()]
        for text, word in wanted:
            old = sentences[text].words[word]
            self._found[texts[text]][word] = [_as_written(new, old) for new in nearest.get(old.lower(), [])]

    def _word_vectors(self, sentences: list[_Sentence]) -> dict[str, Tensor]:
        """Mean state of every word of the texts, numbers and stop words apart."""
        model = self.model
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for chosen, inputs in _by_length(self.tokenizer, [sentence.ids for sentence in sentences]):
            if isinstance(model, MaskedWords):
                states = model.states(inputs)
            else:
                states = model(**accepted_inputs(model, inputs), output_hidden_states=True).hidden_states[-1]
            for row, text in enumerate(chosen):
                for word, (first, count) in zip(sentences[text].words, sentences[text].pieces, strict=True):
                    if count and not _stays(word):
                        state = states[row, first : first + count].mean(0)
                        name = word.lower()
                        sums[name] = sums[name] + state if name in sums else state.clone()
                        counts[name] = counts.get(name, 0) + 1
        return {name: sums[name] / counts[name] for name in sorted(sums)}


def _stays(word: str) -> bool:
    return word.lower() in STOP_WORDS or any(character.isdigit() for character in word)


def _as_written(new: str, old: str) -> str:
    return new.capitalize() if old[:1].isupper() else new


def _whole_words(tokenizer: Any, size: int) -> Tensor:
    """bool [V]: pieces that are words of letters by themselves."""
    continued = "##"
    whole = torch.zeros(size, dtype=torch.bool)
    for token, index in tokenizer.get_vocab().items():
        if index < size and not token.startswith(continued) and token.isalpha() and len(token) > 1:
            whole[index] = True
    return whole


def _vocabulary_size(model: Any) -> int:
    if isinstance(model, MaskedWords):
        return len(model.bias)
    return int(model.config.vocab_size)


def _encoded(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    return dict(tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))


def _spans(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[_Sentence]:
    """Tokens and words of every text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids)
    found = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts = {begin: i for i, (begin, end) in enumerate(offsets) if end > begin and ids[i] not in special}
        words, pieces = [], []
        for match in WORD.finditer(text):
            words.append(match[0])
            first, at = starts.get(match.start()), match.start()
            count = 0
            while first is not None and first + count < len(offsets) and at < match.end():
                begin, end = offsets[first + count]
                if begin < at or end > match.end() or end <= begin:
                    break
                at, count = end, count + 1
            pieces.append((first or 0, count if at == match.end() else 0))
        found.append(_Sentence(list(ids), words, pieces))
    return found


def _by_length(tokenizer: Any, rows: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices, padded batch) of rows of ids, shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        longest = max(len(rows[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask[row, : len(rows[i])] = 1
        yield chosen, {"input_ids": ids, "attention_mask": mask}


def _masked_batches(
    tokenizer: Any, sentences: list[_Sentence], apart: int | None, *, keep_stops: bool, with_owners: bool = False
) -> Iterator[Any]:
    """(inputs, bool [B, T] masked places, true ids [N][, (sentence, word) of each]) over all words of one piece."""
    rows: list[list[int]] = []
    owners: list[tuple[int, dict[int, int]]] = []  # sentence, and word by place
    for number, sentence in enumerate(sentences):
        single = [
            (first, word)
            for word, (first, count) in enumerate(sentence.pieces)
            if count == 1 and (keep_stops or not _stays(sentence.words[word]))
        ]
        groups: dict[int, dict[int, int]] = {}
        for position, (first, word) in enumerate(single):
            groups.setdefault(position if apart is None else word % apart, {})[first] = word
        for places in groups.values():
            rows.append([tokenizer.mask_token_id if i in places else token for i, token in enumerate(sentence.ids)])
            owners.append((number, places))
    for chosen, inputs in _by_length(tokenizer, rows):
        masked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        truth, found = [], []
        for row, i in enumerate(chosen):
            number, places = owners[i]
            for place in sorted(places):
                masked[row, place] = True
                truth.append(sentences[number].ids[place])
                found.append((number, places[place]))
        batch = (inputs, masked, torch.tensor(truth))
        yield (*batch, found) if with_owners else batch


def _digest(model: Any, texts: Sequence[str], settings: list[Any]) -> str:
    total = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for text in texts:
        total.update(text.encode() + b"\0")
    return total.hexdigest()
