"""DRAGON on sound: one model tuned towards nine rewards of all three kinds, against peers at equal samples and steps.

Targets: CLAP score, quality, loudness range, spectral centroid (instance), per-song FAD with two encoders (instance to
law), dataset FAD with two encoders and Vendi (law).  Peers: reward-weighted regression, regression on D+ alone, and the
random split, which sees no reward and is therefore trained once.  Every model is scored on held-out prompts from noise
that the base model got too: paired win rate with Wilson interval for item rewards, bootstrap win rate over subsets for
set rewards (ours: the paper's definition is not known).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.matching.dragon import Dragon, DragonConfig
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression, RwrConfig
from gencontrol.algorithms.online.compare import compare_scores
from gencontrol.algorithms.online.rollout import Sampling, Scores, generate, score
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.base import Check, Loop, run_in_memory, table
from gencontrol.models.roles import Roles
from gencontrol.rng import item_generators, stream
from gencontrol.stats import Estimate, student_t

#: (name in the tables, name of the reward, options of the reward)
TARGETS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("clap", "clap", {}),
    ("quality", "quality", {}),
    ("spectral-centroid", "spectral-centroid", {}),
    ("loudness-range", "loudness-range", {}),
    ("fad/clap", "fad", {"encoder": "clap"}),
    ("fad/mel", "fad", {"encoder": "mel"}),
    ("fad-set/clap", "fad-set", {"encoder": "clap"}),
    ("fad-set/mel", "fad-set", {"encoder": "mel"}),
    ("vendi", "vendi", {}),
)
DRAGON, RWR, POSITIVE, RANDOM = "DRAGON", "reward-weighted", "positive-only", "random split"


@dataclass(frozen=True)
class Budget:
    """Equal resources of every method: rounds, prompts per round, generations of each, updates, sampler steps."""

    rounds: int
    pairs: int
    generations: int
    updates: int
    demo_steps: int
    eval_steps: int
    eval_items: int
    guidance_scale: float
    lr: float
    micro_batch: int
    minutes: float


def make_algorithm(
    method: str, task: PromptTask, reward: Any, budget: Budget, roles: Roles, seed: int
) -> Dragon | RewardWeightedRegression:
    """Return a method with the budget's samples and steps."""
    common: dict[str, Any] = {
        "generations": budget.generations,
        "updates_per_round": budget.updates,
        "demo_steps": budget.demo_steps,
        "eval_steps": budget.eval_steps,
        "guidance_scale": budget.guidance_scale,
        "ema_decay": 0.9,
    }
    if method == RWR:
        weighted = RwrConfig(prompts_per_round=budget.pairs, **common)
        return RewardWeightedRegression(task, reward, weighted, roles=roles, seed=seed)
    options: dict[str, Any] = {
        DRAGON: {"loss": "kto"},
        POSITIVE: {"loss": "positive"},
        RANDOM: {"loss": "kto", "split": "random"},
    }[method]
    config = DragonConfig(prompts_per_round=budget.pairs, **common, **options)
    return Dragon(task, reward, config, roles=roles, seed=seed)


class SoundBench:
    """The base model with its evaluation sounds; tunes fresh copies of its weights."""

    def __init__(self, task: PromptTask, rewards: dict[str, Any], budget: Budget, *, seed: int) -> None:
        """Sample and score the base model once."""
        self.task, self.rewards, self.budget, self.seed = task, rewards, budget, seed
        self.prompts = [task.eval_prompts[i % len(task.eval_prompts)] for i in range(budget.eval_items)]
        self.weights = copy.deepcopy(task.denoiser.network.state_dict())
        self.base_sounds = self.sounds()
        self.base_scores = {name: self.score(name, self.base_sounds) for name in rewards}

    def _ctx(self) -> StepContext:
        return StepContext(seed=self.seed, step=0, micro_batch=self.budget.micro_batch, autocast=self._autocast)

    def _autocast(self) -> torch.autocast:
        """bfloat16 for the networks, as the demo trains them."""
        return torch.autocast(next(self.task.denoiser.parameters()).device.type, dtype=torch.bfloat16)

    def sounds(self) -> Float[Tensor, "n *c s"]:
        """Generate the evaluation sounds with the network's present weights; the noise is the same at each call."""
        how = Sampling(self.budget.eval_steps, "euler", self.budget.guidance_scale)
        generators = item_generators(self.seed, "sound/eval", range(len(self.prompts)))
        latents = generate(self.task, self.task.encode(self.prompts), generators, how, self._ctx())
        parts = latents.split(self.budget.micro_batch)
        return torch.cat([self.task.decode(part).cpu() for part in parts])

    def score(self, name: str, sounds: Float[Tensor, "n *c s"]) -> Scores:
        """Score sounds with one reward."""
        as_they_are = replace(self.task, decode=lambda x: x)
        return score(as_they_are, self.rewards[name], sounds, self.prompts, self._ctx())

    def wins(self, name: str, sounds: Float[Tensor, "n *c s"]) -> tuple[Estimate, Estimate]:
        """Return (win rate, gain) of sounds over the base's under one reward."""
        generator = stream(self.seed, "sound/bootstrap")
        found = compare_scores(self.rewards[name], self.score(name, sounds), self.base_scores[name], generator)
        return found[0], found[1]

    def tune(self, method: str, reward: Any) -> tuple[Float[Tensor, "n *c s"], float]:
        """Train a method from the base weights; returns its evaluation sounds and the seconds of training."""
        network = self.task.denoiser.network
        network.load_state_dict(self.weights)
        roles = Roles(network)
        algorithm = make_algorithm(method, self.task, reward, self.budget, roles, self.seed)
        loop = Loop(self.budget.lr, self.budget.micro_batch, autocast=self._autocast)
        records = run_in_memory(algorithm, self.budget.rounds, loop, seed=self.seed)
        with roles.use("ema"):
            sounds = self.sounds()
        network.load_state_dict(self.weights)
        return sounds, sum(record["time/step"] for record in records)


