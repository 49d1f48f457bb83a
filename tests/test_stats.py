"""Estimates against closed forms; published tables are in tests/golden, coverage in tests/test_coverage.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gencontrol.rng import stream
from gencontrol.stats import (
    average,
    bonett_price,
    clopper_pearson,
    compare_sets,
    mcnemar,
    newcombe,
    pair,
    paired_gain,
    paired_wins,
    rate,
    student_t,
    wilson,
)


def test_student_t_interval() -> None:
    """Five numbers 1…5: mean 3, s/√n = 0.70711, t(0.975, 4) = 2.77645 (printed tables)."""
    found = student_t([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.high - 3.0 == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5)
    assert found.low == pytest.approx(6.0 - found.high)
    alone = student_t([2.0])
    assert alone.value == 2.0 and math.isnan(alone.low)


def test_intervals_of_a_share_at_the_ends() -> None:
    """Without a failure the exact lower end is (α/2)^(1/n); without a trial there is no interval."""
    for interval in (wilson, clopper_pearson):
        assert interval(0, 20).low == 0.0 and interval(20, 20).high == 1.0
        assert math.isnan(interval(0, 0).low) and math.isnan(interval(0, 0).high)
    assert rate(20, 20).low == pytest.approx(0.025 ** (1 / 20), rel=1e-12)
    assert math.isnan(rate(0, 0).value)


def test_paired_wins_count_ties_as_half() -> None:
    found = paired_wins(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0]))
    assert found.value == 2.5 / 4 and found.low < 2.5 / 4 < found.high


def test_bonett_price() -> None:
    """One of 30 pairs for the first, none for the second: p̃ = 2/32, q̃ = 1/32, t(0.975, 29) = 2.04523 (tables)."""
    centre, spread = 1 / 32, math.sqrt((3 / 32 - 1 / 1024) / 32)
    assert bonett_price(20, 1, 0, 9) == pytest.approx((centre - 2.04523 * spread, centre + 2.04523 * spread), abs=1e-6)
    assert bonett_price(0, 5, 0, 0).high == 1.0 and math.isnan(bonett_price(1, 0, 0, 0).low)


def test_average_of_many_values_is_near_the_normal_interval() -> None:
    """A hull of three intervals that agree at n = 400; an end of a bootstrap has an error of 2 % of the half width."""
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = average(x, seed=1)
    half = 1.96 * x.std() / 20
    assert found.value == pytest.approx(x.mean())
    assert x.mean() - 1.12 * half < found.low <= x.mean() - half
    assert x.mean() + half <= found.high < x.mean() + 1.12 * half
    assert found == average(x, seed=1) != average(x, seed=2)
    wide = student_t(x)
    assert found.low <= wide.low and wide.high <= found.high


def test_average_of_equal_or_single_values_has_no_interval() -> None:
    for values in ([1.0], [2.0, 2.0, 2.0]):
        found = average(values)
        assert found.value == values[0] and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(average([]).value)


def test_average_of_two_values_and_of_rare_ones_is_finite() -> None:
    for values in ([0.0, 1.0], [0.0] * 30 + [1.0]):
        found = average(values)
        assert math.isfinite(found.low) and found.low < found.value < found.high < math.inf


def test_pairs() -> None:
    a = [True] * 30 + [False] * 20
    b = [True] * 28 + [False] * 2 + [True] * 12 + [False] * 8
    returns = np.arange(50.0)
    found = pair(a, b, (returns, 2 * returns))
    assert (found.both, found.first, found.second, found.neither, found.count) == (28, 2, 12, 8, 50)
    assert found.difference.value == pytest.approx(0.2) and found.p == mcnemar(2, 12)
    assert (found.difference.low, found.difference.high) == bonett_price(28, 12, 2, 8)
    assert found.score == newcombe(28, 12, 2, 8)  # of the second minus the first, like the difference
    assert found.returns == average(returns)
    assert math.isnan(pair(a, b).returns.value)
    with pytest.raises(ValueError, match="paired"):
        pair([True], [True, False])


def test_gain_of_binary_and_of_other_values() -> None:
    a, b = np.array([0.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert paired_gain(a, b) == pair(a > 0, b > 0).difference
    assert paired_gain(a, 0.5 * b) == average(0.5 * b - a)
    assert paired_gain(a, a).low < 0 < paired_gain(a, a).high and math.isnan(paired_gain([], []).value)


def test_pairs_without_a_discordant_one_keep_a_width() -> None:
    same = pair([True, True, False], [True, True, False])
    assert (same.difference.value, same.p) == (0.0, 1.0)
    assert same.difference.low == -same.difference.high < -0.3


def test_sets_that_differ_by_a_shift() -> None:
    """Means of subsets of equal rows differ by exactly the shift; the win rate is 1, and 1/2 without a shift."""
    base = torch.randn(40, generator=stream(0, "test/base")).double()

    def compare(shift: float):
        def value(rows: torch.Tensor, tuned: bool) -> float:
            return float((base[rows] + shift * tuned).mean())

        return compare_sets(value, 40, subset=20, draws=30, generator=stream(0, "test/bootstrap"))

    wins, gain = compare(0.5)
    assert wins == 1.0
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    assert compare(0.0)[0] == 0.5


@pytest.mark.parametrize("subset", [10, 25])
def test_standard_error_of_a_set_reward(subset: int) -> None:
    """For a mean the interval is Student's t, whatever the size of the subsets; 4000 draws leave 1.1 % of its width."""
    gains = torch.randn(41, generator=stream(0, "test/gains")).double()

    def value(rows: torch.Tensor, tuned: bool) -> float:
        return float(gains[rows].mean()) if tuned else 0.0

    found = compare_sets(value, 41, subset=subset, draws=4000, generator=stream(0, "test/draws"))[1]
    expected = student_t(gains)
    assert found.value == pytest.approx(expected.value)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.035)


def test_subsets_have_distinct_rows() -> None:
    seen = []

    def value(rows: torch.Tensor, tuned: bool) -> float:
        seen.append(rows.tolist())
        return float(rows.sum())

    compare_sets(value, 10, subset=5, draws=4, generator=stream(0, "test/rows"))
    assert all(len(set(rows)) == 5 for rows in seen[:8])
    assert seen[0] == seen[1] and seen[0] != seen[2] and sorted(seen[-1]) == list(range(10))
