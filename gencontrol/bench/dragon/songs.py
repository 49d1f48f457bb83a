"""DRAGON claim 6b: per-song against dataset Fréchet distance on tiny "songs", and cheap demonstrations.

Songs have 16 frames of 6 bands; a prompt is a band profile under a decaying envelope and a tremolo.  The base flow
learned from songs half of which are noisy; the reference holds 2000 clean ones.  Frames are embedded by 10 random tanh
features of (frame, difference to the frame before).  Claims: each set construction is best on its own distance and
improves both (the pattern of the paper's Table 5), the per-song win rate is high, and 8-step demonstrations serve as
well as 20-step ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.matching.dragon import Dragon, DragonConfig
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression, RwrConfig
from gencontrol.algorithms.matching.sets import build_sets
from gencontrol.algorithms.online.rollout import Sampling, generate, score
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.base import Check, Loop, over_seeds, run_in_memory, table
from gencontrol.bench.toys import EmbeddedFrechet, EmbeddedFrechetItem, fit_flow, toy_flow, toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.rng import item_generators, stream
from gencontrol.stats import compare_sets, paired_wins

FRAMES, BANDS, PROMPTS = 16, 6, 8
SIZE, NOISE, STEPS, UPDATES = FRAMES * BANDS, 0.3, 20, 6
NAMES = [f"profile {i}" for i in range(PROMPTS)]


def songs(prompt: Tensor, generator: torch.Generator, *, noisy: float = 0.0) -> Float[Tensor, "n 96"]:
    """Draw songs of prompts [n]; a share `noisy` of them carries noise of deviation 0.3 on every band and frame."""
    count = len(prompt)
    profile = 0.3 + 1.4 * torch.rand(PROMPTS, BANDS, generator=stream(0, "songs/profiles"))[prompt]
    gain, decay, rate, phase = torch.rand(4, count, 1, generator=generator)
    frame = torch.arange(FRAMES)
    envelope = (0.5 + gain) * torch.exp(-(0.02 + 0.1 * decay) * frame)
    tremolo = 1 + 0.4 * torch.sin((0.4 + 0.8 * rate) * frame + 2 * torch.pi * phase)
    x = (envelope * tremolo)[:, :, None] * profile[:, None]
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    dirty = (torch.rand(count, generator=generator) < noisy)[:, None, None]
    return (x + dirty * NOISE * torch.randn(x.shape, generator=generator)).flatten(1)


def frame_features(seed: int) -> Callable[[Tensor], Float[Tensor, "b 15 10"]]:
    """Return the embedding of songs: 10 tanh features per frame after the first."""
    generator = stream(seed, "songs/features")
    weight = torch.randn(2 * BANDS, 10, generator=generator) * 0.5
    bias = 0.5 * torch.randn(10, generator=generator)

    def embed(x: Tensor) -> Tensor:
        frames = x.view(-1, FRAMES, BANDS)
        return torch.tanh(torch.cat([frames[:, 1:], frames.diff(dim=1)], -1) @ weight + bias)

    return embed


def encode(texts: Sequence[str]) -> Float[Tensor, "b 8"]:
    """One-hot condition of the prompt's number."""
    return torch.nn.functional.one_hot(torch.tensor([int(t.split()[1]) for t in texts]), PROMPTS).float()


def make_task(denoiser: Denoiser) -> PromptTask:
    """The task on songs."""
    return toy_task(denoiser, SIZE, prompts=NAMES, eval_prompts=NAMES, encode=encode)


@dataclass(frozen=True)
class World:
    """The base flow and the two rewards of one seed."""

    base: Denoiser
    whole: EmbeddedFrechet
    song: EmbeddedFrechetItem
    seed: int
    copies: int


def make_world(seed: int, *, base_steps: int, copies: int) -> World:
    """Train the base flow and take the reference statistics; a measurement draws `copies` songs per prompt."""
    clean = songs(torch.arange(2000) % PROMPTS, stream(seed, "songs/reference"))
    whole = EmbeddedFrechet(frame_features(seed), clean)

    size = min(50_000, 16 * base_steps)
    prompts = torch.arange(size) % PROMPTS
    bank, conds = songs(prompts, stream(seed, "songs/bank"), noisy=0.5), torch.eye(PROMPTS)[prompts]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(size, (256,), generator=generator)
        return bank[rows], conds[rows]

    base = toy_flow(SIZE, conditions=PROMPTS, width=192, seed=seed)
    fit_flow(base, batch, steps=base_steps, lr=2e-3, seed=seed)
    return World(base, whole, EmbeddedFrechetItem(whole), seed, copies)


