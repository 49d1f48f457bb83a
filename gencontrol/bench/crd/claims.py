"""What `gencontrol bench crd` claims on scenes and words: speed in samples, accuracy gained, drift at equal accuracy.

Between two measurements metrics are taken as linear in the round; round 0 is the base.  Everything is worked out per
seed and then averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gencontrol.bench.base import Check
from gencontrol.bench.crd.tables import Results
from gencontrol.stats import Estimate, student_t

Run = Mapping[str, Mapping[int, float]]
Bases = Sequence[Mapping[str, float]]


def path_of(run: Run, base: Mapping[str, float], metric: str) -> list[tuple[float, float]]:
    """Return (round, value) from the base on."""
    return [(0.0, base[metric]), *[(float(at), value) for at, value in sorted(run.get(metric, {}).items())]]


def round_reaching(run: Run, base: Mapping[str, float], level: float, metric: str = "exact") -> float:
    """First round, interpolated, at which the accuracy is at least `level`; NaN where it never is."""
    points = path_of(run, base, metric)
    if points[0][1] >= level:
        return 0.0
    for (r0, a0), (r1, a1) in zip(points, points[1:], strict=False):
        if a1 >= level:
            return r0 + (r1 - r0) * (level - a0) / (a1 - a0)
    return math.nan


def value_at(run: Run, base: Mapping[str, float], metric: str, at: float) -> float:
    """Return a metric at a round, interpolated; NaN beyond the run."""
    points = path_of(run, base, metric)
    for (r0, a0), (r1, a1) in zip(points, points[1:], strict=False):
        if r0 <= at <= r1:
            return a0 + (a1 - a0) * (at - r0) / (r1 - r0)
    return math.nan


def best(run: Run, base: Mapping[str, float]) -> float:
    """Largest accuracy of a run."""
    return max(value for _, value in path_of(run, base, "exact"))


def final(run: Run, base: Mapping[str, float], metric: str = "exact") -> float:
    """Accuracy at the last measurement of a run."""
    return path_of(run, base, metric)[-1][1]


def at_equal_accuracy(results: Results, bases: Bases, peer: str, metric: str) -> Estimate:
    """CRD's metric over the peer's where each first reaches the lower of their best accuracies, over seeds."""
    ratios = []
    for mine, other, base in zip(results["CRD"], results[peer], bases, strict=True):
        level = min(best(mine, base), best(other, base))
        values = [value_at(run, base, metric, round_reaching(run, base, level)) for run in (mine, other)]
        ratios.append(values[0] / values[1])
    return student_t(ratios)


def share_of_samples(results: Results, bases: Bases, peer: str, metric: str = "exact") -> Estimate:
    """Share of a peer's samples with which CRD reaches the peer's final accuracy, over seeds."""
    shares = []
    for mine, other, base in zip(results["CRD"], results[peer], bases, strict=True):
        rounds = max(other[metric])
        shares.append(round_reaching(mine, base, final(other, base, metric), metric) / rounds)
    return student_t(shares)


def gain(results: Results, bases: Bases, label: str) -> Estimate:
    """Accuracy gained over the base at the last measurement, over seeds."""
    return student_t([final(run, base) - base["exact"] for run, base in zip(results[label], bases, strict=True)])


def _shown(value: Estimate, digits: str) -> str:
    half = (value.high - value.low) / 2
    if math.isnan(value.value):
        return "not reached in every seed"
    return format(value.value, digits) + ("" if math.isnan(half) else f" ±{half:.2g}")


def scenes_checks(results: Results, bases: Bases) -> list[Check]:
    """The claims of issue 4 on scenes."""
    found = []
    if "Flow-GRPO" in results:
        share = share_of_samples(results, bases, "Flow-GRPO")
        claim = "CRD reaches Flow-GRPO's final accuracy with at most half of the samples"
        found.append(Check(claim, _shown(share, ".2f"), share.value <= 0.5))
    gained = gain(results, bases, "CRD")
    found.append(
        Check("CRD gains at least .25 accuracy on held-out captions", _shown(gained, "+.3f"), gained.value >= 0.25)
    )
    for peer in results:
        if peer != "CRD":
            drift, spread = (at_equal_accuracy(results, bases, peer, metric) for metric in ("fd", "diversity"))
            claim = f"at equal accuracy CRD's FD is no worse and its diversity no less than those of '{peer}' (by 2 %)"
            shown = f"FD × {_shown(drift, '.2f')}, diversity × {_shown(spread, '.2f')}"
            found.append(Check(claim, shown, drift.value <= 1.02 and spread.value >= 0.98))
    return found


def words_checks(results: Results, bases: Bases) -> list[Check]:
    """The claim of issue 4 on words."""
    gained = gain(results, bases, "CRD")
    claim = "CRD's word accuracy on held-out words rises by at least .20"
    return [Check(claim, _shown(gained, "+.3f"), gained.value >= 0.20)]
