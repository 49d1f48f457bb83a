"""Samples of a model on prompts: drawn, scored, compared inside their groups, and noised again.

Everything random is a pure function of (seed, stream name, step, row): row i of a pool is the same sample in any
micro-batch and on any number of ranks.  A pool has `groups × generations` rows, the generations of a prompt adjacent.

Advantages are A = (r − mean of its prompt group)/std, clipped; the mean removes what all samples of a prompt share, the
spread makes the learning rate independent of the reward's unit.  Rule and floor are those of Flow-GRPO's and
DiffusionNFT's code (PORT; docs/methods/index.md#advantages).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collectives, StepContext
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.errors import RewardError, UsageError
from gencontrol.models.denoiser import Denoiser, TakesGroups
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Features, Reward, SetReward, as_set_reward
from gencontrol.rng import stream
from gencontrol.sampling import Path, sample
from gencontrol.sampling.guidance import cfg
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, Grouped, RewardContext, grouped, index_cond

Spread = Literal["global", "group"]
#: how several rewards become one advantage
Combine = Literal["gdpo", "normalised-sum", "sum"]

#: Added to a standard deviation (PORT): groups of nearly equal rewards must not become advantages of size 1.
FLOOR = 1e-4
#: prefix of the values of a weighted sum's parts while they are collected
_PART = "part/"


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: sampler steps, name or Step object, and the guidance scale (1 = no guidance)."""

    steps: int
    sampler: str | Step
    guidance_scale: float


@dataclass(frozen=True)
class Scores:
    """What a reward says about a pool of samples: `values` for an item reward, `features` for a set reward.

    `parts` holds the values of each reward of a weighted sum of item rewards, by name; `reasons` counts why samples of
    this rank could not be scored, where the reward says it.
    """

    valid: Bool[Tensor, " pool"]
    values: Float[Tensor, " pool"] | None = None
    features: Features | None = None
    parts: Mapping[str, Float[Tensor, " pool"]] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)


def item_values(reward: Reward | SetReward, scores: Scores) -> Float[Tensor, " pool"]:
    """Return item values, or the influence R(S) − R(S∖i) of each valid item in the set of all valid items."""
    if scores.values is not None:
        return scores.values
    assert scores.features is not None
    rows = scores.valid.nonzero().flatten()
    values = torch.zeros(len(scores.valid), dtype=torch.float64)
    if len(rows):
        values[rows] = as_set_reward(reward).state(scores.features, rows).influence().double().cpu()
    return values


def reward_of(reward: Reward | SetReward, scores: Scores, rows: Int64[Tensor, " n"]) -> float:
    """Return the reward of a set of pool rows: the mean of an item reward, or the value of a set reward."""
    if scores.values is not None:
        return float(scores.values[rows].double().mean())
    assert scores.features is not None
    return float(as_set_reward(reward).evaluate({key: value[rows] for key, value in scores.features.items()}))


@dataclass(frozen=True)
class Pool:
    """Rows of this rank (`latents`, and `cond` with one row per group) and the scores of all ranks' rows.

    `first_row` is the global row of `latents[0]`; `path` holds all states of this rank's rows where it was asked for;
    `shared` says that the network takes conditions that rows share.
    """

    latents: Float[Tensor, "rows *d"]
    cond: Cond
    generations: int
    first_row: int
    scores: Scores
    path: Path | None = None
    shared: bool = False

    def owned(self, rows: Int64[Tensor, " p"]) -> Tensor:
        """Return which global rows lie on this rank."""
        return (rows >= self.first_row) & (rows < self.first_row + len(self.latents))

    def take(self, rows: Int64[Tensor, " p"]) -> Tensor:
        """Return the latents of global rows that lie on this rank."""
        return self.latents[(rows - self.first_row).to(self.latents.device)]

    def take_cond(self, rows: Int64[Tensor, " p"]) -> Cond:
        """Return the conditions of global rows that lie on this rank, `Grouped` by prompt where the network can."""
        local = torch.div(rows - self.first_row, self.generations, rounding_mode="floor")
        return grouped(self.cond, local) if self.shared else index_cond(self.cond, local.to(self.latents.device))


