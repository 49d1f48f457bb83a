"""CRD: centred reward distillation of diffusion and flow models (arXiv 2603.14128; docs/methods/crd.md).

Per prompt, the centred implicit reward β(ρ_i − ρ̄) is regressed on the centred reward: the normaliser of
KL-regularised reward maximisation cancels, any sampler may draw, no trajectory is differentiated.  The mathematics of
the regression is in `gencontrol.algorithms.crd`, free of models and rollouts.  Three controls of drift: the ratio's
snapshot "old" and the sampler "sampling" follow the policy by schedules of their own; an anchor to the base under
guidance; its strength grows with the raw reward.

Settings follow the author's trainer in Flow-Factory (PORT) except where marked: centring is inside the prompt's group
(there: the micro-batch), κ follows the raw reward (there: the advantage), snapshots and counters are in the checkpoint.

Exact mode (DERIVED, ours): weighting = "elbo", target = "reward", unbiased = True, draws_per_sample ≥ 2.  ρ is then the
difference of two ELBOs, ∫ w(t)·E[‖v_old − v‖² − ‖v_θ − v‖²] dt with w = −½·dSNR/dt on x0.  For the exact denoiser of a
law the ELBO is tight at every x0 (I-MMSE), so that the denoiser of π_old·exp(r/β)/Z makes ρ − r/β constant and the loss
0.  It is the right one of the loss's minima: in the metric w(t)·p_t the first step from old, and the minimum of least
norm, is Δ = E[(v − v_old)(r − r̄)|x_t]/β, the tilt's own first order, because the map Δ → ρ has the adjoint
f → 2E[(v − v_old)·f|x_t].  In a network of any other metric it is one of many minima; small steps with a moving old
(schedule "none", β large) follow the path of tilts.  The default instead asks each t alone for the whole reward, which
preconditions the tilt by Cov(v|x_t)⁻¹ (docs/methods/crd.md#what-beta-means): β is then no temperature.  Squaring single
draws adds β²·Var ρ̂, which shrinks the step; the product of two independent estimates does not (`centered_losses`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import Collected, Collectives, LossOut, StepContext
from gencontrol.algorithms.crd import centered_losses, elbo_weight, implicit_reward
from gencontrol.algorithms.forward.base import ForwardConfig, ForwardTuning, Micro, Rows, Samples, Views
from gencontrol.algorithms.online.base import anchor_penalty
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, Positive, options
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward

#: Mean ‖v_θ − v_old‖² below which the ratio carries no signal, and first updates in a row before the warning.
_COLLAPSED, _PATIENCE = 1e-6, 5


@options
class CrdConfig(ForwardConfig):
    """Options of `Crd`; the shared ones are in `ForwardConfig`.

    Args:
        beta: > 0, scale of the implicit reward; the temperature of the tilt in the exact mode only (1, PORT).
        loss: "mse" (PORT) or "bce".
        weight_temp: τ of the centring weights: negative is uniform (PORT); see `centring_weights`.
        center: means over the prompt's "group", or over the whole optimizer "batch" (parity with PORT's micro-batch).
        weighting: of an error: "adaptive" self-normalised (PORT), "none", or "elbo", the bound's own (exact mode).
        target: R is A/(2·A_max) + ½ clipped to [0, 1] ("advantage", PORT; the loss is scaled by A_max/β), or the raw
            "reward" (exact mode; no scale).
        draws_per_sample: (t, ε) draws of a sample that are averaged before squaring (1, PORT).
        unbiased: multiply two independent halves of the draws instead of squaring their mean (DERIVED).
        old_decay: schedule of the ratio's snapshot in optimizer steps, "start-first-slope-last" (the paper's
            OCR run, by PORT).
        sampling_decay: schedule of the sampler (the same source).
    """

    beta: Positive = 1.0
    loss: Literal["mse", "bce"] = "mse"
    weight_temp: float = -1.0
    center: Literal["group", "batch"] = "group"
    weighting: Literal["adaptive", "none", "elbo"] = "adaptive"
    target: Literal["advantage", "reward"] = "advantage"
    draws_per_sample: Count = 1
    unbiased: bool = False
    old_decay: str = "0-0.25-0.005-0.999"
    sampling_decay: str = "75-0.0-0.0075-0.999"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unbiased and (self.draws_per_sample % 2 or self.loss != "mse"):
            raise ValueError("unbiased = True needs loss = 'mse' and an even draws_per_sample, at least 2")

    def snapshots(self) -> Mapping[str, str]:
        """The ratio's reference and the sampler."""
        return {"old": self.old_decay, "sampling": self.sampling_decay}

    def draws(self) -> int:
        """Draws averaged before squaring."""
        return self.draws_per_sample

    def strata(self) -> int:
        """Each independent half is spread over all times."""
        return self.draws_per_sample // 2 if self.unbiased else self.draws_per_sample


