"""`gencontrol bench crd`: CRD against DiffusionNFT, AWM, RWR and Flow-GRPO, each also with CRD's anchor, and ablations.

Parts: "digits" (docs/methods/crd.md#experiment-a), "shifted" (the same with a sampler whose times are shifted as those
of SD3 are), "exact" (KL to the closed-form tilt of a Gaussian mixture, default
against the exact mode), "scenes" and "words" (the bundled text-to-image model with the rewards compositional and ocr,
held-out captions and words).  All methods draw equal samples and their network passes are counted.  A claim that does
not hold is printed as NOT CONFIRMED and kept.  Bases and finished runs are kept in the output folder: the same command
goes on where it was interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from gencontrol import config
from gencontrol.bench.parts import PartOptions, chosen_parts, run_parts
from gencontrol.errors import UsageError

#: reward at which drifts are compared
GOAL = 0.97


@config.options
class Options(PartOptions):
    """Options of the benchmark.

    Args:
        parts: comma-separated: digits, shifted, exact, scenes, words (default: all).
        seeds: of base and fine-tuning; --quick takes at most two.
        rounds: of every run of the parts digits and shifted, at least 6.
        first_seed: the first of the seeds.
        rate: learning rate instead of a part's own, for all rows.
        methods: only the row of this label, or rows whose label holds this; claims are left out.
    """

    seeds: config.Count = 3
    rounds: Annotated[int, Ge(6)] = 150
    first_seed: config.Natural = 0
    rate: config.Positive | None = None
    methods: str = ""
    output: str = "runs/bench/crd"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _race(options: Options, part: str, methods: Sequence[Any], plan: Any, world: Callable[[int], Any]) -> Any:
    """Run all methods on all seeds; returns results by label, and the bases' measurements with and without guidance."""
    from gencontrol.bench.crd.runs import kept_run

    exact = [m for m in methods if m.label == options.methods]
    methods = exact or [m for m in methods if options.methods in m.label]
    if not methods:
        raise UsageError(f"--methods: no row's label holds '{options.methods}'.")
    plan = plan if options.rate is None else replace(plan, lr=options.rate)
    results: dict[str, list[Any]] = {m.label: [] for m in methods}
    bases = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        here = world(seed)
        guided = {f"{key}_guided": value for key, value in here.measure(here.base, scale=3.0).items()}
        bases.append(here.measure(here.base) | guided)
        for method in methods:
            began = time.perf_counter()
            run = kept_run(Path(options.output) / "runs", method, plan, here, seed)
            results[method.label].append(run)
            last = {key: f"{points[max(points)]:.3g}" for key, points in run.items()}
            _say(f"{part}, seed {seed}, {method.label}: {last} ({time.perf_counter() - began:.0f} s)")
    return results, bases


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _sixths(rounds: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, rounds * k // 6) for k in range(1, 7)}))


def _digits(options: Options, shift: float = 1.0) -> dict[str, Any]:
    from gencontrol.bench.crd import claims as crd_claims
    from gencontrol.bench.crd import digits as crd_digits
    from gencontrol.bench.crd import runs as crd_runs
    from gencontrol.bench.crd import tables as crd_tables

    measured = _sixths(6 if options.quick else options.rounds)
    plan = crd_runs.Plan(rounds=measured[-1], measured=measured)
    steps = 150 if options.quick else crd_digits.STEPS

    def world(seed: int) -> crd_digits.World:
        return crd_digits.build_world(seed, steps=steps, bases=Path(options.output) / "bases", shift=shift)

    part, rows = ("digits", crd_runs.METHODS) if shift == 1.0 else ("shifted", crd_runs.of_part("shifted"))
    results, bases = _race(options, part, rows, plan, world)
    shown = (measured[1], measured[3], measured[5]) if len(measured) == 6 else measured
    extra: dict[str, Any] = {f"FD at reward {GOAL:g}": partial(crd_tables.drift_at_reward, results, reward=GOAL)}
    if "CRD" in results:
        extra["samples CRD needs for it"] = partial(crd_claims.share_of_samples, results, bases, metric="reward")
    complete = not options.methods and part == "digits"
    return {
        "table": crd_tables.method_table(results, _mean(bases), shown, crd_tables.DIGITS, extra),
        "checks": crd_tables.digits_checks(results, shown, GOAL) if complete else [],
        "curves": crd_tables.curves(results, crd_tables.DIGITS),
        "base": bases,
        "runs": results,
    }


def _scenes(options: Options, part: str) -> dict[str, Any]:
    from gencontrol.bench.crd import claims as crd_claims
    from gencontrol.bench.crd import runs as crd_runs
    from gencontrol.bench.crd import scenes as crd_scenes
    from gencontrol.bench.crd import tables as crd_tables

    plan = crd_runs.SCENES_PLAN
    if options.quick:
        plan = replace(
            plan, rounds=2, groups=2, generations=2, demo_steps=2, train_times=2, measured=(1, 2), compiled=False
        )

    def world(seed: int) -> crd_scenes.ScenesWorld:
        return crd_scenes.build_world(part, seed, per_kind=2 if options.quick else crd_scenes.HELD_OUT[part])

    results, bases = _race(options, part, crd_runs.of_part(part), plan, world)
    rounds = plan.measured
    gained: dict[str, Any] = {"accuracy gained": lambda label: crd_claims.gain(results, bases, label)}
    if "CRD" in results:
        gained["samples CRD needs for it"] = lambda label: crd_claims.share_of_samples(results, bases, label)
        gained["FD of CRD at equal accuracy ×"] = lambda label: crd_claims.at_equal_accuracy(
            results, bases, label, "fd"
        )
    check = crd_claims.scenes_checks if part == "scenes" else crd_claims.words_checks
    return {
        "table": crd_tables.method_table(
            results, _mean(bases), (rounds[len(rounds) // 2 - 1], rounds[-1]), crd_tables.SCENES, gained
        ),
        "checks": [] if options.methods else check(results, bases),
        "curves": crd_tables.curves(results, crd_tables.SCENES),
        "base": bases,
        "runs": results,
    }


def _exact(options: Options) -> dict[str, Any]:
    from gencontrol.bench.crd import exact as crd_exact

    effort = crd_exact.Effort(rounds=4, samples=32, draws=500) if options.quick else crd_exact.Effort()
    return crd_exact.run(
        beta=1.0, seeds=range(options.first_seed, options.first_seed + options.seeds), effort=effort, say=_say
    )


_RUN: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "digits": _digits,
    "shifted": partial(_digits, shift=3.0),
    "exact": _exact,
    "scenes": partial(_scenes, part="scenes"),
    "words": partial(_scenes, part="words"),
}
PARTS = tuple(_RUN)


def main(options: Options) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON and curves; 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part, or a number out of range.
    """
    parts = chosen_parts(options.parts, PARTS)
    if options.quick:
        options = replace(options, seeds=min(options.seeds, 2))
    run_parts({part: partial(_RUN[part], options) for part in parts}, Path(options.output), "crd_")
    return 0
