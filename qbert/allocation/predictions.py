r"""Six measures of how much each block suffers at each bit width, side by side with the truth.

It stands alone because it only calculates and prints; `sensitivity` measures what it is given.

With dW the change of the block's weights at b bits, g and H gradient and Hessian of the loss in those weights:

===============  ==============================================================  ==================================
metric           predicted damage                                                from
===============  ==============================================================  ==================================
``omega``        (|mean(lambda)| + std(lambda)) ||dW||^2                         Shen et al. 2020 (Q-BERT), 3.1
``eigenvalue``   |mean(lambda)| ||dW||^2                                         Dong et al. 2019 (HAWQ)
``trace``        |mean(diag H)| ||dW||^2                                         Dong et al. 2020 (HAWQ-V2)
``weight_error`` ||dW||^2                                                        (no second-order information)
``curvature``    dW^T H dW / 2                                                   the quadratic term itself
``kronecker``    tr(G dW C dW^T) / 2                                             Martens and Grosse 2015 (K-FAC)
``taylor``       g^T dW + dW^T H dW / 2                                          second-order Taylor expansion
``loss_change``  L(W + dW) - L(W), that block quantized                          measured
===============  ==============================================================  ==================================

    >>> report = Sensitivities.load("sensitivity.json"); print(report)
    >>> allocate_bits(report.using("trace"), bits=(2, 3, 4), size_mb=9, model=model)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from qbert.files import check_seal, json_array, read_saved, write_json

FORMAT = "qbert.sensitivity/1"
METRICS = ("omega", "eigenvalue", "trace", "weight_error", "curvature", "kronecker", "taylor", "loss_change")
TRUTH = "loss_change"
_BY_BLOCK = ("omega", "eigenvalue", "trace", "trace_error")
_ARRAYS = (*_BY_BLOCK, "weight_error", "curvature", "gradient", "loss_change")


class RankCorrelation(NamedTuple):
    """Agreement of two orderings, 1 = the same, -1 = reversed, nan where one is constant."""

    kendall: float
    spearman: float


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What was measured of L blocks at B bit widths.

    Attributes:
        names: [L] block names relative to the base model.
        members: block name -> names of its matrices.
        bits: [B] widths, ascending.
        omega: [L] |mean| + std of the top eigenvalue over data subsets.
        eigenvalue: [L] mean top eigenvalue, signed.
        trace: [L] mean of the Hessian's diagonal over the block's matrices, signed.
        trace_error: [L] standard error of `trace` over the random probes.
        weight_error: [L, B] ||dW||^2.
        curvature: [L, B] dW^T H dW.
        gradient: [L, B] g^T dW.
        loss_change: [L, B] loss with the block quantized minus the loss.
        loss: loss of the float model on the same data.
        metric: the prediction that `damage` and `sensitivity` give by default.
        settings: what was asked for.
        kronecker: [L, B] tr(G dW C dW^T) / 2; ``None`` where it was not measured: in files of older versions, and for
            losses that are not seen to come from logits.
    """

    names: list[str]
    members: dict[str, list[str]]
    bits: tuple[int, ...]
    omega: NDArray[np.float64]
    eigenvalue: NDArray[np.float64]
    trace: NDArray[np.float64]
    trace_error: NDArray[np.float64]
    weight_error: NDArray[np.float64]
    curvature: NDArray[np.float64]
    gradient: NDArray[np.float64]
    loss_change: NDArray[np.float64]
    loss: float
    metric: str = TRUTH
    settings: dict[str, Any] = field(default_factory=dict)
    kronecker: NDArray[np.float64] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured."""
        return tuple(m for m in METRICS if m != "kronecker" or self.kronecker is not None)

    def __post_init__(self) -> None:
        _check_metric(self.metric)

    def using(self, metric: str) -> Sensitivities:
        """The same measurements with another default prediction.

        Raises:
            ValueError: unknown metric.
        """
        return replace(self, metric=_check_metric(metric))

    def table(self, metric: str | None = None) -> NDArray[np.float64]:
        """[L, B] predicted damage (for ``loss_change``: the measured one), in units of the loss up to a constant.

        Raises:
            ValueError: unknown metric, or one that was not measured.
        """
        chosen = _check_metric(metric or self.metric)
        if chosen not in self.metrics:
            raise ValueError(f"metric: {chosen!r} was not measured; use one of {', '.join(self.metrics)}")
        if chosen == "omega":
            return self.omega[:, None] * self.weight_error
        if chosen == "eigenvalue":
            return np.abs(self.eigenvalue)[:, None] * self.weight_error
        if chosen == "trace":
            return np.abs(self.trace)[:, None] * self.weight_error
        if chosen == "curvature":
            return self.curvature / 2
        if chosen == "taylor":
            return self.gradient + self.curvature / 2
        return np.array(getattr(self, chosen))

    def damage(self, metric: str | None = None) -> dict[str, dict[int, float]]:
        """`table` as block name -> bits -> damage, 0 at 16 and 32 bits; what `allocate_bits` minimises the sum of."""
        rows = zip(self.names, self.table(metric).tolist(), strict=True)
        return {name: {**dict(zip(self.bits, row, strict=True)), 16: 0.0, 32: 0.0} for name, row in rows}

    @property
    def sensitivity(self) -> NDArray[np.float64]:
        """[L] what ranks the blocks: Omega itself for ``omega`` (the paper's rule), else damage at the fewest bits."""
        return self.omega if self.metric == "omega" else self.table()[:, 0]

    def ranking(self, metric: str | None = None) -> list[str]:
        """Block names, most sensitive first; equals stay in model order."""
        values = self.using(metric or self.metric).sensitivity
        return [self.names[i] for i in np.argsort(-values, kind="stable")]

    def rank_correlations(self) -> dict[str, dict[int, RankCorrelation]]:
        """metric -> bits -> agreement of the predicted with the measured order of the blocks."""
        found: dict[str, dict[int, RankCorrelation]] = {}
        for metric in self.metrics:
            if metric != TRUTH:
                table = self.table(metric)
                found[metric] = {b: _agreement(table[:, i], self.loss_change[:, i]) for i, b in enumerate(self.bits)}
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (aside first, then renamed)."""
        content: dict[str, Any] = {"format": FORMAT, "names": self.names, "members": self.members}
        content |= {"bits": list(self.bits), "loss": self.loss, "metric": self.metric, "settings": self.settings}
        if self.kronecker is not None:
            content["kronecker"] = json_array(self.kronecker)
        write_json(path, content | {name: json_array(getattr(self, name)) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivities:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not a whole report.
        """
        content = read_saved(path, FORMAT, "Sensitivities")
        try:
            names, bits = [str(n) for n in content["names"]], tuple(int(b) for b in content["bits"])
            present = [*_ARRAYS, *(["kronecker"] if "kronecker" in content else [])]
            arrays = {name: np.array(content[name], dtype=np.float64) for name in present}
            members = {n: [str(m) for m in content["members"][n]] for n in names}
            loss, metric, settings = float(content["loss"]), str(content["metric"]), dict(content["settings"])
            report = cls(names, members, bits, **arrays, loss=loss, metric=metric, settings=settings)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"path: {path} is a damaged sensitivity file ({error!r}); measure it again") from error
        for name, array in arrays.items():
            if array.shape != ((len(names),) if name in _BY_BLOCK else (len(names), len(bits))):
                raise ValueError(f"path: {path} is a damaged sensitivity file ({name} has another shape)")
        check_seal(path, content)
        return report

    def __str__(self) -> str:
        width = max(len(n) for n in [*self.names, "block"])
        lines = [f"loss {self.loss:.5f}; damage in units of the loss, omega, eigenvalue, trace up to a constant"]
        for i, b in enumerate(self.bits):
            lines.append(f"\n{b} bits\n{'block':<{width}}" + "".join(f"{m:>13}" for m in self.metrics))
            columns = [self.table(m)[:, i] for m in self.metrics]
            for name, *values in zip(self.names, *columns, strict=True):
                lines.append(f"{name:<{width}}" + "".join(f"{v:>13.4g}" for v in values))
        return "\n".join([*lines, "", correlation_table(self.rank_correlations())])


def correlation_table(found: Mapping[str, Mapping[int, RankCorrelation]]) -> str:
    """Rank correlations with the measured loss change as text, Kendall's tau / Spearman's rho."""
    bits = list(next(iter(found.values())))
    lines = [f"{'rank correlation with loss_change':<34}" + "".join(f"{f'{b} bits':>14}" for b in bits)]
    for metric, by_bits in found.items():
        cells = [f"{c.kendall:+.2f} / {c.spearman:+.2f}" for c in by_bits.values()]
        lines.append(f"{metric:<34}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _agreement(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> RankCorrelation:
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return RankCorrelation(float("nan"), float("nan"))
    return RankCorrelation(float(kendalltau(predicted, true).statistic), float(spearmanr(predicted, true).statistic))


def _check_metric(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is unknown; use one of {', '.join(METRICS)}")
    return metric
