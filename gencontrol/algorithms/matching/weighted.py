"""Weighted denoising regression on the policy's own samples: a method says which samples count how much.

The loss of a sample is weight·‖v_θ(x_t) − target‖² at a fresh time and fresh noise per update.  `rwr` is a softmax of
the rewards; keeping the best share of each prompt's group is another (RAFT, arXiv 2304.06767: `examples/raft.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.online.base import OnPolicyConfig, Tuning, anchor_penalty
from gencontrol.algorithms.online.rollout import item_values, predict, reward_of
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.types import Cond, index_cond


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


class WeightedDenoising(Tuning):
    """All but the weights; a subclass gives `weights`, and by need a `Config` of its own."""

    Config = OnPolicyConfig

    @abstractmethod
    def weights(
        self, values: Float[Tensor, " n"], valid: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Return a weight of each sample and metrics to log.

        A sample of weight 0 counts in the mean of the loss and moves nothing; NaN leaves it out, like invalid ones are.

        Args:
            values: rewards of the round's samples on all ranks, the `generations` of a prompt adjacent; those of a set
                reward are influences R(S) − R(S∖i) in the set of all.
            valid: which samples have a reward; the others' values mean nothing.
        """

    def collect(self, ctx: StepContext) -> Collected:
        """Draw samples with the policy and weight them."""
        pool, metrics = self.draw(ctx)
        valid = pool.scores.valid
        if int(valid.sum()) < 2:
            return Collected(None, 0, metrics)
        weights, found = self.weights(item_values(self.reward, pool.scores), valid)
        mine = torch.arange(pool.first_row, pool.first_row + len(pool.latents))
        mine = mine[(valid & ~weights.isnan())[mine]]
        data = Weighted(pool.take(mine), weights[mine].to(pool.latents.device), pool.take_cond(mine), mine, len(valid))
        metrics["reward/mean"] = reward_of(self.reward, pool.scores, valid.nonzero().flatten())
        return Collected(data, self.config.updates_per_round, metrics | found)

    def minibatches(self, data: Weighted, update: int, ctx: StepContext) -> Iterable[WeightedMicro]:
        """Yield all samples of the round with new times and noise."""
        for part, t, noise in self.noised(data.row, data.total, data.latents, ctx.micro_batch, ctx, update):
            cond = index_cond(data.cond, torch.arange(part.start, part.stop, device=data.latents.device))
            yield WeightedMicro(data.latents[part], data.weights[part], cond, t, noise)

    def loss(self, micro: WeightedMicro, ctx: StepContext) -> LossOut:
        """Weighted denoising error of one micro-batch, with the pull to the base where it is asked for."""
        ctx.poll()
        denoiser = self.task.denoiser
        assert isinstance(denoiser.process, GaussianProcess)
        base = self.base_at(denoiser.process.corrupt(micro.latents, micro.t, micro.noise), micro.t, micro.cond, ctx)
        with self.roles.use("policy"), ctx.autocast():
            prediction, target = predict(denoiser, micro.latents, micro.t, micro.noise, micro.cond)
        errors = (prediction - target).square().flatten(1).mean(1)
        losses = micro.weights * errors
        metrics = {"loss/weighted": losses.detach().sum(), "loss/denoising": errors.detach().sum()}
        if base is not None:
            penalty = anchor_penalty(prediction, base.raw)
            losses, metrics["policy/anchor_distance"] = losses + self.config.kl_coef * penalty, penalty.detach().sum()
        return LossOut(losses.sum(), len(errors), metrics)
