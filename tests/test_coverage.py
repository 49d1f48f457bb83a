"""Every interval that gencontrol prints covers the truth in at least 93 of 100 cases; `python tests/test_coverage.py`
prints the table of docs/guarantees.md#coverage.

Shares and paired differences have finitely many outcomes, so their coverage is a sum of probabilities, without chance.
Means are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.special import gammaln, xlogy
from scipy.stats import binom

from gencontrol import stats
from gencontrol.rng import stream
from gencontrol.stats import Interval, average, bonett_price, clopper_pearson, compare_sets, newcombe, wilson

LEAST = 0.93
SIZES = (20, 50, 200)
#: a bound that equals the truth up to rounding counts as covering it
EPS = 1e-12
#: rates that are tried, finer near 0 and 1, where intervals fail
RATES = np.concatenate([np.geomspace(1e-4, 0.05, 150), np.linspace(0.05, 0.95, 901), 1 - np.geomspace(1e-4, 0.05, 150)])


def of_shares(interval: Callable[[float, int], Interval], n: int) -> np.ndarray:
    """Coverage of a share's interval at all `RATES`, exactly."""
    ends = np.array([interval(k, n) for k in range(n + 1)])
    law = binom.pmf(np.arange(n + 1), n, RATES[:, None])
    covered = (ends[:, 0] <= RATES[:, None] + EPS) & (RATES[:, None] - EPS <= ends[:, 1])
    return (law * covered).sum(1)


