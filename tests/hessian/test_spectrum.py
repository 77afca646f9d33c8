"""hessian_spectrum and HessianSpectrum: right eigenvalues, the same for every way to hand over data, resumable."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import FAMILIES, build, inputs_for
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, XLMConfig

import qbert
from qbert.hessian import HessianOperator, HessianSpectrum, hessian_spectrum, hessian_traces, parameter_blocks
from qbert.hessian.batches import as_samples, draw, micro_batches
from qbert.hessian.losses import model_loss
from qbert.hessian.measure import check_finite
from qbert.hessian.starts import some_samples

LAYERS = ["encoder.layer.0", "encoder.layer.1"]


def tiny_bert(seed: Any = 0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=40,
        max_position_embeddings=16,
        num_labels=3,  # type: ignore[call-arg]
    )
    model = BertForSequenceClassification(config).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def rows(count: Any = 24, seed: Any = 0) -> Any:
    """Samples of different lengths, unpadded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(1, 40, (length,), generator=generator),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": torch.randint(0, 3, (), generator=generator),
        }
        for length in lengths
    ]


def collate(samples: Any) -> Any:
    longest = max(len(s["input_ids"]) for s in samples)
    batch = {
        k: torch.stack([torch.nn.functional.pad(s[k], (0, longest - len(s[k]))) for s in samples])
        for k in ("input_ids", "attention_mask")
    }
    return {**batch, "labels": torch.stack([s["labels"] for s in samples])}


def batches(count: Any = 24, size: Any = 6) -> Any:
    data = rows(count)
    return [collate(data[i : i + size]) for i in range(0, count, size)]


def measure(model: Any = None, data: Any = None, **settings: Any) -> Any:
    settings = {"runs": 3, "fraction": 0.5, "progress": False, **settings}
    return hessian_spectrum(model or tiny_bert(), data or batches(), **settings)


def dense_top(model: Any, data: Any, parameters: Any, settings: Any, run: Any) -> Any:
    """The eigenvalue of largest magnitude of the dense Hessian on the subset of a run."""
    samples = as_samples(data)
    subset = micro_batches(samples, draw(len(samples), run=run, **settings), 1000)
    operator = HessianOperator(model, subset, {"x": parameters})
    n = operator.size("x")
    H = torch.stack([operator.product("x", e) for e in torch.eye(n, dtype=torch.float64)])
    eigenvalues = torch.linalg.eigvalsh((H + H.T) / 2)
    return float(eigenvalues[eigenvalues.abs().argmax()])


@pytest.mark.parametrize("granularity", ["layer", "block", "matrix"])
def test_every_eigenvalue_is_that_of_the_dense_hessian(granularity: Any) -> None:
    model, data = tiny_bert(), batches()
    spectrum = measure(model, data, granularity=granularity, runs=2)
    assert spectrum.eigenvalues.dtype == np.float64 and spectrum.eigenvalues.shape == (2, len(spectrum.names))
    blocks = {b.name: b.parameters for b in parameter_blocks(model, granularity)}
    chosen = spectrum.names if granularity != "matrix" else spectrum.names[::5]
    for name in chosen:
        column = spectrum.names.index(name)
        for run in range(2):
            expected = dense_top(model, data, blocks[name], {"fraction": 0.5, "seed": 0}, run)
            assert spectrum.eigenvalues[run, column] == pytest.approx(expected, rel=1e-3)
            assert spectrum.converged[run, column] and spectrum.residuals[run, column] <= 1e-3


def test_blocks_say_what_they_cover() -> None:
    model = tiny_bert()
    by = {g: parameter_blocks(model, g) for g in ("layer", "block", "matrix")}
    assert [b.name for b in by["layer"]] == LAYERS
    assert [b.name for b in by["block"]] == [f"{n}.{half}" for n in LAYERS for half in ("attention", "ffn")]
    for layer, name in enumerate(LAYERS):
        whole = by["layer"][layer]
        attention, ffn = by["block"][2 * layer : 2 * layer + 2]
        assert (
            whole.size
            == attention.size + ffn.size
            == sum(p.numel() for p in model.get_submodule(f"bert.{name}").parameters())
        )
        assert whole.members == attention.members + ffn.members and len(whole.members) == 6
        assert ffn.members == [f"{name}.intermediate.dense", f"{name}.output.dense"]
    assert [b.members for b in by["matrix"]] == [[m] for b in by["layer"] for m in b.members]


