"""`gencontrol bench gpc`: composition of policies (GPC), where the law is known and where a robot decides.

Parts: "exact" (methods/gpc.md §5.4 and §9 part A: closed forms, two modes), "fetch" (§9 part B: two imperfect parents
of Fetch pick-and-place, fitted weights, fresh paired episodes).  A claim that does not hold is printed as NOT
CONFIRMED and kept.  Trained parents and finished rows stay in the output folder: the same command goes on.
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
    parser = argparse.ArgumentParser(prog="gencontrol bench gpc", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="training seeds of part fetch, episodes pooled (default 1)"
    )
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--episodes", type=int, default=300, help="fresh episodes of each row and seed (default 300)")
    parser.add_argument("--num-envs", type=int, default=2, help="environments side by side (default 2)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of every part")
    parser.add_argument("--output", default="runs/bench/gpc", help="folder of the JSON results and tables")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exact(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench.gpc.exact import part_a

    return part_a(count=4000) if options.quick else part_a()  # the levels decide what the closed forms' tolerance is


def _fetch(options: argparse.Namespace) -> dict[str, Any]:
    from gencontrol.bench.gpc.fetch import Effort, part_b

    effort = Effort(test=options.episodes, num_envs=options.num_envs)
    if options.quick:
        effort = Effort(demos=2, steps=5, validation=2, test=2, num_envs=options.num_envs)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return part_b(seeds, effort, keep=Path(options.output) / "runs", say=_say)


PARTS = {"exact": _exact, "fetch": _fetch}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts, print their tables and verdicts, write one JSON file each.

    Raises:
        UsageError: an unknown part, or a number below 1.
        EnvironmentMissing: gymnasium-robotics is not installed (part fetch).
    """
    options = _parser().parse_args(arguments)
    if min(options.seeds, options.episodes, options.num_envs) < 1:
        raise UsageError("--seeds, --episodes and --num-envs of at least 1 are needed.")
    chosen = chosen_parts(options.parts, list(PARTS))
    run_parts({part: partial(PARTS[part], options) for part in chosen}, Path(options.output))
    return 0
