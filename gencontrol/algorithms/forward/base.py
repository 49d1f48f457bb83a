"""What the forward-process methods share (CRD, DiffusionNFT, AWM): options, groups, noised rows, anchor, snapshots.

A round draws `generations` samples per prompt, scores them, and takes a few optimizer steps on noised samples: the
reverse process is never differentiated and any sampler may draw.  Update u uses the groups g with g mod updates = u.
All samples of a group see the same times at an update (centred means must not mix noise levels), noise of their own.
A method gives its snapshots' schedules and a loss per row; the penalty κ·‖v_θ − v_ref‖² is added here for all of them.

Schedules of the snapshots: docs/methods/crd.md#snapshot-schedules (PORT; the same rule serves DiffusionNFT).  The
    history of rewards is
ours: a KL strength that grows with the reward needs a reward in [0, 1], and an unbounded one has no place there but its
rank among those seen so far.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.forward import times
from gencontrol.algorithms.online.base import OnPolicyConfig, Several, Tuning, anchor_penalty
from gencontrol.algorithms.online.rollout import (
    Combine,
    Spread,
    chunks,
    combined_advantages,
    item_values,
    reward_of,
    zero_spread_share,
)
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, NonNegative, Positive, options
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rewards.compose import WeightedItems
from gencontrol.rng import Keyed, row_keys, stream
from gencontrol.sampling.grids import model_grid
from gencontrol.types import Cond, index_cond

#: Schedules by name (PORT).
PRESETS = {
    "none": "0-0-0-0",
    "slow": "0-0-0.001-0.5",
    "medium": "75-0-0.0075-0.999",
    "offline": "0-1-0-1",
    "fast": "0-0-0.02-0.99",
    "moderate": "0-0-0.01-0.5",
}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_FORM = re.compile("-".join([_NUMBER] * 4))


@dataclass(frozen=True)
class LinearDecay:
    """d(s) = first for s < start, else min(first + slope·(s − start), last); d = 0 copies the policy, d = 1 freezes.

    Args:
        start: optimizer step from which the decay rises.
        first, last: decay before and at the end, in [0, 1].
        slope: rise per optimizer step, ≥ 0.
    """

    start: float
    first: float
    slope: float
    last: float

    @classmethod
    def parse(cls, text: str) -> LinearDecay:
        """Read "start-first-slope-last", e.g. "75-0.0-0.0075-0.999", or the name of a preset.

        Raises:
            ValueError: another form, or a decay outside [0, 1].
        """
        found = _FORM.fullmatch(PRESETS.get(text, text).replace(" ", ""))
        if found is None:
            raise ValueError(
                f"decay {text!r}; expected start-first-slope-last like 75-0-0.0075-0.999, or {', '.join(PRESETS)}"
            )
        decay = cls(*(float(part) for part in found.groups()))
        if decay.first > 1 or decay.last > 1:
            raise ValueError(f"decay {text!r} leaves [0, 1]; 0 copies the policy, 1 freezes the snapshot")
        return decay

    def at(self, step: int) -> float:
        """Decay after `step` optimizer steps."""
        return self.first if step < self.start else min(self.first + self.slope * (step - self.start), self.last)


class RewardRange:
    """Places rewards in [0, 1]: as they are while all lie there, else by rank among all rewards seen so far.

    The history keeps at most `LIMIT` values: when it is full, every second value of the sorted list stays and only
    every second new one enters from then on, so that old and new ones keep equal weight.
    """

    LIMIT = 4096

    def __init__(self) -> None:
        self.unbounded = False
        self.stride = 1
        self.seen: Float[Tensor, " n"] = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Float[Tensor, " n"]) -> None:
        """Enter a round's valid rewards."""
        values = values.detach().double().cpu()
        self.unbounded = self.unbounded or bool(((values < 0) | (values > 1)).any())
        self.seen = torch.cat([self.seen, values.sort().values[:: self.stride]]).sort().values
        while len(self.seen) > self.LIMIT:
            self.seen, self.stride = self.seen[::2].clone(), 2 * self.stride

    def place(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the rewards' places in [0, 1], float64 on the CPU; the middle of its ties for a repeated value."""
        values = values.detach().double().cpu()
        if not self.unbounded:
            return values.clamp(0.0, 1.0)
        if not len(self.seen):
            return torch.zeros_like(values)
        values = values.contiguous()
        below = torch.searchsorted(self.seen, values, right=False)
        upto = torch.searchsorted(self.seen, values, right=True)
        return (below + upto).double() / (2 * len(self.seen))

    def state_dict(self) -> dict[str, object]:
        """Everything, for the checkpoint."""
        return {"unbounded": self.unbounded, "stride": self.stride, "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned."""
        seen = state["seen"]
        assert isinstance(seen, Tensor)
        self.unbounded, self.stride = bool(state["unbounded"]), int(str(state["stride"]))
        self.seen = seen.double().clone()


@options
class ForwardConfig(OnPolicyConfig):
    """Shared options; labels as in docs/methods/crd.md (PORT = Flow-Factory's trainer and its SD3.5 preset).

    PORT too: 48 prompts of 24 samples, 2 updates per round (each on its own share of the groups), 10 demonstration
    steps of "euler" without guidance.

    Args:
        train_times: times per sample at an update (9, as DiffusionNFT; PORT's preset of CRD has 20).
        time_sampling: "stratified" uniform in (0, 1) (ours); "grid", strata of the times that the sampler visits
            (PORT); "permutation", a random order of these, cut to `train_times` (CODE of DiffusionNFT); "uniform"; or
            "logit-normal" with shift 3 (PORT).
        time_start: the sampler's first time, t = 1 on most grids, in "grid": "drawn" like the others (PORT), left
            "out", or "always" taken.
        time_range: share of the times that is used, counted from t = 1: 0.99 leaves out the last 1 % (PORT).
        spread: advantages are divided by the spread of the round ("global", PORT) or of each "group".
        adv_clip: A_max, advantages are clipped to ±A_max (5, PORT).
        combine: several rewards: "gdpo" normalises each by its group's own mean and spread, sums with the weights and
            normalises over the round (PORT); "normalised-sum" normalises each, and the sum, by `spread` (ours); "sum"
            takes advantages of the weighted sum (PORT's preset).
        skip_equal: leave out groups whose rewards are all equal (False, PORT: they still pull ratios together).
        kl_coef: κ_max, the anchor's largest weight; 0 switches it off.
        kl_guidance: guidance scale of the anchor's base; 1 = its plain conditional prediction.
        kl_adapt: κ = κ_min + q·(κ_max − κ_min) with q the reward in [0, 1] ("raw_reward", DERIVED; an unbounded reward
            counts with its rank among all seen so far), q = A/(2·A_max) + ½ ("advantage", PORT), or q = 1 ("off").
        kl_min: κ_min (1e-4, PORT).
    """

    prompts_per_round: Count = 48
    generations: Several = 24
    updates_per_round: Count = 2
    demo_steps: Count = 10
    train_times: Count = 9
    time_sampling: Literal["stratified", "grid", "permutation", "uniform", "logit-normal"] = "stratified"
    time_start: times.Start = "drawn"
    time_range: Annotated[float, Gt(0), Le(1)] = 0.99
    spread: Spread = "global"
    adv_clip: Positive = 5.0
    combine: Combine = "gdpo"
    skip_equal: bool = False
    kl_coef: NonNegative = 0.1
    kl_guidance: NonNegative = 4.5
    kl_adapt: Literal["raw_reward", "advantage", "off"] = "raw_reward"
    kl_min: NonNegative = 1e-4

    def __post_init__(self) -> None:
        if self.updates_per_round > self.prompts_per_round:
            raise ValueError(
                f"updates_per_round = {self.updates_per_round} is more than prompts_per_round = "
                f"{self.prompts_per_round}; every update needs a group of its own"
            )
        if self.time_sampling == "permutation" and self.train_times > self.demo_steps:
            raise ValueError(
                f"train_times = {self.train_times}; expected at most demo_steps = {self.demo_steps}, the times that "
                "there are to permute"
            )
        for text in self.snapshots().values():
            LinearDecay.parse(text)

    def snapshots(self) -> Mapping[str, str]:
        """Return role → decay schedule of the method's snapshots; none by default."""
        return {}

    def draws(self) -> int:
        """Return the number of (t, ε) draws that a method averages for one sample at one time index."""
        return 1

    def strata(self) -> int:
        """Return the number of strata over which the draws of one sample are spread."""
        return self.draws()

    def kept_times(self, grid: Sequence[float]) -> int:
        """Return how many of the sampler's times are trained at, from noise on."""
        return times.kept_by_level(grid, self.time_range)

    def spaced_times(
        self, offsets: Float[Tensor, "g k m"], grid: Sequence[float], keys: Float[Tensor, "g n"]
    ) -> Float[Tensor, "g k m"]:
        """Return times in [1e-4, 1 − 1e-4]: at t = 1 itself x0 cannot be read from a prediction of noise.

        Args:
            offsets: uniform in [0, 1); one stratum per index k (m = 1) or per draw m.
            grid: the n times at which the sampler's steps start.
            keys: uniform; their order is that of "permutation".
        """
        count = offsets.shape[1] if offsets.shape[2] == 1 else self.strata()
        if self.time_sampling in ("grid", "permutation"):
            if self.time_sampling == "grid":
                index = times.strata(offsets, self.kept_times(grid), count=count, start=self.time_start)
            else:
                index = times.permutation(offsets, keys)
            return torch.tensor(grid, dtype=offsets.dtype)[index].clamp(1e-4, 1.0 - 1e-4)
        share = times.spread(offsets, count) if self.time_sampling == "stratified" else offsets
        if self.time_sampling == "logit-normal":
            raw = torch.sigmoid(torch.special.ndtri(share.clamp(1e-9, 1 - 1e-9)))
            share = 3.0 * raw / (1.0 + 2.0 * raw)
        return ((1.0 - self.time_range) + self.time_range * share).clamp(1e-4, 1.0 - 1e-4)


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


class ForwardTuning(Tuning):
    """Base of the forward-process methods; a method overrides `objective` and, by need, the class attributes."""

    config: ForwardConfig
    #: role that draws the samples, and roles of the snapshots whose predictions the loss needs
    sampler_role: str = "policy"
    frozen_roles: tuple[str, ...] = ()

    def __init__(self, task: PromptTask, reward: Reward | SetReward, config: Any, *, roles: Roles, seed: int) -> None:
        """Set up; arguments and errors are those of `Tuning`."""
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.decays = {role: LinearDecay.parse(text) for role, text in config.snapshots().items()}
        self.range = RewardRange()
        self.samples = self.evaluations = 0

    @staticmethod
    def role_names(config: ForwardConfig) -> tuple[str, ...]:
        """Policy, ref, the average where there is one, and the method's snapshots."""
        return (*Tuning.role_names(config), *config.snapshots())

    # ---------------------------------------------------------------- data rule

    def collect(self, ctx: StepContext) -> Collected:
        """Draw and score groups with the sampler's weights; compute advantages and the anchor's strength."""
        cfg, reward = self.config, self.reward
        pool, metrics = self.draw(ctx, role=self.sampler_role)
        valid, values = pool.scores.valid, item_values(reward, pool.scores)
        values = torch.where(valid, values, torch.zeros_like(values))
        parts = [(values, 1.0)]
        if isinstance(reward, WeightedItems) and len(pool.scores.parts) == len(reward.parts) > 1:
            parts = [(pool.scores.parts[r.name], w) for r, w in zip(reward.parts, reward.weights, strict=True)]
        rule = cfg.combine if len(parts) > 1 else "sum"
        advantage = combined_advantages(parts, valid, cfg.generations, rule, spread=cfg.spread, clip=cfg.adv_clip)
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
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[kept[mine]]
        group = torch.div(mine, pool.generations, rounding_mode="floor")
        own, aim, worth, pull = (part[mine].float() for part in (advantage, goal, values, strength))
        near = group - pool.first_row // pool.generations
        data = Samples(pool.take(mine), pool.cond, near, mine, group, own, aim, worth, pull, len(kept))
        self._count(int(kept.sum()), len(valid))
        if bool(valid.any()):
            metrics["reward/mean"] = reward_of(reward, pool.scores, valid.nonzero().flatten())
            metrics |= {f"reward/{name}": float(part[valid].mean()) for name, part in pool.scores.parts.items()}
            metrics["policy/anchor_strength"] = float(strength[valid].mean())
        metrics["reward/equal_groups"] = zero_spread_share(values, valid, cfg.generations)
        return Collected(data, cfg.updates_per_round if bool(kept.any()) else 0, metrics | self._state_metrics())

    def _count(self, trained: int, drawn: int) -> None:
        """Add this round's samples and network evaluations (rollouts and training) to the run's counters."""
        cfg = self.config
        passes = 1 + len(self.frozen_roles) + (cfg.kl_coef > 0) * (1 + (cfg.kl_guidance != 1.0))
        self.samples += drawn
        self.evaluations += drawn * cfg.demo_steps * (1 + (cfg.guidance_scale != 1.0))
        self.evaluations += trained * cfg.train_times * cfg.draws() * passes

    def _state_metrics(self) -> dict[str, float]:
        """Counters, and each snapshot's decay and ‖θ − snapshot‖: a frozen sampler shows here
        (docs/methods/crd.md#p12-stale-sampler).
        """
        found = {"count/samples": float(self.samples), "count/evaluations": float(self.evaluations)}
        weights = self.roles.state_dict() if self.decays else {}
        for role, decay in self.decays.items():
            found[f"policy/decay_{role}"] = decay.at(self.updates)
            squares = [
                (weights["policy"][name].float() - w.float()).square().sum() for name, w in weights[role].items()
            ]
            found[f"policy/distance_{role}"] = float(torch.stack(squares).sum().sqrt())
        return found

    # ---------------------------------------------------------------- noised rows

    def times(self, groups: int, ctx: StepContext, update: int) -> Float[Tensor, "g k m"]:
        """Return the times of every group at an update, a pure function of (seed, step, update)."""
        cfg = self.config
        grid = model_grid(self.task.denoiser.process, cfg.demo_steps)[:-1]
        generator = stream(self.seed, f"{self.name}/time", ctx.step, update)
        offsets = torch.rand((groups, cfg.train_times, cfg.draws()), generator=generator, dtype=torch.float64)
        return cfg.spaced_times(offsets, grid, torch.rand((groups, len(grid)), generator=generator))

    def rows(self, data: Samples, update: int, ctx: StepContext) -> Rows:
        """Return this rank's noised rows of an update, sample by sample inside a unit, unit by unit."""
        cfg = self.config
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
            item, name = rows.item[part], f"{self.name}/eps/{ctx.step}/{update}"
            keys = row_keys(self.seed, name, data.row[item], rows.index[part], rows.draw[part])
            noise = Keyed(keys).normal((len(item), *data.latents.shape[1:]), device, data.latents.dtype)
            at = item.to(device)
            yield Micro(
                data.latents[at],
                noise,
                rows.t[part].to(device),
                index_cond(data.cond, data.place[item].to(device)),
                rows.unit[part].to(device),
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

    def views(self, micro: Micro, ctx: StepContext, *, anchored: bool = True) -> Views:
        """Return all predictions of a micro-batch; frozen ones first, so that no switch meets the policy's graph."""
        ctx.poll()
        task = self.task
        assert isinstance(task.denoiser.process, GaussianProcess)
        xt = task.denoiser.process.corrupt(micro.latents, micro.t, micro.noise)
        target = task.denoiser.target(micro.latents, micro.noise, micro.t).float()
        anchor = self.base_at(xt, micro.t, micro.cond, ctx) if anchored else None
        frozen = {}
        with ctx.autocast():
            for role in () if micro.extra else self.frozen_roles:
                with self.roles.use(role), torch.no_grad():
                    frozen[role] = task.denoiser(xt, micro.t, micro.cond)
            with self.roles.use("policy"):
                theta = task.denoiser(xt, micro.t, micro.cond)
        return Views(theta, target, frozen, anchor)

    @abstractmethod
    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Return the method's loss of each row, and sums over the rows to log."""

    def loss(self, micro: Micro, ctx: StepContext) -> LossOut:
        """The method's loss plus κ·mean_d (v_θ − v_ref)² of every row."""
        views = self.views(micro, ctx)
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
        if update == self.config.updates_per_round - 1:
            for role, decay in self.decays.items():
                self.roles.lerp(role, decay.at(self.updates))

    def state_dict(self) -> dict[str, Any]:
        """Counters and the history of rewards; the snapshots are roles."""
        own = {"samples": self.samples, "evaluations": self.evaluations, "range": self.range.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
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
