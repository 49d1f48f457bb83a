"""Groups of on-policy samples with their scores: the part that all prompt-conditioned methods share.

Everything random is a pure function of (seed, stream name, step, row): row i of a pool is the same sample in any
micro-batch and on any number of ranks.  A pool has `groups × generations` rows, the generations of a prompt adjacent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collectives, StepContext
from gencontrol.algorithms.online.sets import Scores
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.errors import RewardError, UsageError
from gencontrol.models.denoiser import TakesGroups
from gencontrol.rewards.base import Reward, SetReward, as_set_reward
from gencontrol.rng import item_generators, stream
from gencontrol.sampling import Path, sample
from gencontrol.sampling.guidance import cfg
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, Grouped, RewardContext, cond_to, grouped, index_cond

#: prefix of the values of a weighted sum's parts while they are collected
_PART = "part/"


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: sampler steps, name or Step object, and the guidance scale (1 = no guidance)."""

    steps: int
    sampler: str | Step
    guidance_scale: float


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
    seconds: dict[str, float]
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


def autocast(ctx: StepContext) -> AbstractContextManager[Any]:
    """Return the context manager of the run's precision."""
    return ctx.autocast() if ctx.autocast is not None else nullcontext()


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
    with autocast(ctx):
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
        with autocast(ctx):
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
    *,
    keep: int = 0,
) -> tuple[Scores, list[Tensor]]:
    """Decode and score in micro-batches; also return the first `keep` decoded samples.

    Raises:
        RewardError: the reward returned another number of values than it was given samples.
    """
    outs: list[dict[str, Tensor]] = []
    kept: list[Tensor] = []
    reasons: Counter[str] = Counter()
    for part in chunks(len(latents), ctx.micro_batch):
        ctx.poll()
        samples = task.decode(latents[part])
        context = RewardContext(list(prompts[part]), task.sampling_rate, poll=ctx.poll)
        kept += [x.detach().cpu() for x in samples[: max(0, keep - len(kept))]]
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
        return Scores(valid=merged["valid"], features=merged), kept
    parts = {key.removeprefix(_PART): value for key, value in merged.items() if key.startswith(_PART)}
    valid = merged["valid"] & merged["values"].isfinite()
    return Scores(valid, merged["values"], parts=parts, reasons=reasons), kept


def _gathered(scores: Scores, group: Collectives) -> Scores:
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


def _draw(
    task: PromptTask,
    reward: Reward | SetReward,
    prompts: list[str],
    generations: int,
    how: Sampling,
    ctx: StepContext,
    noise: tuple[int, str],
    record: list[Path] | None,
) -> Pool:
    """Sample and score this rank's share of the groups; `noise` is (seed, stream name); see `generate` for `record`."""
    count = len(prompts) // ctx.world_size
    mine = prompts[ctx.rank * count : (ctx.rank + 1) * count]
    first = ctx.rank * count * generations
    began = time.perf_counter()
    with ctx.group.all_or_none(ctx.poll):
        cond = cond_to(task.encode(mine), device_of(task))
        rows = torch.arange(len(mine)).repeat_interleave(generations)
        generators = item_generators(*noise, range(first, first + len(rows)))
        latents = generate(task, grouped(cond, rows), generators, how, ctx, record=record)
        drawn = time.perf_counter()
        scores, _ = score(task, reward, latents, [mine[i] for i in rows.tolist()], ctx)
    seconds = {"time/rollout": drawn - began, "time/reward": time.perf_counter() - drawn}
    path = joined(record) if record else None
    return Pool(
        latents,
        cond,
        generations,
        first,
        _gathered(scores, ctx.group),
        seconds,
        path,
        isinstance(task.denoiser.network, TakesGroups),
    )


def draw_pool(
    task: PromptTask,
    reward: Reward | SetReward,
    how: Sampling,
    ctx: StepContext,
    *,
    seed: int,
    name: str,
    groups: int,
    generations: int,
    min_valid: float,
    keep_path: bool = False,
) -> tuple[Pool, dict[str, float]]:
    """Sample and score the groups of this step with the active weights; returns the pool and metrics.

    Below `min_valid` valid groups the pool is drawn once more with other noise.  With `keep_path` the pool has a path.

    Raises:
        RewardError: too few groups are valid twice in a row.
        UsageError: the groups do not divide over the ranks.
    """
    if groups % ctx.world_size:
        raise UsageError(f"{groups} groups per round do not divide over {ctx.world_size} processes; use a multiple.")
    prompts = prompts_of_step(task.prompts, groups, seed, f"{name}/prompts", ctx.step)
    for attempt in range(2):
        noise = f"{name}/noise" if attempt == 0 else f"{name}/redraw"
        record: list[Path] | None = [] if keep_path else None
        pool = _draw(task, reward, prompts, generations, how, ctx, (seed, f"{noise}/{ctx.step}"), record)
        valid = float(pool.scores.valid.view(-1, generations).all(1).double().mean())
        if valid >= min_valid:
            items = float(pool.scores.valid.double().mean())
            metrics = {"reward/valid_fraction": items, "rollout/valid_groups": valid, "rollout/redrawn": float(attempt)}
            return pool, metrics | pool.seconds
    why = "; ".join(f"{reason} ({count})" for reason, count in pool.scores.reasons.items())
    raise RewardError(
        f"reward '{reward.name}' was valid for {valid:.0%} of the groups, twice; at least {min_valid:.0%} are needed: "
        f"{why or 'look at the samples'}; mend the reward or its inputs, or lower min_valid."
    )
