"""Streams of text: every text once, in an order fit for batches that can be found again."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tasks import tiny_encoder
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from qbert.tasks.streams import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_encoder(tmp_path_factory.mktemp("tiny")))


def write(folder: Path, lengths: list[int], name: str = "text.txt", between: str = "\n") -> Path:
    text = between.join(" ".join(["film", *["the"] * (length - 1)]) for length in lengths)
    content = text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def ids(stream: Any) -> list[list[int]]:
    return [example["input_ids"] for example in stream]


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=400), batch=st.integers(1, 3), first=st.integers(0, 420)
)
def test_every_text_comes_once_and_any_example_can_be_found_again(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch: int, first: int
) -> None:
    file = write(tmp_path_factory.mktemp("s"), lengths)
    stream = TextStream([file], tokenizer, least_words=1, batch_size=batch)
    found = ids(stream)
    assert sorted(map(len, found)) == sorted(length + 2 for length in lengths)
    assert ids(stream) == found and ids(stream.from_example(first)) == found[first:]


def test_batches_are_of_like_length_and_drawn_anew_each_epoch(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [1 + (7 * i) % 40 for i in range(512)])
    stream = TextStream([file], tokenizer, least_words=1, batch_size=8)
    found = [len(example) for example in ids(stream)]
    batches = [found[i : i + 8] for i in range(0, len(found), 8)]
    assert max(max(batch) - min(batch) for batch in batches) <= 1
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)
    stream.set_epoch(1)
    assert [len(example) for example in ids(stream)] != found
    assert ids(TextStream([file], tokenizer, least_words=1, batch_size=8, seed=1, epoch=1)) != ids(stream)


@pytest.mark.parametrize("first", [0, 7])
def test_workers_share_the_examples_and_keep_the_batches(first: int, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [1 + (7 * i) % 12 for i in range(150)])
    stream = TextStream([file], tokenizer, least_words=1, batch_size=2).from_example(first)
    alone, shared = (list(DataLoader(stream, 2, num_workers=n, collate_fn=ids)) for n in (0, 2))
    assert shared == alone


def test_processes_with_workers_share_the_examples(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [1 + (7 * i) % 12 for i in range(144)])
    stream = TextStream([file], tokenizer, least_words=1, batch_size=4)
    found = [
        example
        for process in (0, 1)
        for batch in DataLoader(
            IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=process),
            2,
            num_workers=2,
            collate_fn=ids,
        )
        for example in batch
    ]
    assert sorted(found) == sorted(ids(stream))


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_paragraphs_and_long_texts(name: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [3, 3, 20], name, between="\n\n")
    (tmp_path / "more.txt").write_text("film the\nthe the\n\n = = \n")
    stream = TextStream([file, tmp_path / "more.txt"], tokenizer, unit="paragraph", words=8, least_words=3)
    texts = list(stream.texts())
    assert [len(text.split()) for text in texts] == [3, 3, 8, 8, 4, 4]  # cut into pieces, lines joined
    assert stream.fingerprint() != TextStream([file], tokenizer, unit="paragraph", words=8).fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": []}, "files is empty"),
        ({"unit": "page"}, "unit='page'"),
        ({"max_length": 4}, "max_length=4"),
        ({"least_words": 50}, "no text of at least 50 words"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    settings: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"files": [write(tmp_path, [6])], **settings}
    with pytest.raises(ValueError, match=message):
        TextStream(tokenizer=tokenizer, **arguments)


def test_missing_and_damaged_files_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt is no file"):
        TextStream([tmp_path / "absent.txt"], tokenizer)
    whole = gzip.compress(b"the film was superb and kind\n" * 5000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is damaged"):
        list(TextStream([tmp_path / "cut.txt.gz"], tokenizer))
