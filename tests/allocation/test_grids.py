"""`choose_grid`: which grid is chosen, on which rows, and that what is chosen is an ordinary configuration."""

from typing import Any

import pytest
import torch
from encoders import build, inputs_for
from torch import nn

import qbert
from qbert.allocation.grids import GRIDS, choose_grid, divergence, halves


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [inputs_for("bert", batch=6, length=9 + i) for i in range(count)]


@pytest.mark.filterwarnings("ignore:calibration_data")
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_the_chosen_grid_has_the_least_divergence_on_rows_kept_apart(rounding: Any, tmp_path: Any) -> None:
    model, data = build("bert").eval(), batches()
    config = qbert.BitsConfig(2, groups=16, rounding=rounding)
    choice = choose_grid(model, config, data)
    assert list(choice.divergence) == [name for name in GRIDS if "inputs" not in name]  # 64 inputs do not fit 48
    assert choice.divergence[choice.grid] == min(choice.divergence.values())
    assert choice.grid in str(choice)
    assert choice.config == qbert.BitsConfig(2, groups=16, rounding=rounding, **GRIDS[choice.grid])
    fitted, kept = halves(data)
    student = qbert.quantize_model(model, choice.config, calibration_data=fitted).eval()
    with torch.no_grad():
        wanted, found = ([m(**b).logits.double() for b in kept] for m in (model, student))
    assert divergence(wanted, found, classes=True) == pytest.approx(choice.divergence[choice.grid], rel=1e-3)
    choice.config.save(tmp_path / "bits.json")
    assert qbert.BitsConfig.load(tmp_path / "bits.json") == choice.config


@pytest.mark.filterwarnings("ignore:calibration_data")
def test_a_grid_that_is_better_by_construction_is_chosen() -> None:
    # Weights of two values far from zero: with 2 bits only a grid whose levels may lie anywhere holds them exactly.
    model = build("bert").eval()
    for layer in model.bert.encoder.layer:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = 1.0 + 0.1 * torch.randint(0, 4, module.weight.shape).float()
    choice = choose_grid(model, qbert.BitsConfig(2, activation_bits=None, embedding_bits=32, groups=1), batches(1))
    assert choice.grid == "offset" and choice.divergence["offset"] < 1e-6


@pytest.mark.filterwarnings("ignore:calibration_data")
def test_a_matrix_that_another_grid_suits_by_construction_has_that_one() -> None:
    model = build("bert").eval()
    lonely = "encoder.layer.1.output.dense"
    for name, module in model.bert.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("encoder"):
            levels = torch.tensor([-1.5, -0.5, 0.5, 1.5] if name == lonely else [-1.0, 0.0, 1.0])
            module.weight.data = 0.1 * levels[torch.randint(len(levels), module.weight.shape)]
    config = qbert.BitsConfig(2, activation_bits=None, embedding_bits=32, groups=1)
    grids = {name: GRIDS[name] for name in ("symmetric", "midrise")}
    choice = choose_grid(model, config, batches(2), grids=grids, by_matrix=True)
    assert choice.grid == "symmetric" and choice.matrices == {lonely: "midrise"}
    assert choice.checked is not None and choice.checked[1] < 1e-2 * choice.checked[0]
    specs = qbert.BitsConfig.from_dict(choice.config.to_dict()).resolve(model)
    assert {n.removeprefix("bert.") for n, s in specs.items() if s.scheme == "midrise"} == {lonely}
    assert lonely in str(choice)


def test_a_pattern_keeps_the_scheme_that_it_names() -> None:
    model = build("bert").eval()
    config = qbert.BitsConfig({"*.query": {"bits": 4, "scheme": "midrise"}, "*": 4}, groups=16)
    choice = choose_grid(model, config, batches(1), grids={"offset": {"scheme": "offset"}})
    specs = choice.config.resolve(model)
    assert {s.scheme for n, s in specs.items() if n.endswith("query")} == {"midrise"}
    assert {s.scheme for n, s in specs.items() if n.endswith("key")} == {"offset"}


def test_halves_share_no_row_and_lose_none() -> None:
    data = [{"input_ids": torch.arange(start, start + count).view(-1, 1)} for start, count in ((0, 3), (3, 1), (4, 4))]
    parts = [torch.cat([b["input_ids"] for b in part]).flatten().tolist() for part in halves(data)]
    assert sorted(parts[0] + parts[1]) == list(range(8)) and abs(len(parts[0]) - len(parts[1])) <= 1


def test_what_cannot_be_chosen_from_is_refused() -> None:
    model = build("bert").eval()
    with pytest.raises(ValueError, match="one row cannot be halved"):
        choose_grid(model, 4, [inputs_for("bert", batch=1)])
    with pytest.raises(ValueError, match="calibration_data: choosing a grid needs rows"):
        choose_grid(model, 4, None)
    with pytest.raises(ValueError, match="grids: there is none"):
        choose_grid(model, 4, batches(1), grids={})