def device_of(task: PromptTask) -> torch.device:
    """Return the device of the denoiser's parameters."""
    return next(task.denoiser.parameters()).device


def chunks(count: int, size: int) -> Iterator[slice]:
    """Cut range(count) into slices of at most `size`."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + max(1, size), count))


def rows_of_step(total: int, count: int, seed: int, name: str, step: int) -> list[int]:
    """Return `count` row numbers below `total`: stretches of a fresh permutation per epoch, so all are seen equally."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, total)
        if epoch not in orders:
            orders[epoch] = torch.randperm(total, generator=stream(seed, name, epoch)).tolist()
        chosen.append(orders[epoch][place])
    return chosen


def prompts_of_step(prompts: Sequence[str], count: int, seed: int, name: str, step: int) -> list[str]:
    """Return the prompts of a step, by `rows_of_step`.

    Raises:
        UsageError: there are none.
    """
    if not prompts:
        raise UsageError("the list of training prompts is empty; give at least one prompt (--prompts FILE).")
    return [prompts[row] for row in rows_of_step(len(prompts), count, seed, name, step)]


def guided(task: PromptTask, scale: float, uncond: Cond = None) -> Any:
    """Return the denoiser, under classifier-free guidance where the scale is not 1 (`uncond`: None is the task's)."""
    if scale == 1.0:
        return task.denoiser
    if task.uncond is None:
        raise UsageError(f"guidance_scale {scale} needs an unconditional condition, and this model has none; use 1.0.")
    return cfg(task.denoiser, scale, task.uncond if uncond is None else uncond)


@torch.no_grad()
def ready(task: PromptTask, scale: float, cond: Cond, ctx: StepContext) -> tuple[Any, Cond]:
    """Return the guided model and condition for sampling with the active weights.

    Where batch rows share a condition, what depends on it alone is computed here, once for all sampler steps.
    """
    network = task.denoiser.network
    if not isinstance(cond, Grouped) or not isinstance(network, TakesGroups):
        return guided(task, scale), cond
    with ctx.autocast():
        if scale == 1.0 or task.uncond is None:
            return guided(task, scale), network.prepare(cond)
        empty = network.prepare(Grouped(task.uncond, torch.zeros(1, dtype=torch.int64)))
        return guided(task, scale, empty.unique), network.prepare(cond)


@torch.no_grad()
def generate(
    task: PromptTask,
    cond: Cond,
    generators: list[torch.Generator],
    how: Sampling,
    ctx: StepContext,
    *,
    record: list[Path] | None = None,
) -> Float[Tensor, "b *d"]:
    """Sample one latent per generator with the weights that are active now, `ctx.micro_batch` at a time.

    Each part's states and log-probabilities are appended to `record` where it is given.
    """
    model, cond = ready(task, how.guidance_scale, cond, ctx)
    parts = []
    for part in chunks(len(generators), ctx.micro_batch):
        draw: Any = partial(
            sample,
            model,
            (part.stop - part.start, *task.latent_shape),
            steps=how.steps,
            step=how.sampler,
            generator=generators[part],
            cond=index_cond(cond, part),
            callback=lambda index, t, x: ctx.poll(),
        )
        with ctx.autocast():
            if record is None:
                latents = draw()
            else:
                record.append(draw(keep_path=True))
                latents = record[-1].x
        parts.append(latents.float())
    return torch.cat(parts)


