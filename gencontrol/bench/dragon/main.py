"""`gencontrol bench dragon`: the claims of DRAGON, with peers at equal compute, controls, seeds and intervals.

Parts: "6a" a distributional reward on a 2-D mixture, "6b" per-song against dataset distance on tiny songs, "sound" the
bundled text-to-audio model towards nine rewards.  Numbers are measured here and now; a claim that does not hold is
printed as NOT CONFIRMED and kept.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from gencontrol import config
from gencontrol.bench.parts import PartOptions, chosen_parts, run_parts

PARTS = ("6a", "6b", "sound")


@config.options
class Options(PartOptions):
    """Options of the benchmark.

    Args:
        parts: comma-separated: 6a, 6b, sound (default: all).
        seeds: of 6a and 6b.
        model: text-to-audio model of the part sound.
        targets: comma-separated rewards of the part sound (default: all nine).
        sound_rounds: rounds of the part sound.
        sound_pairs: prompts per round, four generations each.
        sound_minutes: targets that no longer fit are skipped.
        guidance: guidance scale of demonstrations and evaluation.
        device: of the part sound.
    """

    seeds: config.Count = 3
    output: str = "runs/bench/dragon"
    model: str = "bundled"
    targets: str = ""
    sound_rounds: config.Count = 6
    sound_pairs: Annotated[int, Ge(2)] = 32
    sound_minutes: config.Positive = 30.0
    guidance: float = 1.0
    device: str = "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _mixture(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dragon import mixture as dragon_mixture

    size = {"rounds": 60, "pairs": 256, "base_steps": 4000, "measured": 4000, "seeds": options.seeds}
    if options.quick:
        size = {"rounds": 2, "pairs": 16, "base_steps": 50, "measured": 200, "seeds": 1}
    return dragon_mixture.run(lr=3e-4, say=_say, **size)


def _songs(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dragon import songs as dragon_songs

    size = {"rounds": 30, "pairs": 256, "base_steps": 3000, "copies": 64, "seeds": options.seeds}
    if options.quick:
        size = {"rounds": 2, "pairs": 16, "base_steps": 50, "copies": 8, "seeds": 1}
    return dragon_songs.run(lr=1e-4, say=_say, **size)


def _sound(options: Options) -> dict[str, Any]:
    from gencontrol.bench.dragon import sound as dragon_sound
    from gencontrol.pipelines import TextToAudioPipeline
    from gencontrol.recipes.sound.data.grammar import sample_captions

    names = [n.strip() for n in options.targets.split(",") if n.strip()] or [row[0] for row in dragon_sound.TARGETS]
    budget = dragon_sound.Budget(
        rounds=1 if options.quick else options.sound_rounds,
        pairs=4 if options.quick else options.sound_pairs,
        generations=4,
        updates=2 if options.quick else 6,
        demo_steps=2 if options.quick else 12,
        eval_steps=2 if options.quick else 12,
        eval_items=8 if options.quick else 64,
        guidance_scale=options.guidance,
        lr=4e-5,
        micro_batch=64,
        minutes=options.sound_minutes,
    )
    pipeline = TextToAudioPipeline.from_pretrained(options.model).to(options.device)
    rewards = dragon_sound.load_targets(names, options.device)
    # The settings were chosen on the test captions of seed 0; these of seed 1 were never looked at before.
    task = pipeline.task(sample_captions(512, 0, "train"), sample_captions(budget.eval_items, 1, "test"))
    return dragon_sound.run(task, rewards, budget, seed=0, say=_say, folder=Path(options.output) / "sounds")


def main(options: Options) -> int:
    """Run the chosen parts, print tables and verdicts, write JSON; returns 0 also where a claim is not confirmed.

    Raises:
        UsageError: an unknown part or target, or a number out of range.
    """
    parts = chosen_parts(options.parts, PARTS)
    run = {"6a": _mixture, "6b": _songs, "sound": _sound}
    run_parts({part: partial(run[part], options) for part in parts}, Path(options.output))
    return 0
