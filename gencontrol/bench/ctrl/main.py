"""`gencontrol bench ctrl`: the claims of CTRL with its bound, its peers at their true cost, and seeds.

Parts: "mixture" (E-CTRL-1 of methods/ctrl.md), "digits" (E-CTRL-2), "linear" (E-CTRL-3), "scenes" (two attributes on
the bundled text-to-image model).  A claim that does not hold is printed as NOT CONFIRMED and kept.  Finished runs are
kept in the output folder: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gencontrol.bench.parts import chosen_parts, run_parts
from gencontrol.errors import UsageError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gencontrol bench ctrl", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every part (default 3)")
    parser.add_argument("--iterations", type=int, default=400, help="updates of each training (default 400)")
    parser.add_argument("--batch", type=int, default=96, help="paths of an update (default 96)")
    parser.add_argument("--scene-iterations", type=int, default=240, help="of the part scenes (default 240)")
    parser.add_argument("--scene-batch", type=int, default=32, help="paths of an update of the part scenes (32)")
    parser.add_argument("--scene-guidance", type=float, default=1.0, help="guidance of the base of scenes (1: none)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of every part: two seeds, few updates")
    parser.add_argument("--output", default="runs/bench/ctrl", help="folder of the JSON results, tables and curves")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _runs(options: argparse.Namespace) -> Path:
    """Where finished runs are kept, so that the same command goes on where it was interrupted."""
    return Path(options.output) / "runs"


def _mixture(options: argparse.Namespace) -> dict[str, Any]:
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


def _linear(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench.ctrl.exact import linear_part

    samples = 1000 if options.quick else 20_000
    iterations = max(2, options.iterations // 2)
    return linear_part(
        seeds=range(options.seeds), iterations=iterations, samples=samples, say=_say, keep=_runs(options)
    )


def _digits(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench.ctrl.digits import Effort, digits_part

    effort = Effort(options.iterations, options.batch)
    if options.quick:
        effort = Effort(options.iterations, options.batch, fit_steps=5, cfg_updates=(2, 4), repeats=1)
    return digits_part(seeds=range(options.seeds), effort=effort, say=_say, keep=_runs(options))


def _scenes(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench.ctrl.scenes import Effort, scenes_part

    effort = Effort(options.scene_iterations, options.scene_batch, guidance_scale=options.scene_guidance)
    if options.quick:
        effort = Effort(3, 8, 6, options.scene_guidance, per_row=4, fit_steps=5, samples=8)
    return scenes_part(seeds=range(options.seeds), effort=effort, say=_say, keep=_runs(options))


_RUN = {"mixture": _mixture, "linear": _linear, "digits": _digits, "scenes": _scenes}
PARTS = tuple(_RUN)


def main(arguments: Sequence[str]) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON and curves; 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part, or a number out of range.
    """
    options = _parser().parse_args(list(arguments))
    parts = chosen_parts(options.parts, PARTS)
    if min(options.seeds, options.iterations, options.scene_iterations) < 1:
        raise UsageError("--seeds and both iterations are at least 1.")
    if min(options.batch, options.scene_batch) < 2:
        raise UsageError("the batches are at least 2.")
    if options.quick:
        options.seeds, options.iterations, options.batch = 2, 3, 8
    run_parts({part: partial(_RUN[part], options) for part in parts}, Path(options.output))
    return 0