def load_targets(names: Sequence[str], device: str) -> dict[str, Any]:
    """Load the rewards of the named rows of `TARGETS`.

    Raises:
        UsageError: a name that is not in the table, or a reward that cannot be loaded.
    """
    from gencontrol.errors import UsageError, nearest
    from gencontrol.rewards import load_reward

    known = {name: (reward, options) for name, reward, options in TARGETS}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown target '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
    takes_device = {"clap", "fad", "fad-set", "vendi"}
    return {
        name: load_reward(
            known[name][0], **known[name][1], **({"device": device} if known[name][0] in takes_device else {})
        )
        for name in names
    }


def run(
    task: PromptTask,
    rewards: dict[str, Any],
    budget: Budget,
    *,
    seed: int,
    say: Callable[[str], None],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Tune towards every target with every method; targets past `budget.minutes` are skipped and named."""
    began = time.perf_counter()
    bench = SoundBench(task, rewards, budget, seed=seed)
    say(f"sound: base scored in {time.perf_counter() - began:.0f} s")
    random_sounds, random_s = bench.tune(RANDOM, next(iter(rewards.values())))
    rows: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    matrix: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {RANDOM: random_s}
    longest, skipped = 0.0, []
    for name, reward in rewards.items():
        spent = time.perf_counter() - began
        if spent + longest > 60 * budget.minutes:
            skipped.append(name)
            continue
        start = time.perf_counter()
        rows[name] = {RANDOM: bench.wins(name, random_sounds)}
        for method in (DRAGON, POSITIVE, RWR):
            sounds, took = bench.tune(method, reward)
            rows[name][method] = bench.wins(name, sounds)
            seconds[method] = max(seconds.get(method, 0.0), took)
            if method == DRAGON:
                matrix[name] = {other: bench.wins(other, sounds)[0].value for other in rewards}
                _write_sounds(task, folder, name, bench.base_sounds, sounds)
        longest = max(longest, time.perf_counter() - start)
        say(f"sound {name}: " + ", ".join(f"{m} {w.value:.2f}" for m, (w, _) in rows[name].items()))
    result = {
        "rows": {name: {m: {"win_rate": w, "gain": g} for m, (w, g) in found.items()} for name, found in rows.items()},
        "matrix": matrix,
        "skipped": skipped,
        "budget": vars(budget),
        "training_seconds": seconds,
    }
    return result | {"checks": _checks(rows, skipped), "table": _tables(rows, rewards, matrix, budget)}


def _write_sounds(task: PromptTask, folder: Path | None, name: str, base: Tensor, tuned: Tensor) -> None:
    """Write two sounds of the base and of the tuned model for people to compare."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(2, len(base))):
        stem = name.replace("/", "-")
        for file, data in {
            **task.artefacts(f"{stem}_base_{i}", base[i]),
            **task.artefacts(f"{stem}_tuned_{i}", tuned[i]),
        }.items():
            (folder / file).write_bytes(data)


def _mean(rows: dict[str, dict[str, tuple[Estimate, Estimate]]], method: str) -> Estimate:
    """Mean win rate of a method over the targets, with Student t interval over targets."""
    return student_t([found[method][0].value for found in rows.values()])


def _tables(rows: dict[str, Any], rewards: dict[str, Any], matrix: dict[str, dict[str, float]], budget: Budget) -> str:
    methods = (DRAGON, POSITIVE, RWR, RANDOM)

    def cell(estimate: Estimate) -> str:
        return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"

    body: list[list[Any]] = [
        [name, rewards[name].kind, *(cell(found[m][0]) for m in methods)] for name, found in rows.items()
    ]
    if rows:
        body.append(["mean over targets", "", *(cell(_mean(rows, m)) for m in methods)])
    title = (
        f"Sound: win rate over the base on the target reward, {budget.rounds} rounds of {budget.pairs} prompts "
        f"× {budget.generations} generations, "
        f"{budget.eval_items} held-out items (item: Wilson interval; set: bootstrap over subsets, ours)"
    )
    printed = table(title, ("target", "kind", *methods), body)
    return printed + table(
        "Sound: win rates of each DRAGON model (row: trained on) under every reward (column)",
        ("trained on", *rewards),
        [[name, *found.values()] for name, found in matrix.items()],
    )


def _checks(rows: dict[str, dict[str, tuple[Estimate, Estimate]]], skipped: list[str]) -> list[Check]:
    if not rows:
        return [Check("at least one target fits the time", "none", False)]
    means = {method: _mean(rows, method) for method in (DRAGON, POSITIVE, RWR, RANDOM)}
    dragon = means[DRAGON].value
    listed = ", ".join(f"{method} {estimate.value:.3f}" for method, estimate in means.items())
    return [
        Check(
            "mean win rate over the targets ≥ 0.8145 (the paper's average, on other data)",
            f"{dragon:.3f}",
            dragon >= 0.8145,
        ),
        Check(
            "DRAGON above every peer in the mean", listed, all(dragon > means[m].value for m in (POSITIVE, RWR, RANDOM))
        ),
        Check("all targets ran", "all" if not skipped else f"skipped for time: {', '.join(skipped)}", not skipped),
    ]