def test_a_subset_without_labels_is_drawn_again(tmp_path: Any) -> None:
    data = rows(12)
    for row in data[1:]:
        row["labels"] = torch.tensor(-100)
    spectrum = measure(data=[collate(data)], fraction=0.1, runs=6, method="ggn", checkpoint=tmp_path)
    alone = measure(data=[collate(data[:1])], fraction=1.0, runs=1, method="ggn")
    np.testing.assert_allclose(spectrum.eigenvalues, np.tile(alone.eigenvalues, (6, 1)), rtol=1e-6)
    data[0]["labels"] = torch.tensor(-100)
    with pytest.raises(ValueError, match=r"run 1 of 3 drew no labelled sample .* use a larger fraction"):
        measure(data=[collate(data)], fraction=0.1)
    with pytest.raises(ValueError, match="no labelled samples"):
        measure(data=[collate(data)], fraction=1.0)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", None])
def test_labels_of_another_type_are_refused_in_one_sentence(problem_type: Any) -> None:
    model = tiny_bert()
    model.config.problem_type = problem_type
    whole = problem_type == "multi_label_classification"
    data = [{**b, "labels": torch.ones(6, 3).long() if whole else b["labels"].double()} for b in batches()]
    with pytest.raises(ValueError, match=r"labels of torch\.(float|int)64 and shape .* give whole numbers for classes"):
        measure(model, data)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    first, second = measure(), measure()
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert np.array_equal(first.losses, second.losses)
    assert not np.array_equal(first.losses, measure(seed=1).losses)
    assert len(set(first.losses)) == 3  # every run draws its own subset


def test_the_way_data_is_handed_over_changes_nothing() -> None:
    data = rows()
    expected = measure(data=batches())
    for given, more in (
        (DataLoader(data, batch_size=5, shuffle=True, collate_fn=collate), {}),
        (data, {"collate_fn": collate}),
        (batches(size=1), {}),
        (batches(), {"micro_batch_size": 2}),
        (batches(), {"block_chunk": 1}),
    ):
        found = measure(data=given, **more)
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=2e-3)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-9)