@torch.no_grad()
def score(
    task: PromptTask,
    reward: Reward | SetReward,
    latents: Float[Tensor, "b *d"],
    prompts: Sequence[str],
    ctx: StepContext,
) -> Scores:
    """Decode and score in micro-batches.

    Raises:
        RewardError: the reward returned another number of values than it was given samples.
    """
    outs: list[dict[str, Tensor]] = []
    reasons: Counter[str] = Counter()
    for part in chunks(len(latents), ctx.micro_batch):
        ctx.poll()
        samples = task.decode(latents[part])
        context = RewardContext(list(prompts[part]), task.sampling_rate, poll=ctx.poll)
        if reward.kind == "set":
            outs.append(
                {key: value.detach().cpu() for key, value in as_set_reward(reward).features(samples, context).items()}
            )
        else:
            out = reward(samples, context)
            outs.append({"values": out.values.detach().float().cpu(), "valid": out.valid.detach().cpu()})
            reasons.update(out.extras.get("reasons", {}))
            parts = out.extras.get("parts", {})
            outs[-1] |= {f"{_PART}{name}": part.detach().float().cpu() for name, part in parts.items()}
        if len(outs[-1]["valid"]) != len(samples):
            raise RewardError(
                f"reward '{reward.name}' gave {len(outs[-1]['valid'])} values for {len(samples)} samples."
            )
    merged = {key: torch.cat([out[key] for out in outs]) for key in outs[0]}
    if reward.kind == "set":
        return Scores(valid=merged["valid"], features=merged)
    parts = {key.removeprefix(_PART): value for key, value in merged.items() if key.startswith(_PART)}
    valid = merged["valid"] & merged["values"].isfinite()
    return Scores(valid, merged["values"], parts=parts, reasons=reasons)


def gathered(scores: Scores, group: Collectives) -> Scores:
    """Return the scores of all ranks' rows, in rank order."""
    return Scores(
        valid=group.gather_rows(scores.valid),
        values=None if scores.values is None else group.gather_rows(scores.values),
        features=None if scores.features is None else {k: group.gather_rows(v) for k, v in scores.features.items()},
        parts={name: group.gather_rows(part) for name, part in scores.parts.items()},
        reasons=scores.reasons,
    )


def joined(parts: Sequence[Path]) -> Path:
    """Put paths over one grid together along the batch axis, states in float32."""
    log_probs = [part.log_probs for part in parts if part.log_probs is not None]
    return Path(
        torch.cat([part.x for part in parts]).float(),
        torch.cat([part.states for part in parts], 1).float(),
        parts[0].times,
        torch.cat(log_probs, 1) if len(log_probs) == len(parts) else None,
    )


# ---------------------------------------------------------------- advantages


def group_advantages(
    values: Float[Tensor, " n"],
    valid: Bool[Tensor, " n"],
    generations: int,
    *,
    spread: Spread = "global",
    clip: float = 5.0,
) -> Float[Tensor, " n"]:
    """Return the clipped advantage of each sample in its group of `generations` neighbours; 0 where invalid.

    Args:
        values: rewards in any unit; invalid items may hold anything.
        valid: which items count; an invalid one enters neither mean nor spread.
        generations: samples per prompt, adjacent; divides n.
        spread: "global" divides by the standard deviation of all valid rewards, "group" by that of the own group.
        clip: largest size of an advantage, > 0 (5, PORT).

    Raises:
        ValueError: n is not a multiple of `generations`, or `spread` is unknown.
    """
    if generations < 1 or len(values) % generations:
        raise ValueError(f"{len(values)} rewards do not divide into groups of {generations}; give whole groups")
    if spread not in ("global", "group"):
        raise ValueError(f"spread = {spread!r}; expected 'global' or 'group'")
    grid = torch.where(valid, values, torch.zeros_like(values)).double().view(-1, generations)
    mask = valid.view(-1, generations).double()
    count = mask.sum(1, keepdim=True).clamp_min(1.0)
    centred = (grid - grid.sum(1, keepdim=True) / count) * mask
    if spread == "group":
        scale = (centred.square().sum(1, keepdim=True) / count).sqrt()
    else:
        kept = values[valid].double()
        scale = kept.std(unbiased=False) if len(kept) else torch.zeros((), dtype=torch.float64, device=values.device)
    return (centred / (scale + FLOOR)).clamp(-clip, clip).flatten().to(values.dtype)


