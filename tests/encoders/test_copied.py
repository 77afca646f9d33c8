"""Parameters that were copied: every change of values that torch lets us see is told, a move is none."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qbert.encoders.copied import CopiedParameters

MANY = 10_000  # tokens, so that every check looks


def held() -> tuple[nn.Module, CopiedParameters]:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 4, bias=False))
    return model, CopiedParameters({"first": model[0], "rest": model[1:]})


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    model[1].bias.add_(1)


def other_data(model: nn.Module) -> None:
    model[1].bias.data = model[1].bias.data + 1


def new_parameter(model: nn.Module) -> None:
    model[1].bias = nn.Parameter(model[1].bias.detach() + 1)


def taken_away(model: nn.Module) -> None:
    model[1].bias = None


def optimizer_step(model: nn.Module) -> None:
    model(torch.ones(1, 8)).sum().backward()
    torch.optim.SGD([model[1].bias], lr=1.0).step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, other_data, new_parameter, taken_away, optimizer_step, loaded])
def test_every_change_of_values_is_told_by_name(change: Callable[[nn.Module], None]) -> None:
    model, copied = held()
    copied.check(MANY)
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(rest\.1\.bias|first\.weight) was changed after qbert"):
            copied.check(MANY)


def test_a_move_is_no_change() -> None:
    model, copied = held()
    model.share_memory()
    copied.check(MANY)
    model[1].bias.data = model[1].bias.data.clone()
    copied.check(MANY)
    model.double()
    model.float()
    copied.check(MANY)
    model.to(torch.bfloat16)
    copied.check(MANY)
    in_place(model)
    with pytest.raises(RuntimeError, match="was changed"):
        copied.check(MANY)


def test_a_copy_watches_its_own_parameters() -> None:
    model, copied = held()
    memo: dict[int, object] = {}
    twin, copied_twin = copy.deepcopy((model, copied), memo)
    in_place(twin)
    copied.check(MANY)
    with pytest.raises(RuntimeError, match="was changed"):
        copied_twin.check(MANY)
    in_place(model)
    late = copy.deepcopy(copied, {id(m): m for m in model.modules()})
    with pytest.raises(RuntimeError, match="was changed"):
        late.check(MANY)


def test_parameters_made_in_inference_mode_have_no_counter_and_do_no_harm() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    copied = CopiedParameters({"": model})
    copied.check(MANY)
    model.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="bias was changed"):
        copied.check(MANY)


def test_short_calls_look_first_then_now_and_then_and_after_a_doubt() -> None:
    model, copied = held()
    with torch.no_grad():
        copied.check(16)
        in_place(model)
        for _ in range(31):
            copied.check(16)
        with pytest.raises(RuntimeError, match="was changed"):
            copied.check(16)
        copied.check(16)
        copied.doubt()
        for _ in range(2):  # and it stays in doubt
            with pytest.raises(RuntimeError, match="was changed"):
                copied.check(16)
    with pytest.raises(RuntimeError, match="was changed"):
        copied.check(16)
