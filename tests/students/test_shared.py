"""Layers applied several times and narrow tables: chosen, saved, quantized once, counted as often as they are used."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller
from encoders import build, head, inputs_for, outputs, same_state

import qbert
from qbert.allocation.kronecker import kronecker_factors
from qbert.distill import recipes
from qbert.distill.step_sizes import begin_training
from qbert.encoders.sharing import share, uses
from qbert.encoders.tables import NarrowTable
from qbert.students.depth import compare_depths, student_with_layers
from qbert.students.shared import narrow_table, share_layers
from qbert.tasks.order import order_pairs, sentences


def teacher_of(depth: int = 4) -> Any:
    torch.manual_seed(0)
    return build("bert", num_hidden_layers=depth).eval()


@pytest.mark.parametrize(
    ("pattern", "order"),
    [("all", [1, 1, 1, 1]), ("sandwich", [0, 1, 1, 3]), (2, [0, 0, 2, 2]), ([0, 1, 0, 1], [0, 1, 0, 1])],
)
def test_patterns_say_which_layer_each_depth_applies(pattern: Any, order: list[int]) -> None:
    teacher = teacher_of()
    student = share_layers(teacher, pattern)
    own = [teacher.bert.encoder.layer[i] for i in order]
    for layer, source in zip(student.bert.encoder.layer, own, strict=True):
        assert same_state(layer, source)
    assert len(set(map(id, student.bert.encoder.layer))) == len(set(order))


def test_the_layer_between_is_the_one_that_does_best_in_the_place_of_all() -> None:
    teacher = teacher_of(5)
    data = [inputs_for("bert", 8) for _ in range(2)]
    errors = {}
    for source in (1, 2, 3):
        tried = copy.deepcopy(teacher)
        share(tried, [0, source, source, source, 4])
        wanted = [outputs(teacher, b).log_softmax(-1) for b in data]
        found = [outputs(tried, b).log_softmax(-1) for b in data]
        errors[source] = sum(float((w.exp() * (w - f)).sum()) for w, f in zip(wanted, found, strict=True))
    best = min(errors, key=lambda s: errors[s])
    student = share_layers(teacher, "sandwich", data=data)
    assert same_state(student.bert.encoder.layer[2], teacher.bert.encoder.layer[best])


@pytest.mark.parametrize("kind", ["spans", "several labels", "tags", "none"])
def test_the_layer_between_is_chosen_whatever_the_head_and_without_padding(kind: str) -> None:
    teacher = head(kind, depth=5)
    short = [inputs_for("bert", 4, 6) for _ in range(2)]
    padded = [{k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()} for batch in short]
    students = [share_layers(teacher, "sandwich", data=data) for data in (short, padded)]
    chosen = [teacher.base_model.encoder.layer[i] for i in (1, 2, 3)]
    found = [[same_state(s.base_model.encoder.layer[2], layer) for layer in chosen] for s in students]
    assert found[0] == found[1] and sum(found[0]) == 1
    compared = [compare_depths(teacher, data, 3).best_sandwich.divergence for data in (short, padded)]
    assert compared[0] == pytest.approx(compared[1], rel=1e-3)


def test_a_sandwich_trains_as_one_model_and_takes_the_whole_way(tmp_path: Path) -> None:
    teacher = teacher_of()
    student = qbert.quantize_model(share_layers(teacher, "sandwich"), qbert.BitsConfig(3, groups=16))
    run = distiller(tmp_path, teacher=teacher, student=student, recipe=recipes.qbert_kd(), max_steps=2)
    run.train()
    packed = qbert.pack(student)
    batch = inputs_for("bert")
    for name, saved in (("trainable", student), ("packed", packed)):
        saved.save_pretrained(tmp_path / name)
        loaded = qbert.load(tmp_path / name)
        assert torch.equal(outputs(loaded, batch), outputs(saved.eval(), batch))
        assert loaded.bert.encoder.layer[1] is loaded.bert.encoder.layer[2]
    fast = qbert.optimize_for_inference(packed)
    torch.testing.assert_close(outputs(fast, batch), outputs(packed, batch), rtol=0, atol=1e-5)


def test_bytes_of_a_shared_layer_count_once() -> None:
    teacher, three = teacher_of(), student_with_layers(teacher_of(), [0, 1, 3])
    student = share_layers(teacher, "sandwich")
    for bits in (4, 2):
        ours, theirs = (qbert.pack(qbert.quantize_model(m, bits)) for m in (student, three))
        assert qbert.model_size(ours).total == qbert.model_size(theirs).total


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_the_gradient_of_a_shared_step_is_a_mean_over_its_uses(family: str) -> None:
    """Summed over as many uses it would be that many times a single layer's."""
    model = share_layers(teacher_of(), "all") if family == "bert" else build("albert", num_hidden_layers=4).eval()
    student = qbert.quantize_model(model, qbert.BitsConfig(3, groups=16, embedding_bits=32))
    recipe = recipes.qat()
    begin_training(student, recipe)
    counts = uses(student)
    layer = next(m for m in student.modules() if m in counts and hasattr(m, "weight_quantizer"))
    assert counts[layer] == 4
    batch = {**inputs_for(family), "labels": torch.tensor([0, 1])}

    def gradient(uses: int) -> torch.Tensor:
        layer.weight_quantizer.uses = uses
        student.zero_grad()
        student(**batch).loss.backward()
        return layer.weight_quantizer.scale.grad.clone()

    torch.testing.assert_close(gradient(4), gradient(1) / 4)


