"""Zeros in training: a pruned student's stay, movement pruning finds its own, a resumed run goes on."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import distiller
from encoders import build, inputs_for, same_state

import qbert
from qbert.distill import recipes
from qbert.distill.checkpoint import last_good_checkpoint
from qbert.distill.recipe import Zeros
from qbert.distill.zeros import STATE, KeepZeros, Movement
from qbert.encoders.zeros import noted_zeros
from qbert.quantizers.sparsity import Pattern
from qbert.students.curvature import layer_matrices
from qbert.students.depth import student_with_layers


def zeros_in_runs(matrix: torch.Tensor) -> set[int]:
    return set((matrix == 0).unflatten(1, (-1, 4)).sum(2).unique().tolist())


@pytest.mark.parametrize("bits", [None, 3])
def test_zeros_of_a_pruned_student_stay_while_the_others_train(bits: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = build("bert").eval()
    student = qbert.prune(teacher, pattern="2:4", data=[inputs_for("bert", 8)], names="*.output.dense")
    if bits is not None:
        student = qbert.quantize_model(student, qbert.BitsConfig(bits, groups=16))
    layer = student.bert.encoder.layer[0].output.dense
    before = layer.weight.detach().clone()
    distiller(tmp_path, teacher=teacher, student=student, max_steps=4).train()
    assert torch.equal(layer.weight == 0, before == 0) and zeros_in_runs(layer.weight) == {2}
    assert not torch.equal(layer.weight, before)
    dense = student.bert.encoder.layer[0].intermediate.dense
    assert float((dense.weight == 0).float().mean()) < 0.01
    if bits is not None:
        assert zeros_in_runs(layer.quantized_weight()) <= {2, 3, 4}


def test_zeros_of_a_grid_are_not_taken_for_a_pattern(tmp_path: Path) -> None:
    """A start from compensated codes, of which many are zero, moves them all; of a pattern only its share is held."""
    teacher = build("bert").eval()
    data = [inputs_for("bert", 8)]
    config = qbert.BitsConfig(2, groups=16, rounding="compensated")
    student = qbert.quantize_model(teacher, config, calibration_data=data)
    keeper = KeepZeros(student)
    keeper.on_train_begin(None, None, None)  # type: ignore[arg-type]
    assert not keeper._masks
    pruned = qbert.quantize_model(qbert.prune(teacher, pattern="2:4", data=data), config, calibration_data=data)
    keeper = KeepZeros(pruned)
    keeper.on_train_begin(None, None, None)  # type: ignore[arg-type]
    assert all(int(mask.sum()) * 2 == mask.numel() for _, mask in keeper._masks)


def test_scores_are_sums_of_gradient_times_weight_and_the_least_go() -> None:
    """Against the definition, written out for plain gradient descent on one matrix."""
    torch.manual_seed(0)
    model = build("bert").eval()
    name = "encoder.layer.0.output.dense"
    module = model.bert.get_submodule(name)
    movement = Movement(model, Zeros(0.5, 0.0, 1.0, name))
    state: Any = type("State", (), {"global_step": 0, "max_steps": 2})()
    args: Any = None
    movement.on_train_begin(args, state, None)  # type: ignore[arg-type]
    dense, score = module.weight.detach().clone(), torch.zeros_like(module.weight)
    out = torch.zeros_like(score, dtype=torch.bool)
    for step in range(2):
        gradient = torch.randn(module.weight.shape)
        shown = module.weight.detach().clone()
        assert torch.equal(shown, dense.masked_fill(out, 0))
        module.weight.grad = gradient.clone()
        movement.on_pre_optimizer_step(args, state, None)  # type: ignore[arg-type]
        with torch.no_grad():
            module.weight -= 0.1 * module.weight.grad
        movement.on_optimizer_step(args, state, None)  # type: ignore[arg-type]
        score -= gradient * dense
        dense = dense - 0.1 * gradient.masked_fill(out, 0)
        share = 0.5 * (1 - (1 - (step + 1) / 2) ** 3)
        out = Pattern(share=share).mask(score)
        state.global_step += 1
    torch.testing.assert_close(module.weight.detach(), dense.masked_fill(out, 0))
    assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_movement_ends_with_the_share_of_zeros_and_learns(pattern: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    teacher = build("bert").eval()
    student = copy.deepcopy(teacher)
    distiller(
        tmp_path, teacher=teacher, student=student, recipe=recipes.movement(pattern=pattern), max_steps=10
    ).train()
    for target in layer_matrices(student):
        assert float((target.matrix == 0).float().mean()) == pytest.approx(0.5, abs=1e-3), target.name
        assert pattern == 0.5 or zeros_in_runs(target.matrix) == {2}
    assert set(noted_zeros(student)) == {t.name for t in layer_matrices(student)}
    student.save_pretrained(tmp_path / "saved")
    assert noted_zeros(type(student).from_pretrained(tmp_path / "saved")) == noted_zeros(student)


def test_a_resumed_movement_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    ends = []
    for folder, steps in ((tmp_path / "whole", None), (tmp_path / "cut", 4)):
        torch.manual_seed(2)
        teacher = build("bert").eval()
        student = copy.deepcopy(teacher)
        options = {"teacher": teacher, "recipe": recipes.movement(), "max_steps": 8, "save_steps": 4, "seed": 3}
        run = distiller(folder, student=student, **options)  # type: ignore[arg-type]
        run.train()
        if steps is not None:
            student = copy.deepcopy(teacher)
            distiller(folder, student=student, **options).train(str(folder / f"checkpoint-{steps}"))  # type: ignore[arg-type]
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_movement_goes_on_from_a_copied_checkpoint_and_passes_over_one_without_its_scores(tmp_path: Path) -> None:
    def run(folder: Path) -> Any:
        torch.manual_seed(2)
        return distiller(folder, student=build("bert"), recipe=recipes.movement(), max_steps=6, save_steps=2)

    whole = run(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "copied")
    elsewhere = run(tmp_path / "other")
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "copied"))
    assert same_state(elsewhere.student, whole.student)
    (tmp_path / "whole" / "checkpoint-6" / STATE).unlink()
    assert last_good_checkpoint(tmp_path / "whole") == tmp_path / "whole" / "checkpoint-4"
    again = run(tmp_path / "whole")
    again.train(resume_from_checkpoint=True)
    assert same_state(again.student, whole.student)


def test_kept_layers_keep_their_zeros_noted() -> None:
    student = qbert.prune(build("bert").eval(), pattern="2:4", names="encoder.layer.1")
    assert {n.split(".")[2] for n in noted_zeros(student)} == {"1"}
    assert {n.split(".")[2] for n in noted_zeros(student_with_layers(student, [1]))} == {"0"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zeros("2:4", 0.7, 0.2), "begin=0.7 and end=0.2"),
        (lambda: Zeros(1.5), "pattern=1.5 is not known"),
        (lambda: Movement(build("bert"), Zeros(0.5, names="pooler")), "'pooler' matches no matrix"),
    ],
)
def test_impossible_zeros_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
