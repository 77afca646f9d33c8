"""Ways to store a matrix that change the model's structure: two factors of a rank, or 2:4 zeros, in some bits each.

In a file of its own, since a `FilePlan` chooses among options without knowing what structures there are. They stand in
the same exact choice as bits: factors (Chen et al. 2021, DRONE) and zeros (Frantar and Alistarh 2023, SparseGPT) are
fitted to one half of the rows, and their damage is measured on the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from qbert.allocation.whole_file import FILE_DEFAULTS, Alternative, rounded_matrix
from qbert.bits import DEFAULT_GROUPS, SPEC_FIELDS, TensorSpec
from qbert.encoders.targets import Target
from qbert.layers.layout import has_exact_zero
from qbert.layers.quantizer import WeightQuantizer
from qbert.pipeline.steps import Factorize, Prune, Structure
from qbert.quantizers.groups import row_groups
from qbert.quantizers.rounding import bias_change
from qbert.quantizers.sparsity import Pattern, sparsify
from qbert.sizes import quantized_header_bytes, tensor_bytes
from qbert.students.curvature import Moments, Observed, layer_matrices, observed_inputs
from qbert.students.lowrank import Spectrum, paying_rank

SHARES = (0.375, 0.625)  # of the largest rank that takes fewer values than the matrix
FACTOR_BITS = (4, 8)
PATTERN: Final = "2:4"
SPARSE_BITS = (3, 4)  # at 2 bits no grid has a zero between its other codes; at 8 rather fewer bits for all weights
_WEIGHTING: Final = "activations"
_DAMPING = 0.01
_LONGER_NAMES = 32  # bytes of header that a bias and a range of activations take more, as part of a factor


def matrix_alternatives(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Mapping[str, Any],
    bits: Sequence[int],
    shares: Sequence[float] = SHARES,
) -> dict[str, list[Alternative]]:
    """Name of every matrix of the layers -> its pairs of factors, and itself with 2:4 zeros.

    Args:
        model: a float encoder.
        batches: rows that factors and zeros are fitted to, without labels.
        settings: defaults of the `BitsConfig`.
        bits: the widths that a plan chooses from.
        shares: ranks, as shares of the largest that takes fewer values than the matrix itself.
    """
    targets = layer_matrices(model)
    known = _known(settings)
    seen = observed_inputs(model, batches, [cast(nn.Linear, t.module) for t in targets])
    found: dict[str, list[Alternative]] = {}
    for target in targets:
        inputs = seen[cast(nn.Linear, target.module)]
        found[target.name] = [
            *_factors(target, Moments(inputs.second, None), known, shares),
            *_sparse(target, inputs, known, _sparse_widths(target, known, bits)),
        ]
    return found


def alternative_sizes(
    model: nn.Module, settings: Mapping[str, Any], bits: Sequence[int], shares: Sequence[float] = SHARES
) -> dict[str, list[int]]:
    """Bytes of all that `matrix_alternatives` gives, which shapes tell."""
    known = _known(settings)
    return {
        target.name: [
            *(_factor_bytes(target, r, spec) for r in _ranks(target, shares) for spec in _factor_specs(known)),
            *(_bytes(_zeros_of(target), _spec(known, width)) for width in _sparse_widths(target, known, bits)),
        ]
        for target in layer_matrices(model)
    }


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in {**FILE_DEFAULTS, **settings}.items() if name in SPEC_FIELDS}
    return known | {"groups": known.get("groups") or DEFAULT_GROUPS}


def _spec(known: Mapping[str, Any], bits: int, **rule: Any) -> TensorSpec:
    return TensorSpec(**{**known, "bits": bits, **rule})


def _factor_specs(known: Mapping[str, Any]) -> list[TensorSpec]:
    return [_spec(known, bits, rounding="nearest") for bits in FACTOR_BITS]


def _ranks(target: Target, shares: Sequence[float]) -> list[int]:
    most = paying_rank(*target.shape)
    return sorted({rank for share in shares if 0 < (rank := round(most * share / 8) * 8) <= most})


def _sparse_widths(target: Target, known: Mapping[str, Any], bits: Sequence[int]) -> list[int]:
    if target.shape[1] % 4 or not has_exact_zero(_spec(known, 4).scheme):
        return []
    return [width for width in bits if width in SPARSE_BITS]


def _zeros_of(target: Target) -> Target:
    """A target of the shape of another, with 2:4 zeros."""
    row = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(target.shape[1] // 4)
    return _like(target, row.repeat(target.shape[0], 1))


def _factor_bytes(target: Target, rank: int, spec: TensorSpec) -> int:
    shapes = {"down": (rank, target.shape[1]), "up": (target.shape[0], rank)}
    own = sum(_bytes(_like(target, torch.ones(shape), f".{part}"), spec) for part, shape in shapes.items())
    return own + _LONGER_NAMES


def steps_of(forms: Mapping[str, Mapping[str, Any]]) -> tuple[Structure, ...]:
    """The steps that put what `FilePlan.forms` says in the place of matrices: zeros first, since factors have names of
    their own."""
    ranks = {name: int(form["rank"]) for name, form in forms.items() if "rank" in form}
    sparse = tuple(name for name, form in forms.items() if "pattern" in form)
    steps: list[Structure] = [Prune(pattern=PATTERN, names=sparse)] if sparse else []
    return (*steps, Factorize(ranks, weighting=_WEIGHTING)) if ranks else tuple(steps)


@torch.no_grad()
def _factors(
    target: Target, moments: Moments, known: Mapping[str, Any], shares: Sequence[float]
) -> Iterator[Alternative]:
    matrix = target.matrix.detach()
    spectrum = Spectrum.of(matrix, moments, _DAMPING)
    for rank in _ranks(target, shares):
        factors = dict(zip(("down", "up"), spectrum.factors(rank), strict=True))
        for spec in _factor_specs(known):
            rounded = {part: _rounded(values.to(matrix), spec) for part, values in factors.items()}
            rule = {"bits": spec.bits, "rounding": spec.rounding}
            yield Alternative(
                {f"{target.name}.{part}": rule for part in factors},
                rounded["up"] @ rounded["down"] - matrix,
                _factor_bytes(target, rank, spec),
                {"rank": rank},
            )


@torch.no_grad()
def _sparse(target: Target, seen: Observed, known: Mapping[str, Any], widths: Sequence[int]) -> Iterator[Alternative]:
    if not widths:
        return
    matrix = target.matrix.detach()
    sparse = sparsify(matrix, seen.second, Pattern.parse(PATTERN))
    own = _like(target, sparse)
    for bits in widths:
        spec = _spec(known, bits)
        # The bias follows the codes, as in `quantize_model`, but not the zeros (`prune`).
        follows = spec.rounding == "compensated" and getattr(target.module, "bias", None) is not None
        rounded = rounded_matrix(own, spec, seen.covariance if follows else seen.second)
        bias = bias_change(sparse - rounded, seen.mean).float() if follows else None
        yield Alternative(
            {target.name: {"bits": bits}}, rounded - matrix, _bytes(own, spec), {"pattern": PATTERN}, bias
        )


def _rounded(values: Tensor, spec: TensorSpec) -> Tensor:
    assert spec.groups is not None
    quantizer = WeightQuantizer(row_groups(len(values), min(spec.groups, len(values))), 1, spec).to(values.device)
    quantizer.find(values)
    return quantizer(values)  # type: ignore[no-any-return]


def _like(target: Target, values: Tensor, part: str = "") -> Target:
    """A target of these values [O, I] in the place of another, or as a part of it."""
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values, requires_grad=False)
    return Target(target.name + part, target.path + part, linear, "linear", target.layer, None)


def _bytes(target: Target, spec: TensorSpec) -> int:
    """Bytes in the file of one matrix."""
    return sum(tensor_bytes(target, spec)) + quantized_header_bytes(target, spec)
