"""AWM: advantage-weighted matching, the policy gradient of the denoising error (arXiv 2509.25050).

With log p taken as −ℓ the loss is −A·exp(log p_θ − log p_old); at θ = old its gradient is A·∇ℓ
(docs/methods/crd.md#gradients-at-the-snapshot).
Negative advantages push errors up without bound, hence the robust weighting of ℓ and two penalties: to the base, and
to a lagging snapshot ("EMA-KL").  Formulas and defaults: official code, scxue/advantage_weighted_matching, its
single-node GenEval run (CODE), of which docs/methods/nft-awm.md#awm gives an outline; the 1e-3 of its KL is 3e-3 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.forward import times
from gencontrol.algorithms.forward.base import ForwardConfig, ForwardTuning, Micro, Views
from gencontrol.algorithms.online.base import anchor_penalty
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, NonNegative, Positive, options
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward

#: keeps the power of an error of 0 differentiable (CODE)
_SOFT = 1e-10


@options
class AwmConfig(ForwardConfig):
    """Options of `Awm`; defaults of the official GenEval run (CODE by docs/methods/nft-awm.md#awm) where they differ.

    Args:
        weighting: log p = −t·((ℓ + 1e-10)^p − 1e-10^p)/p with p = `robust` ("robust", CODE: generalised Huber), −t·ℓ
            ("time"), or −ℓ ("uniform").
        robust: the power p in (0, 1] (0.25, CODE); 1 is "time".
        advantage_max: advantages, clipped to ±adv_clip, are divided by adv_clip and multiplied by this (1, CODE).
        clip_range: the ratio counts between 1 ± this, by the worse of the clipped and the plain term (1, CODE).
        snapshot_coef: weight ≥ 0 of mean ‖v_θ − v_snapshot‖² ("EMA-KL"; 1, CODE).
        snapshot_decay: schedule of that snapshot in optimizer steps ("0-0-0.001-0.3", CODE).
        updates_per_round: 1, on-policy (CODE); with more the ratio is to the snapshot "start", the policy at the
            round's start.
        time_sampling, time_start, time_range, train_times, demo_steps: 6 of the first 0.9·n of the sampler's n = 14
            times, without the very first (CODE; its sampler is SA-solver, ours `sampler`).
        kl_coef, kl_guidance, kl_adapt: 1e-3, constant, to the plain base (CODE; its OCR preset has 3e-3).
    """

    weighting: Literal["robust", "time", "uniform"] = "robust"
    robust: Annotated[float, Gt(0), Le(1)] = 0.25
    advantage_max: Positive = 1.0
    clip_range: NonNegative = 1.0
    snapshot_coef: NonNegative = 1.0
    snapshot_decay: str = "0-0-0.001-0.3"
    prompts_per_round: Count = 72
    updates_per_round: Count = 1
    train_times: Count = 6
    demo_steps: Count = 14
    time_sampling: Literal["stratified", "grid", "permutation", "uniform", "logit-normal"] = "grid"
    time_start: times.Start = "out"
    time_range: Annotated[float, Gt(0), Le(1)] = 0.9
    kl_coef: NonNegative = 1e-3
    kl_guidance: NonNegative = 1.0
    kl_adapt: Literal["raw_reward", "advantage", "off"] = "off"

    def kept_times(self, grid: Sequence[float]) -> int:
        """The first part of the sampler's times, by their number (CODE)."""
        return times.kept_by_count(grid, self.time_range)

    def snapshots(self) -> Mapping[str, str]:
        """The lagging snapshot of the penalty; with several updates per round also the policy at the round's start."""
        lagging = {"old": self.snapshot_decay} if self.snapshot_coef > 0 else {}
        return lagging | ({"start": "none"} if self.updates_per_round > 1 else {})


class Awm(ForwardTuning):
    """Advantage-weighted matching; see the module docstring and `AwmConfig`."""

    Config = AwmConfig
    config: AwmConfig
    name = "awm"
    title = "advantage-weighted matching (2025)"
    paper = "arXiv:2509.25050"
    summary = "A policy gradient that takes the denoising error as minus the log-probability."

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: AwmConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; arguments and errors are those of `Tuning`."""
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.frozen_roles = tuple(config.snapshots())

    def _log_prob(self, pred: Pred, target: Tensor, t: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
        """The stand-in for log p of every row: its mean squared error, weighted, with a minus."""
        error = (pred.raw.float() - target).square().flatten(1).mean(1)
        if self.config.weighting == "uniform":
            return -error
        power = self.config.robust if self.config.weighting == "robust" else 1.0
        return -t * ((error + _SOFT) ** power - _SOFT**power) / power

    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Loss of every row, with the pull to the lagging snapshot."""
        cfg = self.config
        now = self._log_prob(views.theta, views.target, micro.t)
        before = self._log_prob(views.frozen["start"], views.target, micro.t) if "start" in views.frozen else now
        ratio = (now - before.detach()).exp()
        advantage = micro.advantage * (cfg.advantage_max / cfg.adv_clip)
        clipped = ratio.clamp(1.0 - cfg.clip_range, 1.0 + cfg.clip_range)
        losses = torch.maximum(-advantage * ratio, -advantage * clipped)
        if "old" in views.frozen:
            losses = losses + cfg.snapshot_coef * anchor_penalty(views.theta.raw, views.frozen["old"].raw)
        return losses, {"loss/log_prob": now.detach().sum(), "policy/ratio": ratio.detach().sum()}
