"""Tables of several parts: what they hold, which rows get more bits, and that every form of a model is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import build, inputs_for, outputs, same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import qbert
from qbert.bits import TensorSpec
from qbert.layers.tables import LowRankTable, MixedTable, TableUse, fill_table, low_rank, rounded_rows, row_widths
from qbert.layers.tables import empty_table as empty
from qbert.quantize import quantize_model
from qbert.usage import expected_shares, table_uses

WORDS = "embeddings.word_embeddings"
RULES: dict[str, dict[str, Any]] = {
    "bits by rows": {"bits": 2, "row_bits": {8: 7, 4: 20}},
    "bits by rows, midrise": {"bits": 3, "row_bits": {4: 30}, "scheme": "midrise"},
    "low rank": {"bits": 4, "rank": 12},
    "low rank, 3 bits": {"bits": 3, "rank": 20},
}
DATA = [inputs_for("bert", batch=4, length=12) for _ in range(3)]


def student_of(name: str, model: Any = None) -> Any:
    config = qbert.BitsConfig({"*": 4, "embeddings": 8, WORDS: RULES[name]}, groups=4)
    return quantize_model(build("bert").eval() if model is None else model, config, calibration_data=DATA)


def even_use(rows: int, columns: int) -> TableUse:
    return TableUse(torch.full((rows,), 1 / rows, dtype=torch.float64), torch.eye(columns, dtype=torch.float64))


@pytest.mark.parametrize("name", RULES)
def test_packed_unpacked_and_optimized_models_compute_the_same(name: str) -> None:
    student = student_of(name).eval()
    packed = qbert.pack(student)
    batch = inputs_for("bert")
    expected = outputs(student, batch)
    for twin in (packed, qbert.unpack(packed), qbert.optimize_for_inference(packed)):
        assert torch.allclose(outputs(twin, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["packed", "trainable"])
@pytest.mark.parametrize("name", RULES)
def test_a_saved_model_loads_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    model = student_of(name).eval()
    model = qbert.pack(model) if form == "packed" else model
    model.save_pretrained(tmp_path)
    for loaded in (qbert.load(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert same_state(loaded, model)
        assert torch.equal(outputs(loaded.eval(), DATA[0]), outputs(model, DATA[0]))
    bare = AutoModel.from_pretrained(tmp_path)
    assert same_state(bare.embeddings, model.bert.embeddings)


@pytest.mark.parametrize("name", RULES)
def test_sizes_are_those_of_the_packed_model(name: str) -> None:
    model = build("bert").eval()
    rules = {"*": 4, "embeddings": 8, WORDS: RULES[name]}
    config = qbert.BitsConfig(rules, groups=4, activation_range="dynamic")
    student = quantize_model(model, config, calibration_data=DATA)
    packed = qbert.pack(student)
    sizes = [qbert.model_size(*args) for args in ((model, config), (student,), (packed,))]
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert [s.total for s in sizes] == [stored] * 3
    assert {s.float_total for s in sizes} == {qbert.model_size(model).total}


@pytest.mark.parametrize("name", RULES)
def test_a_dequantized_model_has_an_ordinary_table(name: str) -> None:
    packed = qbert.pack(student_of(name))
    table = packed.bert.embeddings.word_embeddings.quantized_weight()
    embedding = packed.dequantize().bert.embeddings.word_embeddings
    assert type(embedding) is nn.Embedding and torch.equal(embedding.weight, table)


@pytest.mark.parametrize("name", RULES)
def test_every_part_is_trained(name: str) -> None:
    student = student_of(name)
    ids = torch.arange(100).view(10, 10)
    student(input_ids=ids, labels=torch.zeros(10, dtype=torch.int64)).loss.backward()
    for parameter in student.bert.embeddings.word_embeddings.parameters():
        assert not parameter.requires_grad or bool((parameter.grad != 0).any())


@pytest.mark.parametrize("name", RULES)
def test_half_precision_computes_nearly_the_same(name: str) -> None:
    packed = qbert.pack(student_of(name))
    table = packed.bert.embeddings.word_embeddings
    wanted = table(torch.arange(100))
    assert torch.allclose(table.bfloat16()(torch.arange(100)).float(), wanted, atol=0.02)


def test_onnx_gives_the_rows_of_the_packed_table(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    for name in ("bits by rows", "low rank"):
        packed = qbert.pack(student_of(name))
        batch = inputs_for("bert")
        file = tmp_path / f"{name}.onnx"
        qbert.export_onnx(packed, file, inputs=batch)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        (found,) = session.run(["logits"], {k: v.numpy() for k, v in batch.items() if k in names})
        assert torch.allclose(torch.from_numpy(found), outputs(packed, batch), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**31))
def test_rows_lie_where_the_map_says(eight: int, four: int, three: int, seed: int) -> None:
    rows = 64
    counts = {8: eight, **({4: four} if four else {}), **({3: three} if three else {})}
    if sum(counts.values()) >= rows:
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 8, generator=generator)
    share = torch.rand(rows, generator=generator, dtype=torch.float64)
    spec = TensorSpec(bits=2, row_bits=counts)  # type: ignore[arg-type]
    table = empty(spec, (rows, 8), None, "cpu", torch.float32)
    fill_table(table, weight, spec, TableUse(share / share.sum(), torch.eye(8, dtype=torch.float64)))
    assert isinstance(table, MixedTable)
    assert torch.equal(table(torch.arange(rows).view(8, 8)), weight.view(8, 8, 8))
    assert torch.bincount(table.row_widths(), minlength=9)[[8, 4, 3, 2]].tolist() == [
        eight, four, three, rows - eight - four - three
    ]  # fmt: skip


def test_rows_that_matter_most_get_the_most_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 8)
    share = torch.linspace(1, 2, 50, dtype=torch.float64)
    spec = TensorSpec(bits=2, row_bits={8: 5, 4: 10})  # type: ignore[arg-type]
    widths = row_widths(weight, spec, TableUse(share / share.sum(), torch.eye(8, dtype=torch.float64)))
    harm = share * (rounded_rows(weight, TensorSpec(bits=2)) - weight).square().sum(1)
    order = harm.argsort(descending=True)
    assert widths[order].tolist() == [8] * 5 + [4] * 10 + [2] * 35


def test_an_even_use_gives_the_best_low_rank_table() -> None:
    """Eckart and Young: no table of that rank has a smaller squared error than the truncated SVD."""
    torch.manual_seed(0)
    weight = torch.randn(60, 16)
    rows, up = low_rank(weight, 6, even_use(60, 16))
    best = torch.linalg.svdvals(weight.double())[6:].square().sum()
    assert float((rows @ up.T - weight).square().sum()) == pytest.approx(float(best), rel=1e-4)


def test_rows_that_are_used_are_kept_better() -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 16)
    share = torch.full((60,), 0.1 / 50, dtype=torch.float64)
    share[:10] = 0.09
    rows, up = low_rank(weight, 6, TableUse(share, torch.eye(16, dtype=torch.float64)))
    errors = (rows @ up.T - weight).square().sum(1)
    even, even_up = low_rank(weight, 6, even_use(60, 16))
    assert float(errors[:10].sum()) < 0.6 * float((even @ even_up.T - weight).square().sum(1)[:10].sum())


def test_a_low_rank_table_with_a_metric_beats_one_without_in_it() -> None:
    torch.manual_seed(0)
    weight, mix = torch.randn(80, 16), torch.randn(16, 16, dtype=torch.float64)
    mix = mix * torch.logspace(0, -2, 16, dtype=torch.float64)
    metric = mix.T @ mix
    use = TableUse(torch.full((80,), 1 / 80, dtype=torch.float64), metric)

    def damage(rows: torch.Tensor, up: torch.Tensor) -> float:
        error = (rows @ up.T - weight).double()
        return float(((error @ metric) * error).sum())

    assert damage(*low_rank(weight, 6, use)) < 0.7 * damage(*low_rank(weight, 6, even_use(80, 16)))


def test_expected_shares_are_counts_and_a_rest_for_the_unseen() -> None:
    counts = torch.tensor([6.0, 3.0, 1.0, 0.0, 0.0])
    shares = expected_shares(counts, torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]))
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[3:].sum()) == pytest.approx(0.1)  # one token in ten is of a row that one sample holds
    assert float(shares[0]) == pytest.approx(0.54) and bool(shares[3] > shares[4])
    assert float(expected_shares(torch.zeros(5), torch.zeros(5)).sum()) == pytest.approx(1)


def test_uses_leave_padding_out() -> None:
    model = build("bert").eval()
    batch = inputs_for("bert", batch=3, length=8)
    words = model.bert.embeddings.word_embeddings
    share = table_uses(model, [batch], [words])[words].share
    read = torch.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=100)
    assert torch.equal(share > share[read == 0].max(), read > 0)


@pytest.mark.parametrize(
    "rule,match",
    [
        ({"bits": 4, "rank": 48}, r"rank=48 saves nothing over its 100 rows of 48; the largest rank that does is 32"),
        ({"bits": 4, "rank": 0}, "rank=0 is not possible"),
        ({"bits": 2, "row_bits": {8: 100}}, r"are 100 rows, but the table has 100"),
        ({"bits": 4, "row_bits": {3: 10}}, "3 bits are no more than the other rows' 4"),
        ({"bits": 2, "row_bits": {5: 10}}, "row_bits=.* is not possible"),
        ({"bits": 2, "row_bits": {8: 0}}, "row_bits=.* is not possible"),
        ({"bits": 2, "row_bits": 8}, "row_bits=8 is not possible"),
        ({"bits": 2, "row_bits": {8: 5}, "rank": 4}, "exclude each other"),
        ({"bits": 2, "row_bits": {8: 5}, "groups": 4}, "has a range a row"),
    ],
)
def test_what_a_table_cannot_be_is_refused(rule: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantize_model(build("bert"), {"*": {"bits": 4, "groups": 4}, WORDS: rule}, calibration_data=DATA)


def test_a_matrix_has_no_rows_to_tell_apart() -> None:
    with pytest.raises(ValueError, match="rank=4 is for lookup tables, and this is a matrix"):
        quantize_model(build("bert"), {"encoder.layer.0.output.dense": {"bits": 4, "rank": 4}}, calibration_data=DATA)


@pytest.mark.parametrize("name", ["bits by rows", "low rank"])
def test_without_data_it_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{WORDS} needs calibration_data, which tells its rows apart"):
        quantize_model(build("bert"), {"*": {"bits": 4, "groups": 4}, WORDS: RULES[name]})


def test_a_table_that_a_head_computes_with_is_refused() -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(build("bert").config)
    with pytest.raises(ValueError, match="another layer computes with the same weight"):
        quantize_model(model, {"*": {"bits": 4, "groups": 4}, WORDS: RULES["low rank"]}, calibration_data=DATA)


def test_a_failure_puts_the_float_table_back() -> None:
    model = build("bert").eval()
    table = model.bert.embeddings.word_embeddings
    bad = [{"input_ids": torch.full((2, 600), 7)}]  # more tokens than the model has positions
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        quantize_model(
            model, {"*": {"bits": 4, "groups": 4}, WORDS: RULES["low rank"]}, calibration_data=bad, inplace=True
        )
    assert model.bert.embeddings.word_embeddings is table


def test_configurations_survive_json(tmp_path: Path) -> None:
    for rule in RULES.values():
        config = qbert.BitsConfig({"*": 4, WORDS: rule})
        config.save(tmp_path / "bits.json")
        assert qbert.BitsConfig.load(tmp_path / "bits.json") == config


def test_a_low_rank_table_is_two_parts() -> None:
    table = student_of("low rank").bert.embeddings.word_embeddings
    assert isinstance(table, LowRankTable) and tuple(table.rows.weight.shape) == (100, 12)
    assert table.up.weight_quantizer.bits == 8 and tuple(table.up.weight.shape) == (48, 12)
