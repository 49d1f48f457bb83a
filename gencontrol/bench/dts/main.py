"""`gencontrol bench dts`: the claims of Diffusion Tree Sampling and Search, with peers at equal model calls, and seeds.

Parts: "chain" (E-DTS-1 of docs/methods/dts.md), "mixture" (E-DTS-2), "digits" (E-DTS-3), "maximum" (E-DTS-4),
"posterior" (E-DTS-5), "tokens", "throughput", "sound".  Numbers are measured here and now; a claim that does not hold
is printed as NOT CONFIRMED and kept.  Seeds below 100 are reported; those looked at while writing are 100 and up.
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
        parts: comma-separated: chain, mixture, digits, maximum, posterior, tokens, throughput, sound (default: all).
        seeds: mixture and the token search take four times as many, posterior twice, sound one.
        sound_prompts: prompts of the part sound.
        sound_nfe: model calls per prompt and method of the part sound.
        sound_minutes: fewer calls are made where more would not fit.
        device: of the part sound.
    """

    seeds: Annotated[int, Ge(2)] = 5
    output: str = "runs/bench/dts"
    sound_prompts: Annotated[int, Ge(2)] = 20
    sound_nfe: Annotated[int, Ge(20)] = 4000
    sound_minutes: config.Positive = 12.0
    device: str = "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _chain(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import chain as dts_chain

    if options.quick:
        return dts_chain.run(trees=8, rounds=(10, 20), full=8, say=_say)
    return dts_chain.run(trees=30 * options.seeds, rounds=(200, 1000, 4000), full=80 * options.seeds, say=_say)


def _mixture(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import mixture as dts_mixture

    budgets = (300, 600) if options.quick else (10_000, 30_000, 100_000)
    seeds = options.seeds if options.quick else 4 * options.seeds  # the distances have heavy tails
    return dts_mixture.run(budgets=budgets, seeds=range(seeds), say=_say)


def _digits(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import digits as dts_digits

    quick = options.quick
    return dts_digits.posterior(
        dts_digits.World.bundled(),
        classes=("1", "8") if quick else ("1", "3", "8"),
        budgets=(60, 120) if quick else (3000, 30_000),
        seeds=range(options.seeds),
        reference=64 if quick else 12_000,
        say=_say,
    )


def _maximum(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import digits as dts_digits

    nfe = 120 if options.quick else 15_000
    return dts_digits.maximum(dts_digits.World.bundled(), nfe=nfe, seeds=range(options.seeds), say=_say)


def _posterior(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import posterior as dts_posterior

    quick = options.quick
    return dts_posterior.run(
        budgets=(400, 800) if quick else (4000, 20_000, 100_000),
        seeds=range(options.seeds if quick else 2 * options.seeds),
        reference=64 if quick else 20_000,
        keep=None if quick else Path(options.output) / "posterior",
        say=_say,
        few=quick,
    )


def _tokens(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import tokens as dts_tokens

    nfe, cap = (100, 100) if options.quick else (20_000, 20_000)
    searches = range(options.seeds if options.quick else 4 * options.seeds)
    return dts_tokens.run(nfe=nfe, seeds=range(options.seeds), searches=searches, cap=cap, say=_say)


def _throughput(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import throughput as dts_throughput

    size = (
        {"nfe": 1024, "runs": 1, "dim": 32, "depth": 1}
        if options.quick
        else {"nfe": 4096, "runs": 3, "dim": 256, "depth": 8}
    )
    return dts_throughput.run(**size, say=_say)


def _sound(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dts import sound as dts_sound
    from gencontrol.pipelines import TextToAudioPipeline
    from gencontrol.recipes.sound.data.grammar import sample_captions
    from gencontrol.rewards import load_reward

    budget = dts_sound.SoundBudget(nfe=options.sound_nfe, minutes=options.sound_minutes)
    count = options.sound_prompts
    if options.quick:
        budget, count = dts_sound.SoundBudget(nfe=10, steps=5, leaf_batch=1, minutes=options.sound_minutes), 2
    pipe = TextToAudioPipeline.from_pretrained("bundled").to(options.device)
    search = dts_sound.SoundSearch(
        pipe, load_reward("clap", device=options.device), sample_captions(count, 2, "test"), budget
    )
    return dts_sound.run(search, seed=0, say=_say)


_RUN = {
    "chain": _chain,
    "mixture": _mixture,
    "digits": _digits,
    "maximum": _maximum,
    "posterior": _posterior,
    "tokens": _tokens,
    "throughput": _throughput,
    "sound": _sound,
}
PARTS = tuple(_RUN)


def main(options: Options) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON and curves; 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part, or a number out of range.
    """
    parts = chosen_parts(options.parts, PARTS)
    if options.quick:
        options = replace(options, seeds=2)
    run_parts({part: partial(_RUN[part], options) for part in parts}, Path(options.output))
    return 0