class Crd(ForwardTuning):
    """Centred reward distillation; see the module docstring and `CrdConfig`."""

    Config = CrdConfig
    config: CrdConfig
    name = "crd"
    title = "CRD, centred reward distillation"
    paper = "arXiv:2603.14128"
    summary = "Per prompt, the centred log-ratio of new and old model is regressed on the centred reward."
    sampler_role = "sampling"
    frozen_roles = ("old",)

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: CrdConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; arguments and errors are those of `Tuning`."""
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self._gap: tuple[float, int] = (0.0, 0)
        self._still = 0
        self._first = False

    def collect(self, ctx: StepContext) -> Collected:
        """Draw groups with the sampler; warn where the ratio has carried no signal for some rounds."""
        total, count = self._gap
        self._still = self._still + 1 if count and total < _COLLAPSED * count else 0
        self._gap = (0.0, 0)
        if self._still == _PATIENCE:
            warnings.warn(
                f"crd: mean |v_policy - v_old|^2 < {_COLLAPSED:g} at the first update of {_PATIENCE} rounds: the ratio "
                "carries no signal and the loss is advantage-weighted regression; let old lag (old_decay).",
                RuntimeWarning,
                stacklevel=2,
            )
        return super().collect(ctx)

    # ---------------------------------------------------------------- one update

    def times(self, groups: int, ctx: StepContext, update: int) -> Float[Tensor, "g k m"]:
        """Times of every group; the same for all groups where means are taken over all of them."""
        if self.config.center == "group":
            return super().times(groups, ctx, update)
        return super().times(1, ctx, update).expand(groups, -1, -1)

    def minibatches(self, data: Samples, update: int, ctx: StepContext) -> Iterable[Micro]:
        """Yield whole groups; where they do not fit into a micro-batch, single rows with slopes taken before."""
        self._first = update == 0
        rows = self.rows(data, update, ctx)
        largest = int(torch.bincount(rows.unit).max()) if len(rows.unit) else 0
        # the ranks need not agree here unless means cross them
        if self.config.center == "group" and largest <= ctx.micro_batch:
            return self.cut(data, rows, ctx, update, whole=True)
        return self.cut(data, rows, ctx, update, extra=self._first_pass(data, rows, ctx, update))

    def _weighted(self, ratio: Tensor, micro: Micro) -> Float[Tensor, " r"]:
        """ρ̂, or its ELBO estimate in nats."""
        if self.config.weighting != "elbo":
            return ratio
        weight = elbo_weight(self.task.denoiser, micro.t, micro.latents)
        return ratio * weight.to(ratio)

    def _losses(self, ratio: Tensor, goal: Tensor, unit: Tensor) -> Float[Tensor, " n"]:
        """Loss of each (sample, time index) from ρ̂ [n·draws]; `goal`, `unit` [n]."""
        cfg = self.config
        shaped = ratio.view(len(goal), -1)
        if cfg.unbiased:
            estimates = torch.stack([shaped[:, 0::2].mean(1), shaped[:, 1::2].mean(1)], 1)
        else:
            estimates = shaped.mean(1, keepdim=True)
        tau = math.inf if cfg.weight_temp < 0 else cfg.weight_temp
        losses = centered_losses(estimates, goal, unit, beta=cfg.beta, tau=tau, kind=cfg.loss)
        return losses * (cfg.adv_clip / cfg.beta if cfg.target == "advantage" else 1.0)

    def _goal(self, source: Samples | Micro) -> Tensor:
        """The regression's target of every sample or row."""
        return source.goal if self.config.target == "advantage" else source.value

    def _first_pass(self, data: Samples, rows: Rows, ctx: StepContext, update: int) -> dict[str, Tensor]:
        """Return loss, slope dL/dρ̂, ρ̂ and ‖v_θ − v_old‖² of every row: then rows may be cut anywhere.

        The means are constants, and L depends on θ through ρ̂ alone: slope·∇ρ̂ is the exact gradient.
        """
        draws, adaptive = self.config.draws_per_sample, self.config.weighting == "adaptive"
        ratios, gaps = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
        with ctx.group.all_or_none(ctx.poll), torch.no_grad():
            for micro in self.cut(data, rows, ctx, update):
                views = self.views(micro, ctx, anchored=False)
                ratio = implicit_reward(views.theta.raw, views.frozen["old"].raw, views.target, adaptive=adaptive)
                ratios.append(self._weighted(ratio, micro).double().cpu())
                gaps.append(anchor_penalty(views.theta.raw, views.frozen["old"].raw).cpu())
        leaf = torch.cat(ratios).requires_grad_()
        goal, unit = self._goal(data)[rows.item[::draws]].double(), rows.unit[::draws]
        if self.config.center == "batch":
            size = data.rows // ctx.world_size * self.config.train_times
            losses = self._over_ranks(leaf, goal, rows.index[::draws], size, ctx.group)
        else:
            losses = self._losses(leaf, goal, unit)
        (slope,) = torch.autograd.grad(losses.sum() * draws, leaf)
        return {
            "loss": losses.detach().repeat_interleave(draws),
            "slope": slope,
            "ratio": leaf.detach(),
            "gap": torch.cat(gaps),
        }

    def _over_ranks(
        self, ratio: Tensor, goal: Tensor, index: Tensor, size: int, group: Collectives
    ) -> Float[Tensor, " n"]:
        """Losses of this rank's samples with means over those of all ranks; `size` bounds a rank's samples."""
        if group.world_size == 1:
            return self._losses(ratio, goal, index)
        draws, count = self.config.draws_per_sample, len(goal)
        padded = torch.zeros(size, draws + 3, dtype=torch.float64)
        padded[:count] = torch.cat([ratio.detach().view(count, draws), goal[:, None], index[:, None], goal[:, None]], 1)
        padded[:count, -1] = 1.0
        own = torch.zeros(size, dtype=torch.bool)
        own[:count] = True
        table, mine = group.gather_rows(padded), torch.zeros(0, dtype=torch.bool)
        for rank in range(len(table) // size):
            mine = torch.cat([mine, own if rank == group.rank else torch.zeros_like(own)])
        whole = table[:, :draws].clone()
        whole[mine] = ratio.view(count, draws)
        there = table[:, -1] > 0
        losses = self._losses(whole[there].flatten(), table[there, draws], table[there, draws + 1].long())
        return losses[mine[there]]

    # ---------------------------------------------------------------- loss

    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Centred loss of whole groups; after a first pass its linearisation in ρ̂, of equal value and gradient."""
        adaptive, draws = self.config.weighting == "adaptive", self.config.draws_per_sample
        if micro.extra:
            ratio = micro.extra["ratio"]
            # the snapshot's part of ρ̂ has no gradient and its value is known
            moving = self._weighted(
                implicit_reward(views.theta.raw, views.target, views.target, adaptive=adaptive), micro
            )
            losses = micro.extra["loss"] + micro.extra["slope"] * (moving - moving.detach())
        else:
            known = implicit_reward(views.theta.raw, views.frozen["old"].raw, views.target, adaptive=adaptive)
            ratio = self._weighted(known, micro)
            unit = micro.unit[::draws] - micro.unit[0]
            losses = self._losses(ratio, self._goal(micro)[::draws], unit).repeat_interleave(draws)
        ratio = ratio.detach()
        metrics = {"policy/ratio": ratio.sum(), "policy/ratio_square": ratio.square().sum()}
        return losses, metrics | ({"policy/old_distance": micro.extra["gap"].sum()} if micro.extra else {})

    def loss(self, micro: Micro, ctx: StepContext) -> LossOut:
        """Loss of a micro-batch; notes the distance to the snapshot for the warning."""
        out = super().loss(micro, ctx)
        if self._first:
            self._gap = (self._gap[0] + float(out.metrics["policy/old_distance"]), self._gap[1] + out.count)
        return out
