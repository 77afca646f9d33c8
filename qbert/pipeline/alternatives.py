"""Ways to store a matrix that change the model's structure: two factors of a rank, in some bits each.

In a file of its own, since a `FilePlan` chooses among options without knowing what structures there are. Ranks stand in
the same exact choice as bits: their factors are fitted to one half of the rows (Chen et al. 2021, DRONE), and their
damage is measured on the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from qbert.allocation.whole_file import FILE_DEFAULTS, Alternative
from qbert.bits import DEFAULT_GROUPS, SPEC_FIELDS, TensorSpec
from qbert.encoders.targets import Target
from qbert.layers.quantizer import WeightQuantizer
from qbert.quantizers.groups import row_groups
from qbert.sizes import quantized_header_bytes, tensor_bytes
from qbert.students.curvature import Moments, layer_matrices, second_moments
from qbert.students.lowrank import Spectrum, paying_rank

SHARES = (0.375, 0.625)  # of the largest rank that takes fewer values than the matrix
FACTOR_BITS = (4, 8)
WEIGHTING: Final = "activations"
_DAMPING = 0.01
_LONGER_NAMES = 32  # bytes of header that a bias and a range of activations take more, as part of a factor


def rank_alternatives(
    model: nn.Module, batches: Sequence[Any], settings: Mapping[str, Any], shares: Sequence[float] = SHARES
) -> dict[str, list[Alternative]]:
    """Name of every matrix of the layers -> its pairs of factors.

    Args:
        model: a float encoder.
        batches: rows that the factors are fitted to, without labels.
        settings: defaults of the `BitsConfig`.
        shares: ranks, as shares of the largest that takes fewer values than the matrix itself.
    """
    targets = layer_matrices(model)
    moments = second_moments(model, batches, [cast(nn.Linear, t.module) for t in targets], gradients=False)
    return {
        target.name: list(_of(target, moments[cast(nn.Linear, target.module)], settings, shares)) for target in targets
    }


@torch.no_grad()
def _of(
    target: Target, moments: Moments, settings: Mapping[str, Any], shares: Sequence[float]
) -> Iterator[Alternative]:
    matrix = target.matrix.detach()
    spectrum = Spectrum.of(matrix, moments, _DAMPING)
    most = paying_rank(*target.shape)
    ranks = sorted({rank for share in shares if 0 < (rank := round(most * share / 8) * 8) <= most})
    known = {name: value for name, value in {**FILE_DEFAULTS, **settings}.items() if name in SPEC_FIELDS}
    for rank in ranks:
        factors = dict(zip(("down", "up"), spectrum.factors(rank), strict=True))
        for bits in FACTOR_BITS:
            rule = {"bits": bits, "rounding": "nearest"}
            spec = TensorSpec(**{**known, **rule, "groups": known.get("groups") or DEFAULT_GROUPS})
            rounded = {part: _rounded(values.to(matrix), spec) for part, values in factors.items()}
            size = sum(_bytes(target, part, values, spec) for part, values in factors.items())
            yield Alternative(
                {f"{target.name}.{part}": rule for part in factors},
                rounded["up"] @ rounded["down"] - matrix,
                size + _LONGER_NAMES,
                rank,
            )


def _rounded(values: Tensor, spec: TensorSpec) -> Tensor:
    assert spec.groups is not None
    quantizer = WeightQuantizer(row_groups(len(values), min(spec.groups, len(values))), 1, spec).to(values.device)
    quantizer.find(values)
    return quantizer(values)  # type: ignore[no-any-return]


def _bytes(target: Target, part: str, values: Tensor, spec: TensorSpec) -> int:
    """Bytes in the file of one factor."""
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False)
    factor = Target(f"{target.name}.{part}", f"{target.path}.{part}", linear, "linear", target.layer, None)
    return sum(tensor_bytes(factor, spec)) + quantized_header_bytes(factor, spec)
