"""AWM: advantage-weighted matching, the policy gradient of the denoising error (arXiv 2509.25050).

With log p taken as −ℓ the loss is −A·exp(log p_θ − log p_old); at θ = old its gradient is A·∇ℓ (methods/crd.md §2.3).
Negative advantages push errors up without bound, hence the robust weighting of ℓ and two penalties: to the base, and
to a lagging snapshot ("EMA-KL").  What the index says of the official code is followed; the exact form of the robust
weighting and the snapshot's schedule are our reading and labelled so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.anchor import anchor_penalty
from gencontrol.algorithms.forward_config import ForwardConfig, KlAdapt
from gencontrol.algorithms.forward_rl import ForwardTuning, Micro, Views
from gencontrol.algorithms.task import PromptTask
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward

#: Added to the error that divides in the robust weighting, and bound of the log-ratio in the exponent (ours).
_SOFT, _LIMIT = 1e-3, 5.0


@dataclass(frozen=True)
class AwmConfig(ForwardConfig):
    """Options of `Awm`; defaults of the official GenEval run (CODE by methods/crd.md §9) where they differ.

    Args:
        robust: power p ≥ 0 of the robust weighting ℓ/(ℓ + 1e-3)^p, weight constant for the gradient; 0 = plain ℓ
            (0.25, CODE; this form is ours).
        snapshot_coef: weight ≥ 0 of mean ‖v_θ − v_snapshot‖² ("EMA-KL"; 1e-3, ours).
        snapshot_decay: schedule of that snapshot in optimizer steps ("0-0-0.001-0.5", ours).
        updates_per_round: 1, on-policy (CODE); with more the ratio is clipped at exp(±5) to the snapshot "old", the
            policy at the round's start.
        adv_clip, train_times, demo_steps, kl_*: 1, 6, 14, constant 1e-3 to the plain base (CODE).
    """

    robust: float = 0.25
    snapshot_coef: float = 1e-3
    snapshot_decay: str = "0-0-0.001-0.5"
    prompts_per_round: int = 72
    updates_per_round: int = 1
    train_times: int = 6
    demo_steps: int = 14
    adv_clip: float = 1.0
    kl_coef: float = 1e-3
    kl_guidance: float = 1.0
    kl_adapt: KlAdapt = "off"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("robust", "snapshot_coef"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"{name} = {vars(self)[name]}; expected at least 0")

    def snapshots(self) -> Mapping[str, str]:
        """The lagging snapshot of the penalty; with several updates per round also the policy at the round's start."""
        lagging = {"old": self.snapshot_decay} if self.snapshot_coef > 0 else {}
        return lagging | ({"start": "none"} if self.updates_per_round > 1 else {})


class Awm(ForwardTuning):
    """Advantage-weighted matching; see the module docstring and `AwmConfig`."""

    Config = AwmConfig
    name = "awm"
    options: AwmConfig

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: AwmConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; `roles` holds the names that `role_names(config)` gives.

        Raises:
            UsageError: a role is missing, or guidance is asked of a model without an unconditional condition.
        """
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.frozen_roles = tuple(config.snapshots())

    def _error(self, pred: Pred, target: Tensor) -> Float[Tensor, " r"]:
        """ℓ of every row: the mean squared error, robustly weighted."""
        error = (pred.raw.float() - target).square().flatten(1).mean(1)
        return error / (error.detach() + _SOFT) ** self.options.robust

    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Loss of every row, with the pull to the lagging snapshot."""
        error = self._error(views.theta, views.target)
        before = self._error(views.frozen["start"], views.target) if "start" in views.frozen else error.detach()
        losses = -micro.advantage * (before - error).clamp(-_LIMIT, _LIMIT).exp()
        if "old" in views.frozen:
            losses = losses + self.options.snapshot_coef * anchor_penalty(views.theta.raw, views.frozen["old"].raw)
        return losses, {"loss/denoising": error.detach().sum()}
