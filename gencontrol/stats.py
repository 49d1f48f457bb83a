"""Intervals that cover what they say, and paired tests.  What is printed, at 95 %:

shares by `rate` (Clopper–Pearson), differences of paired shares by `pair` (Bonett–Price, with McNemar's exact test),
means over episodes or prompts by `average` (hull of t and bootstraps), means over seeds by `student_t`, set rewards by
`compare_sets`.  tests/test_coverage.py works out what they cover; docs/guarantees.md#coverage lists it.  `wilson` and
`newcombe` are the published score intervals, for comparison with other tools.

Two models are compared on the same seeds or prompts: only the discordant pairs (one succeeded, the other did not) carry
information about the difference of their rates.  scipy is imported where it is used, for it takes a second to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.rng import stream_seed

#: draws of a bootstrap; the Monte-Carlo error of a 2.5 % percentile is then about 0.02 standard deviations
DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN bounds where the interval does not exist."""

    value: float
    low: float
    high: float


class Interval(NamedTuple):
    """Bounds of a 95 % interval."""

    low: float
    high: float


@cache
def _t(share: float, degrees: int) -> float:
    """Quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(share, degrees))


def student_t(values: Sequence[float] | Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of independent values with its Student t interval; the interval is NaN below two values."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = _t(0.5 + confidence / 2, len(x) - 1) * float(x.std()) / math.sqrt(len(x))
    return Estimate(mean, mean - half, mean + half)


def wilson(successes: float, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share; (NaN, NaN) without a trial.

    It is the formula of Wilson (1927), scipy's `binomtest(…).proportion_ci(method="wilson")` and what LeRobot prints.
    Near 0 and 1 it covers less than it says (84 % at 20 trials and p = 0.009): `rate` is what we print.

    Args:
        successes: in [0, count]; halves are allowed.
        count: of trials.
        level: the confidence, in (0, 1).
    """
    if count < 1:
        return Interval(math.nan, math.nan)
    share, z = successes / count, NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, where rounding leaves 1e-17
    return Interval(low, 1.0 if successes == count else min(1.0, centre + half))


def clopper_pearson(successes: float, count: int, level: float = 0.95) -> Interval:
    """Exact interval of a share: it covers at least `level` whatever the true share is; (NaN, NaN) without a trial.

    Clopper and Pearson (1934), by quantiles of the beta law, which also take the halves of ties.

    Args:
        successes: in [0, count]; halves are allowed.
        count: of trials.
        level: the confidence, in (0, 1).
    """
    from scipy.stats import beta

    if count < 1:
        return Interval(math.nan, math.nan)
    tail, failures = (1 - level) / 2, count - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes > 0 else 0.0
    return Interval(low, float(beta.ppf(1 - tail, successes + 1, failures)) if failures > 0 else 1.0)


def rate(successes: float, count: int) -> Estimate:
    """Share of successes with its exact 95 % interval (`clopper_pearson`); ties may count as half a success."""
    return Estimate(successes / count if count else math.nan, *clopper_pearson(successes, count))


def paired_wins(tuned: Float[Tensor, " n"], base: Float[Tensor, " n"]) -> Estimate:
    """Share of pairs where `tuned` beats `base`, a tie counting as half, with the exact interval of `rate`."""
    wins = float((tuned > base).sum()) + 0.5 * float((tuned == base).sum())
    return rate(wins, len(tuned))


def compare_sets(
    value: Callable[[Tensor, bool], float], count: int, *, subset: int, draws: int, generator: torch.Generator
) -> tuple[float, Estimate]:
    """Compare a set reward on two paired sets; returns (win rate, gain with its 95 % interval).

    `value(rows, tuned)` is the reward of those rows of the tuned or of the base set.  The paper's definition of a win
    rate for set rewards is not known; this one is ours: the share of random subsets, without replacement and by the
    same prompts on both sides, on which the tuned set is better, a tie counting as half.  The subsets overlap, so this
    share has no interval.  The gain is that of the whole sets.  Its standard error is the spread of the gains on
    subsets of m of n items, times √(m/(n − m)): the delete-d jackknife (Shao and Wu 1989), exact for means, since
    without replacement a mean of m varies by (1/m − 1/n) S²; the interval is Student's t with n − 1 degrees.

    Args:
        count: items of each set, n.
        subset: items of a subset, m in [1, n); n/2 is usual.
        draws: of subsets, at least 2.
    """
    gains = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        rows = torch.randperm(count, generator=generator)[:subset]
        gains[i] = value(rows, True) - value(rows, False)
    wins = float((gains > 0).sum() + 0.5 * (gains == 0).sum()) / draws
    everything = torch.arange(count)
    whole = value(everything, True) - value(everything, False)
    reach = _t(0.975, count - 1) * float(gains.std()) * math.sqrt(subset / (count - subset))
    return wins, Estimate(whole, whole - reach, whole + reach)


