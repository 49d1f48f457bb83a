"""Policy gradients on the sampler's own path: each stochastic step is an action with a Gaussian log-probability.

What DDPO (Black et al. 2023, arXiv 2305.13301) and Flow-GRPO (arXiv 2505.05470) share: sample with a stochastic step,
keep all states, and weight the clipped likelihood ratio of each step by the sample's advantage.  A step to clean data,
t = 0, is deterministic and has no density, so it is not trained; on a grid that ends above 0 (Stable Diffusion's table)
the last step is stochastic and trained like the others.  A micro-batch holds rows at one sampler step, cut as the
rollout was, so that before the first update every ratio is 1 to the bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.online.base import OnPolicyConfig, Several, Tuning, anchor_penalty
from gencontrol.algorithms.online.rollout import (
    Sampling,
    chunks,
    guided,
    item_values,
    reward_of,
    zero_spread_share,
)
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, Natural, NonNegative, Positive, options
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.process.schedule import Scalar
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import stream
from gencontrol.sampling.grids import model_grid
from gencontrol.sampling.state import gaussian_log_prob
from gencontrol.sampling.steps import StochasticStep
from gencontrol.types import Cond, index_cond


@options
class PathConfig(OnPolicyConfig):
    """Options that the policy gradients share; an update takes its share of every process's samples.

    The sampler is the evaluation's: rollouts need the method's own stochastic step.

    Args:
        train_steps: sampler steps trained on per round, drawn anew each round; 0 = all that are stochastic.
        clip_range: the likelihood ratio counts up to 1 ± this, > 0.
        adv_clip: largest size of an advantage, > 0.
        path_kl_coef: weight of the KL to the base of a step, reduced like the log-probability; 0 = none.  `kl_coef` is
            the pull of the velocity instead. (default: the unit's own weight of the method)
        path_kl_unit: "paper" is the KL of the transition, Σ over data axes of (mean − mean_ref)²/(2·std²); "code"
            leaves the step's length out of std², as Flow-GRPO's official code does (PORT).
        reduce: "mean" averages log-probability and KL over the data axes (PORT), "sum" is the true density.
        demo_steps: sampler steps of a rollout, at least 2.
    """

    renamed: ClassVar[dict[str, str]] = {"kl": "path_kl_coef"}

    prompts_per_round: Count = 48
    generations: Count = 24
    updates_per_round: Count = 2
    demo_steps: Several = 10
    train_steps: Natural = 0
    clip_range: Positive = 1e-4
    adv_clip: Positive = 5.0
    path_kl_coef: NonNegative | None = None
    path_kl_unit: Literal["code", "paper"] = "paper"
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.train_steps > self.demo_steps:
            raise ValueError(f"train_steps = {self.train_steps}; expected at most demo_steps = {self.demo_steps}")

    def kl_weight(self) -> float:
        """Return the weight of the path KL."""
        return self.path_kl_coef or 0.0


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


class PathGradient(Tuning):
    """Base of the policy gradients on sampler steps: all but the step and the advantages."""

    config: PathConfig

    def __init__(self, task: PromptTask, reward: Reward | SetReward, config: Any, *, roles: Roles, seed: int) -> None:
        """Set up; arguments and errors are those of `Tuning`.

        Raises:
            UsageError: the model is no Gaussian process, or more steps are asked for than have a density.
        """
        if not isinstance(task.denoiser.process, GaussianProcess):
            raise UsageError(f"{self.name} trains Gaussian sampler steps; a masked-token model has none.")
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.step, self.process = self.rollout_step(config), task.denoiser.process
        self.trainable_steps = sum(t > 0 for t in model_grid(self.process, config.demo_steps)[1:])
        if config.train_steps > self.trainable_steps:
            raise UsageError(
                f"train_steps = {config.train_steps}; expected at most {self.trainable_steps} (the step to clean data "
                "is deterministic)"
            )

    @staticmethod
    @abstractmethod
    def rollout_step(config: Any) -> StochasticStep:
        """Return the step that draws the rollouts."""

    @abstractmethod
    def advantages(
        self, values: Float[Tensor, " n"], valid: Tensor, ctx: StepContext
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Return the advantage of all ranks' rows (0 where invalid) and metrics."""

    # ---------------------------------------------------------------- data rule

    def collect(self, ctx: StepContext) -> Collected:
        """Draw paths with the policy and score their ends."""
        cfg = self.config
        pool, metrics = self.draw(ctx, path_of=Sampling(cfg.demo_steps, self.step, cfg.guidance_scale))
        valid = pool.scores.valid
        if not bool(valid.any()):
            return Collected(None, 0, metrics)
        values = item_values(self.reward, pool.scores)
        weights, own = self.advantages(values, valid, ctx)
        metrics |= own | {
            "reward/mean": reward_of(self.reward, pool.scores, valid.nonzero().flatten()),
            "reward/zero_spread_groups": zero_spread_share(values, valid, cfg.generations),
            "policy/advantage_abs": float(weights[valid].abs().mean()),
        }
        path, device = pool.path, pool.latents.device
        assert path is not None and path.log_probs is not None
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[valid[mine]]
        rows = mine - pool.first_row
        # all rows: a view, since the path is the largest thing in memory
        kept: Any = slice(None) if len(rows) == len(pool.latents) else rows.to(device)
        data = PathRound(
            path.states[:, kept],
            path.log_probs[:, kept],
            weights[mine].float().to(device),
            pool.take_cond(mine),
            path.times,
            self.steps_of(ctx.step),
        )
        return Collected(data, cfg.updates_per_round, metrics)

    def steps_of(self, step: int) -> tuple[int, ...]:
        """Return the sampler steps that a round trains on, in order: a fresh subset, the same on all ranks."""
        count = self.config.train_steps or self.trainable_steps
        order = torch.randperm(self.trainable_steps, generator=stream(self.seed, f"{self.name}/steps", step))
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
        with ctx.autocast():
            pred = guided(self.task, self.config.guidance_scale)(micro.x, micro.t, micro.cond)
        assert isinstance(pred, Pred)
        return pred.mix(w0, w1), std, pred

    def _length(self, micro: PathMicro) -> float:
        """The step's length in the flow's time s/(a + s), which is t on the Linear schedule without a shift."""
        ends = [self.process.schedule.at(t) for t in (micro.t, micro.t_next)]
        start, end = (point.s / (point.a + point.s) for point in ends)
        return start - end

    def loss(self, micro: PathMicro, ctx: StepContext) -> LossOut:
        """Clipped surrogate of one sampler step, plus KL and anchor where their weights are above 0."""
        ctx.poll()
        cfg = self.config
        axes = micro.x[0].numel() if cfg.reduce == "mean" else 1
        base_mean, kl_weight = None, cfg.kl_weight()
        if kl_weight:
            with self.roles.use("ref"), torch.no_grad():
                base_mean = self._moments(micro, ctx)[0]
        base = self.base_at(micro.x, torch.full((len(micro.x),), micro.t, device=micro.x.device), micro.cond, ctx)
        with self.roles.use("policy"):
            mean, std, pred = self._moments(micro, ctx)
        log_ratio = (gaussian_log_prob(micro.x_next, mean, std) - micro.log_prob) / axes
        losses, bounded = clipped_surrogate(log_ratio, micro.advantages, cfg.clip_range)
        change = log_ratio.detach()
        metrics: dict[str, float | Tensor] = {
            "loss/surrogate": losses.detach().sum(),
            "policy/ratio": change.exp().sum(),
            "policy/clip_fraction": bounded.sum(),
            "policy/approx_kl": 0.5 * change.square().sum(),
        }
        if base_mean is not None:
            unit = self._length(micro) ** 0.5 if cfg.path_kl_unit == "code" else 1.0
            kl = self.process.path_kl(mean, base_mean, std / unit) / axes
            losses, metrics["policy/kl"] = losses + kl_weight * kl, kl.detach().sum()
        if base is not None:
            pull = anchor_penalty(pred.velocity, base.velocity)
            losses, metrics["loss/anchor"] = losses + cfg.kl_coef * pull, pull.detach().sum()
        return LossOut(losses.sum(), len(losses), metrics)
