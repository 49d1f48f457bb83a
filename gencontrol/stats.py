"""Intervals and win rates: Student t, Wilson, paired gains, and bootstrap comparison of set rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN bounds where the interval does not exist."""

    value: float
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


def wilson(successes: float, count: int, z: float = 1.959964) -> Estimate:
    """Share of successes with its Wilson score interval; ties may count as half a success."""
    if count < 1:
        return Estimate(math.nan, math.nan, math.nan)
    share = successes / count
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
