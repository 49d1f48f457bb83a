"""Tables, checks and curves of `gencontrol bench crd`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gencontrol.bench.base import Check, table
from gencontrol.stats import Estimate, student_t

#: label → one {metric: {round: value}} per seed
Results = Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]]


def estimate(results: Results, label: str, metric: str, at: int) -> Estimate:
    """Mean over seeds at a round; NaN where a run did not get there."""
    values = [run.get(metric, {}).get(at, math.nan) for run in results.get(label, [])]
    return student_t(values) if values else Estimate(math.nan, math.nan, math.nan)


def drift_at_reward(results: Results, label: str, reward: float) -> Estimate:
    """Drift at the first measured round with at least this reward, over seeds; NaN where one never gets there."""
    values = []
    for run in results.get(label, []):
        there = [at for at in sorted(run.get("reward", {})) if run["reward"][at] >= reward]
        values.append(run["fd"][there[0]] if there else math.nan)
    return student_t(values) if values else Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Columns:
    """What a table shows: metrics at each round, metrics at the last one (title → name), its caption."""

    each: Mapping[str, str]
    last: Mapping[str, str]
    caption: str


DIGITS = Columns({"reward": "reward", "FD": "fd"}, {"judge": "judge"}, "drift = Fréchet distance to real digits")
SCENES = Columns(
    {"accuracy": "exact", "FD": "fd"},
    {"reward": "reward", "diversity": "diversity"},
    "held-out captions; drift = Fréchet distance to rendered scenes in an embedding never trained on",
)


def method_table(
    results: Results,
    base: Mapping[str, float],
    rounds: Sequence[int],
    columns: Columns,
    extra: Mapping[str, Callable[[str], Estimate]],
) -> str:
    """One row per method: metrics at some rounds, metrics at the last, what `extra` says of a label, passes."""
    header = ["method", *[f"{title} {at}" for at in rounds for title in columns.each]]
    header += [f"{title} {rounds[-1]}" for title in columns.last] + [*extra, "passes (1e3)"]
    first: list[Any] = ["base", *[base[name] for name in columns.each.values()] * len(rounds)]
    first += [*[base[name] for name in columns.last.values()], *["–"] * len(extra), 0.0]
    rows = [first]
    for label in results:
        row: list[Any] = [label]
        row += [estimate(results, label, name, at) for at in rounds for name in columns.each.values()]
        row += [estimate(results, label, name, rounds[-1]) for name in columns.last.values()]
        row += [measure(label) for measure in extra.values()]
        rows.append([*row, estimate(results, label, "passes", rounds[-1]).value / 1e3])
    return table(f"Mean over seeds ± half the 95 % interval; {columns.caption}", header, rows)


def _compare(claim: str, measured: float, holds: bool, digits: str = ".3f") -> Check:
    return Check(claim, "–" if math.isnan(measured) else format(measured, digits), bool(holds))


def digits_checks(results: Results, rounds: Sequence[int], goal: float) -> list[Check]:
    """The claims of issue 4 and of docs/methods/crd.md#experiment-a on digits, with what was measured."""

    def at(label: str, metric: str, when: int) -> float:
        return estimate(results, label, metric, when).value

    early, last = rounds[0], rounds[-1]
    found = []
    speed = at("CRD", "reward", early)
    found.append(_compare(f"CRD's reward at round {early} is at least .88", speed, speed >= 0.88))
    nft = at("NFT, official GenEval", "reward", early)
    found.append(_compare(f"DiffusionNFT's (official GenEval) at round {early} is at most .80", nft, nft <= 0.80))
    if "Flow-GRPO" in results:
        grpo = at("Flow-GRPO", "reward", early)
        found.append(_compare(f"Flow-GRPO's at round {early} is at most .65", grpo, grpo <= 0.65))
    ratio = drift_at_reward(results, "CRD", goal).value / drift_at_reward(results, "NFT, official GenEval", goal).value
    found.append(_compare(f"at reward {goal:g} FD(CRD) is at most 0.6 FD(NFT, official)", ratio, ratio <= 0.6))
    same = drift_at_reward(results, "CRD", goal).value / drift_at_reward(results, "NFT + anchor", goal).value
    found.append(_compare(f"at reward {goal:g} FD(CRD) is at most FD(NFT + the same anchor)", same, same <= 1.0))
    for peer in ("NFT + anchor", "AWM + anchor", "RWR + anchor", "Flow-GRPO + anchor"):
        if peer in results:
            gain = speed - at(peer, "reward", early)
            found.append(_compare(f"CRD is ahead of {peer} at round {early} (reward)", gain, gain > 0, "+.3f"))
    pull = at("CRD, no anchor", "fd", last) / at("CRD", "fd", last)
    found.append(_compare("the anchor matters: without it FD is at least twice", pull, pull >= 2.0))
    lost = at("CRD, no anchor", "reward", last) - at("CRD, no anchor, old = policy", "reward", last)
    found.append(_compare("ratio collapse: old = policy loses at least .2 reward", lost, lost >= 0.2))
    burst = at("CRD, no anchor, old = policy", "fd", last) / at("CRD, no anchor", "fd", last)
    found.append(_compare("ratio collapse: old = policy at least doubles FD", burst, burst >= 2.0))
    return found + _ablations(results, early, last)


def _ablations(results: Results, early: int, last: int) -> list[Check]:
    """Whether an ingredient helps at all: reward early no lower and drift at the end no higher, one of them by 2 %."""
    found = []
    for label in results:
        if not label.startswith("CRD, ") or "no anchor" in label:
            continue
        gain = estimate(results, "CRD", "reward", early).value - estimate(results, label, "reward", early).value
        drift = estimate(results, "CRD", "fd", last).value / estimate(results, label, "fd", last).value
        helps = gain >= -0.005 and drift <= 1.02 and (gain > 0.02 or drift < 0.98)
        claim = f"what '{label}' leaves out helps (reward at {early} up or FD at {last} down, the other no worse)"
        found.append(Check(claim, f"reward {gain:+.3f}, FD × {drift:.2f}", bool(helps)))
    return found


def curves(results: Results, columns: Columns) -> dict[str, tuple[str, dict[str, dict[float, Any]]]]:
    """Panels for `run_parts`: each metric against rounds."""
    panels = {}
    for title, metric in {**columns.each, **columns.last}.items():
        lines: dict[str, dict[float, Any]] = {}
        for label, runs in results.items():
            at = sorted(set.intersection(*[set(run.get(metric, {})) for run in runs])) if runs else []
            if at:
                lines[label] = {float(k): estimate(results, label, metric, k) for k in at}
        panels[title] = ("round", lines)
    return panels
