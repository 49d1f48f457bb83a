"""Reward-weighted regression: denoising regression on the policy's own samples, weighted by exp(reward/temperature).

The simplest peer of DRAGON (Peters & Schaal 2007; for diffusion Lee et al. 2023, arXiv 2302.12192).  A set reward
enters as the leave-one-out influence R(S) − R(S∖i) of each sample in the round's whole set (`InfluenceAsItem` says
the same for a batch).  Rollout and denoising error are DRAGON's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.online.anchor import anchor_penalty, reference_prediction
from gencontrol.algorithms.online.preference import predict
from gencontrol.algorithms.online.rollout import autocast
from gencontrol.algorithms.online.sets import item_values, reward_of
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.algorithms.online.tuning import RewardTuning, check_counts, check_tuning
from gencontrol.config import options
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.types import Cond, index_cond


@options
class RwrConfig:
    """Options of `RewardWeightedRegression`; all values are ours, the shared ones are DRAGON's.

    Args:
        prompts_per_round: prompts drawn per round, over all processes.
        generations: samples per prompt.
        updates_per_round: optimizer steps on one round's samples.
        temperature: of the softmax weights, in standard deviations of the round's rewards, > 0.
        demo_steps, eval_steps, sampler, guidance_scale: as in `DragonConfig`.
        kl_coef, kl_guidance: weight (0 = none) and guidance scale of the pull to the base; see `algorithms.anchor`.
        ema_decay: of the averaged weights that evaluation and the final model use; 0 = use the policy.
        min_valid: least share of prompts with valid rewards; below it the round is drawn once more.
        eval_samples: samples per evaluation prompt.
    """

    prompts_per_round: int = 256
    generations: int = 2
    updates_per_round: int = 8
    temperature: float = 1.0
    demo_steps: int = 20
    eval_steps: int = 40
    sampler: str = "euler"
    guidance_scale: float = 1.0
    kl_coef: float = 0.0
    kl_guidance: float = 1.0
    ema_decay: float = 0.99
    min_valid: float = 0.8
    eval_samples: int = 1

    def __post_init__(self) -> None:
        check_tuning(self)
        check_counts(self, "prompts_per_round", "updates_per_round")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}; expected a number above 0")
        if self.kl_coef < 0 or self.kl_guidance < 0:
            raise ValueError(f"kl_coef = {self.kl_coef}, kl_guidance = {self.kl_guidance}; expected at least 0")


def softmax_weights(
    values: Float[Tensor, " n"], valid: Tensor, temperature: float
) -> tuple[Float[Tensor, " n"], float]:
    """Return weights of mean 1 over the valid items, 0 elsewhere, and the effective sample size as a share.

    weights ∝ exp((r − mean r)/(temperature·std r)); equal rewards give equal weights.
    """
    kept = values[valid].double()
    spread = float(kept.std(unbiased=False))
    logits = (kept - kept.mean()) / (temperature * spread) if spread > 0 else torch.zeros_like(kept)
    shares = torch.softmax(logits, 0)
    weights = torch.zeros(len(values), dtype=torch.float32)
    weights[valid] = (shares * len(kept)).float()
    return weights, 1.0 / (float(shares.square().sum()) * len(kept))


@dataclass(frozen=True)
class Weighted:
    """This rank's samples of a round with their weights, conditions and global row numbers."""

    latents: Float[Tensor, "n *d"]
    weights: Float[Tensor, " n"]
    cond: Cond
    row: Int64[Tensor, " n"]
    total: int


@dataclass(frozen=True)
class WeightedMicro:
    """One micro-batch of weighted samples with times and noise."""

    latents: Float[Tensor, "n *d"]
    weights: Float[Tensor, " n"]
    cond: Cond
    t: Float[Tensor, " n"]
    noise: Float[Tensor, "n *d"]


class RewardWeightedRegression(RewardTuning):
    """Reward-weighted regression; see the module docstring."""

    Config = RwrConfig
    name = "rwr"
    title = "reward-weighted regression (Peters & Schaal 2007; Lee et al. 2023)"
    paper, medium = "arXiv:2302.12192", "any"
    summary = "Denoising regression on the model's own samples, weighted by exp(reward/temperature)."

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: RwrConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; `roles.module` is the task's network, with the roles policy, ref and (for ema_decay > 0) ema.

        Raises:
            UsageError: a role is missing.
        """
        super().__init__("rwr", task, reward, config, roles, seed)
        self.config = config

    def collect(self, ctx: StepContext) -> Collected:
        """Draw samples with the policy and weight them by their reward."""
        cfg = self.config
        pool, metrics = self.shell.draw(cfg.prompts_per_round, ctx)
        valid = pool.scores.valid
        if int(valid.sum()) < 2:
            return Collected(None, 0, metrics)
        weights, effective = softmax_weights(item_values(self.shell.reward, pool.scores), valid, cfg.temperature)
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[valid[mine]]
        data = Weighted(pool.take(mine), weights[mine].to(pool.latents.device), pool.take_cond(mine), mine, len(valid))
        metrics["reward/mean"] = reward_of(self.shell.reward, pool.scores, valid.nonzero().flatten())
        metrics["policy/effective_share"] = effective
        return Collected(data, cfg.updates_per_round, metrics)

    def minibatches(self, data: Weighted, update: int, ctx: StepContext) -> Iterable[WeightedMicro]:
        """Yield all samples of the round with new times and noise."""
        for part, t, noise in self.shell.noised(data.row, data.total, data.latents, ctx.micro_batch, ctx, update):
            cond = index_cond(data.cond, torch.arange(part.start, part.stop, device=data.latents.device))
            yield WeightedMicro(data.latents[part], data.weights[part], cond, t, noise)

    def loss(self, micro: WeightedMicro, ctx: StepContext) -> LossOut:
        """Weighted denoising error of one micro-batch, with the pull to the base where it is asked for."""
        ctx.poll()
        cfg, denoiser = self.config, self.shell.task.denoiser
        anchor = None
        if cfg.kl_coef > 0:
            assert isinstance(denoiser.process, GaussianProcess)
            xt = denoiser.process.corrupt(micro.latents, micro.t, micro.noise)
            with autocast(ctx):
                anchor = reference_prediction(self.shell.task, self.roles, xt, micro.t, micro.cond, cfg.kl_guidance)
        with self.roles.use("policy"), autocast(ctx):
            prediction, target = predict(denoiser, micro.latents, micro.t, micro.noise, micro.cond)
        errors = (prediction - target).square().flatten(1).mean(1)
        losses = micro.weights * errors
        metrics = {"loss/weighted": losses.detach().sum(), "loss/denoising": errors.detach().sum()}
        if anchor is not None:
            penalty = anchor_penalty(prediction, anchor.raw)
            losses, metrics["policy/anchor_distance"] = losses + cfg.kl_coef * penalty, penalty.detach().sum()
        return LossOut(losses.sum(), len(errors), metrics)

    def state_dict(self) -> dict[str, Any]:
        """Number of updates taken (for the warm-up of the average)."""
        return {"updates": self.shell.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.shell.updates = int(state["updates"])
