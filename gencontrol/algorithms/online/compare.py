"""Evaluation of a tuned model against its base on fixed prompts and fixed noise, paired item by item.

Item rewards: mean of both, paired win rate and paired gain with their intervals.  Set rewards: the value of the whole
set, its gain with an interval, and a win rate over subsets (ours; see `compare_sets`).  Both sets of samples start from
the same noise, which cuts the variance of the difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import Evaluation, RolesProtocol, StepContext
from gencontrol.algorithms.online.rollout import (
    Sampling,
    Scores,
    chunks,
    device_of,
    draw_times,
    generate,
    predict,
    score,
)
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.errors import UsageError
from gencontrol.rewards.base import Reward, SetReward, as_set_reward
from gencontrol.rewards.distribution import vendi_score
from gencontrol.rng import item_generators, item_noise, stream
from gencontrol.stats import Estimate, compare_sets, paired_gain, paired_wins
from gencontrol.types import Cond, cond_to, index_cond

#: Random halves of a set on which a set reward is compared.
DRAWS = 100
#: The samples that people see: place in the order of gains → its name, the more telling first.
PLACES = {0.0: "best", 1.0: "worst", 0.5: "median", 0.25: "upper quarter", 0.75: "lower quarter"}
#: The first samples, the same at each evaluation, where they show the course of training (pictures) or no sample has a
#: gain of its own (set rewards).
FIRST = 8


@dataclass(frozen=True)
class Sampled:
    """Samples of one model on the evaluation prompts: latents and scores."""

    latents: Float[Tensor, "n *d"]
    scores: Scores


def examples(gains: Mapping[int, float]) -> list[tuple[int, str]]:
    """Return (item, name of its place) of the samples that tell what all gains are like, the best gain first.

    Args:
        gains: item → gain; of equal gains the earlier item is the better.
    """
    order = sorted(gains, key=lambda item: (-gains[item], item))
    found: dict[int, str] = {}
    for share, name in PLACES.items():
        if order:
            found.setdefault(round(share * (len(order) - 1)), name)
    return [(order[place], found[place]) for place in sorted(found)]


def compare_scores(
    reward: Reward | SetReward, tuned: Scores, base: Scores, generator: torch.Generator
) -> tuple[Estimate, Estimate, float, float, int]:
    """Return (win rate, gain, tuned reward, base reward, items) over the items that are valid on both sides."""
    both = (tuned.valid & base.valid).nonzero().flatten()
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    if not len(both):
        return nothing, nothing, float("nan"), float("nan"), 0
    if tuned.values is not None and base.values is not None:
        mine, theirs = tuned.values[both].double(), base.values[both].double()
        gain = paired_gain(theirs.numpy(force=True), mine.numpy(force=True))
        return paired_wins(mine, theirs), gain, float(mine.mean()), float(theirs.mean()), len(both)
    assert tuned.features is not None and base.features is not None
    sides = {
        side: {key: value[both] for key, value in held.items()}
        for side, held in ((True, tuned.features), (False, base.features))
    }

    def value(rows: Tensor | slice, side: bool) -> float:
        return float(as_set_reward(reward).evaluate({key: held[rows] for key, held in sides[side].items()}))

    whole = slice(None)
    wins, gain = nothing, nothing
    if len(both) >= 4:
        share, gain = compare_sets(value, len(both), subset=len(both) // 2, draws=DRAWS, generator=generator)
        wins = Estimate(share, float("nan"), float("nan"))  # the halves overlap
    return wins, gain, value(whole, True), value(whole, False), len(both)


class Comparison:
    """Compares a role with the base model `ref` on the task's evaluation prompts; the base is sampled once."""

    def __init__(
        self,
        task: PromptTask,
        reward: Reward | SetReward,
        roles: RolesProtocol,
        how: Sampling,
        *,
        seed: int,
        name: str,
        samples_per_prompt: int,
    ) -> None:
        """Prepare; `name` prefixes the random streams ("dragon" gives "dragon/eval").

        Raises:
            UsageError: there are no evaluation prompts.
        """
        if not task.eval_prompts:
            raise UsageError("the list of evaluation prompts is empty; give at least one (--eval-prompts FILE).")
        self.task, self.reward, self.roles, self.how = task, reward, roles, how
        self.seed, self.name = seed, f"{name}/eval"
        self.prompts = [p for p in task.eval_prompts for _ in range(samples_per_prompt)]
        self._base: Sampled | None = None

    def _cond(self) -> Cond:
        return cond_to(self.task.encode(self.prompts), device_of(self.task))

    def sample(self, role: str, ctx: StepContext) -> Sampled:
        """Draw and score the samples of a role; the noise of item i depends on (seed, i) alone."""
        generators = item_generators(self.seed, self.name, range(len(self.prompts)))
        with self.roles.use(role):
            latents = generate(self.task, self._cond(), generators, self.how, ctx)
        return Sampled(latents, score(self.task, self.reward, latents, self.prompts, ctx))

    def base(self, ctx: StepContext) -> Sampled:
        """Return the base model's samples, drawn at the first call (equal after a resume: same streams)."""
        if self._base is None:
            self._base = self.sample("ref", ctx)
        return self._base

    @torch.no_grad()
    def distance_to_base(self, role: str, latents: Float[Tensor, "n *d"], ctx: StepContext) -> float:
        """Return mean ‖v_role − v_ref‖² per data axis, in the network's own coordinates, at noised latents."""
        device = latents.device
        t = draw_times(len(latents), self.seed, f"{self.name}/time").to(device)
        noise = item_noise(latents.shape[1:], self.seed, f"{self.name}/corrupt", range(len(latents))).to(device)
        cond, total = self._cond(), 0.0
        for part in chunks(len(latents), ctx.micro_batch):
            outputs = []
            for who in ("ref", role):
                with self.roles.use(who), ctx.autocast():
                    outputs.append(
                        predict(self.task.denoiser, latents[part], t[part], noise[part], index_cond(cond, part))[0]
                    )
            total += float((outputs[1] - outputs[0]).square().flatten(1).mean(1).sum())
            ctx.poll()
        return total / len(latents)

    def run(self, role: str, ctx: StepContext) -> Evaluation:
        """Evaluate a role against the base: metrics under eval/, sample files of both, and prompts.json."""
        base, tuned = self.base(ctx), self.sample(role, ctx)
        generator = stream(self.seed, f"{self.name}/bootstrap")
        wins, gain, mean, base_mean, items = compare_scores(self.reward, tuned.scores, base.scores, generator)
        metrics = {
            "eval/reward/mean": mean,
            "eval/reward/base_mean": base_mean,
            "eval/reward/gain": gain.value,
            "eval/reward/gain_low": gain.low,
            "eval/reward/gain_high": gain.high,
            "eval/win_rate": wins.value,
            "eval/win_rate_low": wins.low,
            "eval/win_rate_high": wins.high,
            "eval/items": float(items),
            "eval/valid_fraction": float(tuned.scores.valid.double().mean()),
            "eval/distance_to_base": self.distance_to_base(role, base.latents, ctx),
        }
        for side, held in (("vendi", tuned.scores), ("vendi_base", base.scores)):
            if held.features is not None and "embeddings" in held.features and bool(held.valid.any()):
                rows = held.features["embeddings"][held.valid]
                metrics[f"eval/{side}@{len(rows)}"] = vendi_score(rows)
        return Evaluation(metrics, self._artefacts(tuned, base, ctx))

    @torch.no_grad()
    def _artefacts(self, tuned: Sampled, base: Sampled, ctx: StepContext) -> dict[str, bytes]:
        """The files of both models' samples of `_shown`, and prompts.json with a row for each."""
        shown = self._shown(tuned.scores, base.scores)
        places = torch.tensor([item for item, _ in shown], dtype=torch.int64)
        files: dict[str, bytes] = {}
        for side, held in (("base", base), ("tuned", tuned)):
            for part in chunks(len(places), ctx.micro_batch):
                ctx.poll()
                decoded = self.task.decode(held.latents[places[part].to(held.latents.device)])
                for i, sample in enumerate(decoded, part.start):
                    files |= self.task.artefacts(f"{side}_{i:02d}", sample.detach().cpu())
        rows = []
        for item, place in shown:
            row: dict[str, object] = {"prompt": self.prompts[item], "seed": self.seed, "stream": self.name}
            row |= {"item": item, "place": place}
            for side, scores in (("base_reward", base.scores), ("tuned_reward", tuned.scores)):
                if scores.values is not None:
                    row[side] = float(scores.values[item]) if bool(scores.valid[item]) else None
            rows.append(row)
        files["prompts.json"] = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        return files

    def _shown(self, tuned: Scores, base: Scores) -> list[tuple[int, str]]:
        """(item, place) of what is written: fixed first ones, with the place "", and those chosen by their gain."""
        chosen: list[tuple[int, str]] = []
        if tuned.values is not None and base.values is not None:
            gains = (tuned.values.double() - base.values.double()).tolist()
            chosen = examples({int(i): gains[int(i)] for i in (tuned.valid & base.valid).nonzero().flatten()})
        if chosen and self.task.sampling_rate is not None:
            return chosen
        return [(item, "") for item in range(min(FIRST, len(self.prompts)))] + chosen