def combined_advantages(
    parts: Sequence[tuple[Float[Tensor, " n"], float]],
    valid: Bool[Tensor, " n"],
    generations: int,
    rule: Combine = "gdpo",
    *,
    spread: Spread = "global",
    clip: float = 5.0,
) -> Float[Tensor, " n"]:
    """Return the clipped advantage of each sample from several rewards; 0 where invalid.

    Args:
        parts: (values, weight) of each reward.
        rule: "gdpo" is GDPO's as PORT has it (docs/methods/crd.md#several-rewards): each reward is normalised by its
            group's mean and spread, the weighted sum by the round's; `spread` plays no part.  "normalised-sum" (ours)
            is `group_advantages` of each reward, and of their weighted sum.  In both no reward dominates by its unit.
            "sum" is `group_advantages` of the weighted sum of the rewards.
        valid, generations, spread, clip: as in `group_advantages`.
    """
    pieces = [(values.double(), weight) for values, weight in parts]
    if rule == "gdpo":
        total = sum(weight * _standardised(values, valid, generations) for values, weight in pieces)
        found = _standardised(torch.as_tensor(total), valid, len(valid)).clamp(-clip, clip)
    else:
        if rule == "normalised-sum":
            pieces = [
                (group_advantages(values, valid, generations, spread=spread, clip=clip), weight)
                for values, weight in pieces
            ]
        kept = [(torch.where(valid, values, torch.zeros_like(values)), weight) for values, weight in pieces]
        total = sum(weight * values for values, weight in kept)
        found = group_advantages(torch.as_tensor(total), valid, generations, spread=spread, clip=clip)
    return found.to(parts[0][0].dtype)


def _standardised(values: Float[Tensor, " n"], valid: Bool[Tensor, " n"], size: int) -> Float[Tensor, " n"]:
    """Return (r − mean)/max(std, 1e-6) in each group of `size` neighbours, over its valid items; 0 where invalid."""
    mask = valid.view(-1, size).double()
    grid = torch.where(valid, values, torch.zeros_like(values)).view(-1, size)
    count = mask.sum(1, keepdim=True).clamp_min(1.0)
    centred = (grid - grid.sum(1, keepdim=True) / count) * mask
    return (centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)).flatten()


def zero_spread_share(values: Float[Tensor, " n"], valid: Bool[Tensor, " n"], generations: int) -> float:
    """Return the share of groups whose valid rewards are all equal: they carry no preference."""
    grid, mask = values.view(-1, generations).double(), valid.view(-1, generations)
    high = torch.where(mask, grid, -torch.inf).amax(1)
    low = torch.where(mask, grid, torch.inf).amin(1)
    return float((high <= low).double().mean())


# ---------------------------------------------------------------- noised samples


def predict(
    denoiser: Denoiser, x0: Float[Tensor, "b *d"], t: Float[Tensor, " b"], noise: Float[Tensor, "b *d"], cond: Cond
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """Return the network's own prediction at x_t and its target r·(x0, eps), both float32."""
    assert isinstance(denoiser.process, GaussianProcess)
    xt = denoiser.process.corrupt(x0, t, noise)
    return denoiser(xt, t, cond).raw.float(), denoiser.target(x0, noise, t).float()


def denoising_error(
    denoiser: Denoiser, x0: Float[Tensor, "b *d"], t: Float[Tensor, " b"], noise: Float[Tensor, "b *d"], cond: Cond
) -> Float[Tensor, " b"]:
    """Return ℓ(x0; t, noise) per item: the squared prediction error averaged over the data axes."""
    return squared_error(*predict(denoiser, x0, t, noise, cond))


def squared_error(prediction: Float[Tensor, "b *d"], target: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Mean square over the data axes per item, in float64: contrasts subtract errors and multiply them by β ≈ 5000."""
    return (prediction.double() - target.double()).square().flatten(1).mean(1)


def draw_times(count: int, seed: int, name: str, *indices: int) -> Float[Tensor, " count"]:
    """Return `count` times, each uniform on (0, 1), jointly stratified and in random order (lower variance; ours)."""
    generator = stream(seed, name, *indices)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    grid = (torch.arange(count, dtype=torch.float64) + offset) / count
    return grid[torch.randperm(count, generator=generator)].float().clamp(1e-4, 1 - 1e-4)
