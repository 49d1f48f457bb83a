"""DRaFT and AlignProp: the reward's own gradient, taken back through the last K sampler steps.

DRaFT-K (Clark et al. 2023, arXiv 2309.17400) differentiates reward(decode(x0)) through the last K steps of the chain;
DRaFT-LV adds re-noised copies of the result to lower the variance of K = 1; AlignProp (Prabhudesai et al. 2023, arXiv
2310.03739) draws K anew for each update.  Samples are made inside the loss, so every update is on-policy.  The anchor
(a pull to the base, optionally guided) is ours: direct gradients exploit a reward faster than any other method.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.online.base import OnPolicyConfig, Tuning, anchor_penalty
from gencontrol.algorithms.online.rollout import chunks, device_of, draw_times, guided
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, Natural, options
from gencontrol.errors import RewardError, UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import item_generators, item_noise, stream
from gencontrol.sampling import make_step, sample
from gencontrol.sampling.grids import make_grid
from gencontrol.types import Cond, RewardContext, cond_to, grouped, index_cond


@options
class DraftConfig(OnPolicyConfig):
    """Options of `Draft`; its own are PAPER, the pull to the base and the sizes are ours.

    An update takes its share of the round's samples; `sampler` and `demo_steps` are of the chain that is
    differentiated, and `min_valid` bounds the share of valid rewards in an update: nothing is drawn twice.

    Args:
        grad_steps: K, the last sampler steps that carry gradient, 1 to `demo_steps`.
        truncation: "fixed" K, or "random" (AlignProp): uniform on 1 … grad_steps, drawn anew for each update.
        low_variance: re-noised copies whose gradients are averaged with the sample's own (DRaFT-LV; grad_steps must be
            1); 0 = none.
    """

    prompts_per_round: Count = 64
    generations: Count = 1
    updates_per_round: Count = 4
    grad_steps: Count = 1
    truncation: Literal["fixed", "random"] = "fixed"
    low_variance: Natural = 0

    def __post_init__(self) -> None:
        if self.grad_steps > self.demo_steps:
            raise ValueError(f"grad_steps = {self.grad_steps}; the chain has {self.demo_steps} steps (demo_steps)")
        if self.low_variance and self.grad_steps != 1:
            raise ValueError(f"low_variance = {self.low_variance} needs grad_steps = 1, not {self.grad_steps}")


@dataclass(frozen=True)
class DraftRound:
    """This rank's samples-to-be: conditions and prompts of each, and global numbers of all."""

    cond: Cond
    prompts: list[str]
    items: Int64[Tensor, " n"]


@dataclass(frozen=True)
class DraftMicro:
    """Samples of one micro-batch, which the loss will draw, with the depth K of the gradient."""

    cond: Cond
    prompts: list[str]
    items: Int64[Tensor, " n"]
    t: Float[Tensor, " n"]
    depth: int
    update: int


def differentiable_rewards() -> list[str]:
    """Return the names of the item rewards in the registry that have a gradient."""
    from gencontrol.registry import REWARDS, find

    kinds = {name: vars(find(REWARDS, name, "reward")) for name in REWARDS}
    return sorted(name for name, own in kinds.items() if own.get("differentiable") is True)


