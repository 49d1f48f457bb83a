"""Intervals and paired tests: Student t, Wilson, bootstrap, McNemar, Newcombe, and comparison of set rewards.

Two models are compared on the same seeds or prompts: only the discordant pairs (one succeeded, the other did not) carry
information about the difference of their rates.  scipy is imported where it is used, for it takes a second to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def student_t(values: Sequence[float] | Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of independent values with its Student t interval; the interval is NaN below two values."""
    from scipy.stats import t as student

    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(student.ppf(0.5 + confidence / 2, len(x) - 1)) * float(x.std()) / math.sqrt(len(x))
    return Estimate(mean, mean - half, mean + half)


def wilson(successes: float, count: int) -> Estimate:
    """Share of successes with its Wilson score interval; ties may count as half a success.

    At whole numbers it is scipy's `binomtest(…).proportion_ci(method="wilson")`, which takes no halves.
    """
    if count < 1:
        return Estimate(math.nan, math.nan, math.nan)
    share, z = successes / count, 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_wins(tuned: Float[Tensor, " n"], base: Float[Tensor, " n"]) -> Estimate:
    """Share of pairs where `tuned` beats `base`, a tie counting as half, with its Wilson interval."""
    wins = float((tuned > base).sum()) + 0.5 * float((tuned == base).sum())
    return wilson(wins, len(tuned))


def bootstrap_sets(
    value: Callable[[Tensor, bool], float],
    count: int,
    *,
    subset: int,
    draws: int,
    generator: torch.Generator,
) -> tuple[Estimate, Estimate]:
    """Compare a set reward on random subsets of two paired sets; returns (win rate, gain) with intervals.

    `value(rows, tuned)` is the reward of those rows of the tuned or of the base set.  The paper's definition of a win
    rate for set rewards is not known; this one is ours: P(R(S_tuned) > R(S_base)) over subsets without replacement,
    both sets by the same prompts.  The gain's interval is the 2.5 % and 97.5 % percentiles over the draws.
    """
    gains = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        rows = torch.randperm(count, generator=generator)[:subset]
        gains[i] = value(rows, True) - value(rows, False)
    wins = wilson(float((gains > 0).sum()) + 0.5 * float((gains == 0).sum()), draws)
    low, high = torch.quantile(gains, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return wins, Estimate(float(gains.mean()), low, high)


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Mean with the percentile bootstrap interval (Efron 1979); NaN bounds below two values.

    Args:
        values: independent, [n].
        seed: names the stream of resamples; the interval is a pure function of values and seed.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else math.nan, math.nan, math.nan)
    from scipy.stats import bootstrap

    found = bootstrap(
        (x,),
        np.mean,
        n_resamples=draws,
        batch=max(1, 4_000_000 // len(x)),  # rows at once: 32 MB
        method="percentile",
        random_state=np.random.default_rng(stream_seed(seed, "bootstrap")),
    )
    return Estimate(float(x.mean()), *map(float, found.confidence_interval))


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p of McNemar's test: the binomial test of the two counts of discordant pairs; 1 without any.

    Args:
        first: pairs where only the first policy succeeded.
        second: pairs where only the second one did.

    Raises:
        ValueError: a negative count.
    """
    if first < 0 or second < 0:
        raise ValueError(f"counts of discordant pairs are {first} and {second}; they cannot be negative")
    from scipy.stats import binomtest

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def newcombe(both: int, first: int, second: int, neither: int) -> Estimate:
    """Difference second − first of two paired rates with Newcombe's score interval.

    Method 10 of Newcombe (1998, Statistics in Medicine 17:2635).  Unlike the bootstrap it keeps a width when no pair is
    discordant.
    """
    n = both + first + second + neither
    if n < 1:
        return Estimate(math.nan, math.nan, math.nan)
    a, b = wilson(both + second, n), wilson(both + first, n)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    centre = float(both * neither - first * second)
    if centre > 0:
        centre = max(centre - n / 2, 0.0)  # continuity correction of the correlation, as the paper has it
    phi = centre / math.sqrt(product) if product > 0 else 0.0
    difference = a.value - b.value
    below = (a.value - a.low) ** 2 - 2 * phi * (a.value - a.low) * (b.high - b.value) + (b.high - b.value) ** 2
    above = (a.high - a.value) ** 2 - 2 * phi * (a.high - a.value) * (b.value - b.low) + (b.value - b.low) ** 2
    return Estimate(difference, difference - math.sqrt(max(below, 0)), difference + math.sqrt(max(above, 0)))


@dataclass(frozen=True)
class Pairs:
    """Paired outcomes of two policies, and what follows from them.

    Args:
        both, first, second, neither: pairs in which both, only the first, only the second, or none succeeded.
        p: of McNemar's exact test that the two succeed equally often.
        difference: rate of the second minus rate of the first, percentile bootstrap over pairs.
        score: the same difference with Newcombe's score interval.
        returns: mean difference of the returns, percentile bootstrap over pairs.
    """

    both: int
    first: int
    second: int
    neither: int
    p: float
    difference: Estimate
    score: Estimate
    returns: Estimate

    @property
    def count(self) -> int:
        """Number of pairs."""
        return self.both + self.first + self.second + self.neither


def pair(
    first: Sequence[bool],
    second: Sequence[bool],
    returns: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    seed: int = 0,
) -> Pairs:
    """Compare two policies on the same episodes.

    Args:
        first, second: success of episode i under each, of equal length.
        returns: returns of episode i under each.

    Raises:
        ValueError: lengths differ.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} outcomes cannot be paired")
    both, only_first, only_second, neither = (int(np.sum(x)) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    if returns is None:
        gain = Estimate(math.nan, math.nan, math.nan)
    else:
        gain = bootstrap_mean(np.asarray(returns[1], np.float64) - np.asarray(returns[0], np.float64), seed=seed)
    difference = bootstrap_mean(b.astype(np.float64) - a, seed=seed)
    p, score = mcnemar(only_first, only_second), newcombe(both, only_first, only_second, neither)
    return Pairs(both, only_first, only_second, neither, p, difference, score, gain)