def sample_songs(world: World, denoiser: Denoiser) -> Float[Tensor, "n 96"]:
    """Draw the songs of a measurement from fixed noise."""
    task, names = make_task(denoiser), [name for name in NAMES for _ in range(world.copies)]
    ctx = StepContext(seed=world.seed, step=0, micro_batch=len(names))
    generators = item_generators(world.seed, "songs/measure", range(len(names)))
    return generate(task, encode(names), generators, Sampling(STEPS, "euler", 1.0), ctx)


def measure(world: World, x: Float[Tensor, "n 96"], before: Float[Tensor, "n 96"]) -> dict[str, float]:
    """Return both distances of songs, and their win rates against the base's songs from the same noise."""
    frames = {True: world.whole.embed(x), False: world.whole.embed(before)}
    values = {side: -world.whole.law.clip_distances(held) for side, held in frames.items()}

    def value(rows: Tensor, tuned: bool) -> float:
        valid = torch.ones(len(rows), dtype=torch.bool)
        return world.whole.evaluate({"frames": frames[tuned][rows], "valid": valid})

    wins, _ = compare_sets(
        value, len(x), subset=len(x) // 2, draws=100, generator=stream(world.seed, "songs/bootstrap")
    )
    return {
        "song_fad": -float(values[True].mean()),
        "song_win_rate": paired_wins(values[True], values[False]).value,
        "set_fad": -value(torch.arange(len(x)), True),
        "set_win_rate": wins,
    }


@dataclass(frozen=True)
class Variant:
    """A row of the table; `reward` is "song" or "set"."""

    name: str
    reward: str
    options: dict[str, Any]
    rwr: bool = False


SONG, CHEAP = "per-song, KTO (DRAGON)", "per-song, KTO, 8-step demonstrations"
VARIANTS = (
    Variant(SONG, "song", {"loss": "kto"}),
    Variant(CHEAP, "song", {"loss": "kto", "demo_steps": 8}),
    Variant("per-song, DPO", "song", {"loss": "dpo"}),
    Variant("per-song, positive-only", "song", {"loss": "positive"}),
    Variant("per-song, reward-weighted regression", "song", {}, rwr=True),
    Variant("dataset, KTO (DRAGON)", "set", {"loss": "kto"}),
    Variant("dataset, positive-only", "set", {"loss": "positive"}),
    Variant("dataset, reward-weighted regression by influence", "set", {}, rwr=True),
    Variant("random split, KTO (control)", "song", {"loss": "kto", "split": "random"}),
    Variant("random split, positive-only (control)", "song", {"loss": "positive", "split": "random"}),
)


def tune(world: World, variant: Variant, *, rounds: int, pairs: int, lr: float) -> tuple[Denoiser, float]:
    """Fine-tune a copy of the base; returns it with the averaged weights, and the seconds taken."""
    denoiser = copy.deepcopy(world.base)
    roles = Roles(denoiser.network)
    reward: Any = world.song if variant.reward == "song" else world.whole
    common = {"demo_steps": STEPS, "eval_steps": STEPS, "updates_per_round": UPDATES, **variant.options}
    algorithm: Dragon | RewardWeightedRegression
    if variant.rwr:
        weighted = RwrConfig(prompts_per_round=pairs, **common)
        algorithm = RewardWeightedRegression(make_task(denoiser), reward, weighted, roles=roles, seed=world.seed)
    else:
        config = DragonConfig(prompts_per_round=pairs, **common)
        algorithm = Dragon(make_task(denoiser), reward, config, roles=roles, seed=world.seed)
    records = run_in_memory(algorithm, rounds, Loop(lr), seed=world.seed)
    roles.copy("ema", "policy")
    return denoiser, sum(record["time/step"] for record in records)


