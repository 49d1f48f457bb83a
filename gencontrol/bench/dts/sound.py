"""DTS* against best-of-N on the bundled text-to-sound model: the largest CLAP score per prompt at equal model calls.

Twenty prompts of the grammar's test split, 20 SDE steps without guidance; all prompts are the roots of one forest,
best-of-N draws whole batches of one prompt.  DTS* scores more samples than best-of-N at equal model calls, since a
rollout from inside the tree costs less than a path; the table has both counts and the seconds.
Settings: C = 1, α = 0.5, max backup, exploration of one standard deviation, as on the digits; none was tuned on sound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gencontrol.bench.base import Check, table
from gencontrol.bench.dts.measure import Peer, grow, over
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.tree.rules import Uct
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.types import RewardContext

#: batch of every model call of best-of-N, and about that of the forest
BATCH = 64


@dataclass(frozen=True)
class SoundBudget:
    """Resources of both methods.

    Args:
        nfe: model calls per prompt.
        steps: of a path.
        leaf_batch: leaves per round and prompt.
        exploration: c of UCT in standard deviations of a prompt's scores.
        minutes: the part is cut to fewer calls where a trial says that it would take longer.
    """

    nfe: int = 4000
    steps: int = 20
    leaf_batch: int = 2
    exploration: float = 1.0
    minutes: float = 12.0


class SoundSearch:
    """The bundled model with prompts and the CLAP reward."""

    def __init__(self, pipe: Any, reward: Any, prompts: Sequence[str], budget: SoundBudget) -> None:
        """Encode the prompts."""
        self.pipe, self.reward, self.prompts, self.budget = pipe, reward, list(prompts), budget
        self.cond = pipe.encode_prompt(self.prompts)

    def _autocast(self) -> torch.autocast:
        """bfloat16 for the network."""
        return torch.autocast(self.pipe.device.type, dtype=torch.bfloat16)

    def _context(self, prompts: Sequence[str]) -> RewardContext:
        return RewardContext(prompts=prompts, sampling_rate=self.pipe.sampling_rate)

    def best_of_n(self, index: int, nfe: int, seed: int) -> Any:
        """Particles of one prompt."""
        chain = make_chain(
            self.pipe.denoiser,
            self.pipe.latent_shape,
            steps=self.budget.steps,
            cond=self.pipe.encode_prompt([self.prompts[index]]),
            autocast=self._autocast,
        )
        return Peer("best-of-N", "best-of-n", {}, BATCH).run(
            chain,
            self.reward,
            nfe,
            temperature=1.0,
            seed=seed,
            decode=self.pipe.decode,
            context=self._context([self.prompts[index]]),
        )

    def tree(self, seed: int) -> DiffusionTree:
        """A forest over all prompts."""
        return DiffusionTree(
            self.pipe.denoiser,
            self.reward,
            (len(self.prompts), *self.pipe.latent_shape),
            steps=self.budget.steps,
            select=Uct(self.budget.exploration),
            backup="max",
            widening="small",
            leaf_batch=self.budget.leaf_batch,
            generator=seed,
            cond=self.cond,
            decode=self.pipe.decode,
            context=self._context(self.prompts),
            reward_batch=BATCH,
            autocast=self._autocast,
        )


def run(search: SoundSearch, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both methods; returns rows, checks, curves and the printed table."""
    budget, count = search.budget, len(search.prompts)
    began = time.perf_counter()
    search.best_of_n(0, BATCH * budget.steps, seed + 1)
    a_call = (time.perf_counter() - began) / (BATCH * budget.steps)
    # both methods, and a third more for the scores of the tree
    fits = int(60 * budget.minutes / (2.3 * count * a_call))
    nfe = max(budget.steps, min(budget.nfe, fits) // budget.steps * budget.steps)
    say(f"sound: {a_call * 1e3:.1f} ms per model call, so {nfe} calls per prompt")
    began = time.perf_counter()
    base = []
    for index in range(count):
        base.append(search.best_of_n(index, nfe, seed + index).rewards)
        say(f"sound best-of-N {index + 1}/{count}: {float(base[-1].max()):.4f}, {time.perf_counter() - began:.0f} s")
    seconds = {"best-of-N": time.perf_counter() - began}
    running = torch.stack(base).cummax(1).values.mean(0)
    curves: dict[str, dict[float, float]] = {
        "best-of-N": {budget.steps * (i + 1): float(v) for i, v in enumerate(running)}
    }
    began = time.perf_counter()
    tree = search.tree(seed)
    climb: dict[float, float] = {}

    def look() -> bool:
        climb[tree.nfe / count] = float(tree.counts["best"].mean())
        if tree.rounds % 20 == 0:
            say(
                f"sound DTS* at {tree.nfe / count:.0f}: {climb[tree.nfe / count]:.4f}, "
                f"{time.perf_counter() - began:.0f} s"
            )
        return False

    grow(tree, nfe, look)
    seconds["DTS*"], curves["DTS*"] = time.perf_counter() - began, climb
    best = {"best-of-N": [float(rewards.max()) for rewards in base], "DTS*": tree.counts["best"].tolist()}
    calls = {"best-of-N": sum(len(rewards) for rewards in base), "DTS*": tree.reward_calls}
    return _report(search, nfe, best, calls, seconds, curves)


def _report(
    search: SoundSearch,
    nfe: int,
    best: dict[str, list[float]],
    calls: dict[str, int],
    seconds: dict[str, float],
    curves: dict[str, dict[float, float]],
) -> dict[str, Any]:
    """Table, checks and rows."""
    gain = over(a - b for a, b in zip(best["DTS*"], best["best-of-N"], strict=True))
    level = sum(best["best-of-N"]) / len(search.prompts)
    there = [calls_ for calls_, value in sorted(curves["DTS*"].items()) if value >= level]
    needs = (
        f"reaches best-of-N's mean after {there[0]:.0f} calls ({nfe / there[0]:.1f}x fewer)" if there else "not reached"
    )
    printed = table(
        f"Sound: largest CLAP score of {len(search.prompts)} prompts with {nfe} model calls each "
        "(mean ± half the 95 % t interval over prompts)",
        ("method", "best score", "samples scored", "seconds"),
        [[name, over(values), f"{calls[name]}", f"{seconds[name]:.0f}"] for name, values in best.items()],
    )
    check = Check(
        f"sound: DTS* above best-of-N at {nfe} model calls per prompt, 95 % interval of the paired difference above 0",
        f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] over {len(search.prompts)} prompts; {needs}",
        gain.low > 0,
    )
    return {
        "rows": best,
        "prompts": search.prompts,
        "nfe": nfe,
        "reward_calls": calls,
        "seconds": seconds,
        "difference": gain,
        "checks": [check],
        "table": printed,
        "curves": {"sound: best CLAP score": ("model calls per prompt", curves)},
    }
