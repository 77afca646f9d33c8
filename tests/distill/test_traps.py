"""The silent traps of transformers 5: each test fails where the trap is stepped into."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller, rows
from encoders import build, inputs_for
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

import qbert
from qbert.distill import Match, Recipe, Stage, recipes
from qbert.distill.features import Recorder
from qbert.layers.linear import QuantLinear


def gradients_after(trainer: Any, batches: int) -> dict[str, torch.Tensor]:
    """Gradients that reach the optimizer in the first step of `trainer`."""
    seen: dict[str, torch.Tensor] = {}

    def keep(optimizer: Any, *_: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    create = trainer.create_optimizer

    def create_and_hook(*args: Any) -> Any:
        optimizer = create(*args)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    trainer.create_optimizer = create_and_hook
    trainer.args.max_steps = 1
    trainer.train()
    return seen


def test_scores_respect_padding_with_the_fast_attention() -> None:
    # Trap (a): a custom attention function without a mask function drops the padding mask. Hooks keep SDPA.
    model = build("bert").eval()
    inputs = inputs_for("bert")
    with torch.no_grad():
        plain = model(**inputs).logits
        with Recorder(model, {"scores"}):
            recorded = model(**inputs).logits
        changed = {k: v.clone() for k, v in inputs.items()}
        changed["input_ids"][-1, 4:] = 99  # only padding changes
        with Recorder(model, {"scores"}) as recorder:
            padded = model(**changed)
            scores = recorder.features("scores", padded)[0]
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(recorded, plain)
    torch.testing.assert_close(padded.logits, plain)
    assert scores.requires_grad is False and scores.shape == (2, 4, 9, 9)


@pytest.mark.parametrize("recipe", [recipes.ternarybert(), recipes.qat()])
def test_accumulated_gradients_are_those_of_the_whole_batch(recipe: Recipe, tmp_path: Path) -> None:
    # Trap (b): Trainer takes the loss for one that is divided already, and multiplies the gradient by 4.
    found = []
    for size, accumulation in ((16, 1), (4, 4)):
        trainer = distiller(
            tmp_path,
            recipe=recipe,
            dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )
        found.append(gradients_after(trainer, 16))
    whole, accumulated = found
    assert whole.keys() == accumulated.keys() and len(whole) > 20
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_stock_trainer_still_has_that_trap(tmp_path: Path) -> None:
    # If this fails, transformers changed its guess, and our class attribute should be looked at again.
    assert Trainer.loss_is_scaled_for_ga is None
    assert distiller(tmp_path).loss_is_scaled_for_ga is False
    assert distiller(tmp_path).model_accepts_loss_kwargs is True


def test_step_sizes_come_from_the_data_after_loading(tmp_path: Path) -> None:
    # Trap (c): parameters and buffers made in a subclass's __init__ come back uninitialised from from_pretrained.
    build("bert").save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    student = qbert.quantize_model(loaded, 3)
    for module in student.modules():
        if isinstance(module, QuantLinear):
            scale = module.weight_quantizer.scale
            assert torch.isfinite(scale).all() and (scale > 1e-6).all() and (scale < 1).all()
            error = (module.quantized_weight() - module.weight).square().mean()
            assert error < 0.1 * module.weight.square().mean()


def test_learned_steps_survive_a_checkpoint(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, save_steps=4, max_steps=4)
    trainer.train()
    trained = {n: p.detach().clone() for n, p in trainer.student.named_parameters() if n.endswith("scale")}
    other = distiller(tmp_path, max_steps=4)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    loaded = dict(other.student.named_parameters())
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    # Trap (d): features recorded inside it have no gradient, so their losses train nothing.
    with pytest.raises(ValueError, match="reentrant gradient checkpointing"):
        distiller(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    trainer = distiller(tmp_path)
    trainer.student.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant gradient checkpointing"):
        trainer.train()


def test_checkpointing_without_reentry_gives_the_same_gradients(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    plain = gradients_after(distiller(tmp_path, **options), 1)
    saving = gradients_after(
        distiller(
            tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}, **options
        ),
        1,
    )
    assert plain.keys() == saving.keys()
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], rtol=1e-4, atol=1e-7)


def test_every_term_trains_something(tmp_path: Path) -> None:
    for match in recipes.qbert_kd().stages[0].matches:
        recipe = Recipe("one", "test", (Stage("one", (match,)),))
        gradients = gradients_after(distiller(tmp_path, recipe=recipe), 1)
        name = "student.bert.encoder.layer.0.attention.self.query.weight"
        assert float(gradients[name].norm()) > 0, match.feature


def test_the_teacher_is_outside_of_everything_that_trains_or_saves(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, save_steps=2, max_steps=2)
    before = {n: p.clone() for n, p in trainer.teacher.named_parameters()}
    modes: list[bool] = []
    trainer.teacher.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    assert modes and not any(modes)
    assert all(torch.equal(p, before[n]) for n, p in trainer.teacher.named_parameters())
    assert not any(id(p) in {id(q) for q in trainer.teacher.parameters()} for p in trainer.distillation.parameters())
    with safe_open(str(tmp_path / "checkpoint-2" / "distillation.safetensors"), framework="pt") as file:
        assert not [key for key in file.keys() if "teacher" in key]  # noqa: SIM118


def test_projections_are_in_checkpoints_and_never_in_the_student(tmp_path: Path) -> None:
    recipe = Recipe("p", "test", (Stage("p", (Match("hidden", projection="linear"), Match("logits", weight="auto"))),))
    teacher = build("bert", hidden_size=96)
    trainer = distiller(tmp_path, teacher=teacher, recipe=recipe, save_steps=2, max_steps=2)
    before = [p.detach().clone() for p in trainer.distillation.heads.parameters()]
    trainer.train()
    after = list(trainer.distillation.heads.parameters())
    assert len(after) == 6 and not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with safe_open(str(tmp_path / "checkpoint-2" / "distillation.safetensors"), framework="pt") as file:
        keys = list(file.keys())
    assert sum(key.startswith("heads.projections.") for key in keys) == 6 and "heads.auto_sum" in keys
    assert not [name for name in trainer.student.state_dict() if "projection" in name or "heads." in name]
    assert float(trainer.distillation.heads.auto_count[recipe.terms.index("logits")]) == 2


def test_the_loss_of_a_batch_does_not_depend_on_its_padding(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, dropout=0.0)
    batch = trainer.data_collator(
        [{k: v[: 4 + i] for k, v in r.items() if k != "labels"} for i, r in enumerate(rows(3))]
    )
    wider = {k: nn.functional.pad(v, (0, 40)) for k, v in batch.items()}
    with torch.no_grad():
        narrow_terms, wide_terms = (trainer.distillation.losses(dict(b))["terms"] for b in (batch, wider))
    torch.testing.assert_close(wide_terms, narrow_terms, rtol=1e-4, atol=1e-6)
