"""`gencontrol bench crd`: CRD against DiffusionNFT, AWM, RWR and Flow-GRPO, each also with CRD's anchor, and ablations.

Parts: "digits" (experiment A of methods/crd.md §6), "exact" (KL to the closed-form tilt of a Gaussian mixture, default
against the exact mode).  All methods draw equal samples and their network passes are counted.  A claim that does not
hold is printed as NOT CONFIRMED and kept.  Bases and finished runs are kept in the output folder: the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gencontrol.bench.base import verdicts, write_result
from gencontrol.bench.dts_measure import draw_curves
from gencontrol.errors import UsageError, nearest

#: reward at which drifts are compared
GOAL = 0.97


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gencontrol bench crd", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of base and fine-tuning (default 3)")
    parser.add_argument("--rounds", type=int, default=150, help="rounds of every run of the part digits (default 150)")
    parser.add_argument("--methods", default="", help="only rows of the part digits whose label holds this text")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two seeds, few rounds, poor bases")
    parser.add_argument("--output", default="runs/bench/crd", help="folder of the JSON results, tables and curves")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _digits(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench import crd_digits, crd_runs, crd_tables

    rounds = 6 if options.quick else options.rounds
    measured = tuple(sorted({max(1, rounds * k // 6) for k in range(1, 7)}))
    plan = crd_runs.Plan(rounds=rounds, measured=measured)
    shown = (measured[1], measured[3], measured[5]) if len(measured) == 6 else measured
    methods = [m for m in crd_runs.available() if options.methods in m.label]
    if not methods:
        raise UsageError(f"--methods: no row's label holds '{options.methods}'.")
    results: dict[str, list[Any]] = {m.label: [] for m in methods}
    bases = []
    for seed in range(options.seeds):
        world = crd_digits.build_world(
            seed, steps=150 if options.quick else crd_digits.STEPS, bases=Path(options.output) / "bases"
        )
        bases.append(world.measure(world.denoiser) | {"fd_guided": world.measure(world.denoiser, scale=3.0)["fd"]})
        for method in methods:
            began = time.perf_counter()
            run = crd_runs.kept_run(Path(options.output) / "runs", method, plan, world, seed)
            results[method.label].append(run)
            last = {key: f"{points[max(points)]:.3g}" for key, points in run.items()}
            _say(f"digits, seed {seed}, {method.label}: {last} ({time.perf_counter() - began:.0f} s)")
    base = {key: sum(row[key] for row in bases) / len(bases) for key in bases[0]}
    whole = not options.methods
    return {
        "table": crd_tables.method_table(results, base, shown, GOAL),
        "checks": crd_tables.checks(results, shown, GOAL) if whole else [],
        "curves": crd_tables.curves(results),
        "base": bases,
        "runs": results,
    }


def _exact(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench import crd_exact

    effort = crd_exact.Effort(rounds=4, samples=32, draws=500) if options.quick else crd_exact.Effort()
    return crd_exact.run(beta=1.0, seeds=range(options.seeds), effort=effort, say=_say)


_RUN = {"digits": _digits, "exact": _exact}
PARTS = tuple(_RUN)


def main(arguments: Sequence[str]) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON and curves; 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part, or a number out of range.
    """
    options = _parser().parse_args(list(arguments))
    parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"unknown part '{part}'.{nearest(part, PARTS)} Parts: {', '.join(PARTS)}.")
    if options.seeds < 1 or options.rounds < 6:
        raise UsageError("--seeds is at least 1, --rounds at least 6.")
    if options.quick:
        options.seeds = min(options.seeds, 2)
    folder = Path(options.output)
    for part in parts:
        began = time.perf_counter()
        result = _RUN[part](options)
        seconds = time.perf_counter() - began
        printed = result.pop("table") + "\n" + verdicts(result["checks"])
        picture = draw_curves(folder, f"crd_{part}", result["curves"])
        path = write_result(folder, f"crd_{part}", result, seconds)
        (folder / f"crd_{part}.md").write_text(printed, encoding="utf-8")
        curves = f", curves {picture}" if picture is not None else ""
        print(printed + f"\n{part}: {seconds:.0f} s, written to {path}{curves}", flush=True)
    return 0
