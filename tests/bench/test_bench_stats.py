"""Intervals and win rates against values worked out elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.rng import stream
from gencontrol.stats import bootstrap_sets, paired_wins, student_t, wilson


def test_student_t_interval() -> None:
    """Five numbers 1…5: mean 3, s/√n = 0.70711, t(0.975, 4) = 2.77645 (printed tables)."""
    found = student_t([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.high - 3.0 == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5)
    assert found.low == pytest.approx(6.0 - found.high)
    alone = student_t([2.0])
    assert alone.value == 2.0 and math.isnan(alone.low)


def test_wilson_interval() -> None:
    """8 of 10: [0.4902, 0.9433] (Wilson 1927; e.g. statsmodels' proportion_confint)."""
    found = wilson(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=2e-4)
    full, none = wilson(10, 10), wilson(0, 0)
    assert full.high == pytest.approx(1.0) and full.low == pytest.approx(0.7225, abs=2e-4) and math.isnan(none.value)


def test_paired_wins_count_ties_as_half() -> None:
    assert paired_wins(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])).value == 2.5 / 4


def test_bootstrap_of_a_shifted_set() -> None:
    """Means of subsets of equal rows differ by exactly the shift; the win rate is 1, and 1/2 without a shift."""
    base = torch.randn(40, generator=stream(0, "test/base")).double()

    def compare(shift: float):
        def value(rows: torch.Tensor, tuned: bool) -> float:
            return float((base[rows] + shift * tuned).mean())

        return bootstrap_sets(value, 40, subset=20, draws=30, generator=stream(0, "test/bootstrap"))

    wins, gain = compare(0.5)
    assert wins.value == 1.0 and wins.high == pytest.approx(1.0)
    assert gain.value == pytest.approx(0.5) and gain.low == pytest.approx(0.5) and gain.high == pytest.approx(0.5)
    assert compare(0.0)[0].value == 0.5


def test_bootstrap_subsets_have_distinct_rows() -> None:
    seen = []

    def value(rows: torch.Tensor, tuned: bool) -> float:
        seen.append(rows.tolist())
        return float(rows.sum())

    bootstrap_sets(value, 10, subset=5, draws=4, generator=stream(0, "test/rows"))
    assert all(len(set(rows)) == 5 for rows in seen) and seen[0] == seen[1] and seen[0] != seen[2]
