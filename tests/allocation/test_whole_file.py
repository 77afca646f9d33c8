"""One choice for a whole file: measured damage, exact against brute force, and never a larger file than asked for."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import build, head, inputs_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import qbert
from qbert.allocation.whole_file import FILE_DEFAULTS, FilePlan, Item, whole_file_bytes
from qbert.allocation.whole_file.matrices import matrix_changes, slopes
from qbert.allocation.whole_file.options import Rules
from qbert.calibration import input_moments
from qbert.encoders.targets import find_targets
from qbert.layers.tables import LowRankTable, MixedTable
from qbert.outputs import output_gradients
from qbert.quantize import quantize_model
from qbert.shrinking import as_batches

FAST: dict[str, Any] = {"groups": 4, "range_method": "minmax"}


def batches(family: str = "bert", count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [inputs_for(family, batch=8, length=12) for _ in range(count)]


def trained_like(family: str = "bert", **overrides: Any) -> Any:
    """A random classifier whose logits spread as those of a trained one do."""
    torch.manual_seed(0)
    model = build(family, **overrides).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return trained_like()


@pytest.fixture(scope="module")
def plan(model: Any) -> FilePlan:
    return FilePlan(model, batches(), **FAST)


def brute_force(items: list[Item], room: int) -> float:
    """The least damage of all choices in `room` bytes."""
    sizes, damages = np.zeros(1), np.zeros(1)
    for item in items:
        sizes = np.add.outer(sizes, [o.size for o in item.options]).ravel()
        damages = np.add.outer(damages, [o.damage for o in item.options]).ravel()
    return float(damages[sizes <= room].min())


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 1))
def test_no_choice_of_matrices_and_tables_does_less_damage(share: float) -> None:
    small = _small_plan()
    least = small.constant + sum(min(o.size for o in item.options) for item in small.items)
    most = small.constant + sum(max(o.size for o in item.options) for item in small.items)
    bound = (least + share * (most - least)) // 1
    picked = small.choose(bound / 1e6)
    assert small.size(picked) <= bound
    assert small.damage(picked) == pytest.approx(brute_force(small.items, int(bound) - small.constant), rel=1e-12)


_SMALL: list[FilePlan] = []


def _small_plan() -> FilePlan:
    """A plan with few enough choices to try them all: three matrices, three tables, the pooler."""
    if not _SMALL:
        fixed = {"encoder.layer.1": 4, "encoder.layer.0.attention.self": 8, "embeddings.token_type_embeddings": 8}
        _SMALL.append(FilePlan(trained_like(), batches(), (2, 4), fixed=fixed, **FAST))
    return _SMALL[0]


@pytest.mark.parametrize("size", [0.045, 0.06, 0.09])
def test_the_file_is_at_most_as_large_as_asked_for(size: float, model: Any, plan: FilePlan, tmp_path: Path) -> None:
    config = plan.config(size)
    packed = qbert.pack(quantize_model(model, config, calibration_data=batches()))
    packed.save_pretrained(tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    bound = plan.size(plan.choose(size))
    assert written <= bound <= size * 1e6
    assert whole_file_bytes(model, config) == bound
    assert bound - written <= 20 * len(packed.state_dict())  # what offsets of a shorter file leave free


def test_a_size_that_no_file_has_names_the_smallest(plan: FilePlan) -> None:
    with pytest.raises(ValueError, match=r"size_mb=0.001 is too small .* the smallest file has 0\.0\d+ MB"):
        plan.config(0.001)
    assert plan.size(plan.choose(plan.smallest_mb)) / 1e6 == plan.smallest_mb


def test_more_bytes_never_do_more_damage(plan: FilePlan) -> None:
    sizes = [plan.smallest_mb * factor for factor in (1.0, 1.1, 1.3, 1.8, 3.0)]
    damages = [plan.damage(plan.choose(size)) for size in sizes]
    assert damages == sorted(damages, reverse=True)


def test_a_table_offers_bits_splits_of_its_rows_and_ranks(plan: FilePlan) -> None:
    (words,) = [i for i in plan.items if i.names == ("embeddings.word_embeddings",)]
    rules = [o.rule for o in words.options]
    assert {r["bits"] for r in rules if set(r) == {"bits", "scheme"}} == {2, 3, 4, 8}
    assert sum("row_bits" in r for r in rules) >= 5 and sum("rank" in r for r in rules) >= 3
    assert all(o.damage >= 0 for o in words.options)


def test_poolers_are_chosen_and_classifiers_stay(plan: FilePlan) -> None:
    names = {name for item in plan.items for name in item.names}
    assert "pooler.dense" in names and "classifier" not in names


def test_what_is_fixed_has_one_option(model: Any) -> None:
    fixed: dict[str, Any] = {"encoder": 3, "embeddings": {"bits": 4, "scheme": "symmetric"}}
    found = FilePlan(model, batches(count=2), fixed=fixed, **FAST)
    rules = {item.names[0]: [dict(o.rule) for o in item.options] for item in found.items}
    assert rules.pop("pooler.dense") == [{"bits": b} for b in (2, 3, 4, 8, 32)]
    tables = [rules.pop(f"embeddings.{name}_embeddings") for name in ("word", "position", "token_type")]
    assert tables == [[fixed["embeddings"]]] * 3 and all(r == [{"bits": 3}] for r in rules.values())


def test_predicted_damage_is_the_divergence_of_small_changes() -> None:
    """Of 8-bit weights, whose errors are small, the sum over the items is the KL divergence that is measured."""
    model = trained_like()
    data = batches(count=40)
    plan = FilePlan(model, data, (4,), rounding="nearest", activation_bits=None, groups=48)
    picked = [next(i for i, o in enumerate(item.options) if o.rule["bits"] == 4) for item in plan.items]
    student = quantize_model(model, plan.configuration(picked), calibration_data=data)
    total = 0.0
    with torch.no_grad():
        for batch in data[1::2]:
            wanted, found = (m(**batch).logits.log_softmax(-1) for m in (model, student))
            total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    measured = total / len(data[1::2])
    assert 0.6 * measured <= plan.damage(picked) <= 1.7 * measured


class Mixed(nn.Module):
    """A matrix of every kind that is called, alone on what a table gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 12)
        self.linear, self.plain, self.transposed = nn.Linear(12, 8), nn.Linear(12, 8, bias=False), Conv1D(8, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1)
        for module in (self.linear, self.transposed, self.conv):
            nn.init.normal_(module.bias)
        nn.init.normal_(self.transposed.weight)
        self.table.weight.data += torch.linspace(-2, 2, 12)  # inputs that are not centred

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(input_ids)
        each = [self.linear(x), self.plain(x), self.transposed(x), self.conv(x.transpose(1, 2)).transpose(1, 2)]
        return {"logits": torch.cat(each, -1).mean(1)}