@pytest.mark.parametrize("sizes", [(32, 1, 32, 7), (1,) * 70, (3,), (200, 2)])
def test_a_few_samples_are_spread_over_batches_of_any_size(sizes: tuple[int, ...]) -> None:
    rows = torch.arange(sum(sizes))
    few = some_samples([{"input_ids": part} for part in rows.split(sizes)], 16)
    step = max(1, sum(sizes) // 16)
    assert torch.cat([batch["input_ids"] for batch in few]).tolist() == rows[::step].tolist()


def test_graphs_kept_or_rebuilt_give_the_same_numbers(monkeypatch: Any) -> None:
    expected = measure()
    monkeypatch.setattr("qbert.hessian.operator.free_bytes", lambda device: 0)
    rebuilt = measure()
    assert np.array_equal(rebuilt.eigenvalues, expected.eigenvalues)
    assert np.array_equal(rebuilt.products, expected.products)


def test_proof_and_the_gap_bound_find_the_same_values_at_their_price() -> None:
    plain, proven, quick = measure(), measure(confidence=0.99), measure(bound="gap")
    np.testing.assert_allclose(proven.eigenvalues, plain.eigenvalues, rtol=1e-3)
    np.testing.assert_allclose(quick.eigenvalues, plain.eigenvalues, rtol=1e-2)
    assert (proven.upper_bounds <= np.abs(proven.eigenvalues) * (1 + 1e-3)).all()
    assert quick.products.sum() < plain.products.sum()


class Stop:
    """A loss that is interrupted at its n-th call."""

    def __init__(self, calls: Any) -> None:
        self.left = calls

    def loss(self, model: Any, batch: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return model(**batch).loss


def plain_loss(model: Any, batch: Any) -> Any:
    return model(**batch).loss


@pytest.mark.parametrize("method", ["lanczos", "power", "ggn"])
def test_interrupt_and_resume_give_the_numbers_of_an_unbroken_run(tmp_path: Any, method: Any, monkeypatch: Any) -> None:
    settings: Any = {"method": method, "max_products": 15, "micro_batch_size": 4}
    if method == "lanczos":  # all blocks in step: they end at different times
        monkeypatch.setattr("qbert.hessian.operator.free_bytes", lambda device: 0)
    expected = measure(loss_fn=plain_loss, **settings)
    for name in ("a", "b"):
        stop = Stop(10**9)
        calls, interrupted = 4, 0

        def loss_fn(model: Any, batch: Any, stop: Any = stop) -> Any:
            return stop.loss(model, batch)

        loss_fn.__qualname__ = plain_loss.__qualname__  # what the signature knows of a loss
        for _ in range(200):
            stop.left = calls
            calls += 17
            model = tiny_bert()
            try:
                found = measure(model, loss_fn=loss_fn, checkpoint=tmp_path / name, resume=True, **settings)
                break
            except KeyboardInterrupt:
                interrupted += 1
                assert model.training and not list((tmp_path / name).glob("*.part*"))
        assert interrupted
        for field in ("eigenvalues", "other_end", "residuals", "errors", "upper_bounds", "products", "losses"):
            assert np.array_equal(getattr(found, field), getattr(expected, field), equal_nan=True), field
        again = measure(loss_fn=plain_loss, checkpoint=tmp_path / name, resume=True, **settings)
        assert np.array_equal(again.eigenvalues, expected.eigenvalues)
        assert {p.suffix for p in (tmp_path / name).iterdir()} == {".json"}


def test_a_finished_block_is_not_measured_again(tmp_path: Any) -> None:
    measure(checkpoint=tmp_path / "c", loss_fn=plain_loss)

    def once(model: Any, batch: Any) -> Any:
        """What the signature knows of a loss: its name, and its value on a micro-batch of each run."""
        assert not torch.is_grad_enabled(), "measured again"
        return plain_loss(model, batch)

    once.__qualname__ = plain_loss.__qualname__
    measure(checkpoint=tmp_path / "c", resume=True, loss_fn=once)


def test_a_packed_model_is_refused_by_name() -> None:
    packed = qbert.pack(qbert.quantize_model(tiny_bert(), 8))
    with pytest.raises(ValueError, match="is packed, and has no gradients; measure the float model"):
        measure(model=packed)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": tiny_bert(seed=1)}, "weights"),
        ({"data": [{**b, "labels": (b["labels"] + 1) % 3} for b in batches()]}, "data"),
        ({"tol": 1e-2}, "tol"),
        ({"seed": 5}, "seed"),
        ({"runs": 2}, "runs"),
        ({"granularity": "block"}, "granularity"),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_sentence(tmp_path: Any, changes: Any, what: Any) -> None:
    measure(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=f"belongs to another measurement .*{what}.*give another folder") as error:
        measure(**{"model": tiny_bert(), "data": batches(), **changes, "checkpoint": tmp_path, "resume": True})
    assert "\n" not in str(error.value)


def scaled(by: float) -> Any:
    return lambda model, batch: by * model(**batch).loss


def test_a_checkpoint_of_another_loss_is_refused_and_one_of_another_rounding_is_not(tmp_path: Any) -> None:
    """Lambdas have one name, and a configuration none: the losses themselves are compared."""
    settings: dict[str, Any] = {"checkpoint": tmp_path, "runs": 1, "tol": 0.1}
    first = measure(**settings, loss_fn=scaled(1.0))
    for loss_fn in (scaled(2.0), scaled(1.01)):
        with pytest.raises(ValueError, match=r"another measurement .*losses.*; give another folder"):
            measure(**settings, loss_fn=loss_fn, resume=True)
    again = measure(**settings, loss_fn=scaled(1 + 1e-6), resume=True)
    assert (again.eigenvalues == first.eigenvalues).all()
    model = tiny_bert()
    measure(model, **settings)
    for layer in model.bert.encoder.layer:  # four heads in place of two, with the same weights
        layer.attention.self.num_attention_heads, layer.attention.self.attention_head_size = 4, 2
    with pytest.raises(ValueError, match=r"another measurement .*losses"):
        measure(model, **settings, resume=True)


def test_damaged_checkpoints_are_refused(tmp_path: Any) -> None:
    stop = Stop(4)  # after a look at each of three runs and the first one, in the second one
    settings: Any = {"checkpoint": tmp_path, "loss_fn": stop.loss, "fraction": 1.0, "micro_batch_size": 24}
    with pytest.raises(KeyboardInterrupt):
        measure(**settings)
    stop.left = 10**9
    state = next(tmp_path.glob("*.json"))
    vector = next(tmp_path.glob("*.safetensors"))
    content = vector.read_bytes()
    vector.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="missing or damaged"):
        measure(**settings, resume=True)
    state.write_text(state.read_text()[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        measure(**settings, resume=True)
    state.write_text("{}")
    with pytest.raises(ValueError, match="is not part of a checkpoint"):
        measure(**settings, resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["results"]["0"].pop("gap"),
        lambda state: state["results"]["0"].pop("loss"),
        lambda state: state["results"]["0"].update(value="much"),
        lambda state: state["results"].update({"0": 3}),
        lambda state: state.update(results=[]),
        lambda state: state.update(signature=None),
    ],
)
def test_damaged_records_are_refused(tmp_path: Any, spoil: Any) -> None:
    measure(checkpoint=tmp_path)
    file = next(tmp_path.glob("*.json"))
    state = json.loads(file.read_text())
    spoil(state)
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"checkpoint: .*{file.name} is damaged; remove .* and start again"):
        measure(checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_killed_process_left_is_no_part_of_a_checkpoint(tmp_path: Any, resume: bool) -> None:
    wanted = measure(checkpoint=tmp_path).eigenvalues
    record = next(tmp_path.glob("*.json"))
    left = tmp_path / f".{2**22 + 1}.part.{record.name}"  # no process has such a number
    left.touch()
    assert np.array_equal(measure(checkpoint=tmp_path, resume=resume).eigenvalues, wanted)
    assert not left.exists()


def test_a_flipped_bit_of_a_record_is_refused_and_does_not_hinder_a_new_start(tmp_path: Any) -> None:
    wanted = measure(checkpoint=tmp_path).eigenvalues
    record = next(tmp_path.glob("*.json"))
    content = bytearray(record.read_bytes())
    digit = content.index(b'"value": ') + 12
    content[digit] ^= 1
    record.write_bytes(content)
    with pytest.raises(ValueError, match=record.name):
        measure(checkpoint=tmp_path, resume=True)
    assert np.array_equal(measure(checkpoint=tmp_path).eigenvalues, wanted)


def test_without_resume_an_earlier_checkpoint_is_replaced(tmp_path: Any) -> None:
    measure(checkpoint=tmp_path, seed=1)
    fresh = measure(checkpoint=tmp_path)
    assert np.array_equal(fresh.eigenvalues, measure().eigenvalues)
    (tmp_path / "precious.json").write_text("{}")
    with pytest.raises(ValueError, match=r"precious\.json is not part of a checkpoint"):
        measure(checkpoint=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3


def made_up(eigenvalues: Any, **changes: Any) -> Any:
    eigenvalues = np.array(eigenvalues, dtype=np.float64)
    names = [f"encoder.layer.{i}" for i in range(eigenvalues.shape[1])]
    fields = {
        "names": names,
        "members": {n: [f"{n}.output.dense"] for n in names},
        "parameters": dict.fromkeys(names, 7),
        "eigenvalues": eigenvalues,
        "other_end": -eigenvalues / 2,
        "residuals": np.full_like(eigenvalues, 1e-4),
        "errors": np.full_like(eigenvalues, 1e-4),
        "upper_bounds": np.abs(eigenvalues) * 1.5,
        "products": np.full(eigenvalues.shape, 4),
        "converged": np.ones(eigenvalues.shape, dtype=bool),
        "losses": np.ones(len(eigenvalues)),
        "settings": {"granularity": "layer", "fraction": 0.1},
    }
    return HessianSpectrum(**{**fields, **changes})


def test_sensitivity_is_the_papers_formula() -> None:
    spectrum = made_up([[1.0, -4.0, 2.0], [3.0, -4.0, -2.0]])
    np.testing.assert_allclose(spectrum.mean, [2, -4, 0])
    np.testing.assert_allclose(spectrum.std, [1, 0, 2])
    np.testing.assert_allclose(spectrum.sensitivity, [3, 4, 2])
    assert spectrum.ranking() == ["encoder.layer.1", "encoder.layer.0", "encoder.layer.2"]


def test_confidence_intervals_and_neighbours_that_are_not_told_apart() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal([10.0, 5.0, 4.9, 1.0], [0.1, 1.0, 1.0, 0.1], size=(12, 4))
    spectrum = made_up(values)
    low, high = spectrum.confidence_interval()
    assert (low <= spectrum.sensitivity).all() and (spectrum.sensitivity <= high * 1.05).all()
    assert spectrum.indistinct() == [tuple(spectrum.ranking()[1:3])]
    assert "1 of 3 neighbours" in str(spectrum)
    with pytest.raises(ValueError, match="1 run has no spread"):
        made_up(values[:1]).indistinct()
    assert "neighbours" not in str(made_up(values[:1]))


def test_neighbours_among_many_blocks_are_told_apart() -> None:
    """Tested together, 900 pairs need a finer p than 20,000 draws give."""
    rng = np.random.default_rng(0)
    values = 1.5 ** -np.arange(900.0) * rng.lognormal(0, 0.01, size=(10, 900))
    values[:, 500] = values[:, 499] * rng.lognormal(0, 0.01, size=10)
    spectrum = made_up(values)
    alike = {"encoder.layer.499", "encoder.layer.500"}
    assert [set(pair) for pair in spectrum.indistinct()] == [alike]


def test_what_is_wrong_with_a_spectrum_is_printed() -> None:
    assert "Warning" not in str(made_up([[1.0, 2.0]]))
    assert "1 of 2 top eigenvalues are negative (encoder.layer.1)" in str(made_up([[1.0, -2.0]]))
    text = str(made_up([[1.0, 2.0]], converged=np.array([[False, True]])))
    assert "1 of 2 eigenvalues did not reach the tolerance (encoder.layer.0)" in text


def test_an_eigenvalue_that_ran_out_of_products_is_flagged() -> None:
    spectrum = measure(max_products=2, runs=1)
    assert not spectrum.converged.any() and (spectrum.products == 2).all()
    assert "did not reach the tolerance" in str(spectrum)


@pytest.mark.parametrize("method", ["lanczos", "power", "ggn"])
def test_saved_and_loaded_it_is_the_same_to_the_last_bit(tmp_path: Any, method: Any) -> None:
    spectrum = measure(method=method)
    spectrum.save(tmp_path / "new folder" / "spectrum.json")
    loaded = HessianSpectrum.load(tmp_path / "new folder" / "spectrum.json")
    for name, value in vars(spectrum).items():
        other = getattr(loaded, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), name
        else:
            assert value == other, name
    assert str(loaded) == str(spectrum)
    json.loads((tmp_path / "new folder" / "spectrum.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("spoil", [lambda t: t[: len(t) // 2], lambda t: "{}", lambda t: "[]", lambda t: "\x00"])
def test_a_damaged_spectrum_file_is_refused(tmp_path: Any, spoil: Any) -> None:
    path = tmp_path / "spectrum.json"
    made_up([[1.0, 2.0]]).save(path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=r"spectrum\.json"):
        HessianSpectrum.load(path)


@pytest.mark.parametrize(
    "changes",
    [{"eigenvalues": [[1.0]]}, {"eigenvalues": [[1.0, None]]}, {"losses": 3.0}, {"losses": []}, {"names": ["a", "a"]}],
)
def test_a_spectrum_file_with_arrays_that_cannot_be_is_refused(tmp_path: Any, changes: Any) -> None:
    path = tmp_path / "spectrum.json"
    made_up([[1.0, 2.0]]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="damaged"):
        HessianSpectrum.load(path)


@pytest.mark.parametrize("values", [[[1.0, -300.0], [2.0, 5.0], [1.0, 8.0]], [[1.0, 1e4]], [[0.0, 0.0], [0.0, 0.0]]])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_written_for_every_sign_and_scale(tmp_path: Any, values: Any, suffix: Any) -> None:
    path = tmp_path / f"spectrum.{suffix}"
    made_up(values).plot(path)
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 0}, "runs: 0"),
        ({"fraction": 0}, "fraction: 0"),
        ({"fraction": 1.5}, "fraction: 1.5"),
        ({"granularity": "row"}, "granularity: 'row'"),
        ({"method": "guess"}, "method: 'guess'"),
        ({"bound": "guess"}, "bound: 'guess'"),
        ({"confidence": 2}, "confidence: 2"),
        ({"tol": -1}, "tol: -1"),
        ({"max_products": 0}, "max_products: 0"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0"),
        ({"block_chunk": 0}, "block_chunk: 0"),
        ({"resume": True}, "resume: there is nothing"),
        ({"data": [{"labels": 3}]}, "holds no tensor"),
        ({"data": rows()}, r"give a collate_fn"),
    ],
)
def test_bad_arguments_are_named_with_their_value(changes: Any, message: Any) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**changes)


@pytest.mark.parametrize("name", ["runs", "fraction", "tol", "confidence", "max_products", "micro_batch_size", "seed"])
def test_arguments_of_another_type_are_named(name: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: 'much' is not "):
        measure(**{name: "much"})
    with pytest.raises(TypeError, match=f"{name}: (True|\\[1\\]) is not "):
        measure(**{name: True if name != "confidence" else [1]})


def test_numpy_numbers_are_numbers_and_can_be_saved(tmp_path: Any) -> None:
    numbers = {"runs": np.int64(2), "fraction": np.float64(0.5), "tol": np.float64(1e-2), "max_products": np.int32(9)}
    spectrum = measure(**numbers, seed=np.int64(3), checkpoint=tmp_path / "parts")
    spectrum.save(tmp_path / "spectrum.json")
    assert HessianSpectrum.load(tmp_path / "spectrum.json").settings == spectrum.settings
    plain = measure(runs=2, fraction=0.5, tol=1e-2, max_products=9, seed=3)
    assert np.array_equal(spectrum.eigenvalues, plain.eigenvalues) and spectrum.settings == plain.settings


@pytest.mark.parametrize("data", [{"input_ids": torch.ones(1, 3)}, 5, iter([])])
def test_data_of_an_unknown_kind_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="batches"):
        hessian_spectrum(tiny_bert(), data, progress=False)


def test_samples_that_need_a_collator_say_so() -> None:
    unpadded = [{"input_ids": row["input_ids"].tolist(), "labels": int(row["labels"])} for row in rows()]
    even = [{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(24)]
    for data, message in ((unpadded, "default_collate cannot .*give a collate_fn"), (even, "'input_ids' is a list")):
        for view in (Plain(data), DataLoader(Plain(data), batch_size=4)):
            with pytest.raises(ValueError, match=message):
                measure(data=view, fraction=1.0)


class Plain:
    """A data set of rows as they are."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def test_batches_whose_tensors_disagree_are_refused() -> None:
    (batch, *_) = batches()
    with pytest.raises(ValueError, match=r"'weights' has the shape \(3,\) in a batch of 6 samples"):
        measure(data=[{**batch, "weights": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"'labels' has the shape \(2,\)"):
        measure(data=[{**batch, "labels": batch["labels"][:2]}])
    with pytest.raises(ValueError, match="'labels' is a list"):
        measure(data=[{**batch, "labels": batch["labels"].tolist()}])
    scalar = measure(data=[{**b, "temperature": torch.tensor(2.0)} for b in batches()], runs=1)
    assert np.array_equal(scalar.eigenvalues, measure(runs=1).eigenvalues)


@pytest.mark.parametrize("method", ["lanczos", "power", "ggn"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(**batch).logits, "scalar"),
        (lambda model, batch: 1.0, "scalar"),
        (lambda model, batch: model(**batch).loss.detach(), "no parameter|no logits"),
        (lambda model, batch: torch.tensor(1.0), "no parameter|no logits"),
        (lambda model, batch: model_loss(tuple_model(model), batch), "return_dict = True"),
    ],
    ids=["vector", "float", "detached", "constant", "tuple"],
)
def test_losses_that_cannot_be_differentiated_are_refused(loss_fn: Any, message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(runs=1, loss_fn=loss_fn, method=method)


def tuple_model(model: Any) -> Any:
    model.config.return_dict = False
    return model


@pytest.mark.parametrize("method", ["lanczos", "power", "ggn"])
@pytest.mark.parametrize("default", ["bfloat16", "meta"])
def test_what_torch_creates_by_default_makes_no_difference(default: str, method: str) -> None:
    model, data = tiny_bert(), batches()
    expected = measure(model, data, runs=2, method=method)
    try:
        if default == "meta":
            torch.set_default_device("meta")  # as set_default_device("cuda") beside a model on the CPU
        else:
            torch.set_default_dtype(torch.bfloat16)
        found = measure(model, data, runs=2, method=method)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found.eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize("method", ["lanczos", "power", "ggn"])
def test_autocast_of_the_caller_makes_no_difference(method: str) -> None:
    model, data = tiny_bert().float(), batches()
    expected = measure(model, data, runs=1, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model, data, runs=1, method=method)
        traces = hessian_traces(model, data, probes=6, progress=False)
        assert (model.classifier(torch.ones(1, 8))).dtype == torch.bfloat16
    assert np.array_equal(found.eigenvalues, expected.eigenvalues)
    assert traces == hessian_traces(model, data, probes=6, progress=False)


def test_inference_mode_makes_no_difference() -> None:
    outside = tiny_bert()
    with torch.inference_mode():
        inside = measure(outside, runs=1)
        model = tiny_bert()
    assert np.array_equal(inside.eigenvalues, measure(runs=1).eigenvalues)
    with pytest.raises(ValueError, match=r"was made in torch\.inference_mode"):
        measure(model)


def test_what_is_no_model_is_refused() -> None:
    for use in (hessian_spectrum, hessian_traces):
        with pytest.raises(TypeError, match=r"model: expected an encoder \(nn\.Module\), got str"):
            use("bert-base-uncased", [], progress=False)  # type: ignore[operator]


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_an_interval_needs_a_probability(level: Any) -> None:
    spectrum = made_up([[1.0, 2.0], [2.0, 1.5]])
    for interval in (spectrum.confidence_interval, spectrum.indistinct):
        with pytest.raises(ValueError, match="level: "):
            interval(level)
    with pytest.raises(ValueError, match="draws: 0"):
        spectrum.confidence_interval(draws=0)


def test_no_samples_and_not_finite_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        hessian_spectrum(tiny_bert(), [], progress=False)
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"bert.encoder.layer.1.output.dense.weight holds NaN or infinity"):
        check_finite(model)


def test_encoders_that_are_measured_in_part_say_so(caplog: Any) -> None:
    """XLM keeps attentions and feed-forward parts in two lists, of which one is taken for the layers."""
    config = XLMConfig(emb_dim=16, n_layers=2, n_heads=2, n_words=30)
    parameter_blocks(AutoModelForSequenceClassification.from_config(config))
    assert "8 of 12 encoder matrices (33 % of the weights) are in no encoder layer" in caplog.text
    caplog.clear()
    for family in FAMILIES:
        parameter_blocks(build(family))
    assert not caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_spectra_of_every_encoder_family(family: Any) -> None:
    """One product per layer against a central difference of gradients, on the model as transformers builds it."""
    model = build(family).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(family, batch=4).items()}
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "layer")}
    operator = HessianOperator(model, [batch], blocks)
    for name, parameters in blocks.items():
        v = torch.randn(operator.size(name), dtype=torch.float64)
        v /= v.norm()
        product = operator.product(name, v)
        errors = []
        for h in (1e-2, 1e-6):  # MobileBERT's ReLU wants small steps, DeBERTa's single-precision constants large ones
            gradients = []
            for step in (h, -2 * h, h):
                for p, part in zip(parameters, v.split([p.numel() for p in parameters]), strict=True):
                    p.data += step * part.view_as(p)
                gradients.append(HessianOperator(model, [batch], {"x": parameters}).gradient("x"))
            difference = (gradients[0] - gradients[1]) / (2 * h)
            errors.append(float((product - difference).norm() / difference.norm()))
        assert min(errors) < 1e-4, (name, errors)
    spectrum = hessian_spectrum(model, [batch], runs=1, fraction=1.0, tol=0.1, max_products=8, progress=False)
    assert np.isfinite(spectrum.eigenvalues).all() and model.training


def test_a_sentence_transformer_with_a_loss_of_its_own() -> Any:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    encoder = build("bert").base_model

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = encoder

        def forward(self, features: Any, **unused: Any) -> Any:
            output = self.auto_model(features["input_ids"], attention_mask=features["attention_mask"])
            return {**features, "token_embeddings": output.last_hidden_state}

    model = SentenceTransformer(modules=[Tokens(), Pooling(48)], device="cpu")
    pairs = {"input_ids": torch.randint(5, 100, (6, 7)), "other_ids": torch.randint(5, 100, (6, 7))}
    pairs["labels"] = torch.rand(6)

    def loss_fn(model: Any, batch: Any) -> Any:
        mask = torch.ones_like(batch["input_ids"])
        left, right = (
            model({"input_ids": batch[k], "attention_mask": mask})["sentence_embedding"]
            for k in ("input_ids", "other_ids")
        )
        return (torch.cosine_similarity(left, right) - batch["labels"]).square().mean()

    spectrum = hessian_spectrum(model, [pairs], runs=1, fraction=1.0, loss_fn=loss_fn, tol=0.1, progress=False)
    assert spectrum.names == LAYERS and spectrum.converged.all()


TWO_RANKS = """
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [{helpers!r}, {tests!r}]
from test_spectrum import batches, measure, tiny_bert

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path({folder!r})
refused = []
for different in ({{"model": tiny_bert(seed=rank)}}, {{"data": batches()[:: 1 - 2 * rank]}}, {{"seed": rank}}):
    try:
        measure(**different)
        refused.append("measured")
    except ValueError as error:
        refused.append(str(error))
(folder / f"refused-{{rank}}.json").write_text(json.dumps(refused))
spectrum = measure(granularity="block", checkpoint=folder / "c")
if rank == 0:
    spectrum.save(folder / "spectrum.json")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: refused-0.json, refused-1.json, spectrum.json and its checkpoint c."""
    folder, tests = tmp_path_factory.mktemp("two_ranks"), Path(__file__).parent
    code = TWO_RANKS.format(helpers=str(tests.parent / "helpers"), tests=str(tests), folder=str(folder))
    (folder / "two_ranks.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parents[1])}
    command.append(str(folder / "two_ranks.py"))
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_processes_with_different_weights_data_or_arguments_are_refused(two_ranks: Path) -> None:
    for rank in (0, 1):
        weights, data, arguments = json.loads((two_ranks / f"refused-{rank}.json").read_text())
        assert weights.startswith("model: the weights differ between the 2 processes; load the same one")
        assert data.startswith("batches: the data differ between the 2 processes; load the same")
        assert arguments.startswith(
            "runs, seed or another argument differs between the 2 processes; pass the same ones"
        )


def test_two_processes_give_the_numbers_of_one(two_ranks: Path) -> None:
    found, expected = HessianSpectrum.load(two_ranks / "spectrum.json"), measure(granularity="block")
    for field in ("eigenvalues", "other_end", "residuals", "upper_bounds", "products", "converged", "losses"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    assert found.names == expected.names and len(list((two_ranks / "c").glob("*.json"))) == 4
