"""Shallower students, the recipes' schedules, and quantizers that train."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import build, inputs_for, outputs

import qbert
from qbert import BitsConfig, students
from qbert.distill import Match, Recipe, Stage, recipes
from qbert.distill.recipes import RECIPES
from qbert.layers.linear import QuantLinear
from qbert.students.depth import student_with_layers


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "vit", "deberta-v2"])
def test_kept_layers_are_the_teachers_and_survive_saving(family: str, tmp_path: Path) -> None:
    teacher = build(family).eval()
    student = student_with_layers(teacher, [-1])
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    inputs = inputs_for(family)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, student(**inputs).logits)
        teacher(**inputs)  # the teacher still has both of its layers


def test_kinds_of_layers_are_kept_with_the_layers(tmp_path: Path) -> None:
    """ModernBERT: local and global layers, and a first one without the norm of the others."""
    teacher = build("modernbert", num_hidden_layers=5).eval()
    student = students.depth(teacher, [0, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    inputs = inputs_for("modernbert")
    for name, model in (("kept", student), ("new", students.small(teacher, layers=3))):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs))
    for layers in ([1, 3], [0, 0], [2, 0]):
        with pytest.raises(ValueError, match="keep layer 0 first, once"):
            students.depth(teacher, layers)
    with pytest.raises(ValueError, match="layers=6 is not possible; the teacher's config lists 5 layer_types"):
        students.small(teacher, layers=6)
    table = students.compare_depths(teacher, [inputs], 2)
    assert {choice.layers[0] for choice in table.choices} == {0} and len(table.choices) == 8


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer 2; it has 2"):
        student_with_layers(build("bert"), [0, 2])
    with pytest.raises(ValueError, match="layers is empty"):
        student_with_layers(build("bert"), [])
    with pytest.raises(ValueError, match="applies 1 shared layer"):
        student_with_layers(build("albert"), [0])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_say_their_source_and_can_be_trained_with(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name and recipe.source
    transformers.TrainingArguments("unused", use_cpu=True, **recipe.arguments)
    recipe.bits_config(2).resolve(build("bert"))


def test_stages_share_the_steps_and_have_their_own_schedule() -> None:
    stages = (
        Stage("a", (Match("hidden"),), share=3, schedule="constant"),
        Stage("b", (Match("logits"),), share=1, rate=0.5),
    )
    recipe = Recipe("two", "here", stages)
    assert recipe.boundaries(100) == [0, 75, 100]
    assert [recipe.stage_at(step, 100) for step in (0, 74, 75, 99, 100)] == [0, 0, 1, 1, 1]
    assert recipe.rate_at(0, 100, 10) == 0.1 and recipe.rate_at(50, 100, 10) == 1.0
    assert recipe.rate_at(75, 100, 10) == 0.5 and recipe.rate_at(99, 100, 10) == pytest.approx(0.5 / 25)
    with pytest.raises(ValueError, match="'b' has no step among 1"):
        recipe.boundaries(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Match("logits", "crossentropy"), "'crossentropy' is not known"),
        (lambda: Match("logits", weight=-1.0), "weight=-1.0 of logits"),
        (lambda: Stage("a", ()), "has no matches"),
        (lambda: Stage("a", (Match("logits"), Match("logits", "kl"))), "two terms called 'logits'"),
        (lambda: Stage("a", (Match("logits"),), bits=5), "bits=5 is not possible"),
        (lambda: Recipe("r", "s", ()), "has no stages"),
        (lambda: recipes.pkd(alpha=2.0), "alpha=2.0 is not a share"),
    ],
)
def test_impossible_recipes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def quantized_linear(bits: int = 3, **settings: Any) -> QuantLinear:
    model = qbert.quantize_model(build("bert"), qbert.BitsConfig(bits, groups=16, activation_bits=None, **settings))
    return model.bert.encoder.layer[0].output.dense


def test_learned_steps_start_at_the_data_and_have_lsq_gradients() -> None:
    layer = quantized_linear(scheme="symmetric")
    quantizer = layer.weight_quantizer
    start = quantizer.scale.detach().clone()
    quantizer.learn()
    upstream = torch.randn(48, 96)
    (quantizer(layer.weight) * upstream).sum().backward()
    position = layer.weight.detach() / start[quantizer.row_group]
    slope = torch.where(position.abs() <= 3.5, position.round() - position, position.sign() * 3)
    expected = torch.zeros(16, 1).index_add_(0, quantizer.row_group, (upstream * slope).sum(1, keepdim=True))
    torch.testing.assert_close(quantizer.scale.grad, expected * (3 * 96 * 3) ** -0.5, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantizer.scale.detach(), start)


def test_refitting_never_raises_the_error_of_the_codes() -> None:
    layer = quantized_linear(range_method="minmax")
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    before = (layer.quantized_weight() - weight).square().sum()
    codes = quantizer.codes(weight)
    quantizer.refit(weight)
    rows = quantizer.row_group
    refitted = quantizer.scale[rows] * (codes - quantizer.zero[rows])
    assert (refitted - weight).square().sum() < before


def test_bits_can_go_down_in_place() -> None:
    layer = quantized_linear(8)
    layer.weight_quantizer.change_bits(2, layer.weight)
    assert torch.unique(layer.weight_quantizer.codes(layer.weight)).numel() <= 4
    fresh = quantized_linear(2)
    fresh.weight_quantizer.find(layer.weight)
    assert torch.equal(fresh.weight_quantizer.scale, layer.weight_quantizer.scale)


def static_activation() -> Any:
    model = qbert.quantize_model(build("bert"), 4, calibration_data=[inputs_for("bert")])
    return model.bert.encoder.layer[0].output.dense.activation_quantizer


def test_activation_ranges_follow_batches_in_training_only() -> None:
    quantizer = static_activation()
    quantizer.follow(0.5)
    quantizer.set_range(-1.0, 1.0)
    quantizer.train()(torch.tensor([-3.0, 3.0]))
    assert float(quantizer.scale * 255) == pytest.approx(4.0, rel=0.02)  # halfway from [-1, 1] to [-3, 3]
    kept = float(quantizer.scale)
    quantizer.eval()(torch.tensor([-30.0, 30.0]))
    quantizer.follow(None)
    quantizer.train()(torch.tensor([-30.0, 30.0]))
    assert float(quantizer.scale) == kept


def test_activation_scales_can_be_learned() -> None:
    quantizer = static_activation()
    quantizer.learn()
    quantizer(torch.randn(3, 4)).sum().backward()
    assert quantizer.scale.grad is not None
    quantizer.learn(False)
    assert not list(quantizer.parameters()) and "scale" in dict(quantizer.named_buffers())
    dynamic = qbert.quantize_model(build("bert"), 4).bert.encoder.layer[0].output.dense.activation_quantizer
    with pytest.raises(ValueError, match="found at run time"):
        dynamic.learn()


def test_a_recipe_adds_its_grids_where_the_bits_do_not_say_otherwise() -> None:
    mixed = BitsConfig({"encoder.layer.0": 3, "encoder.layer.1": 2, "embeddings": 4, "*": 8}, embedding_bits=8)
    adapted = recipes.qbert_kd().adapt(mixed)
    specs = adapted.resolve(build("bert"))
    schemes = {spec.bits: {s.scheme for s in specs.values() if s.bits == spec.bits} for spec in specs.values()}
    assert schemes == {2: {"midrise"}, 3: {"asymmetric"}, 4: {"asymmetric"}}
    assert {n: s.bits for n, s in specs.items()} == {n: s.bits for n, s in mixed.resolve(build("bert")).items()}
    for own in (BitsConfig(2, scheme="symmetric"), BitsConfig({"*": {"bits": 2, "scheme": "symmetric"}})):
        assert {s.scheme for s in recipes.qbert_kd().adapt(own).resolve(build("bert")).values() if s.bits == 2} == {
            "symmetric"
        }
    assert recipes.ternarybert().bits_config(2).defaults == {"groups": 1}
