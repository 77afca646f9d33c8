r"""What a few runs tell of a sensitivity: intervals of |mean| + std, and which blocks they do not tell apart.

It stands alone because it knows nothing of Hessians: runs [R] or [R, L] are independent draws, and what is claimed of
them is simulated in its tests. Two families stand for how they may be distributed:

- normal: exact intervals of mean (Student) and standard deviation (chi-squared), each with half of the error
  probability, so that together they hold whatever the two are;
- lognormal, where all runs have one sign: generalized confidence intervals, which draw the mean and the standard
  deviation of the logarithms from what the runs leave possible (Weerahandi 1993; Krishnamoorthy and Mathew 2003).

An interval covers those of both families, and a difference counts only where it is clear under both: what is less
skewed than a lognormal distribution (exponential, gamma) is then covered too. Skewed runs of both signs are covered
less often (91 % in place of 95 %). Few skewed runs say little: intervals of three runs can reach up by powers of ten.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, stdtrit  # inverse distributions: of chi-squared from above, of Student's t

Array = NDArray[np.float64]
_FEW_DRAWS = 1000  # that tell whether more are worth it
_MOST_SWAPS = 12  # runs of which every exchange is looked at: 4096


def omega(runs: Array) -> Array:
    """|mean| + std (population) over the first axis."""
    return np.abs(runs.mean(axis=0)) + runs.std(axis=0)


def interval(runs: Array, level: float, draws: int, random: np.random.Generator) -> tuple[float, float]:
    """Bounds of |mean| + std of the distribution that the runs [R >= 2] come from, of probability `level` or more."""
    count, tail = len(runs), (1 - level) / 2
    center, spread = abs(float(runs.mean())), float(runs.std(ddof=1))
    reach = stdtrit(count - 1, 1 - tail / 2) * spread / np.sqrt(count)
    small, large = spread * np.sqrt((count - 1) / chdtri(count - 1, [tail / 2, 1 - tail / 2]))
    low, high = max(center - reach, 0.0) + small, center + reach + large
    if _one_sign(runs):
        possible = _log_omega(*_possible(np.log(np.abs(runs)), draws, random))
        with np.errstate(over="ignore"):
            below, above = np.exp(np.quantile(possible, [tail, 1 - tail]))
        low, high = min(low, below), max(high, above)
    return float(low), float(high)


def p_equal(first: Array, second: Array, draws: int, random: np.random.Generator) -> float:
    """Probability of a difference as clear as that of two columns of runs [R >= 2] whose |mean| + std are equal.

    The larger one of two tests: under normality, with the columns drawn independently of each other (which holds for
    columns that rise and fall together, as blocks do over subsets of the data); and under lognormality, or, where not
    all runs of a column have one sign, by exchanging the columns within runs, which assumes no distribution but needs
    six runs to reach 5 %.
    """
    return float(p_of_neighbours(np.column_stack([first, second]), draws, random)[0])


def p_of_neighbours(runs: Array, draws: int, random: np.random.Generator, most: float = 1.0) -> Array:
    """`p_equal` of every two neighbouring columns of runs [R >= 2, L], [L - 1].

    What is drawn is drawn once for the columns of even and once for those of odd index: neighbours are independent.

    Args:
        most: of no interest above; pairs that a few draws place at twice as much are left at that.
    """
    pivots = [_pivots(len(runs), draws, random) for _ in range(2)]

    def omegas(column: int, some: int) -> tuple[Array, Array | None]:
        """|mean| + std under normality, and the logarithm of mean + std under lognormality if there is one sign."""
        x, (scale, shift) = runs[:, column], pivots[column % 2]
        mean, std = _located(x, scale[:some], shift[:some])
        logs = _log_omega(*_located(np.log(np.abs(x)), scale[:some], shift[:some])) if _one_sign(x) else None
        return np.abs(mean) + std, logs

    def p_of(columns: Array, some: int) -> Array:
        """p of the pairs that begin with `columns`, from the first `some` draws."""
        found = np.empty(len(columns))
        last: tuple[int, tuple[Array, Array | None]] | None = None  # a column is the second of one pair, then the first
        for index, column in enumerate(columns):
            one = last[1] if last is not None and last[0] == column else omegas(column, some)
            other = omegas(column + 1, some)
            last = column + 1, other
            if one[1] is not None and other[1] is not None:
                p = _two_sided(one[1] - other[1])
            else:
                p = _p_of_exchanges(runs[:, column], runs[:, column + 1], some, random)
            found[index] = max(p, _two_sided(one[0] - other[0]))
        return found

    pairs = np.arange(runs.shape[1] - 1)
    p = p_of(pairs, min(_FEW_DRAWS, draws)) if most < 1 else np.zeros(len(pairs))
    close = p <= 2 * most
    p[close] = p_of(pairs[close], draws)
    return p


def told_apart(p: Array, level: float) -> NDArray[np.bool_]:
    """Which of several differences count so that, with probability `level`, none of them is by chance (Holm 1979)."""
    order = np.argsort(p)
    clear = p[order] <= (1 - level) / np.arange(len(p), 0, -1)
    found = np.zeros(len(p), dtype=bool)
    found[order] = np.logical_and.accumulate(clear)
    return found


def _possible(runs: Array, draws: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Means and standard deviations [draws] of normal distributions that the runs [R] may come from."""
    return _located(runs, *_pivots(len(runs), draws, random))


def _pivots(count: int, draws: int, random: np.random.Generator) -> tuple[Array, Array]:
    """What the standard deviation of `count` runs is off by, as a factor, and their mean in units of it, [draws]."""
    scale = np.sqrt((count - 1) / random.chisquare(count - 1, draws))
    return scale, random.standard_normal(draws) / np.sqrt(count)


def _located(runs: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    std = runs.std(ddof=1) * scale
    return runs.mean() - std * shift, std


def _log_omega(mean: Array, std: Array) -> Array:
    """Logarithm of mean + std of a lognormal distribution, of the mean and std of its logarithm."""
    variance = std**2
    relative = np.log1p(np.sqrt(np.expm1(np.minimum(variance, 600.0)))) + np.maximum(variance - 600.0, 0.0) / 2
    return mean + variance / 2 + relative


def _one_sign(runs: Array) -> bool:
    return bool((runs > 0).all() or (runs < 0).all())


def _two_sided(differences: Array) -> float:
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(differences) + 1))


def _p_of_exchanges(first: Array, second: Array, draws: int, random: np.random.Generator) -> float:
    """Share of the exchanges of two columns within runs that leave a difference at least as large."""
    count = len(first)
    if count <= _MOST_SWAPS:
        swapped = np.array(list(itertools.product([False, True], repeat=count)))
    else:
        swapped = random.random((draws, count)) < 0.5
        swapped[0] = False
    one, other = (np.where(swapped, a, b).T for a, b in ((second, first), (first, second)))
    differences = np.abs(omega(one) - omega(other))
    return float((differences >= differences[0] * (1 - 1e-12)).mean())