def thirds(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All counts (a, b) of two kinds of n things of three kinds."""
    a, b = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    return a[a + b <= n], b[a + b <= n]


def of_thirds(ends: np.ndarray, a: np.ndarray, b: np.ndarray, n: int, p: float, q: float, truth: float) -> float:
    """Coverage of intervals [outcomes 2] of a function of two trinomial counts."""
    rest = max(0.0, 1 - p - q)
    choices = gammaln(n + 1) - gammaln(a + 1) - gammaln(b + 1) - gammaln(n - a - b + 1)
    law = np.exp(choices + xlogy(a, p) + xlogy(b, q) + xlogy(n - a - b, rest))
    return float(law[(ends[:, 0] <= truth + EPS) & (truth - EPS <= ends[:, 1])].sum())


def paired_laws() -> Iterator[tuple[float, float]]:
    """Rates at which only the first and only the second succeeds: few to many discordant pairs, even to one-sided."""
    for discordant in np.concatenate([np.geomspace(1e-3, 0.1, 40), np.linspace(0.11, 1, 45)]):
        for share in (0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0):
            yield discordant * share, discordant * (1 - share)


def of_paired(n: int) -> np.ndarray:
    """Coverage of the printed paired difference at all `paired_laws`, exactly: it depends on discordant pairs alone."""
    a, b = thirds(n)
    ends = np.array([bonett_price(n - i - j, i, j, 0) for i, j in zip(a.tolist(), b.tolist(), strict=True)])
    return np.array([of_thirds(ends, a, b, n, p, q, p - q) for p, q in paired_laws()])


@pytest.mark.parametrize("n", [5, *SIZES])
def test_shares(n: int) -> None:
    assert of_shares(clopper_pearson, n).min() >= 0.95  # what it guarantees


@pytest.mark.parametrize("n", [5, *SIZES])
def test_paired_differences(n: int) -> None:
    assert of_paired(n).min() >= LEAST


@pytest.mark.parametrize("n", [20, 50])
def test_win_rates_with_ties(n: int) -> None:
    """P(win) + P(tie)/2, estimated by wins + ties/2: it varies less than a share does."""
    a, b = thirds(n)
    ends = np.array([clopper_pearson(i + j / 2, n) for i, j in zip(a.tolist(), b.tolist(), strict=True)])
    found = [
        of_thirds(ends, a, b, n, p, q, p + q / 2)
        for q in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.99)
        for p in np.linspace(0, 1 - q, 60)
    ]
    assert min(found) >= LEAST


def test_the_published_score_intervals_dip() -> None:
    """Why they are not what is printed: Wilson (84 % at n = 20), and Newcombe where only one side ever wins alone."""
    assert of_shares(wilson, 20).min() == pytest.approx(0.839, abs=0.002)
    n, p, rest = 20, 0.103, (1 - 0.103) / 2
    a, b = thirds(n)  # both, only the first; the second never wins alone
    ends = np.array([newcombe(i, j, 0, n - i - j) for i, j in zip(a.tolist(), b.tolist(), strict=True)])
    assert of_thirds(ends, a, b, n, rest, p, p) == pytest.approx(0.897, abs=0.002)


#: draw(generator, shape) and the mean: normal, skewed (skewness 2, 2.8, 6.2), bounded, bounded with most values equal
LAWS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], float]] = {
    "normal": (lambda g, s: g.normal(size=s), 0.0),
    "exponential": (lambda g, s: g.exponential(size=s), 1.0),
    "gamma(1/2)": (lambda g, s: g.gamma(0.5, size=s), 0.5),
    "log-normal(0, 1)": (lambda g, s: g.lognormal(size=s), math.exp(0.5)),
    "beta(5, 1)": (lambda g, s: g.beta(5, 1, size=s), 5 / 6),
    "uniform": (lambda g, s: g.uniform(size=s), 0.5),
    "beta(1/2, 1/2)": (lambda g, s: g.beta(0.5, 0.5, size=s), 0.5),
    "0 in 80 %, else U(1/2, 1)": (lambda g, s: g.uniform(0.5, 1, size=s) * (g.uniform(size=s) < 0.2), 0.15),
    "difference of exponentials": (lambda g, s: g.exponential(size=s) - g.exponential(size=s), 0.0),
}


def of_means(law: str, n: int, simulations: int) -> tuple[float, float]:
    """Simulated coverage of `average` where it prints an interval, and the share of samples where it does."""
    draw, truth = LAWS[law]
    samples = draw(np.random.default_rng(n), (simulations, n))
    found = [average(row) for row in samples]
    told = [one for one in found if not math.isnan(one.low)]
    return sum(one.low <= truth <= one.high for one in told) / len(told), len(told) / simulations


def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 instead of 10,000: the ends get noisier by 4 % of the half width, which hardly moves the coverage."""
    monkeypatch.setattr(stats, "DRAWS", 1000)


@pytest.mark.parametrize("law", ["normal", "exponential", "uniform", "0 in 80 %, else U(1/2, 1)"])
def test_means_of_twenty(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 simulations: standard error 0.8 % at the 96 % that longer runs show."""
    _few_resamples(monkeypatch)
    assert of_means(law, 20, 600)[0] >= LEAST


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("law", ["normal", "exponential", "uniform", "0 in 80 %, else U(1/2, 1)"])
def test_means_of_more(law: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _few_resamples(monkeypatch)
    assert of_means(law, n, 400)[0] >= LEAST


@pytest.mark.slow
def test_gains_of_set_rewards() -> None:
    """Of a set reward that is smooth in the law of its set, the logarithm of a mean; 400 simulations."""
    n, generator, covered = 20, np.random.default_rng(20), 0
    for _ in range(400):
        x = torch.from_numpy(generator.gamma((4.0, 5.0), size=(n, 2)).T.copy())

        def value(rows: torch.Tensor, tuned: bool, x: torch.Tensor = x) -> float:
            return float(x[int(tuned)][rows].mean().log())

        gain = compare_sets(value, n, subset=n // 2, draws=100, generator=stream(0, "test/halves"))[1]
        covered += gain.low <= math.log(5 / 4) <= gain.high
    assert covered / 400 >= LEAST


if __name__ == "__main__":
    for size in SIZES:
        for name, values in (("share", of_shares(clopper_pearson, size)), ("paired difference", of_paired(size))):
            print(f"n = {size}: {name}: least {values.min():.3f}, mean {values.mean():.3f}")
        for name in LAWS:
            cover, printed = of_means(name, size, 4000 if size < 200 else 1000)
            print(f"n = {size}: mean of {name}: {cover:.3f}, an interval in {printed:.1%} of samples", flush=True)