def average(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of independent values with a 95 % interval that also holds for few and skewed ones.

    The interval is the hull of three: Student's t, the bias-corrected and accelerated bootstrap (Efron 1987), and the
    bootstrap of t (Efron 1979), this one widened by n/(n − 1).  Each alone covers too little somewhere at 20 values:
    t and BCa where values are skewed, the bootstrap of t where most are equal (docs/guarantees.md#coverage).

    Args:
        values: independent, [n].
        seed: names the stream of resamples; the interval is a pure function of values and seed.

    Returns:
        the mean; bounds are NaN below two values, and where all are equal, since nothing then tells how they vary.
    """
    from scipy.special import ndtr, ndtri

    x = np.asarray(values, np.float64).ravel()
    n, centre = len(x), float(x.mean()) if len(x) else math.nan
    if n < 2 or not np.ptp(x) > 0:
        return Estimate(centre, math.nan, math.nan)
    away, spread = x - centre, float(x.std(ddof=1))
    error = spread / math.sqrt(n)
    means, spreads = _resampled(away, np.random.default_rng(stream_seed(seed, "bootstrap")))
    told = spreads > 1e-9 * spread  # a resample of equal values has no t
    ends = np.quantile(means[told] / spreads[told] * math.sqrt(n), (0.975, 0.025)) * (n / (n - 1))
    below = float((means < 0).mean() + (means <= 0).mean()) / 2
    shift = float(ndtri(min(max(below, 0.5 / DRAWS), 1 - 0.5 / DRAWS)))
    skew = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    z = shift + ndtri((0.025, 0.975))
    bca = np.quantile(means, ndtr(shift + z / (1 - skew * z)))
    reach = _t(0.975, n - 1) * error
    low = min(-reach, -float(ends[0]) * error, float(bca[0]))
    return Estimate(centre, centre + low, centre + max(reach, -float(ends[1]) * error, float(bca[1])))


def _resampled(x: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of `DRAWS` resamples, [DRAWS] each; 32 MB at once."""
    means, spreads = np.empty(DRAWS), np.empty(DRAWS)
    batch = max(1, 4_000_000 // len(x))
    for first in range(0, DRAWS, batch):
        part = slice(first, min(first + batch, DRAWS))
        drawn = x[generator.integers(0, len(x), (part.stop - part.start, len(x)))]
        means[part], spreads[part] = drawn.mean(1), drawn.std(1, ddof=1)
    return means, spreads


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p of McNemar's test: the binomial test of the two counts of discordant pairs; 1 without any.

    Args:
        first: pairs where only the first succeeded.
        second: pairs where only the second did.

    Raises:
        ValueError: a negative count.
    """
    if first < 0 or second < 0:
        raise ValueError(f"counts of discordant pairs are {first} and {second}; they cannot be negative")
    from scipy.stats import binomtest

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def newcombe(n11: int, n10: int, n01: int, n00: int, level: float = 0.95) -> Interval:
    """Newcombe's score interval of the difference first − second of two paired rates; (NaN, NaN) without a pair.

    Method 10 of Newcombe (1998, Statistics in Medicine 17:2635), whose (e, f, g, h) are the arguments in this order.
    It covers 88 % where one side never wins alone; `bonett_price` is what we print.

    Args:
        n11, n10, n01, n00: pairs in which both, only the first, only the second, or none succeeded.
        level: the confidence, in (0, 1).
    """
    n = n11 + n10 + n01 + n00
    if n < 1:
        return Interval(math.nan, math.nan)
    p, q = (n11 + n10) / n, (n11 + n01) / n
    a, b = wilson(n11 + n10, n, level), wilson(n11 + n01, n, level)
    product = (n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)
    centre = float(n11 * n00 - n10 * n01)
    if centre > 0:
        centre = max(centre - n / 2, 0.0)  # continuity correction of the correlation, as the paper has it
    phi = centre / math.sqrt(product) if product > 0 else 0.0
    below = (p - a.low) ** 2 - 2 * phi * (p - a.low) * (b.high - q) + (b.high - q) ** 2
    above = (a.high - p) ** 2 - 2 * phi * (a.high - p) * (q - b.low) + (q - b.low) ** 2
    return Interval(p - q - math.sqrt(max(below, 0)), p - q + math.sqrt(max(above, 0)))


def bonett_price(n11: int, n10: int, n01: int, n00: int, level: float = 0.95) -> Interval:
    """Interval of the difference first − second of two paired rates; (NaN, NaN) below two pairs.

    Bonett and Price (2012, J. Educ. Behav. Stat. 37:479): Wald's interval after one pair is added to each discordant
    count; with Student's t of n − 1 degrees in place of z (ours), and cut at ±1.  On average as wide as Newcombe's, and
    unlike it never below 93 % of coverage from 5 pairs on (docs/guarantees.md#coverage).

    Args:
        n11, n10, n01, n00: pairs in which both, only the first, only the second, or none succeeded.
        level: the confidence, in (0, 1).
    """
    n = n11 + n10 + n01 + n00
    if n < 2:
        return Interval(math.nan, math.nan)
    p, q = (n10 + 1) / (n + 2), (n01 + 1) / (n + 2)
    half = _t(0.5 + level / 2, n - 1) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval(max(-1.0, p - q - half), min(1.0, p - q + half))


@dataclass(frozen=True)
class Pairs:
    """Paired outcomes of two policies, and what follows from them.

    Args:
        both, first, second, neither: pairs in which both, only the first, only the second, or none succeeded.
        returns: mean difference of the returns, second minus first, by `paired_gain`.
    """

    both: int
    first: int
    second: int
    neither: int
    returns: Estimate = Estimate(math.nan, math.nan, math.nan)

    @property
    def count(self) -> int:
        """Number of pairs."""
        return self.both + self.first + self.second + self.neither

    @property
    def undecided(self) -> str:
        """Why these pairs cannot tell the two apart, as a sentence; "" where they may."""
        if not self.count:
            return "No pair of episodes is left to compare."
        if self.first or self.second:
            return ""
        told = f"{self.both} times both succeeded, {self.neither} times both failed"
        return f"No pair is discordant ({told}), so nothing tells the two apart; try harder or more episodes."

    @property
    def p(self) -> float:
        """Of McNemar's exact test that the two succeed equally often."""
        return mcnemar(self.first, self.second)

    @property
    def difference(self) -> Estimate:
        """Rate of the second minus rate of the first, with the interval of `bonett_price`."""
        gain = (self.second - self.first) / self.count if self.count else math.nan
        return Estimate(gain, *bonett_price(self.both, self.second, self.first, self.neither))

    @property
    def score(self) -> Interval:
        """Newcombe's score interval of the same difference, which others print."""
        return newcombe(self.both, self.second, self.first, self.neither)


def pair(
    first: Sequence[bool] | np.ndarray,
    second: Sequence[bool] | np.ndarray,
    returns: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    seed: int = 0,
) -> Pairs:
    """Compare two policies on the same episodes.

    Args:
        first, second: success of episode i under each, of equal length.
        returns: returns of episode i under each.
        seed: of the resamples behind the interval of the returns.

    Raises:
        ValueError: lengths differ.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} outcomes cannot be paired")
    both, only_first, only_second, neither = (int(np.sum(x)) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    if returns is None:
        return Pairs(both, only_first, only_second, neither)
    return Pairs(both, only_first, only_second, neither, paired_gain(*returns, seed=seed))


def paired_gain(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Estimate:
    """Mean of second − first with its 95 % interval: that of `pair` where all values are 0 or 1, else of `average`."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(a) and np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return pair(a > 0, b > 0).difference
    return average(b - a, seed=seed)
