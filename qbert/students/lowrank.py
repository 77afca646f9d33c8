r"""Students whose matrices are products of two thinner ones, and corrections of low rank beside few bits.

A matrix W [O, I] of rank r takes r (O + I) values instead of O I. Which rank-r matrix is best depends on what an error
costs:

============  ============================================================  ====================================
weighting     least                                                         source
============  ============================================================  ====================================
none          :math:`\|W - W_r\|^2`                                         singular value decomposition
activations   :math:`E\|(W - W_r) x\|^2`, the SVD of :math:`W C^{1/2}`      Chen et al. 2021, DRONE, section 3
both          :math:`\mathrm{tr}\,G (W - W_r) C (W - W_r)^T`, the SVD of    the same under Martens and Grosse 2015
              :math:`G^{1/2} W C^{1/2}`                                     (K-FAC): second order in the loss
============  ============================================================  ====================================

    >>> student = qbert.factorize(model, 0.5, data=batches)                # half of the values of all matrices
    >>> student = quantize_with_correction(model, 2, rank=16, data=batches)

Bits are the better use of the same bytes on these matrices; ranks pay as a correction, and where fewer products count.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, TensorSpec, covers, spec_to_dict
from qbert.calibration import Batch, check_batches, mean_logits, run_batch
from qbert.encoders.factors import CorrectedLinear, corrected, factored, is_factored
from qbert.encoders.inputs import to_device
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.structure import record
from qbert.encoders.targets import Target, find_targets
from qbert.encoders.zeros import note_zeros, noted_zeros
from qbert.quantize import quantize_model
from qbert.quantizers.rounding import bias_change
from qbert.students.curvature import Moments, has_head, layer_matrices, observe, roots, second_moments

Model = TypeVar("Model", bound=nn.Module)
Weighting = Literal["none", "activations", "both"]
WEIGHTINGS = ("none", "activations", "both")


def factorize(
    model: Model,
    rank: int | float | Mapping[str, int],
    *,
    weighting: Weighting | None = None,
    data: Any = None,
    damping: float = 0.01,
) -> Model:
    """A copy of `model` with matrices of its layers in two factors, started from the best of that rank.

    Args:
        model: a float encoder; it is left alone.
        rank: one for all matrices of the layers; or, by name pattern (as in `BitsConfig`), that of each, others stay
            whole; or, as a number between 0 and 1, the share of the matrices' values to keep: ranks are then chosen so
            that the sum of the errors (by `weighting`) is least, and matrices for which no rank pays stay whole.
        weighting: see above; where None, ``both`` for a model with a task head whose loss is known (a warning says
            where it is not), ``activations`` for others, ``none`` without `data`.
        data: batches (a few hundred unlabelled rows), for all but ``none``.
        damping: share of a moment's mean diagonal that is added to its diagonal.

    Returns:
        A model of the same class, in evaluation mode, whose config tells its factors: it is trained, quantized, packed,
        saved and loaded as every other one. ``{"*.up": 8, "*.down": 8}`` gives the factors bits of their own.

    Raises:
        ValueError: a rank that takes more values than the matrix itself, a pattern that matches none, missing data, or
            an impossible argument; before anything is computed.
    """
    ranks = check_rank(model, rank)
    targets = [t for t in layer_matrices(model) if not _inside_factors(model, t)]
    chosen = [t for t in targets if ranks is None or t.name in ranks]
    weighting, moments = _moments(model, chosen, weighting, data)
    spectra = {t.name: Spectrum.of(t.matrix.detach(), moments.get(t.module), damping) for t in chosen}
    if ranks is None:
        ranks = ranks_within(spectra, float(rank), relative=weighting != "both")  # type: ignore[arg-type]
    student = copy.deepcopy(model)
    for target in chosen:
        if target.name in ranks:
            linear = cast(nn.Linear, student.get_submodule(target.path))
            down, up = spectra[target.name].factors(ranks[target.name])
            replace_everywhere(student, linear, factored(linear, ranks[target.name], down, up))
    if ranks:
        record(student, "factors", ranks=dict(ranks))
        note_zeros(student, {name: zeros for name, zeros in noted_zeros(student).items() if name not in ranks})
    return student.eval()


def quantize_with_correction(
    model: Model,
    bits_config: int | Mapping[str, Any] | BitsConfig,
    rank: int | float | Mapping[str, int],
    *,
    weighting: Weighting | None = None,
    data: Any = None,
    factor_bits: int = 8,
    damping: float = 0.01,
) -> Model:
    """`quantize_model` with a low-rank correction of the rounding error beside every matrix.

    y = Q(W) x + B A x, where B A is the best of its rank for W - Q(W), by `weighting`, and has bits of its own.

    Args:
        model: a float encoder; it is left alone.
        bits_config: as for `quantize_model`, for the matrices themselves. Compensated rounding is calibrated on `data`.
        rank: as for `factorize`; a number between 0 and 1 is the share of the matrices' number of values that all
            corrections together may have.
        weighting, data, damping: as for `factorize`.
        factor_bits: bits of the correction, 2, 3, 4 or 8, or 32 for float.

    Returns:
        A trainable model, as of `quantize_model`; `qbert.pack` it.

    Raises:
        ValueError: as `factorize` and `quantize_model`.
    """
    config = BitsConfig.parse(bits_config)
    specs = config.resolve(model)
    data = check_batches(data, "data")  # what can be read only once is read here
    targets = [t for t in layer_matrices(model) if t.path in specs]
    ranks = None if _is_share(rank) else _asked(rank, targets)  # type: ignore[arg-type]
    compensated = any(spec.rounding == "compensated" for spec in specs.values())
    calibration = data if compensated else None
    chosen = [t for t in targets if ranks is None or t.name in ranks]
    weighting, moments = _moments(model, chosen, weighting, data)
    if ranks is None:
        rounded = quantize_model(model, config, calibration_data=calibration)
        errors = {
            t.name: Spectrum.of(_error(t, rounded.get_submodule(t.path)), moments.get(t.module), damping)
            for t in targets
        }
        ranks = ranks_within(errors, float(rank), relative=weighting != "both", start_empty=True)  # type: ignore[arg-type]
    student = copy.deepcopy(model)
    for target in targets:
        if target.name in ranks:
            linear = student.get_submodule(target.path)
            replace_everywhere(student, linear, corrected(linear, ranks[target.name]))
    record(student, "factors", ranks={}, corrections=dict(ranks))
    note_zeros(student, {f"{n}.whole" if n in ranks else n: zeros for n, zeros in noted_zeros(student).items()})
    quantize_model(
        student, _with_factor_bits(config, specs, model, ranks, factor_bits), calibration_data=calibration, inplace=True
    )
    for target in targets:
        if target.name in ranks:
            layer = cast(CorrectedLinear, student.get_submodule(target.path))
            error = _error(target, layer.whole)
            down, up = Spectrum.of(error, moments.get(target.module), damping).factors(ranks[target.name])
            for part, values in ((layer.down, down), (layer.up, up)):
                part.weight = nn.Parameter(values.to(part.weight.dtype))  # its grid is found anew
    if compensated and data is not None:
        _move_biases(model, student, [t for t in targets if t.name in ranks], data)
    return student.eval()


@torch.no_grad()
def _move_biases(model: nn.Module, student: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]) -> None:
    """Biases for outputs of the float model's means: compensated rounding has moved them for the error uncorrected."""
    modules = [cast(nn.Linear, t.module) for t in targets]
    seen = observe(model, modules, lambda: (run_batch(model, to_device(b, model)) for b in batches), batches)
    for target, module in zip(targets, modules, strict=True):
        layer = cast(CorrectedLinear, student.get_submodule(target.path))
        if module.bias is not None:
            left = target.matrix.detach() - layer.weight
            cast(nn.Parameter, layer.whole.bias).copy_(module.bias.double() + bias_change(left, seen[module].mean))
    wanted, found = mean_logits(model, batches), mean_logits(student, batches)
    if wanted is not None and found is not None:
        bias = cast(nn.Parameter, student.get_submodule(found[0]).bias)
        bias.add_((wanted[1] - found[1]).to(bias))


