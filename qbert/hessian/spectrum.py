"""Top Hessian eigenvalues of every block over several data subsets, and the sensitivity that follows from them.

Q-BERT (section 3.1): a layer is sensitive when its largest eigenvalues are large on average *or* spread widely over
subsets of the data, ``Omega_i = |mean(lambda_i)| + std(lambda_i)``.

    >>> spectrum = HessianSpectrum.load("spectrum.json")
    >>> spectrum.ranking()[0]  # the most sensitive layer
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbert.arguments import real_number, whole_number
from qbert.files import check_seal, json_array, read_saved, write_json
from qbert.hessian.intervals import interval, omega, p_of_neighbours, told_apart

FORMAT = "qbert.hessian_spectrum/1"
_ARRAYS = ("eigenvalues", "other_end", "residuals", "errors", "upper_bounds", "products", "converged", "losses")


@dataclass(frozen=True, eq=False)
class HessianSpectrum:
    """Eigenvalues of R runs (random data subsets) and L blocks.

    Attributes:
        names: [L] block names relative to the base model.
        members: block name -> names of the quantizable tensors in it.
        parameters: block name -> number of parameters.
        eigenvalues: [R, L] float64, signed eigenvalue of largest magnitude.
        other_end: [R, L] float64, extreme Ritz value at the opposite end of the spectrum (nan: not looked at).
        residuals: [R, L] float64, ||H v - lambda v|| / |lambda|.
        errors: [R, L] float64, bound on the relative error of `eigenvalues` that was held against the tolerance.
        upper_bounds: [R, L] float64; with 99 % probability no eigenvalue of the block is larger in magnitude.
        products: [R, L] int64, Hessian-vector products used; that of all blocks together, which every run of Lanczos
            starts from, is not among them.
        converged: [R, L] bool, error bound within tolerance.
        losses: [R] float64, mean loss of each subset.
        settings: what was asked for (runs, fraction, granularity, method, tol, seed, samples, ...).
    """

    names: list[str]
    members: dict[str, list[str]]
    parameters: dict[str, int]
    eigenvalues: NDArray[np.float64]
    other_end: NDArray[np.float64]
    residuals: NDArray[np.float64]
    errors: NDArray[np.float64]
    upper_bounds: NDArray[np.float64]
    products: NDArray[np.int64]
    converged: NDArray[np.bool_]
    losses: NDArray[np.float64]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[L] mean eigenvalue over runs."""
        return self.eigenvalues.mean(axis=0)

    @property
    def std(self) -> NDArray[np.float64]:
        """[L] standard deviation over runs (population, as in the paper's code: 0 for one run)."""
        return self.eigenvalues.std(axis=0)

    @property
    def sensitivity(self) -> NDArray[np.float64]:
        """[L] Omega = |mean| + std (Q-BERT, section 3.1)."""
        return omega(self.eigenvalues)

    def ranking(self) -> list[str]:
        """Block names, most sensitive first; equals stay in model order."""
        return [self.names[i] for i in np.argsort(-self.sensitivity, kind="stable")]

    def confidence_interval(
        self, level: float = 0.95, *, draws: int = 2000, seed: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intervals of the sensitivity over all subsets of the data, ([L] low, [L] high).

        They hold for few runs, normal or skewed: see `qbert.hessian.intervals` for what is assumed. The distribution's
        own |mean| + std lies in an interval with probability `level` or more.

        Args:
            level: probability.
            draws: draws of a lognormal's mean and standard deviation.
            seed: for the draws.

        Raises:
            ValueError: with fewer than two runs, which have no spread; a level outside of (0, 1).
        """
        _check_level(level)
        random, draws = np.random.default_rng(seed), whole_number("draws", draws, least=1)
        bounds = [interval(column, level, draws, random) for column in self._spread().T]
        low, high = np.array(bounds).T
        return low, high

    def indistinct(self, level: float = 0.95, *, draws: int = 20_000, seed: int = 0) -> list[tuple[str, str]]:
        """Neighbours in the ranking that the runs do not tell apart.

        With probability `level`, no pair of equal sensitivities is missing: the pairs are tested together (Holm), each
        as by `qbert.hessian.intervals.p_equal`, which says what is assumed.

        Args:
            level: probability.
            draws: draws of what the runs leave possible, or more: to tell L blocks apart, 4 L / (1 - level) are taken.
            seed: for the draws.

        Raises:
            ValueError: with fewer than two runs; a level outside of (0, 1).
        """
        _check_level(level)
        runs, draws = self._spread(), whole_number("draws", draws, least=1)
        order = np.argsort(-self.sensitivity, kind="stable")
        draws = max(draws, math.ceil(4 * len(order) / (1 - level)))
        p = p_of_neighbours(runs[:, order], draws, np.random.default_rng(seed), most=1 - level)
        pairs = itertools.pairwise(order)
        found = told_apart(p, level)
        return [(self.names[a], self.names[b]) for (a, b), apart in zip(pairs, found, strict=True) if not apart]

    def resampled(self, draws: int = 2000, *, seed: int = 0) -> NDArray[np.float64]:
        """Sensitivities [draws, L] of spectra whose runs are drawn from these ones, with replacement (bootstrap).

        Raises:
            ValueError: with fewer than two runs.
        """
        runs, draws = self._spread(), whole_number("draws", draws, least=1)
        picks = np.random.default_rng(seed).integers(len(runs), size=(draws, len(runs)))
        return omega(np.moveaxis(runs[picks], 1, 0))  # [draws, L]

    def _spread(self) -> NDArray[np.float64]:
        """The eigenvalues, of two runs or more."""
        runs = len(self.eigenvalues)
        if runs < 2:
            raise ValueError(f"spectrum: {runs} run has no spread to resample; measure with runs=2 or more")
        return self.eigenvalues

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (format tag inside), aside first and then renamed."""
        content: dict[str, Any] = {"format": FORMAT, "names": self.names, "members": self.members}
        content["parameters"] = self.parameters
        for name in _ARRAYS:
            content[name] = json_array(getattr(self, name))
        content["settings"] = self.settings
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HessianSpectrum:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not a whole spectrum of a known format.
        """
        content = read_saved(path, FORMAT, "HessianSpectrum")
        try:
            names = [str(name) for name in content["names"]]
            arrays: dict[str, Any] = {name: np.array(content[name], dtype=_dtype(name)) for name in _ARRAYS}
            spectrum = cls(
                names=names,
                members={name: list(content["members"][name]) for name in names},
                parameters={name: int(content["parameters"][name]) for name in names},
                settings=dict(content["settings"]),
                **arrays,
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"path: {path} is a damaged spectrum file ({error!r}); measure it again") from error
        shape = (spectrum.losses.size, len(names))
        if not (np.isfinite(spectrum.eigenvalues).all() and np.isfinite(spectrum.losses).all()):
            raise ValueError(f"path: {path} is a damaged spectrum file (not all numbers are finite); measure it again")
        fit = all(getattr(spectrum, name).shape == (shape[:1] if name == "losses" else shape) for name in _ARRAYS)
        if not fit or len(set(names)) < len(names):
            raise ValueError(f"path: {path} is a damaged spectrum file (arrays are not {shape}); measure it again")
        check_seal(path, content)
        return spectrum

    def plot(self, path: str | os.PathLike[str], *, title: str = "", notes: Mapping[str, str] | None = None) -> None:
        """Draw the spread of the eigenvalues per block into an image file (type by its suffix).

        Args:
            path: the file.
            title: what was measured, such as the model and the task.
            notes: block -> what stands below its name, such as the bits that it gets.
        """
        from qbert.plots import plot_spectrum

        plot_spectrum(self, path, title=title, notes=notes)

    def __str__(self) -> str:
        rank = {name: position for position, name in enumerate(self.ranking(), 1)}
        width = max(len(name) for name in [*self.names, "block"])
        lines = [f"{'block':<{width}}  {'mean':>11}  {'std':>10}  {'|mean|+std':>10}  {'rank':>4}"]
        columns = zip(self.names, self.mean, self.std, self.sensitivity, strict=True)
        for name, mean, std, value in columns:
            lines.append(f"{name:<{width}}  {mean:>11.4g}  {std:>10.4g}  {value:>10.4g}  {rank[name]:>4}")
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What a reader of the numbers should know, one sentence each."""
        runs, blocks = self.eigenvalues.shape
        notes = [
            f"{runs} run(s), {self.products.mean():.1f} Hessian products per eigenvalue, "
            f"mean loss {self.losses.mean():.4g}."
        ]
        negative = [name for name, column in zip(self.names, self.eigenvalues.T, strict=True) if (column < 0).any()]
        if negative:
            count = int((self.eigenvalues < 0).sum())
            notes.append(
                f"Warning: {count} of {runs * blocks} top eigenvalues are negative ({_listed(negative)}): the model is "
                "not at a minimum of this loss."
            )
        if not self.converged.all():
            missed = [name for name, column in zip(self.names, self.converged.T, strict=True) if not column.all()]
            count = int((~self.converged).sum())
            notes.append(
                f"Warning: {count} of {runs * blocks} eigenvalues did not reach the tolerance ({_listed(missed)}); "
                "raise max_products or tol."
            )
        if runs > 1 and (pairs := self.indistinct()):
            notes.append(
                f"{len(pairs)} of {blocks - 1} neighbours in the ranking are not told apart by {runs} runs at 95 %: "
                + _listed([f"{a} / {b}" for a, b in pairs])
                + "."
            )
        return notes


def _check_level(level: float) -> None:
    if not 0 < real_number("level", level) < 1:
        raise ValueError(f"level: {level} is not a probability; use a number between 0 and 1, such as 0.95")


def _dtype(name: str) -> type:
    return {"products": np.int64, "converged": np.bool_}.get(name, np.float64)


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
