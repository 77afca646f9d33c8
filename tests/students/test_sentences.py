"""BiLSTM and CNN students: what they compute, and their way through the library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qbert
from qbert import students
from qbert.students.sentences import moved_to_the_left

FAMILIES = {"bilstm": (students.bilstm, {"hidden": 12}), "cnn": (students.cnn, {"filters": 8, "windows": (2, 3)})}
TABLES: dict[str, dict[str, Any]] = {"whole": {}, "components": {"dimensions": 16}, "factors": {"rank": 16}}


def make(family: str, **settings: Any) -> Any:
    factory, sizes = FAMILIES[family]
    return factory(build("bert").eval(), **sizes, **{"dense": 16, **settings})


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 5 and 3 tokens, their second sentence from the third token on."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [3]])).long()
    ids = torch.randint(5, 50, (3, 9), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(9) > 1).long() * mask}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_padding_on_either_side_changes_nothing(family: str, pairs: bool, bits: int | None) -> None:
    model = make(family, pairs=pairs)
    if bits:
        model = qbert.pack(qbert.quantize_model(model, bits))
    inputs = batch()
    expected = logits(model, inputs)
    padded = {k: torch.nn.functional.pad(v, (3, 4)) for k, v in inputs.items()}
    torch.testing.assert_close(logits(model, padded), expected)
    alone = {k: v[1:2, :5] for k, v in inputs.items()}
    torch.testing.assert_close(logits(model, alone), expected[1:2])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_goes_all_the_way(family: str, table: str, bits: int, tmp_path: Path) -> None:
    model, inputs = make(family, **TABLES[table]), batch()
    packed = qbert.pack(qbert.quantize_model(model, bits))
    expected = logits(packed, inputs)
    packed.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=1e-6)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(auto, inputs), expected, rtol=0, atol=1e-6)
    # An activation at the border of a code may take the next one in another engine, and a recurrence carries that on.
    torch.testing.assert_close(logits(qbert.optimize_for_inference(loaded), inputs), expected, rtol=0, atol=2e-3)
    size = qbert.model_size(packed)
    assert size.total == qbert.model_size(model, bits).total
    assert [t.name for t in size.left_in_float] == ["classifier.weight"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_in_training_comes_back_as_it_was_saved(family: str, table: str, tmp_path: Path) -> None:
    student = qbert.quantize_model(make(family, **TABLES[table]), qbert.BitsConfig(4, groups=4))
    expected = logits(student.eval(), batch())
    student.save_pretrained(tmp_path)
    for load in (qbert.load, AutoModelForSequenceClassification.from_pretrained):
        loaded = load(tmp_path)
        torch.testing.assert_close(logits(loaded, batch()), expected, rtol=0, atol=1e-6)
        assert type(loaded) is type(student) and qbert.pack(loaded) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_float_students_are_saved_with_what_is_frozen(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, batch()), logits(model, batch()))
    assert not loaded.words.weight.requires_grad and loaded.classifier.weight.requires_grad
    assert make(family, table="trained").train().words.weight.requires_grad


def test_the_bilstm_is_the_recurrence_of_the_paper() -> None:
    model, inputs = make("bilstm"), batch()
    lstm = model.encoder[0]
    weights = {name: p.detach().double().numpy() for name, p in lstm.named_parameters()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def last_state(words: np.ndarray, suffix: str) -> np.ndarray:
        h, c = np.zeros(12), np.zeros(12)
        for x in words:
            gates = weights[f"weight_ih_l0{suffix}"] @ x + weights[f"bias_ih_l0{suffix}"]
            gates = gates + weights[f"weight_hh_l0{suffix}"] @ h + weights[f"bias_hh_l0{suffix}"]
            i, f, g, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        return h

    table = model.words.weight.detach().double().numpy()
    found = logits(model, inputs)
    for row, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], found, strict=True):
        words = table[row[mask.bool()].numpy()]
        vector = np.concatenate([last_state(words, ""), last_state(words[::-1], "_reverse")])
        dense, classifier = model.encoder[-1], model.classifier
        hidden = np.maximum(dense.weight.detach().numpy() @ vector + dense.bias.detach().numpy(), 0)
        ours = classifier.weight.detach().numpy() @ hidden + classifier.bias.detach().numpy()
        np.testing.assert_allclose(expected.numpy(), ours, rtol=1e-4, atol=1e-6)


def test_the_cnn_takes_the_largest_of_every_window() -> None:
    model, inputs = make("cnn"), batch()
    table, found = model.words.weight.detach().double().numpy(), logits(model, inputs)
    for row, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], found, strict=True):
        words, vector = table[row[mask.bool()].numpy()], []
        for convolution, window in zip(model.encoder[:-1], (2, 3), strict=True):
            edge = np.zeros((window - 1, words.shape[1]))
            padded = np.concatenate([edge, words, edge])
            weight = convolution.weight.detach().double().numpy()
            values = [
                np.einsum("fdk,kd->f", weight, padded[at : at + window]) + convolution.bias.detach().numpy()
                for at in range(len(padded) - window + 1)
            ]
            vector.append(np.max(values, 0).clip(0))
        dense, classifier = model.encoder[-1], model.classifier
        hidden = np.maximum(dense.weight.detach().numpy() @ np.concatenate(vector) + dense.bias.detach().numpy(), 0)
        ours = classifier.weight.detach().numpy() @ hidden + classifier.bias.detach().numpy()
        np.testing.assert_allclose(expected.numpy(), ours, rtol=1e-4, atol=1e-6)


def test_sentences_of_a_pair_are_compared_apart() -> None:
    model = make("bilstm", pairs=True)
    model.config.special_ids, model.config.separator_id = [1, 2], 2
    ids = torch.tensor([[1, 7, 8, 9, 2, 10, 11, 2]])
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    by_types = logits(model, {"input_ids": ids, "token_type_ids": types})
    for zeros in ({}, {"token_type_ids": torch.zeros_like(ids)}):  # told apart by the separator
        torch.testing.assert_close(logits(model, {"input_ids": ids, **zeros}), by_types)
    swapped = torch.tensor([[1, 10, 11, 2, 7, 8, 9, 2]])
    features = []
    model.encoder[-1].register_forward_hook(lambda _, inputs, __: features.append(inputs[0].chunk(4, -1)))
    logits(model, {"input_ids": ids}), logits(model, {"input_ids": swapped})
    (a, b, product, gap), (c, d, product2, gap2) = features
    torch.testing.assert_close((a, b, product, gap), (d, c, product2, gap2))
    torch.testing.assert_close(product, a * b)
    torch.testing.assert_close(gap, (a - b).abs())


def test_pairs_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="token_type_ids are missing"):
        logits(make("cnn", pairs=True), {"input_ids": torch.tensor([[5, 6, 7]])})


def test_tables_are_the_teachers() -> None:
    teacher = build("bert").eval()
    table = teacher.bert.embeddings.word_embeddings.weight.detach()
    whole = students.cnn(teacher).words.weight[1:]
    torch.testing.assert_close(whole / whole[0, 0], table[1:] / table[1, 0])
    full = students.cnn(teacher, rank=table.shape[1])
    full_table = full.widen(full.words.weight)[1:].detach()
    centred = (table - table.mean(0))[1:]
    torch.testing.assert_close(full_table / full_table.norm(), centred / centred.norm(), rtol=1e-3, atol=1e-5)
    assert students.bilstm(teacher, dimensions=4).words.weight.square().mean() == pytest.approx(1, rel=0.05)


def test_special_tokens_of_the_tokenizer_are_not_read(tmp_path: Path) -> None:
    from tiny_tasks import tiny_encoder

    folder = tiny_encoder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder)
    model = students.bilstm(teacher, tokenizer=tokenizer)
    text = tokenizer("the film was superb", return_tensors="pt")
    bare = tokenizer("the film was superb", return_tensors="pt", add_special_tokens=False)
    torch.testing.assert_close(logits(model, dict(text)), logits(model, dict(bare)))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bilstm", {"hidden": 0}, "hidden=0 is not possible"),
        ("bilstm", {"dimensions": 4000}, "dimensions=4000 does not fit"),
        ("cnn", {"windows": ()}, r"windows=\(\)"),
        ("cnn", {"rank": 4, "dimensions": 4}, "give one of them"),
        ("cnn", {"table": "thawed"}, "table='thawed'"),
    ],
)
def test_impossible_shapes_are_refused(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(students, family)(build("bert"), **settings)


def test_kept_ids_move_to_the_left_in_their_order() -> None:
    ids = torch.tensor([[0, 7, 0, 8, 9], [5, 6, 0, 0, 0], [1, 1, 1, 1, 1]])
    kept = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    moved, lengths = moved_to_the_left(ids, kept, 0)
    assert moved.tolist() == [[7, 8], [5, 6], [0, 0]] and lengths.tolist() == [2, 2, 1]


@pytest.mark.parametrize(("labels", "kind"), [(torch.tensor([0, 1, 1]), None), (torch.rand(3, 2), None)])
def test_the_loss_is_that_of_the_labels(labels: torch.Tensor, kind: str | None) -> None:
    model = make("cnn")
    model.config.problem_type = kind
    output = model(**batch(), labels=labels)
    values = output.logits.detach().double().numpy()
    if labels.is_floating_point():
        p = 1 / (1 + np.exp(-values))
        target = labels.double().numpy()
        expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    else:
        logs = values - np.log(np.exp(values).sum(1, keepdims=True))
        expected = -logs[np.arange(3), labels.numpy()].mean()
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
