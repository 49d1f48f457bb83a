"""What the forward-process methods share (CRD, DiffusionNFT, AWM): groups, advantages, noised rows, the anchor, roles.

A round draws `generations` samples per prompt, scores them, and takes a few optimizer steps on noised samples: the
reverse process is never differentiated and any sampler may draw.  Update u uses the groups g with g mod updates = u.
All samples of a group see the same times at an update (centred means must not mix noise levels), noise of their own.
A method gives its snapshots' schedules and a loss per row; the penalty κ·‖v_θ − v_ref‖² is added here for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.forward.config import ForwardConfig
from gencontrol.algorithms.online.advantages import combined_advantages, zero_spread_share
from gencontrol.algorithms.online.anchor import anchor_penalty, reference_prediction
from gencontrol.algorithms.online.rollout import Pool, autocast, chunks
from gencontrol.algorithms.online.sets import Scores, item_values, reward_of
from gencontrol.algorithms.online.snapshots import LinearDecay, RewardRange
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.algorithms.online.tuning import RewardTuning, default_roles
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rewards.compose import WeightedItems
from gencontrol.rng import Keyed, row_keys, stream
from gencontrol.types import Cond, index_cond


@dataclass(frozen=True)
class Samples:
    """This rank's valid samples of a round: latents, place in `cond` (one row per prompt), and what the losses need.

    `row`, `group` are global numbers, `place` the row of `cond`; `advantage` is clipped, `goal` is A/(2·A_max) + ½ in
    [0, 1], `value` the raw reward, `strength` κ of the anchor.  `rows` is the number of samples of all ranks' pools.
    """

    latents: Float[Tensor, "n *d"]
    cond: Cond
    place: Int64[Tensor, " n"]
    row: Int64[Tensor, " n"]
    group: Int64[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    goal: Float[Tensor, " n"]
    value: Float[Tensor, " n"]
    strength: Float[Tensor, " n"]
    rows: int


@dataclass(frozen=True)
class Rows:
    """Noised rows of one update: sample `item`, time index `index`, draw `draw`, time `t`; draws of a sample adjacent.

    `unit` numbers the (group, time index) pairs 0, 1, … in order: the sets in which means are taken.
    """

    item: Int64[Tensor, " r"]
    index: Int64[Tensor, " r"]
    draw: Int64[Tensor, " r"]
    t: Float[Tensor, " r"]
    unit: Int64[Tensor, " r"]

    def take(self, part: slice) -> Rows:
        """Return a stretch of rows."""
        return Rows(self.item[part], self.index[part], self.draw[part], self.t[part], self.unit[part])


@dataclass(frozen=True)
class Micro:
    """One micro-batch of noised rows; `extra` holds what a method computed before, one entry per row."""

    latents: Float[Tensor, "r *d"]
    noise: Float[Tensor, "r *d"]
    t: Float[Tensor, " r"]
    cond: Cond
    unit: Int64[Tensor, " r"]
    advantage: Float[Tensor, " r"]
    goal: Float[Tensor, " r"]
    value: Float[Tensor, " r"]
    strength: Float[Tensor, " r"]
    extra: Mapping[str, Float[Tensor, " r"]]


@dataclass(frozen=True)
class Views:
    """Predictions of a micro-batch at the same x_t in the network's own coordinates; `theta` alone has a gradient.

    `frozen` has the method's snapshots by role (none where the micro-batch brings what they say), `anchor` is None
    where the anchor is off.
    """

    theta: Pred
    target: Float[Tensor, "r *d"]
    frozen: Mapping[str, Pred]
    anchor: Pred | None


class ForwardTuning(RewardTuning):
    """Base of the forward-process methods; a method overrides `objective` and, by need, the class attributes."""

    #: short name: prefix of the random streams
    name: ClassVar[str] = "forward"
    #: role that draws the samples, and roles of the snapshots whose predictions the loss needs
    sampler_role: str = "policy"
    frozen_roles: tuple[str, ...] = ()

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: ForwardConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; `roles` holds the names that `role_names(config)` gives.

        Raises:
            UsageError: a role is missing, or guidance is asked of a model without an unconditional condition.
        """
        super().__init__(self.name, task, reward, config, roles, seed)
        self.options = config
        self.decays = {role: LinearDecay.parse(text) for role, text in config.snapshots().items()}
        self.range = RewardRange()
        self.samples = self.evaluations = 0
        if config.kl_coef > 0:
            self._check_anchor()

    @staticmethod
    def role_names(config: ForwardConfig) -> tuple[str, ...]:
        """Policy, ref, the average where there is one, and the method's snapshots."""
        return (*default_roles(config), *config.snapshots())

    def _check_anchor(self) -> None:
        from gencontrol.errors import UsageError

        if self.options.kl_guidance != 1.0 and self.shell.task.uncond is None:
            raise UsageError(
                f"kl_guidance {self.options.kl_guidance}: this model has no unconditional branch; use kl_guidance = 1."
            )

    # ---------------------------------------------------------------- data rule

    def _advantages(self, scores: Scores, values: Float[Tensor, " pool"]) -> Float[Tensor, " pool"]:
        """Advantages of the reward, or with several rewards and combine = "gdpo" of each for itself, then summed."""
        cfg, reward = self.options, self.shell.reward
        parts = [(values, 1.0)]
        if cfg.combine == "gdpo" and isinstance(reward, WeightedItems) and len(scores.parts) == len(reward.parts):
            parts = [(scores.parts[r.name], w) for r, w in zip(reward.parts, reward.weights, strict=True)]
        return combined_advantages(parts, scores.valid, cfg.generations, spread=cfg.spread, clip=cfg.adv_clip)

    def collect(self, ctx: StepContext) -> Collected:
        """Draw and score groups with the sampler's weights; compute advantages and the anchor's strength."""
        cfg = self.options
        pool, metrics = self.shell.draw(cfg.prompts_per_round, ctx, role=self.sampler_role)
        valid, values = pool.scores.valid, item_values(self.shell.reward, pool.scores)
        values = torch.where(valid, values, torch.zeros_like(values))
        advantage = self._advantages(pool.scores, values)
        self.range.add(values[valid])
        goal = (advantage / (2 * cfg.adv_clip) + 0.5).clamp(0.0, 1.0)
        place = {"raw_reward": self.range.place(values), "advantage": goal, "off": torch.ones_like(goal)}[cfg.kl_adapt]
        least = min(cfg.kl_min, cfg.kl_coef)
        strength = (least + place * (cfg.kl_coef - least)).float()
        kept = valid.clone()
        if cfg.skip_equal:
            grid = torch.where(valid, values, torch.nan).view(-1, cfg.generations)
            spread = (grid - grid.nanmean(1, keepdim=True)).nan_to_num().abs().amax(1)
            kept &= (spread > 0).repeat_interleave(cfg.generations)
        data = self._samples(pool, kept, advantage.float(), goal.float(), values.float(), strength)
        self._count(int(kept.sum()), len(valid))
        if bool(valid.any()):
            metrics["reward/mean"] = reward_of(self.shell.reward, pool.scores, valid.nonzero().flatten())
            metrics |= {f"reward/{name}": float(part[valid].mean()) for name, part in pool.scores.parts.items()}
            metrics["policy/anchor_strength"] = float(strength[valid].mean())
        metrics["reward/equal_groups"] = zero_spread_share(values, valid, cfg.generations)
        metrics |= {"count/samples": float(self.samples), "count/evaluations": float(self.evaluations)}
        metrics |= {f"policy/decay_{role}": decay.at(self.shell.updates) for role, decay in self.decays.items()}
        metrics |= self._distances()
        return Collected(data, cfg.updates_per_round if bool(kept.any()) else 0, metrics)

    def _samples(self, pool: Pool, kept: Tensor, advantage: Tensor, goal: Tensor, values: Tensor, k: Tensor) -> Samples:
        """This rank's kept rows."""
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[kept[mine]]
        group = torch.div(mine, pool.generations, rounding_mode="floor")
        place = group - pool.first_row // pool.generations
        return Samples(
            pool.take(mine),
            pool.cond,
            place,
            mine,
            group,
            advantage[mine],
            goal[mine],
            values[mine],
            k[mine],
            len(kept),
        )

    def _count(self, trained: int, drawn: int) -> None:
        """Add this round's samples and network evaluations (rollouts and training) to the run's counters."""
        cfg = self.options
        passes = 1 + len(self.frozen_roles) + (cfg.kl_coef > 0) * (1 + (cfg.kl_guidance != 1.0))
        self.samples += drawn
        self.evaluations += drawn * cfg.demo_steps * (1 + (cfg.guidance_scale != 1.0))
        self.evaluations += trained * cfg.train_times * cfg.draws() * passes

    def _distances(self) -> dict[str, float]:
        """‖θ − snapshot‖ of every snapshot: a frozen sampler shows here (crd.md §5.12)."""
        if not self.decays:
            return {}
        weights = self.roles.state_dict()
        found = {}
        for role in self.decays:
            squares = [
                (weights["policy"][name].float() - w.float()).square().sum() for name, w in weights[role].items()
            ]
            found[f"policy/distance_{role}"] = float(torch.stack(squares).sum().sqrt())
        return found

    # ---------------------------------------------------------------- noised rows

    def times(self, groups: int, ctx: StepContext, update: int) -> Float[Tensor, "g k m"]:
        """Return the times of every group at an update, a pure function of (seed, step, update)."""
        cfg = self.options
        generator = stream(self.seed, f"{self.name}/time", ctx.step, update)
        offsets = torch.rand((groups, cfg.train_times, cfg.draws()), generator=generator, dtype=torch.float64)
        return cfg.spaced_times(offsets)

    def rows(self, data: Samples, update: int, ctx: StepContext) -> Rows:
        """Return this rank's noised rows of an update, sample by sample inside a unit, unit by unit."""
        cfg = self.options
        groups = data.rows // cfg.generations
        items = ((data.group % cfg.updates_per_round) == update).nonzero().flatten()
        k, m, n = cfg.train_times, cfg.draws(), len(items)
        item = items.repeat_interleave(m).repeat(k)
        index = torch.arange(k).repeat_interleave(n * m)
        draw = torch.arange(m).repeat(k * n)
        t = self.times(groups, ctx, update)[data.group[item], index, draw].float()
        unit = torch.unique_consecutive(index * groups + data.group[item], return_inverse=True)[1]
        return Rows(item, index, draw, t, unit)

    def cut(
        self,
        data: Samples,
        rows: Rows,
        ctx: StepContext,
        update: int,
        *,
        whole: bool = False,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Micro]:
        """Yield the rows with noise, at most `ctx.micro_batch` at once; `whole` never cuts a unit."""
        device = data.latents.device
        for part in _units(rows.unit, ctx.micro_batch) if whole else chunks(len(rows.t), ctx.micro_batch):
            piece = rows.take(part)
            item = piece.item
            keys = row_keys(self.seed, f"{self.name}/eps/{ctx.step}/{update}", data.row[item], piece.index, piece.draw)
            noise = Keyed(keys).normal((len(item), *data.latents.shape[1:]), device, data.latents.dtype)
            at = item.to(device)
            yield Micro(
                data.latents[at],
                noise,
                piece.t.to(device),
                index_cond(data.cond, data.place[item].to(device)),
                piece.unit.to(device),
                data.advantage[item].to(device),
                data.goal[item].to(device),
                data.value[item].to(device),
                data.strength[item].to(device),
                {key: value[part].to(device) for key, value in (extra or {}).items()},
            )

    def minibatches(self, data: Samples, update: int, ctx: StepContext) -> Iterable[Micro]:
        """Yield the noised rows of an update."""
        return self.cut(data, self.rows(data, update, ctx), ctx, update)

    # ---------------------------------------------------------------- loss

    def views(self, micro: Micro, ctx: StepContext, *, anchored: bool) -> Views:
        """Return all predictions of a micro-batch; frozen ones first, so that no switch meets the policy's graph."""
        ctx.poll()
        task = self.shell.task
        assert isinstance(task.denoiser.process, GaussianProcess)
        xt = task.denoiser.process.corrupt(micro.latents, micro.t, micro.noise)
        target = task.denoiser.target(micro.latents, micro.noise, micro.t).float()
        anchor, frozen = None, {}
        with autocast(ctx):
            if anchored:
                anchor = reference_prediction(task, self.roles, xt, micro.t, micro.cond, self.options.kl_guidance)
            for role in () if micro.extra else self.frozen_roles:
                with self.roles.use(role), torch.no_grad():
                    frozen[role] = task.denoiser(xt, micro.t, micro.cond)
            with self.roles.use("policy"):
                theta = task.denoiser(xt, micro.t, micro.cond)
        return Views(theta, target, frozen, anchor)

    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Return the method's loss of each row, and sums over the rows to log."""
        raise NotImplementedError(f"{type(self).__name__}.objective")  # abstract: every method has its own

    def loss(self, micro: Micro, ctx: StepContext) -> LossOut:
        """The method's loss plus κ·mean_d (v_θ − v_ref)² of every row."""
        views = self.views(micro, ctx, anchored=self.options.kl_coef > 0)
        losses, metrics = self.objective(micro, views)
        losses = losses.float()
        metrics["loss/reward"] = losses.detach().sum()
        if views.anchor is not None:
            penalty = anchor_penalty(views.theta.raw, views.anchor.raw)
            metrics["policy/anchor_distance"] = penalty.detach().sum()
            losses = losses + micro.strength * penalty
        for role, pred in views.frozen.items():
            metrics[f"policy/{role}_distance"] = anchor_penalty(views.theta.raw.detach(), pred.raw).sum()
        return LossOut(losses.sum(), len(losses), metrics)

    # ---------------------------------------------------------------- state

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the average after every update, the snapshots after the round's last one (step count included)."""
        super().after_update(ctx, update)
        if update == self.options.updates_per_round - 1:
            for role, decay in self.decays.items():
                self.roles.lerp(role, decay.at(self.shell.updates))

    def state_dict(self) -> dict[str, Any]:
        """Counters and the history of rewards; the snapshots are roles."""
        return {
            "updates": self.shell.updates,
            "samples": self.samples,
            "evaluations": self.evaluations,
            "range": self.range.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.shell.updates = int(state["updates"])
        self.samples, self.evaluations = int(state["samples"]), int(state["evaluations"])
        self.range.load_state_dict(state["range"])


def _units(unit: Int64[Tensor, " r"], size: int) -> Iterator[slice]:
    """Cut rows into stretches of whole units, as many as fit into `size` rows, at least one."""
    bounds = torch.cumsum(torch.bincount(unit), 0).tolist() if len(unit) else []
    start = last = 0
    for bound in bounds:
        if bound - start > size and last > start:
            yield slice(start, last)
            start = last
        last = bound
    if last > start:
        yield slice(start, last)
