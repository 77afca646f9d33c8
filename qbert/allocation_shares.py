"""How sure a bit allocation is of itself: what it would be with other runs.

The runs of a spectrum are random subsets of the data. Drawing as many of them again, with replacement, gives spectra
that might have been measured as well (bootstrap; Efron and Tibshirani 1993, chapter 6); how often their allocations
agree tells what the data decide and what they leave open.

    >>> print(bit_shares(spectrum, bits=(2, 4)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbert.allocation import Problem
from qbert.arguments import whole_number
from qbert.hessian.spectrum import HessianSpectrum

_BOUNDS = ("size_mb", "average_bits", "bit_operations", "max_latency")
_PROBLEM = ("latency", "model", "damage", "share", "fixed", "tied", "embedding_bits")


@dataclass(frozen=True)
class BitShares:
    """How often every block gets every width.

    Attributes:
        names: [L] blocks that are not fixed, bottom first.
        widths: [W] bit widths, ascending.
        chosen: [L] what `allocate_bits` gives for the measured runs.
        shares: [L, W] share of the draws in which the block gets the width.
        same: share of the draws in which all blocks get their chosen width.
    """

    names: list[str]
    widths: tuple[int, ...]
    chosen: list[int]
    shares: NDArray[np.float64]
    same: float

    def __str__(self) -> str:
        width = max(map(len, [*self.names, "block"]))
        header = f"{'block':<{width}}  chosen  " + "  ".join(f"{w:>2} bits" for w in self.widths)
        rows = [
            f"{name:<{width}}  {bits:>6}  " + "  ".join(f"{100 * share:>5.0f} %" for share in shares)
            for name, bits, shares in zip(self.names, self.chosen, self.shares, strict=True)
        ]
        return "\n".join([header, *rows, f"All as chosen in {100 * self.same:.0f} % of the draws."])


def bit_shares(
    spectrum: HessianSpectrum, bits: Sequence[int] = (2, 3), *, draws: int = 200, seed: int = 0, **arguments: Any
) -> BitShares:
    """Allocate bits for `draws` resampled spectra.

    Args:
        spectrum: at least two runs.
        bits, **arguments: as for `qbert.allocate_bits`, budgets and `BitsConfig` settings included; not `damage`, which
            takes the place of the sensitivities.
        draws: number of resampled spectra.
        seed: for the draws.

    Raises:
        ValueError, TypeError: as `allocate_bits`; fewer than two runs or one draw; `damage`; a spectrum without runs.
    """
    if not isinstance(spectrum, HessianSpectrum):
        raise TypeError(f"spectrum: expected a HessianSpectrum with its runs, got {type(spectrum).__name__}")
    draws = whole_number("draws", draws, least=1)
    if arguments.get("damage") is not None:
        raise ValueError("damage: it does not depend on the runs, so that there is nothing to resample; leave it out")
    bounds = {name: arguments.pop(name, None) for name in _BOUNDS}
    given = {name: arguments.pop(name) for name in _PROBLEM if name in arguments}
    problem = Problem(spectrum, bits, bounds=bounds, settings=arguments, **given)
    picked = problem.solve(spectrum)
    problem.config(picked)  # which refuses settings that there are not, or that do not fit
    chosen = problem.chosen(picked)
    found = np.zeros((len(chosen), len(problem.widths)))
    same = 0
    for sensitivity in spectrum.resampled(draws, seed=seed):
        drawn = problem.chosen(problem.solve(_Resampled(spectrum, sensitivity)))
        same += drawn == chosen
        for row, name in enumerate(chosen):
            found[row, problem.widths.index(drawn[name])] += 1
    order = [name for name in spectrum.names if name in chosen]
    rows = [list(chosen).index(name) for name in order]
    return BitShares(order, problem.widths, [chosen[n] for n in order], found[rows] / draws, same / draws)


class _Resampled:
    """The blocks of a spectrum with other sensitivities."""

    def __init__(self, spectrum: HessianSpectrum, sensitivity: NDArray[np.float64]):
        self.names, self.members, self.sensitivity = spectrum.names, spectrum.members, sensitivity
