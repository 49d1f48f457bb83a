"""`gencontrol bench ctrl`: the claims of CTRL with its bound, its peers at their true cost, and seeds.

Parts: "mixture" (E-CTRL-1 of docs/methods/ctrl.md), "digits" (E-CTRL-2), "linear" (E-CTRL-3), "scenes" (two attributes
on the bundled text-to-image model).  A claim that does not hold is printed as NOT CONFIRMED and kept.  Finished runs
are
kept in the output folder: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from gencontrol import config
from gencontrol.bench.parts import PartOptions, chosen_parts, run_parts


@config.options
class Options(PartOptions):
    """Options of the benchmark.

    Args:
        parts: comma-separated: mixture, linear, digits, scenes (default: all).
        seeds: of every part.
        iterations: updates of each training of mixture and linear; with the pool, rounds of 10.
        batch: paths of an update.
        scene_iterations: rounds of 20 updates of the part scenes.
        scene_batch: rows of an update of the part scenes.
    """

    seeds: config.Count = 3
    iterations: config.Count = 400
    batch: Annotated[int, Ge(2)] = 96
    scene_iterations: config.Count = 250
    scene_batch: Annotated[int, Ge(2)] = 64
    output: str = "runs/bench/ctrl"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _runs(options: Options) -> Path:
    """Where finished runs are kept, so that the same command goes on where it was interrupted."""
    return Path(options.output) / "runs"


def _mixture(options: Options) -> dict[str, Any]:
    from gencontrol.bench.ctrl.exact import mixture_part

    steps, samples = (6, 400) if options.quick else (40, 20_000)
    return mixture_part(
        seeds=range(options.seeds),
        iterations=options.iterations,
        batch=options.batch,
        steps=steps,
        samples=samples,
        say=_say,
        keep=_runs(options),
    )


def _linear(options: Options) -> dict[str, Any]:
    from gencontrol.bench.ctrl.exact import linear_part

    samples = 1000 if options.quick else 20_000
    iterations = max(2, options.iterations // 2)
    return linear_part(
        seeds=range(options.seeds), iterations=iterations, samples=samples, say=_say, keep=_runs(options)
    )


def _digits(options: Options) -> dict[str, Any]:
    from gencontrol.bench.ctrl.digits import Effort, digits_part

    effort = Effort()
    if options.quick:
        effort = Effort(3, 8, 64, 2, fit_steps=5, base_images=32, cfg_updates=(2, 4), repeats=1)
    return digits_part(seeds=range(options.seeds), effort=effort, say=_say, keep=_runs(options))


def _scenes(options: Options) -> dict[str, Any]:
    from gencontrol.bench.ctrl.scenes import Effort, scenes_part

    effort = Effort(options.scene_iterations, options.scene_batch)
    if options.quick:
        effort = Effort(3, 8, 6, 3.0, 24, 2, per_row=4, base_labelled=60, base_images=8, fit_steps=5, samples=8)
    return scenes_part(seeds=range(options.seeds), effort=effort, say=_say, keep=_runs(options))


_RUN = {"mixture": _mixture, "linear": _linear, "digits": _digits, "scenes": _scenes}
PARTS = tuple(_RUN)


def main(options: Options) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON and curves; 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part, or a number out of range.
    """
    parts = chosen_parts(options.parts, PARTS)
    if options.quick:
        options = replace(options, seeds=2, iterations=3, batch=8)
    run_parts({part: partial(_RUN[part], options) for part in parts}, Path(options.output))
    return 0