class Draft(Tuning):
    """DRaFT-K; see the module docstring."""

    Config = DraftConfig
    config: DraftConfig
    name = "draft"
    title = "DRaFT, direct reward fine-tuning (Clark et al. 2023)"
    paper = "arXiv:2309.17400"
    summary = "The reward's own gradient is taken back through the last sampler steps."

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: DraftConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; arguments and errors are those of `Tuning`.

        Raises:
            UsageError: the reward has no gradient, or the model has no Gaussian process.
        """
        if not reward.differentiable or reward.kind != "item":
            raise UsageError(
                f"draft needs a differentiable item reward and '{reward.name}' is none; such are: "
                f"{', '.join(differentiable_rewards())}. Use flow-grpo, crd or dragon for the others."
            )
        if not isinstance(task.denoiser.process, GaussianProcess):
            raise UsageError("draft differentiates Gaussian sampler steps; a masked-token model has none.")
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.process, self.step = task.denoiser.process, make_step(config.sampler, task.denoiser.process)
        self._seen = self._valid = 0

    # ---------------------------------------------------------------- data rule

    def collect(self, ctx: StepContext) -> Collected:
        """Choose and encode this step's prompts; samples are drawn in the loss.

        Raises:
            UsageError: the prompts do not divide over the ranks.
        """
        cfg, task = self.config, self.task
        count = cfg.prompts_per_round // ctx.world_size
        mine = self.prompts(ctx)[ctx.rank * count : (ctx.rank + 1) * count]
        with ctx.group.all_or_none(ctx.poll):
            cond = cond_to(task.encode(mine), device_of(task))
        rows = torch.arange(count).repeat_interleave(cfg.generations)
        items = ctx.rank * len(rows) + torch.arange(len(rows))
        data = DraftRound(grouped(cond, rows), [mine[i] for i in rows.tolist()], items)
        return Collected(data, cfg.updates_per_round)

    def depth_of(self, step: int, update: int) -> int:
        """Return K of an update, the same on all ranks."""
        if self.config.truncation == "fixed":
            return self.config.grad_steps
        generator = stream(self.seed, "draft/depth", step, update)
        return int(torch.randint(1, self.config.grad_steps + 1, (), generator=generator))

    def minibatches(self, data: DraftRound, update: int, ctx: StepContext) -> Iterable[DraftMicro]:
        """Yield an update's share of the samples: every n-th."""
        self._seen = self._valid = 0
        share = torch.arange(update, len(data.items), self.config.updates_per_round)
        total = self.config.prompts_per_round * self.config.generations
        t = draw_times(total, self.seed, "draft/time", ctx.step, update)
        for part in chunks(len(share), ctx.micro_batch):
            rows, items = share[part], data.items[share[part]]
            prompts = [data.prompts[row] for row in rows.tolist()]
            yield DraftMicro(
                index_cond(data.cond, rows), prompts, items, t[items], self.depth_of(ctx.step, update), update
            )

    # ---------------------------------------------------------------- loss

    def _sample(self, micro: DraftMicro, ctx: StepContext) -> Float[Tensor, "n *d"]:
        """Draw the samples with the active weights; the last K steps keep their graph."""
        task, cfg = self.task, self.config
        name = f"draft/noise/{ctx.step}/{micro.update}"
        with ctx.autocast():
            return sample(
                guided(task, cfg.guidance_scale),
                (len(micro.items), *task.latent_shape),
                steps=cfg.demo_steps,
                step=self.step,
                generator=item_generators(self.seed, name, micro.items.tolist()),
                cond=micro.cond,
                callback=lambda index, t, x: ctx.poll(),
                grad_steps=micro.depth,
            )

    def _again(self, x0: Float[Tensor, "n *d"], copy: int, micro: DraftMicro, ctx: StepContext) -> Tensor:
        """Noise a detached sample to the grid's last time and take the last step once more."""
        t = make_grid(self.process.schedule, self.config.demo_steps, None)[-2]
        name = f"draft/copy/{ctx.step}/{micro.update}/{copy}"
        noise = item_noise(x0.shape[1:], self.seed, name, micro.items.tolist()).to(x0.device)
        xt = self.process.corrupt(x0.detach(), t, noise)
        with ctx.autocast():
            pred = guided(self.task, self.config.guidance_scale)(xt, t, micro.cond)
        assert isinstance(pred, Pred)
        return pred.x0

    def _rewards(self, x0: Float[Tensor, "n *d"], micro: DraftMicro) -> tuple[Float[Tensor, " n"], Tensor]:
        """Return values with gradient (0 where invalid) and which are valid.

        Raises:
            RewardError: another number of values than samples, or values without a gradient.
        """
        task, reward = self.task, self.reward
        samples = task.decode(x0)
        out = reward(samples, RewardContext(prompts=micro.prompts, sampling_rate=task.sampling_rate))
        if len(out.values) != len(x0):
            raise RewardError(f"reward '{reward.name}' gave {len(out.values)} values for {len(x0)} samples.")
        if not out.values.requires_grad:
            culprit = f"reward '{reward.name}'" if samples.requires_grad else "the model's decode"
            raise RewardError(f"{culprit} passes no gradient on; draft needs one (is there a no_grad or a detach?).")
        return torch.where(out.valid, out.values, torch.zeros_like(out.values)), out.valid

    def loss(self, micro: DraftMicro, ctx: StepContext) -> LossOut:
        """−reward of new samples, by the gradient through the last K steps, plus the anchor where it has a weight."""
        ctx.poll()
        cfg = self.config
        with self.roles.use("policy"):
            x0 = self._sample(micro, ctx)
            values, valid = self._rewards(x0, micro)
            losses = -values
            for copy in range(cfg.low_variance):
                losses = losses - self._rewards(self._again(x0, copy, micro, ctx), micro)[0]
            losses = losses / (1 + cfg.low_variance)
        metrics: dict[str, float | Tensor] = {
            "reward/mean": values.detach().sum(),
            "reward/valid_fraction": valid.float().sum(),
            "policy/depth": float(micro.depth * len(values)),
        }
        self._seen, self._valid = self._seen + len(valid), self._valid + int(valid.sum())
        if cfg.kl_coef:
            pull = self._anchor(x0.detach(), micro, ctx)
            losses, metrics["loss/anchor"] = losses + cfg.kl_coef * pull, pull.detach().sum()
        return LossOut(losses.sum(), len(losses), metrics)

    def _anchor(self, x0: Float[Tensor, "n *d"], micro: DraftMicro, ctx: StepContext) -> Float[Tensor, " n"]:
        """Distance of the policy's velocity from the guided base's at noised samples."""
        name = f"draft/eps/{ctx.step}/{micro.update}"
        noise = item_noise(x0.shape[1:], self.seed, name, micro.items.tolist()).to(x0.device)
        t = micro.t.to(x0.device)
        xt = self.process.corrupt(x0, t, noise)
        base = self.base_at(xt, t, micro.cond, ctx)
        assert base is not None
        with self.roles.use("policy"), ctx.autocast():
            velocity = self.task.denoiser(xt, t, micro.cond).velocity
        return anchor_penalty(velocity, base.velocity)

    # ---------------------------------------------------------------- the rest of the contract

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the averaged weights.

        Raises:
            RewardError: too few rewards of the update were valid.
        """
        if self._valid < self.config.min_valid * self._seen:
            raise RewardError(
                f"reward '{self.reward.name}' was valid for {self._valid} of {self._seen} samples; at least "
                f"{self.config.min_valid:.0%} are needed: look at the samples, or lower min_valid."
            )
        super().after_update(ctx, update)
