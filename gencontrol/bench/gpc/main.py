"""`gencontrol bench gpc`: composition of policies (GPC), where the law is known and where a robot decides.

Parts: "exact" (docs/methods/gpc.md#exact-laws and docs/methods/gpc.md#part-a: closed forms, two modes), "fetch"
(docs/methods/gpc.md#part-b: two imperfect parents of Fetch pick-and-place, fitted weights, fresh paired episodes).  A
claim that does not hold is printed as NOT CONFIRMED and kept.  Trained parents and finished rows stay in the output
folder: the same command goes on.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from gencontrol import config
from gencontrol.bench.parts import PartOptions, chosen_parts, run_parts


@config.options
class Options(PartOptions):
    """Options of the benchmark.

    Args:
        parts: comma-separated: exact, fetch (default: all).
        seeds: training seeds of part fetch, episodes pooled.
        first_seed: the first of them.
        episodes: fresh episodes of each row and seed.
        num_envs: environments side by side.
    """

    seeds: config.Count = 1
    first_seed: int = 0
    episodes: config.Count = 300
    num_envs: config.Count = 2
    output: str = "runs/bench/gpc"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exact(options: Options) -> dict[str, Any]:
    from gencontrol.bench.gpc.exact import part_a

    return part_a(count=4000) if options.quick else part_a()  # the levels decide what the closed forms' tolerance is


def _fetch(options: Options) -> dict[str, Any]:
    from gencontrol.bench.gpc.fetch import Effort, part_b

    effort = Effort(test=options.episodes, num_envs=options.num_envs)
    if options.quick:
        effort = Effort(demos=2, steps=5, validation=2, test=2, num_envs=options.num_envs)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return part_b(seeds, effort, keep=Path(options.output) / "runs", say=_say)


PARTS = {"exact": _exact, "fetch": _fetch}


def main(options: Options) -> int:
    """Run the chosen parts, print their tables and verdicts, write one JSON file each.

    Raises:
        UsageError: an unknown part, or a number below 1.
        EnvironmentMissing: gymnasium-robotics is not installed (part fetch).
    """
    chosen = chosen_parts(options.parts, list(PARTS))
    run_parts({part: partial(PARTS[part], options) for part in chosen}, Path(options.output))
    return 0
