"""Intervals and paired tests of success rates and returns; Wilson's interval is `gencontrol.stats.wilson`.

Two policies are compared on the same seeds: only the discordant pairs (one succeeded, the other did not) carry
information about the difference, and McNemar's exact test is the binomial test of their two counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gencontrol.rng import stream_seed
from gencontrol.robotics.envs.types import Array
from gencontrol.stats import Estimate, wilson

__all__ = ["Estimate", "Interval", "Pairs", "bootstrap_mean", "mcnemar", "newcombe", "pair", "wilson"]

#: draws of a bootstrap; the Monte-Carlo error of a 2.5 % percentile is then about 0.02 standard deviations
DRAWS = 10_000


class Interval(NamedTuple):
    """Bounds of a 95 % interval."""

    low: float
    high: float


def bootstrap_mean(values: Sequence[float] | Array, *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Mean with the percentile bootstrap interval (Efron 1979); NaN bounds below two values.

    Args:
        values: independent, [n].
        seed: names the stream of resamples; the interval is a pure function of values and seed.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else math.nan, math.nan, math.nan)
    random = np.random.default_rng(stream_seed(seed, "bootstrap"))
    block = max(1, 4_000_000 // len(x))  # rows at once: 32 MB
    means = np.concatenate(
        [
            x[random.integers(len(x), size=(min(block, draws - begin), len(x)))].mean(1)
            for begin in range(0, draws, block)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(x.mean()), float(low), float(high))


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p of McNemar's test: 2·P(Binomial(n, 1/2) ≤ min), at most 1.

    Args:
        first: pairs where only the first policy succeeded.
        second: pairs where only the second one did.

    Raises:
        ValueError: a negative count.
    """
    if first < 0 or second < 0:
        raise ValueError(f"counts of discordant pairs are {first} and {second}; they cannot be negative")
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1))
    return min(1.0, float(2 * tail / 2**total)) if total < 1000 else min(1.0, _ratio(2 * tail, total))


def _ratio(tail: int, total: int) -> float:
    """tail / 2^total for whole numbers too large for a float."""
    shift = max(0, tail.bit_length() - 64)
    return math.ldexp(tail >> shift, shift - total)


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