class Spectrum:
    """A matrix [O, I] cut into terms of rank one, largest first, in the metric of its moments.

    Attributes:
        values: [min(O, I)] float64, singular values of the weighted matrix: leaving out term i costs its square.
        shape: [O, I].
    """

    def __init__(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        self._left, self.values, self._right = left, values, right
        self.shape = (len(left), right.shape[1])

    @classmethod
    def of(cls, matrix: Tensor, moments: Moments | None, damping: float) -> Spectrum:
        """The terms of `matrix`; without moments those of its plain SVD."""
        wide = matrix.double()
        if moments is None:
            return cls(*torch.linalg.svd(wide, full_matrices=False))
        root, inverse = roots(moments.inputs.to(wide.device), damping)
        weighted, back = wide @ root, None
        if moments.gradients is not None:
            left_root, back = roots(moments.gradients.to(wide.device), damping)
            weighted = left_root @ weighted
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        return cls(left if back is None else back @ left, values, right @ inverse)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down [r, I], up [O, r]) of the first `rank` terms, alike in size."""
        share = self.values[:rank].sqrt()
        return share.unsqueeze(1) * self._right[:rank], self._left[:, :rank] * share


def paying_rank(rows: int, columns: int) -> int:
    """The largest rank whose factors take fewer values than the matrix [rows, columns] itself."""
    return (rows * columns - 1) // (rows + columns)


def ranks_within(
    spectra: Mapping[str, Spectrum], share: float, *, relative: bool = False, start_empty: bool = False
) -> dict[str, int]:
    """Ranks of least total error whose factors take at most `share` of the values of all matrices.

    Term by term, the one that saves the most for each value it takes comes next; since later terms of a matrix save
    less, no other choice of that size saves more. Matrices that reach the rank that no longer pays are kept whole.

    Args:
        spectra: name -> terms of a matrix.
        share: between 0 and 1.
        relative: count errors as shares of each matrix's own sum, for weightings that do not speak of the loss.
        start_empty: matrices may have no term at all (corrections), and are never whole.

    Returns:
        Name -> rank, of the matrices that are not whole (of those with a term, if `start_empty`).

    Raises:
        ValueError: if `share` leaves no rank of 1 for every matrix.
    """
    budget = share * sum(o * i for o, i in (s.shape for s in spectra.values()))
    found = dict.fromkeys(spectra, 0 if start_empty else 1)
    left = budget - sum(rank * sum(spectra[name].shape) for name, rank in found.items())
    if left < 0:
        raise ValueError(f"rank={share}: so small a share has no room for one term of each of {len(spectra)} matrices")
    gains = []
    for name, spectrum in spectra.items():
        squares = spectrum.values.square()
        total = float(squares.sum()) if relative else 1.0
        limit = min(paying_rank(*spectrum.shape), len(squares))
        price = sum(spectrum.shape)
        for term in range(found[name], limit):
            gains.append((float(squares[term]) / max(total, 1e-300) / price, -term, name))
    whole: set[str] = set()
    for _, term, name in sorted(gains, reverse=True):
        price = sum(spectra[name].shape)
        if price > left or found[name] != -term:
            continue
        found[name] += 1
        left -= price
        rows, columns = spectra[name].shape
        if found[name] == paying_rank(rows, columns) and not start_empty:
            rest = rows * columns - found[name] * price
            if rest <= left:
                whole.add(name)
                left -= rest
    return {name: rank for name, rank in found.items() if name not in whole and rank > 0}


def check_rank(model: nn.Module, rank: int | float | Mapping[str, int]) -> dict[str, int] | None:
    """Name -> rank of every matrix that `rank` names; None for a share. Raises ValueError as `factorize` for ranks."""
    targets = [t for t in layer_matrices(model) if not _inside_factors(model, t)]
    return None if _is_share(rank) else _asked(rank, targets)  # type: ignore[arg-type]


def _is_share(rank: Any) -> bool:
    return isinstance(rank, float) and 0 < rank < 1


def _asked(rank: int | Mapping[str, int], targets: Sequence[Target]) -> dict[str, int]:
    """Name -> rank of every matrix that `rank` names."""
    if not isinstance(rank, Mapping):
        rank = {"*": rank}
    found: dict[str, int] = {}
    for pattern, value in sorted(rank.items(), key=lambda item: (item[0] != "*", len(item[0]))):
        members = [t for t in targets if pattern == "*" or covers(pattern, t.names)]
        if not members:
            names = ", ".join(t.name for t in targets[:3])
            raise ValueError(f"rank: the pattern {pattern!r} matches no matrix of the layers; they are {names}, ...")
        for target in members:
            most = paying_rank(*target.shape)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"rank={value!r} of {target.name} is not possible; use a whole number from 1 to {most}"
                )
            if value > most:
                rows, columns = target.shape
                raise ValueError(
                    f"rank={value} of {target.name} takes {value * (rows + columns):,} values, the matrix "
                    f"[{rows}, {columns}] itself {rows * columns:,}; ranks up to {most} pay"
                )
            found[target.name] = value
    return found


def _moments(
    model: nn.Module, targets: Sequence[Target], weighting: Weighting | None, data: Any
) -> tuple[Weighting, dict[nn.Module, Moments]]:
    """(weighting, also where none is asked for; moments of the matrices of `targets`)."""
    if weighting not in (None, *WEIGHTINGS):
        raise ValueError(f"weighting={weighting!r} is not known; use one of {', '.join(WEIGHTINGS)}")
    if weighting == "none" or (weighting is None and data is None):
        return "none", {}
    if data is None:
        raise ValueError(f"weighting={weighting!r} needs data; give batches of a few hundred unlabelled rows")
    gradients = weighting == "both" if weighting is not None else None if has_head(model) else False
    found = second_moments(model, data, [cast(nn.Linear, t.module) for t in targets], gradients=gradients)
    both = any(of.gradients is not None for of in found.values())
    return "both" if both else "activations", dict(found.items())


def _inside_factors(model: nn.Module, target: Target) -> bool:
    return is_factored(model.get_submodule(target.path.rpartition(".")[0]))


def _error(target: Target, rounded: Any) -> Tensor:
    return target.matrix.detach() - rounded.quantized_weight()


def _with_factor_bits(
    config: BitsConfig, specs: Mapping[str, TensorSpec], model: nn.Module, ranks: Mapping[str, int], bits: int
) -> BitsConfig:
    """The specifications `specs` by path of a whole model, for one with corrections, whose factors have `bits`."""
    rules: dict[str, Any] = {}
    for target in find_targets(model):
        if target.path in specs:
            spec = specs[target.path]
            rules[f"{target.name}.whole" if target.name in ranks else target.name] = spec_to_dict(spec)
            for part in ("down", "up") if target.name in ranks else ():
                factor = TensorSpec(bits, activation_bits=spec.activation_bits, activation_range="asymmetric")
                rules[f"{target.name}.{part}"] = spec_to_dict(factor)
    return BitsConfig(rules, embedding_bits=config.embedding_bits)