def first_sets(world: World, pairs: int) -> dict[str, dict[str, float]]:
    """Return both distances of the base's generations and of D+ built with either reward from the same pairs."""
    names = [NAMES[i % PROMPTS] for i in range(pairs) for _ in range(2)]
    task = make_task(world.base)
    ctx = StepContext(seed=world.seed, step=0, micro_batch=2 * pairs)
    generators = item_generators(world.seed, "songs/first", range(2 * pairs))
    x = generate(task, encode(names), generators, Sampling(STEPS, "euler", 1.0), ctx)
    whole = score(task, world.whole, x, names, ctx)
    rows = {"generations": torch.arange(0, 2 * pairs, 2)}
    for name, reward in (("per-song", world.song), ("dataset", world.whole)):
        scores = score(task, reward, x, names, ctx)
        generator = stream(world.seed, "songs/sets")
        rows[name] = build_sets(
            reward, scores, 2, rule="positive", sweeps=2, grouping="best_worst", generator=generator
        ).positive
    assert whole.features is not None
    result = {}
    for name, chosen in rows.items():
        held = {key: value[chosen] for key, value in whole.features.items()}
        song = -float(world.whole.law.clip_distances(held["frames"]).mean())
        result[name] = {"song_fad": -song, "set_fad": -world.whole.evaluate(held)}
    return result


def crossover(sets: dict[str, dict[str, float]]) -> bool:
    """Whether each construction is best on its own distance and both improve both."""
    start, song, whole = sets["generations"], sets["per-song"], sets["dataset"]
    own_best = song["song_fad"] < whole["song_fad"] and whole["set_fad"] < song["set_fad"]
    return own_best and all(s[key] < start[key] for s in (song, whole) for key in start)


def run(
    *, seeds: int, rounds: int, pairs: int, base_steps: int, copies: int, lr: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all rows on all seeds; returns rows, checks and the printed tables."""
    rows: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("base", "clean songs", *(v.name for v in VARIANTS))
    }
    sets = []
    for seed in range(seeds):
        world = make_world(seed, base_steps=base_steps, copies=copies)
        before = sample_songs(world, world.base)
        clean = songs(torch.arange(PROMPTS).repeat_interleave(copies), stream(seed, "songs/clean"))
        rows["base"].append(measure(world, before, before))
        rows["clean songs"].append(measure(world, clean, before))
        sets.append(first_sets(world, pairs))
        for variant in VARIANTS:
            denoiser, seconds = tune(world, variant, rounds=rounds, pairs=pairs, lr=lr)
            result = measure(world, sample_songs(world, denoiser), before)
            rows[variant.name].append(result | {"seconds": seconds})
            say(f"6b seed {seed} {variant.name}: per-song {result['song_fad']:.3f} dataset {result['set_fad']:.3f}")
    held = {name: over_seeds(found) for name, found in rows.items()}
    return {
        "rows": held,
        "per_seed": rows,
        "first_sets": sets,
        "checks": _checks(rows, sets),
        "table": _tables(held, sets, seeds),
    }


def _tables(held: dict[str, Any], sets: list[dict[str, dict[str, float]]], seeds: int) -> str:
    keys = ("song_fad", "song_win_rate", "set_fad", "set_win_rate", "seconds")
    first = {name: over_seeds([found[name] for found in sets]) for name in sets[0]}
    return table(
        f"6b. First round's sets, {seeds} seeds; lower is better",
        ("set", "per-song FAD", "dataset FAD"),
        [[name, found["song_fad"], found["set_fad"]] for name, found in first.items()],
    ) + table(
        f"6b. Training on tiny songs, {seeds} seeds (mean ± half the 95 % t interval)",
        ("training", "per-song FAD", "paired win rate", "dataset FAD", "bootstrap win rate", "seconds"),
        [[name, *(estimates.get(key, "") for key in keys)] for name, estimates in held.items()],
    )


def _checks(rows: dict[str, list[dict[str, float]]], sets: list[dict[str, dict[str, float]]]) -> list[Check]:
    crossed = sum(crossover(found) for found in sets)
    wins = [row["song_win_rate"] for row in rows[SONG]]
    ratios = [a["song_fad"] / b["song_fad"] for a, b in zip(rows[CHEAP], rows[SONG], strict=True)]
    return [
        Check("crossover of the set constructions on every seed", f"{crossed} of {len(sets)}", crossed == len(sets)),
        Check("per-song paired win rate ≥ 0.80 on every seed", f"{min(wins):.3f} (worst seed)", min(wins) >= 0.8),
        Check(
            "8-step demonstrations end at most 5 % above the per-song FAD of 20-step ones, on every seed",
            f"{max(ratios):.3f} times (worst seed)",
            max(ratios) <= 1.05,
        ),
    ]
