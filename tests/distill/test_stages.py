"""Stages that change bits: the best model is the best one, and the steps of every grid are trained, at its own rate."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller, rows
from encoders import build
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

import qbert
from qbert.distill import Match, Recipe, Stage, recipes
from qbert.distill.checkpoint import last_good_checkpoint
from qbert.distill.step_sizes import StepSizeCallback, static_activations
from qbert.layers.kind import TrainableLayer


def down(*bits: int | None, **settings: Any) -> Recipe:
    stages = tuple(Stage(f"{n}-{b}", (Match("logits"),), bits=b) for n, b in enumerate(bits))
    return Recipe("down", "test", stages, **{"dropout": False, **settings})


class Watch(TrainerCallback):
    """(bits, mean scale, rate of its group) of one matrix after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        quantizer = self.trainer.student.bert.encoder.layer[0].output.dense.weight_quantizer
        groups = kwargs["optimizer"].param_groups
        rate = next((g["initial_lr"] for g in groups if g["params"][0] is quantizer.scale), 0.0)
        self.seen.append((quantizer.bits, float(quantizer.scale.detach().mean()), rate))


def watched(folder: Path, recipe: Recipe, bits: int, **arguments: Any) -> tuple[Any, Watch]:
    watch = Watch()
    watch.trainer = distiller(folder, recipe=recipe, bits=bits, callbacks=[watch], **arguments)
    return watch.trainer, watch


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_learn_below_8_bits_and_stay_positive(bits: int, tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, down(8, 2, step_rate=0.3, freeze_at=1.0), bits, max_steps=8)
    trainer.train()
    eights, twos = ([scale for b, scale, _ in watch.seen if b == wanted] for wanted in (8, 2))
    assert len(set(eights)) == 1 and len(set(twos)) == len(twos) == 4
    assert all(bool((p > 0).all()) for n, p in trainer.student.named_parameters() if n.endswith("quantizer.scale"))


def test_the_rate_of_a_step_belongs_to_its_grid(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, down(4, 2, step_rate=1e-3, freeze_at=1.0), 4, max_steps=6)
    fresh = qbert.quantize_model(build("bert"), qbert.BitsConfig(2, groups=16))
    trainer.train()
    rates = {bits: rate for bits, _, rate in watch.seen}
    scales = {bits: scale for bits, scale, _ in reversed(watch.seen)}
    for bits, rate in rates.items():
        assert rate == pytest.approx(1e-3 * scales[bits], rel=0.05)
    assert rates[2] > 2 * rates[4] and fresh is not trainer.student


def test_a_stage_of_the_same_bits_keeps_the_learned_grid(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, down(3, 3, step_rate=0.05, freeze_at=1.0), 3, max_steps=8)
    trainer.train()
    scales = [scale for _, scale, _ in watch.seen]
    jumps = [abs(b - a) / a for a, b in itertools.pairwise(scales)]
    assert max(jumps) < 0.1 and len(set(scales)) == 8


def test_steps_stay_positive_in_the_step_after_which_they_freeze(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, down(None, step_rate=5.0, freeze_at=0.5), 3, max_steps=4, learning_rate=1e-9)
    trainer.train()
    assert watch.seen[2][1] == watch.seen[3][1]
    assert all(bool((p > 0).all()) for n, p in trainer.student.named_parameters() if n.endswith("quantizer.scale"))


@pytest.mark.parametrize("bits", [(8, 2), (4, 2), (None, 2), (2, 8)])
def test_the_best_model_is_loaded_with_its_bits(bits: tuple[int | None, ...], tmp_path: Path) -> None:
    trainer = distiller(
        tmp_path, recipe=down(*bits), bits=4, max_steps=6, save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, options={"eval_dataset": rows(16)},
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    layer = trainer.student.bert.encoder.layer[0].output.dense
    first = trainer.state.best_global_step <= 3
    assert layer.spec.bits == layer.weight_quantizer.bits == ((bits[0] or 4) if first else bits[1])


def test_a_checkpoint_of_a_later_stage_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    recipe = down(4, 2, step_rate=0.02)
    whole = distiller(tmp_path / "whole", recipe=recipe, bits=4, max_steps=8)
    whole.train()
    cut = distiller(tmp_path / "cut", recipe=recipe, bits=4, max_steps=8, save_steps=3)
    cut.train()
    assert last_good_checkpoint(tmp_path / "cut") is not None
    resumed = distiller(tmp_path / "cut", recipe=recipe, bits=4, max_steps=8)
    resumed.train(str(tmp_path / "cut" / "checkpoint-6"))
    for (name, one), (_, two) in zip(
        whole.student.state_dict().items(), resumed.student.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(two, one, rtol=0, atol=0, msg=name)


def test_a_second_training_trains_what_the_first_did(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, down(4, 2, step_rate=0.02), 4, max_steps=4)
    trainer.train()
    first = list(watch.seen)
    watch.seen.clear()
    trainer.train()
    assert [bits for bits, *_ in watch.seen] == [bits for bits, *_ in first] == [4, 4, 2, 2]
    assert watch.seen[0][1] != watch.seen[1][1] and watch.seen[2][1] != watch.seen[3][1]
    assert all(rate > 0 for *_, rate in watch.seen)


def test_learned_activation_ranges_are_trained_again(tmp_path: Path) -> None:
    recipe = down(None, activations="learned", step_rate=0.05, freeze_at=1.0)
    batch = {k: torch.tensor([row[k] for row in rows(8)]) for k in ("input_ids", "attention_mask")}
    student = qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=16), calibration_data=[batch])
    trainer = distiller(tmp_path, student=student, recipe=recipe, max_steps=3)
    values = []
    for _ in range(3):
        values.append(float(student.bert.encoder.layer[0].output.dense.activation_quantizer.scale))
        trainer.train()
    assert len(set(values)) == 3


