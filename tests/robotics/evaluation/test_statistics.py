"""Intervals and paired tests against published values and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gencontrol.stats import bootstrap_mean, mcnemar, newcombe, pair, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # LeRobot's own tests of pc_success_ci95 (docs/robot-interfaces.md#lerobot-intervals), percent to two digits
    [(9, 10, 59.58, 98.21), (14, 20, 48.10, 85.45), (14, 30, 30.23, 63.86), (7, 10, 39.68, 89.22)],
)
def test_wilson_equals_lerobots_values(k: int, n: int, low: float, high: float) -> None:
    found = wilson(k, n)
    assert 100 * found.low == pytest.approx(low, abs=0.006) and 100 * found.high == pytest.approx(high, abs=0.006)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 20).low == 0.0 and wilson(20, 20).high == 1.0
    assert math.isnan(wilson(0, 0).value)


def test_wilson_equals_scipy() -> None:
    from scipy.stats import binomtest

    for k, n in ((0, 5), (3, 9), (70, 100), (1, 1)):
        expected = binomtest(k, n).proportion_ci(0.95, "wilson")
        assert (wilson(k, n).low, wilson(k, n).high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_mcnemar_is_the_binomial_test() -> None:
    """2·P(Binomial(n, 1/2) ≤ min), at most 1, worked out in whole numbers."""
    for first, second in ((0, 0), (1, 0), (3, 9), (10, 10), (0, 15), (40, 61), (450, 520)):
        tail = sum(math.comb(first + second, k) for k in range(min(first, second) + 1))
        assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail / 2 ** (first + second)), rel=1e-12)
    assert mcnemar(2000, 2100) == pytest.approx(0.12206498, abs=5e-9)
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)


def test_newcombe_equals_the_paper() -> None:
    """Newcombe 1998, table II, method 10: rows (36, 12, 2, 0) and (53, 0, 1, 0) of (e, f, g, h); difference f − g."""
    found = newcombe(36, 2, 12, 0)
    assert found.value == pytest.approx(0.2, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=5e-4), pytest.approx(0.3404, abs=5e-4))
    found = newcombe(53, 1, 0, 0)
    assert found.value == pytest.approx(-1 / 54, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(-0.0977, abs=5e-4), pytest.approx(0.0508, abs=5e-3))


def test_bootstrap_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap_mean(x, seed=1)
    half = 1.96 * x.std() / 20  # the normal interval; 10 000 draws leave about 1 % of its width
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert found == bootstrap_mean(x, seed=1) != bootstrap_mean(x, seed=2)
    assert math.isnan(bootstrap_mean([1.0]).low) and math.isnan(bootstrap_mean([]).value)


def test_pairs() -> None:
    a = [True] * 30 + [False] * 20
    b = [True] * 28 + [False] * 2 + [True] * 12 + [False] * 8
    found = pair(a, b, ([0.0] * 50, [1.0] * 50))
    assert (found.both, found.first, found.second, found.neither, found.count) == (28, 2, 12, 8, 50)
    assert found.difference.value == pytest.approx(0.2) and found.p == mcnemar(2, 12)
    assert found.difference.low < 0.2 < found.difference.high
    assert (found.returns.value, found.returns.low, found.returns.high) == (1.0, 1.0, 1.0)
    same = pair(a, a)
    assert (same.difference.value, same.p) == (0.0, 1.0)
    with pytest.raises(ValueError, match="paired"):
        pair([True], [True, False])