def test_sensitivity_of_a_shared_matrix_counts_every_use() -> None:
    """The curvature of one weight that several depths use is the sum over copies of their own."""
    student = share_layers(teacher_of(), "all")
    apart = copy.deepcopy(teacher_of())
    for depth in range(4):
        apart.bert.encoder.layer[depth].load_state_dict(student.bert.encoder.layer[0].state_dict())
    batch = {**inputs_for("bert", 4), "labels": torch.tensor([0, 1, 0, 1])}
    shared = student.bert.encoder.layer[0].intermediate.dense
    copies = [layer.intermediate.dense for layer in apart.bert.encoder.layer]
    ours = kronecker_factors(student, [batch], [shared])[shared]
    theirs = kronecker_factors(apart, [batch], copies)
    torch.testing.assert_close(ours.gradients, sum(theirs[m].gradients for m in copies))  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [0, 2])
def test_a_narrow_table_starts_as_the_best_of_its_width_and_takes_the_whole_way(heads: int, tmp_path: Path) -> None:
    model = teacher_of(2)
    counts = torch.arange(100.0)
    student = narrow_table(model, 12, heads=heads, counts=counts)
    table, words = student.bert.embeddings.word_embeddings, model.bert.embeddings.word_embeddings.weight.detach()
    assert isinstance(table, NarrowTable)
    weighted = counts.sqrt().unsqueeze(1) * (words - table.weight.detach())
    best = torch.linalg.svdvals(counts.sqrt().unsqueeze(1) * words)[12:].square().sum()
    torch.testing.assert_close(weighted.square().sum(), best, rtol=1e-4, atol=1e-5)
    batch = inputs_for("bert")
    quantized = qbert.quantize_model(student, 4)
    for name, saved in (("float", student), ("trainable", quantized), ("packed", qbert.pack(quantized))):
        saved.save_pretrained(tmp_path / name)
        assert torch.equal(outputs(qbert.load(tmp_path / name), batch), outputs(saved, batch))
    fast = qbert.optimize_for_inference(qbert.pack(quantized))
    torch.testing.assert_close(outputs(fast, batch), outputs(quantized, batch), rtol=0, atol=1e-4)


def test_attention_of_a_table_starts_at_zero_learns_and_never_sees_padding() -> None:
    student = narrow_table(teacher_of(2), 12, heads=2)
    table = student.bert.embeddings.word_embeddings
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    torch.testing.assert_close(table(ids), table.up(table.table(ids)))
    with torch.no_grad():
        table.attended.weight.normal_()
    assert not torch.allclose(table(ids), table.up(table.table(ids)))
    torch.testing.assert_close(table(ids)[:, :3], table(ids[:, :3]))
    assert bool(table(torch.zeros(1, 4, dtype=torch.long)).isfinite().all())


def test_pairs_are_neighbours_and_half_of_them_exchanged() -> None:
    paragraphs = [f"One is here {i}. Two follows! Does three? Four ends." for i in range(200)]
    rows = order_pairs(paragraphs, seed=1)
    for row, paragraph in zip(rows, paragraphs, strict=True):
        pair = (row["second"], row["first"]) if row["label"] else (row["first"], row["second"])
        assert " ".join(map(str, pair)) == paragraph
    assert 70 < sum(int(row["label"]) for row in rows) < 130 and rows == order_pairs(paragraphs, seed=1)
    assert sentences('He said "no." Then it rained (a lot). In 3.5 hours.') == [
        'He said "no.', "Then it rained (a lot).", "In 3.5 hours."
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: share_layers(teacher_of(3), "sandwich"), "saves nothing of 3 layers"),
        (lambda: share_layers(teacher_of(), "half"), "'half' is not known"),
        (lambda: share_layers(teacher_of(), 3), "3 groups do not divide 4"),
        (lambda: share_layers(build("albert"), "all"), "shares its layers already"),
        (lambda: narrow_table(teacher_of(2), 40), r"saves nothing of a table \[100, 48\]"),
        (lambda: narrow_table(teacher_of(2), 10, heads=3), "heads=3 do not divide"),
        (lambda: order_pairs(["One sentence only."]), "none has two sentences"),
    ],
)
def test_what_cannot_be_shared_or_narrowed_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
