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
from scipy import stats

Array = NDArray[np.float64]
_MOST_SWAPS = 12  # runs of which every exchange is looked at: 4096


def omega(runs: Array) -> Array:
    """|mean| + std (population) over the first axis."""
    return np.abs(runs.mean(axis=0)) + runs.std(axis=0)


def interval(runs: Array, level: float, draws: int, random: np.random.Generator) -> tuple[float, float]:
    """Bounds of |mean| + std of the distribution that the runs [R >= 2] come from, of probability `level` or more."""
    count, tail = len(runs), (1 - level) / 2
    center, spread = abs(float(runs.mean())), float(runs.std(ddof=1))
    reach = stats.t.ppf(1 - tail / 2, count - 1) * spread / np.sqrt(count)
    small, large = spread * np.sqrt((count - 1) / stats.chi2.ppf([1 - tail / 2, tail / 2], count - 1))
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
    normal = [np.abs(mean) + std for mean, std in (_possible(x, draws, random) for x in (first, second))]
    p = _two_sided(normal[0] - normal[1])
    if _one_sign(first) and _one_sign(second):
        logs = [_log_omega(*_possible(np.log(np.abs(x)), draws, random)) for x in (first, second)]
        return max(p, _two_sided(logs[0] - logs[1]))
    return max(p, _p_of_exchanges(first, second, draws, random))


def told_apart(p: Array, level: float) -> NDArray[np.bool_]:
    """Which of several differences count so that, with probability `level`, none of them is by chance (Holm 1979)."""
    order = np.argsort(p)
    clear = p[order] <= (1 - level) / np.arange(len(p), 0, -1)
    found = np.zeros(len(p), dtype=bool)
    found[order] = np.logical_and.accumulate(clear)
    return found


def _possible(runs: Array, draws: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Means and standard deviations [draws] of normal distributions that the runs [R] may come from."""
    count = len(runs)
    std = runs.std(ddof=1) * np.sqrt((count - 1) / random.chisquare(count - 1, draws))
    return runs.mean() - std * random.standard_normal(draws) / np.sqrt(count), std


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
