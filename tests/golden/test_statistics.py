"""Intervals and the paired test on 20 tables that statsmodels and scipy worked out."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.stats import Interval, clopper_pearson, mcnemar, newcombe, wilson
from tests.helpers.golden import tensors

HELD = tensors("statistics")
#: both sides compute in float64; the tables hold the exact z
CLOSE = 1e-12


@pytest.mark.parametrize(("ours", "theirs"), [(wilson, "single_wilson"), (clopper_pearson, "single_clopper_pearson")])
def test_intervals_of_a_share(ours, theirs: str) -> None:
    found = [ours(k, n) for k, n in HELD["single"].tolist()]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), HELD[theirs], rtol=0, atol=CLOSE)


def test_newcombe_without_correlation() -> None:
    """Neither package has the paired interval.  Where the corrected correlation is 0 it is that of independent samples.

    eh − fg = e·n − x1·x2, and Newcombe sets it to 0 up to n/2: some whole e does it for about half of all margins.
    """
    met = 0
    for (x1, n1, x2, n2), theirs in zip(HELD["pair"].tolist(), HELD["pair_newcombe"].tolist(), strict=True):
        e = -(-x1 * x2 // n1)
        if n1 != n2 or e * n1 - x1 * x2 > n1 / 2 or not max(0, x1 + x2 - n1) <= e <= min(x1, x2):
            continue
        assert newcombe(e, x1 - e, x2 - e, n1 - x1 - x2 + e) == pytest.approx(tuple(theirs), abs=CLOSE)
        met += 1
    assert met >= 3


def test_newcombe_equals_the_paper() -> None:
    """Newcombe 1998, table II, method 10, rows (e, f, g, h) as printed, to three or four digits."""
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = newcombe(53, 0, 1, 0)
    assert (low, high) == (pytest.approx(-0.0977, abs=5e-4), pytest.approx(0.0508, abs=5e-3))
    assert newcombe(2, 12, 36, 0) == pytest.approx([-end for end in reversed(newcombe(2, 36, 12, 0))])
    assert newcombe(0, 0, 0, 0) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_level() -> None:
    """scipy's values at 90 % and 99 % for 7 of 9."""
    from scipy.stats import binomtest

    for level in (0.9, 0.99):
        for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
            theirs = binomtest(7, 9).proportion_ci(level, method)
            assert ours(7, 9, level=level) == pytest.approx(Interval(theirs.low, theirs.high), abs=CLOSE)
    narrow, wide = newcombe(5, 3, 1, 4, level=0.8), newcombe(5, 3, 1, 4, level=0.99)
    assert wide.low < narrow.low < 2 / 13 < narrow.high < wide.high


def test_mcnemar() -> None:
    found = [mcnemar(only_first, only_second) for _, only_first, only_second, _ in HELD["table"].tolist()]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), HELD["table_mcnemar_exact"][:, 1], rtol=0, atol=CLOSE
    )
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)