def test_a_training_too_short_for_a_stage_says_so(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, recipe=down(4, 2), bits=4, max_steps=1)
    with pytest.warns(UserWarning, match=r"stage '[01]-[24]' .* has no step among 1"):
        trainer.train()


@pytest.mark.parametrize("kind", ["linear", "transposed", "table", "conv", "lstm"])
def test_steps_of_every_kind_of_layer_are_refitted_to_its_own_matrix(kind: str) -> None:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "linear": nn.Linear(12, 12),
        "transposed": Conv1D(12, 12),  # square: its transpose would fit as well
        "table": nn.Embedding(12, 12),
        "conv": nn.Conv1d(4, 12, 3),
        "lstm": nn.LSTM(12, 12),
    }
    layer = made[kind]
    with torch.no_grad():
        for weight in (p for p in layer.parameters() if p.dim() > 1):
            torch.nn.init.normal_(weight)
            weight.mul_(torch.logspace(-1, 1, weight.shape[-1]))
    student = qbert.quantize_model(nn.Sequential(layer), {"*": {"bits": 3, "groups": 4}})
    layers = [m for m in student.modules() if isinstance(m, TrainableLayer)]
    with torch.no_grad():
        for m in layers:
            m.weight.mul_(1 + 0.1 * torch.rand_like(m.weight))  # as training moves it
    grids = [copy.deepcopy(m.weight_quantizer) for m in layers]
    state = TrainerState(global_step=1, max_steps=10)
    recipe = down(None, steps="refit", refit_every=1)
    StepSizeCallback(student, recipe).on_step_end(TrainingArguments(), state, TrainerControl())
    assert layers
    for m, grid in zip(layers, grids, strict=True):
        found = grid.codes(m.matrix)
        before = grid.scale.detach().clone()
        groups = [m.matrix[grid.row_group == g] for g in range(len(before))]
        shifted = [(found.float() - grid.zero[grid.row_group])[grid.row_group == g] for g in range(len(before))]
        best = torch.stack([(w * s).sum() / s.square().sum() for w, s in zip(groups, shifted, strict=True)])
        torch.testing.assert_close(m.weight_quantizer.scale.squeeze(1), best)
        assert not torch.equal(m.weight_quantizer.scale, before)


def test_tables_follow_their_weights_where_steps_are_refitted(tmp_path: Path) -> None:
    student = qbert.quantize_model(build("bert"), recipes.ternarybert().bits_config(2))
    table = student.bert.embeddings.word_embeddings
    before = table.weight_quantizer.scale.detach().clone()
    trainer = distiller(tmp_path, student=student, recipe=recipes.ternarybert(), max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert table.weight_quantizer.bits == 4
    assert not torch.equal(table.weight_quantizer.scale, before)


@pytest.mark.parametrize("frozen", [1.0, 0.5])
def test_moving_ranges_leave_out_the_padding(frozen: float, tmp_path: Path) -> None:
    calibration = [{"input_ids": torch.randint(5, 100, (8, 9)), "attention_mask": torch.ones(8, 9, dtype=torch.long)}]
    made = rows(16, 12)
    lengths = [4 if i % 8 else 12 for i in range(16)]
    found = []
    for padding in (0, 1):
        data = [
            {
                "input_ids": row["input_ids"][:n] + [padding] * (12 - n),
                "attention_mask": [1] * n + [0] * (12 - n),
                "labels": row["labels"],
            }
            for row, n in zip(made, lengths, strict=True)
        ]
        torch.manual_seed(1)
        student = qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=16), calibration_data=calibration)
        before = [q.scale.clone() for q in static_activations(student)]
        hooks = len(student._forward_pre_hooks)
        recipe = down(None, activations="average", steps="fixed", freeze_at=frozen)
        distiller(tmp_path, student=student, recipe=recipe, data=data, max_steps=4, learning_rate=0.0).train()
        found.append([q.scale.clone() for q in static_activations(student)])
        assert not any(torch.equal(a, b) for a, b in zip(before, found[-1], strict=True))
        assert len(student._forward_pre_hooks) == hooks
        copy.deepcopy(student)
        assert all(q._real is None for q in static_activations(student))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_stage_of_half_the_rate_has_it_under_every_schedule(schedule: str, tmp_path: Path) -> None:

    class Rates(TrainerCallback):
        trainer: Any
        seen: list[dict[str, float]]

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): n for n, p in self.trainer.student.named_parameters()}
            self.seen.append({names[id(p)]: g["lr"] for g in kwargs["optimizer"].param_groups for p in g["params"]})

    seen = []
    for settings in ({}, {"rate": 0.5, "rates": {"encoder.layer.0": 0.0}}):
        rates = Rates()
        rates.seen = []
        recipe = Recipe("one", "test", (Stage("only", (Match("logits"),), **settings),))  # type: ignore[arg-type]
        arguments: dict[str, Any] = {"lr_scheduler_type": schedule, "max_steps": 4, "warmup_steps": 2}
        rates.trainer = distiller(tmp_path, recipe=recipe, callbacks=[rates], **arguments)
        rates.trainer.train()
        seen.append(rates.seen)
    for plain, halved in zip(*seen, strict=True):
        for name in plain:
            factor = 0.0 if ".layer.0." in name else 0.5
            assert halved[name] == pytest.approx(factor * plain[name], rel=1e-6), name
    assert len({next(iter(rates.values())) for rates in seen[0]}) > 1 or schedule != "linear"