@pytest.mark.parametrize("name", ["linear", "plain", "transposed", "conv"])
def test_a_plan_scores_the_codes_and_the_bias_that_quantize_model_makes(name: str) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    data = [{"input_ids": torch.randint(100, (16, 9))} for _ in range(3)]
    settings = {**FILE_DEFAULTS, "groups": 1, "activation_bits": None}
    target = next(t for t in find_targets(model) if t.name == name)
    rule = {name: {"bits": 2}}
    config = qbert.BitsConfig({**rule, "*": {"bits": 32}}, embedding_bits=32, **settings)
    student = quantize_model(model, config, calibration_data=data)
    rules = Rules(model, [target], [2], settings, rule)
    ((change,),) = matrix_changes(model, data, [rules], False).values()
    assert change is not None
    made, given = getattr(student, name), getattr(model, name)
    moved = (made.weight - given.weight).detach()
    torch.testing.assert_close(change.weight.float(), moved, rtol=0.01, atol=1e-4)
    assert (change.bias is None) == (given.bias is None)
    if change.bias is not None:
        torch.testing.assert_close(change.bias, (made.bias - given.bias).detach(), rtol=0.02, atol=0.01)
    ((_, (call,)),) = output_gradients(model, data[:1], [given])
    (slope,) = slopes(given, [call], [change])
    with torch.no_grad():  # one module alone, with a linear way to the outputs: the change itself
        twin = copy.deepcopy(given)
        twin.weight.data += change.weight.float()
        if change.bias is not None:
            twin.bias.data += change.bias
        expected = ((twin(call.input) - given(call.input)) * call.gradient).flatten(1).sum(1)
    torch.testing.assert_close(slope[:, 0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_gradients_of_random_vectors_give_the_metric_of_the_outputs(kind: str) -> None:
    """The mean of their squares is the second derivative in a layer's output of what such outputs diverge by."""
    model = trained_like(num_labels=3)
    model.config.problem_type = kind
    batch = inputs_for("bert", batch=1)
    dense = model.classifier
    rows = {k: v[:1].expand(1000, -1) for k, v in batch.items()}
    ((samples, (call,)),) = output_gradients(model, [rows], [dense])
    with torch.no_grad():
        logits = model(**batch).logits[0]
    diverged = {
        "single_label_classification": lambda y: F.kl_div(y.log_softmax(0), logits.softmax(0), reduction="sum"),
        "multi_label_classification": lambda y: F.binary_cross_entropy_with_logits(
            y, logits.sigmoid(), reduction="sum"
        ),
        "regression": lambda y: (y - logits).square().sum() / 2,
    }[kind]
    metric = torch.autograd.functional.hessian(diverged, logits)
    assert torch.allclose(call.gradient.T @ call.gradient / samples, metric, atol=0.04 * float(metric.max() / 0.25))


def test_spans_do_not_depend_on_scores_of_padding() -> None:
    """Neither in the damages of a plan nor in the weights of compensated rounding."""
    model = head("spans")
    torch.manual_seed(0)
    ids = torch.randint(5, 100, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {key: F.pad(value, (0, 5)) for key, value in batch.items()}
    for data in (batch, padded):
        ((_, (call,)),) = output_gradients(model, [data], [model.qa_outputs])
        assert bool((call.gradient[data["attention_mask"] == 1] != 0).any())
        assert bool((call.gradient[data["attention_mask"] == 0] == 0).all())
    seeds: list[torch.Tensor] = []

    def watch(module: nn.Module, x: Any, y: torch.Tensor) -> None:
        if y.requires_grad:
            y.register_hook(seeds.append)

    handle = model.qa_outputs.register_forward_hook(watch)
    for _ in input_moments(model, [padded], [model.bert.encoder.layer[0].output.dense], weigh=0.9):
        pass
    handle.remove()
    assert seeds and all(bool((seed[:, :6] != 0).all()) and bool((seed[:, 6:] == 0).all()) for seed in seeds)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "mpnet", "electra"])
def test_every_family_can_be_planned(family: str) -> None:
    model = trained_like(family)
    plan = FilePlan(model, batches(family, 2), (2, 4), **FAST)
    config = plan.config(plan.smallest_mb * 1.2)
    student = quantize_model(model, config, calibration_data=batches(family))
    assert qbert.model_size(student).total <= plan.size(plan.choose(plan.smallest_mb * 1.2))


def test_a_table_that_a_head_computes_with_keeps_one_width() -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(build("bert").config).eval()
    plan = FilePlan(model, batches(count=2), (2, 4), **FAST)
    (words,) = [i for i in plan.items if i.names == ("embeddings.word_embeddings",)]
    assert all("rank" not in o.rule and "row_bits" not in o.rule for o in words.options)
    quantize_model(model, plan.config(plan.smallest_mb), calibration_data=batches(count=2))


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    FilePlan(model, batches(count=2), (2, 4), **FAST)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


def test_one_call_from_sentences_to_a_file(tmp_path: Path) -> None:
    from tiny_tasks import sentiment_rows, tiny_encoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_encoder(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [row["sentence"] for row in sentiment_rows(60)]
    packed = qbert.shrink(model, texts, 0.06, tokenizer=AutoTokenizer.from_pretrained(folder), **FAST)
    packed.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 60_000
    loaded = qbert.load(tmp_path / "out")
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(input_ids=ids).logits, packed(input_ids=ids).logits)


def test_small_files_take_composed_tables() -> None:
    model = trained_like(vocab_size=3000)
    plan = FilePlan(model, batches(), fixed={"encoder": 2}, **FAST)
    config = plan.config(plan.smallest_mb * 1.1)
    student = quantize_model(model, config, calibration_data=batches())
    assert isinstance(student.bert.embeddings.word_embeddings, MixedTable | LowRankTable)


@pytest.mark.parametrize(
    "arguments,match",
    [
        ({}, "size_mb and calibration_data: .* give both"),
        ({"size_mb": 1.0}, "give both"),
        ({"size_mb": -1.0, "calibration_data": batches(count=2)}, "size_mb=-1.0 is not a bound"),
        ({"size_mb": 1.0, "calibration_data": []}, "calibration_data is empty"),
        ({"size_mb": 1.0, "calibration_data": [inputs_for("bert", batch=1)]}, "one row"),
        ({"size_mb": 1.0, "calibration_data": batches(count=2), "bits": (5,)}, r"bits=\(5,\) is not possible"),
        ({"size_mb": 1.0, "calibration_data": batches(count=2), "average_bits": 3}, "average_bits: .* for a spectrum"),
        ({"size_mb": 1.0, "calibration_data": batches(count=2), "embedding_bits": 4}, "tables are chosen too"),
        ({"size_mb": 1.0, "calibration_data": batches(count=2), "grups": 4}, "unknown setting 'grups'"),
    ],
)
def test_what_cannot_be_planned_is_refused(model: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        qbert.allocate_bits(model, **arguments)


@pytest.mark.parametrize(
    "arguments,match",
    [
        ({"fixed": {"embedings": 8}}, "pattern 'embedings' matches no tensor of the model; the nearest names are emb"),
        ({"fixed": {"layer.0": 8}}, r"pattern 'layer\.0' matches no tensor"),
        ({"fixed": {"embeddings": 5}}, "embeddings.*5"),
        ({"bits": (32,)}, "every tensor is left in float"),
        ({"size_mb": 0.001}, r"size_mb=0\.001 is too small .* the smallest file has 0\.\d+ MB"),
    ],
)
def test_what_shapes_tell_is_refused_before_anything_is_measured(
    model: Any, arguments: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=match):
        qbert.shrink(model, batches(count=2), **{"size_mb": 1.0, **FAST, **arguments})


def test_fixed_is_a_mapping(model: Any) -> None:
    with pytest.raises(TypeError, match="fixed: expected a mapping from name patterns to bits, got int"):
        qbert.shrink(model, batches(count=2), 1.0, fixed=4)  # type: ignore[arg-type]


def test_the_smallest_file_is_known_before_anything_is_measured(model: Any, plan: FilePlan) -> None:
    FilePlan(model, batches(count=2), size_mb=plan.smallest_mb + 1e-6, **FAST)
    with pytest.raises(ValueError, match="is too small"):
        FilePlan(model, batches(count=2), size_mb=plan.smallest_mb - 1e-6, **FAST)


def test_all_matrices_may_be_fixed_at_once(model: Any) -> None:
    plan = FilePlan(model, batches(count=2), fixed={"*": 8, "encoder.layer.0": 4}, **FAST)
    rules = {name: [option.rule for option in item.options] for item in plan.items for name in item.names}
    assert rules["encoder.layer.0.output.dense"] == [{"bits": 4}]
    assert rules["encoder.layer.1.output.dense"] == [{"bits": 8}]
    assert len(rules["embeddings.word_embeddings"]) > 4


def test_a_model_without_tables_is_planned() -> None:
    torch.manual_seed(0)
    model, images = build("vit").eval(), [inputs_for("vit", batch=8) for _ in range(6)]
    size = 0.6 * qbert.model_size(model).mb
    packed = qbert.shrink(model, images, size, **FAST)
    assert qbert.model_size(packed).mb <= size


def test_a_quantized_model_is_refused(model: Any) -> None:
    student = quantize_model(model, qbert.BitsConfig(4, groups=4))
    with pytest.raises(ValueError, match="is quantized already; give the float model"):
        FilePlan(student, batches(count=2))


def test_gates_of_recurrent_layers_need_their_bits() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm = nn.Embedding(100, 16), nn.LSTM(16, 8, batch_first=True)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.lstm(self.table(input_ids))[0]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"fixed: what lstm\.weight_ih_l0 does to the outputs is not measured"):
        FilePlan(Tagger(), batches(count=2), groups=4)
    fixed = {f"lstm.weight_{kind}_l0": 8 for kind in ("ih", "hh")}
    plan = FilePlan(Tagger(), batches(count=2), fixed=fixed, groups=4)
    table = next(item for item in plan.items if item.names == ("table",))
    assert len(table.options) > 4


def test_a_spectrum_takes_no_data() -> None:
    with pytest.raises(ValueError, match="calibration_data: it is for a model"):
        qbert.allocate_bits({"encoder.layer.0": 1.0}, calibration_data=batches(count=1))


class Frame(dict[str, list[str]]):
    """As a table of columns, which iterates over their names."""

    columns = ("text",)


@pytest.mark.parametrize(
    "data,error,match",
    [
        ("one", TypeError, "pass a list"),
        (["a"], ValueError, "tokenizer"),
        ([("a", "b")], ValueError, "tokenizer"),
        (["a", ("a", "b")], TypeError, "data: some rows are one sentence and some are pairs"),
        ([("a", "b", "c")], TypeError, "data: every batch must be a dict of tensors"),
        ([{"text": "a"}], TypeError, "data: every batch must be .* got a dict of text"),
        (Frame(text=["a"]), TypeError, "data: got a whole Frame; pass the column"),
        ([], ValueError, "data is empty"),
    ],
)
def test_sentences_that_cannot_be_read_are_refused(model: Any, data: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        qbert.shrink(model, data, 1.0)


def test_pairs_of_sentences_and_columns_are_taken_as_text() -> None:
    asked: list[Any] = []

    def tokenizer(*texts: list[str], **_: Any) -> dict[str, list[Any]]:
        asked.append(texts)
        return {"input_ids": list(zip(*texts, strict=True))}

    class Column(list[str]):
        """As a column of a table, which has an index."""

        def keys(self) -> range:
            return range(len(self))

    pairs = [("a long one", "b"), ["a", "b"]]
    assert as_batches(pairs, tokenizer) == [{"input_ids": [("a", "b"), ("a long one", "b")]}]
    assert as_batches(Column(["b c", "a"]), tokenizer) == [{"input_ids": [("a",), ("b c",)]}]
    assert asked == [(["a", "a long one"], ["b", "b"]), (["a", "b c"],)]
