"""Checkpoints of a distillation: whole ones are resumed, damaged ones passed over by their digests."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from distilling import distiller
from encoders import build
from safetensors.torch import load_file, save_file

import qbert
from qbert.distill import Distiller, Match, Recipe, Stage, recipes
from qbert.distill.checkpoint import (
    FILES,
    ORIGIN,
    WEIGHTS,
    check_origin,
    finish_checkpoint,
    is_whole,
    last_good_checkpoint,
    origin,
)
from qbert.distill.losses import cosine_distance, hidden_mse


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.nn.Module]:
    """A folder with two checkpoints, ids, and the student as it was at the second."""
    folder = tmp_path_factory.mktemp("out")
    run = distiller(folder, max_steps=4, save_steps=2)
    run.train()
    return folder, torch.arange(5, 25).view(2, 10), run.student


def test_a_checkpoint_loads_as_the_student(trained: tuple[Path, torch.Tensor, torch.nn.Module]) -> None:
    folder, ids, student = trained
    loaded = qbert.load(folder / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.state_dict().keys() == student.state_dict().keys()


def test_what_save_model_writes_loads_as_the_student(tmp_path: Path) -> None:
    run = distiller(tmp_path / "out", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "final"))
    state = qbert.load(tmp_path / "final").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in run.student.state_dict().items())


def test_a_flipped_bit_of_any_file_has_the_checkpoint_passed_over(
    trained: tuple[Path, torch.Tensor, torch.nn.Module], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "out"))
    last, chance = folder / "checkpoint-4", random.Random(0)
    names = sorted(path.name for path in last.iterdir() if path.is_file())
    assert {WEIGHTS, "optimizer.pt", "scheduler.pt", "trainer_state.json", FILES} <= set(names)
    for name in names:
        content = (last / name).read_bytes()
        for _ in range(5):
            changed = bytearray(content)
            changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (last / name).write_bytes(changed)
            assert last_good_checkpoint(folder) == folder / "checkpoint-2", name
        (last / name).write_bytes(content)
    assert is_whole(last)


def test_a_damaged_checkpoint_that_is_named_is_refused_by_name(
    trained: tuple[Path, torch.Tensor, torch.nn.Module], tmp_path: Path
) -> None:
    last = Path(shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    (last / "optimizer.pt").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"optimizer\.pt cannot be read or is damaged; resume from an earlier one"):
        distiller(tmp_path, max_steps=6).train(resume_from_checkpoint=str(last))


def test_one_that_was_killed_before_its_digests_is_passed_over(
    trained: tuple[Path, torch.Tensor, torch.nn.Module], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "out"))
    (folder / "checkpoint-4" / FILES).unlink()
    assert last_good_checkpoint(folder) == folder / "checkpoint-2"


def test_one_of_an_earlier_version_without_digests_is_taken(
    trained: tuple[Path, torch.Tensor, torch.nn.Module], tmp_path: Path
) -> None:
    last = Path(shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    (last / FILES).unlink()
    save_file(load_file(last / WEIGHTS), last / WEIGHTS, {"format": "pt"})
    assert is_whole(last)
    (last / "scheduler.pt").write_bytes((last / "scheduler.pt").read_bytes()[:20])
    assert not is_whole(last)


@pytest.mark.parametrize(
    ("teacher_seed", "temperature", "other"), [(3, 1.0, "another teacher"), (2, 7.0, "another recipe"), (2, 1.0, None)]
)
def test_a_checkpoint_goes_on_with_its_own_teacher_and_recipe_alone(
    teacher_seed: int, temperature: float, other: str | None, tmp_path: Path
) -> None:
    def run(seed: int, heat: float, steps: int) -> Distiller:
        torch.manual_seed(seed)
        teacher, recipe = build("bert").eval(), recipes.logits(temperature=heat)
        return distiller(tmp_path, teacher=teacher, recipe=recipe, max_steps=steps, save_steps=1)

    run(2, 1, 1).train()
    again = run(teacher_seed, temperature, 2)
    if other is None:
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2
    else:
        with pytest.raises(ValueError, match=f"is of {other}; resume with the"):
            again.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_an_origin_goes_on_with_a_warning(
    trained: tuple[Path, torch.Tensor, torch.nn.Module], tmp_path: Path
) -> None:
    last = Path(shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    (last / ORIGIN).unlink()
    finish_checkpoint(last)
    with pytest.warns(UserWarning, match="of an earlier version, which kept no digests of teacher and recipe"):
        check_origin(last, origin(build("bert"), recipes.logits()))


def test_the_origin_tells_terms_apart_and_no_ways_of_writing_them() -> None:
    def found(match: Match) -> str:
        return origin(teacher, Recipe("any", "test", (Stage("a", (match,)),)))["recipe"]

    teacher = build("bert")
    one = found(Match("hidden", hidden_mse, weight=2, layers=[(0, 1)]))
    assert one == found(Match("hidden", hidden_mse, weight=2.0, layers=((0, 1),)))
    for other in (
        Match("hidden", cosine_distance, weight=2, layers=[(0, 1)]),
        Match("hidden", hidden_mse, weight=3, layers=[(0, 1)]),
        Match("hidden", hidden_mse, weight=2, layers=[(0, 2)]),
    ):
        assert found(other) != one


def test_the_origin_of_a_general_stage_knows_no_head() -> None:
    one, two, other = (build("bert") for _ in range(3))
    two.bert.load_state_dict({**one.bert.state_dict(), "pooler.dense.bias": torch.ones(48)})
    general = recipes.tinybert(general=True)
    assert origin(one, general) == origin(two, general) != origin(other, general)
    assert origin(one, recipes.logits()) != origin(two, recipes.logits())
