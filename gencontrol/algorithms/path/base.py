"""Policy gradients on the sampler's own path: each stochastic step is an action with a Gaussian log-probability.

What DDPO (Black et al. 2023, arXiv 2305.13301) and Flow-GRPO (arXiv 2505.05470) share: sample with a stochastic step,
keep all states, and weight the clipped likelihood ratio of each step by the sample's advantage.  The last step, to
clean data, is deterministic and has no density, so it is not trained (as in both codes).  A micro-batch holds rows at
one sampler step, cut as the rollout was, so that before the first update every ratio is 1 to the bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.online.advantages import zero_spread_share
from gencontrol.algorithms.online.anchor import anchor_penalty, reference_velocity
from gencontrol.algorithms.online.rollout import Pool, Sampling, autocast, chunks, guided
from gencontrol.algorithms.online.sets import item_values, reward_of
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.algorithms.online.tuning import RewardTuning, check_counts, check_tuning
from gencontrol.config import options
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.process.schedule import Scalar
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import stream
from gencontrol.sampling.state import gaussian_log_prob
from gencontrol.sampling.steps import StochasticStep
from gencontrol.types import Cond, index_cond


@options
class PathConfig:
    """Options that the policy gradients share.

    Args:
        prompts_per_round, generations: prompts drawn per round over all processes, and samples of each.
        updates_per_round: optimizer steps per round; each takes its share of every process's samples.
        train_steps: sampler steps trained on per round, drawn anew each round; 0 = all that are stochastic.
        clip_ratio: the likelihood ratio counts up to 1 ± this, > 0.
        advantage_clip: largest size of an advantage, > 0.
        kl: weight of the path KL to the base, Σ over data axes of (mean − mean_ref)²/(2·std²) of a step, reduced like
            the log-probability; 0 = none.
        reduce: "mean" averages log-probability and KL over the data axes (PORT), "sum" is the true density.
        anchor, anchor_scale: weight (0 = none) and guidance scale of the pull of the velocity to the guided base; see
            `gencontrol.algorithms.online.anchor`.
        demo_steps: sampler steps of a rollout, at least 2.
        eval_steps, sampler, guidance_scale: evaluation's steps and sampler; guidance of rollouts and evaluation.
        ema_decay: of the averaged weights that evaluation and the final model use; 0 = use the policy.
        min_valid: least share of prompts with valid rewards; below it the round is drawn once more.
        eval_samples: samples per evaluation prompt.
    """

    prompts_per_round: int = 48
    generations: int = 24
    updates_per_round: int = 2
    train_steps: int = 0
    clip_ratio: float = 1e-3
    advantage_clip: float = 5.0
    kl: float = 0.04
    reduce: Literal["mean", "sum"] = "mean"
    anchor: float = 0.0
    anchor_scale: float = 1.0
    demo_steps: int = 10
    eval_steps: int = 40
    sampler: str = "euler"
    guidance_scale: float = 1.0
    ema_decay: float = 0.99
    min_valid: float = 0.8
    eval_samples: int = 1

    def __post_init__(self) -> None:
        check_tuning(self)
        check_counts(self, "prompts_per_round", "updates_per_round")
        for name in ("clip_ratio", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a number above 0")
        for name in ("kl", "anchor", "anchor_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a number of at least 0")
        if self.demo_steps < 2 or not 0 <= self.train_steps < self.demo_steps:
            raise ValueError(
                f"demo_steps = {self.demo_steps}, train_steps = {self.train_steps}; expected at least 2 sampler steps, "
                "and at most demo_steps − 1 to train (the last is deterministic)"
            )
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce = {self.reduce!r}; expected 'mean' or 'sum'")


@dataclass(frozen=True)
class PathRound:
    """This rank's valid rows of a round: states [k+1 n *d], log-probabilities [k n] and the sampler steps to train."""

    states: Float[Tensor, "k1 n *d"]
    log_probs: Float[Tensor, "k n"]
    advantages: Float[Tensor, " n"]
    cond: Cond
    times: tuple[float, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class PathMicro:
    """Rows at one sampler step t → t_next with the log-probability [n] that they were drawn with."""

    x: Float[Tensor, "n *d"]
    x_next: Float[Tensor, "n *d"]
    log_prob: Float[Tensor, " n"]
    advantages: Float[Tensor, " n"]
    cond: Cond
    t: float
    t_next: float


def clipped_surrogate(
    log_ratio: Float[Tensor, " n"], advantages: Float[Tensor, " n"], clip: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return max(−A·r, −A·clamp(r, 1 ± clip)) with r = exp(log_ratio) (PPO), and where the clamp bounds (1 or 0)."""
    ratio = log_ratio.exp()
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, bounded), (bounded > free).float()


class PathGradient(RewardTuning):
    """Base of the policy gradients on sampler steps: all but the step and the advantages."""

    def __init__(
        self,
        name: str,
        task: PromptTask,
        reward: Reward | SetReward,
        config: PathConfig,
        roles: Roles,
        seed: int,
        step: StochasticStep,
    ) -> None:
        """Set up; arguments and errors are those of `Tuning`, `step` draws the rollouts.

        Raises:
            UsageError: the model is no Gaussian process.
        """
        if not isinstance(task.denoiser.process, GaussianProcess):
            raise UsageError(f"{name} trains Gaussian sampler steps; a masked-token model has none.")
        super().__init__(name, task, reward, config, roles, seed)
        self.config, self.step, self.process = config, step, task.denoiser.process
        self.rollout = Sampling(config.demo_steps, step, config.guidance_scale)

    @abstractmethod
    def advantages(
        self, values: Float[Tensor, " n"], valid: Tensor, ctx: StepContext
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Return the advantage of all ranks' rows (0 where invalid) and metrics."""

    # ---------------------------------------------------------------- data rule

    def collect(self, ctx: StepContext) -> Collected:
        """Draw paths with the policy and score their ends."""
        cfg = self.config
        pool, metrics = self.shell.draw(cfg.prompts_per_round, ctx, path_of=self.rollout)
        valid = pool.scores.valid
        if not bool(valid.any()):
            return Collected(None, 0, metrics)
        values = item_values(self.shell.reward, pool.scores)
        weights, own = self.advantages(values, valid, ctx)
        metrics |= own | {
            "reward/mean": reward_of(self.shell.reward, pool.scores, valid.nonzero().flatten()),
            "reward/zero_spread_groups": zero_spread_share(values, valid, cfg.generations),
            "policy/advantage_abs": float(weights[valid].abs().mean()),
        }
        return Collected(self._round(pool, weights, ctx), cfg.updates_per_round, metrics)

    def _round(self, pool: Pool, weights: Float[Tensor, " n"], ctx: StepContext) -> PathRound:
        """Keep this rank's valid rows and choose the sampler steps."""
        path = pool.path
        assert path is not None and path.log_probs is not None
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[pool.scores.valid[mine]]
        rows, device = mine - pool.first_row, pool.latents.device
        kept: Any = slice(None) if len(rows) == len(pool.latents) else rows.to(device)
        return PathRound(
            path.states[:, kept],
            path.log_probs[:, kept],
            weights[mine].float().to(device),
            pool.take_cond(mine),
            path.times,
            self.steps_of(ctx.step),
        )

    def steps_of(self, step: int) -> tuple[int, ...]:
        """Return the sampler steps that a round trains on, in order: a fresh subset, the same on all ranks."""
        stochastic = self.config.demo_steps - 1
        count = self.config.train_steps or stochastic
        order = torch.randperm(stochastic, generator=stream(self.seed, f"{self.shell.name}/steps", step))
        return tuple(sorted(order[:count].tolist()))

    def minibatches(self, data: PathRound, update: int, ctx: StepContext) -> Iterable[PathMicro]:
        """Yield an update's share of the rows (every n-th, so that each holds parts of all groups), step by step."""
        share = torch.arange(update, data.states.shape[1], self.config.updates_per_round)
        for part in chunks(len(share), ctx.micro_batch):
            rows = share[part].to(data.states.device)
            cond = index_cond(data.cond, rows)
            for k in data.steps:
                yield PathMicro(
                    data.states[k, rows],
                    data.states[k + 1, rows],
                    data.log_probs[k, rows],
                    data.advantages[rows],
                    cond,
                    data.times[k],
                    data.times[k + 1],
                )

    # ---------------------------------------------------------------- loss

    def _moments(self, micro: PathMicro, ctx: StepContext) -> tuple[Tensor, Scalar, Pred]:
        """Return mean and deviation of the step under the active role, guided as in the rollout, and its prediction."""
        w0, w1, std = self.step.weights(self.process, micro.t, micro.t_next, micro.x)
        with autocast(ctx):
            pred = guided(self.shell.task, self.config.guidance_scale)(micro.x, micro.t, micro.cond)
        assert isinstance(pred, Pred)
        return pred.mix(w0, w1), std, pred

    @torch.no_grad()
    def _references(self, micro: PathMicro, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """Return the base's step mean and guided velocity where kl and anchor ask for them."""
        mean, velocity = None, None
        if self.config.kl:
            with self.roles.use("ref"):
                mean = self._moments(micro, ctx)[0]
        if self.config.anchor:
            t = torch.full((len(micro.x),), micro.t, device=micro.x.device)
            scale = self.config.anchor_scale
            with autocast(ctx):
                velocity = reference_velocity(self.shell.task, self.roles, micro.x, t, micro.cond, scale)
        return mean, velocity

    def loss(self, micro: PathMicro, ctx: StepContext) -> LossOut:
        """Clipped surrogate of one sampler step, plus KL and anchor where their weights are above 0."""
        ctx.poll()
        cfg = self.config
        axes = micro.x[0].numel() if cfg.reduce == "mean" else 1
        base_mean, base_velocity = self._references(micro, ctx)
        with self.roles.use("policy"):
            mean, std, pred = self._moments(micro, ctx)
        log_ratio = (gaussian_log_prob(micro.x_next, mean, std) - micro.log_prob) / axes
        losses, bounded = clipped_surrogate(log_ratio, micro.advantages, cfg.clip_ratio)
        change = log_ratio.detach()
        metrics: dict[str, float | Tensor] = {
            "loss/surrogate": losses.detach().sum(),
            "policy/ratio": change.exp().sum(),
            "policy/clip_fraction": bounded.sum(),
            "policy/approx_kl": 0.5 * change.square().sum(),
        }
        if base_mean is not None:
            kl = self.process.path_kl(mean, base_mean, std) / axes
            losses, metrics["policy/kl"] = losses + cfg.kl * kl, kl.detach().sum()
        if base_velocity is not None:
            pull = anchor_penalty(pred.velocity, base_velocity)
            losses, metrics["loss/anchor"] = losses + cfg.anchor * pull, pull.detach().sum()
        return LossOut(losses.sum(), len(losses), metrics)

    # ---------------------------------------------------------------- the rest of the contract

    def state_dict(self) -> dict[str, Any]:
        """Number of updates taken (for the warm-up of the average)."""
        return {"updates": self.shell.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.shell.updates = int(state["updates"])
