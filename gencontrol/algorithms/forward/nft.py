"""DiffusionNFT: contrast of an implicit positive and negative policy on the forward process (arXiv 2509.16117).

With v⁺ = β·v_θ + (1 − β)·v_old, v⁻ = (1 + β)·v_old − β·v_θ and r = A/(2·A_max) + ½ in [0, 1] the loss is
(A_max/β)·[r·ℓ(v⁺) + (1 − r)·ℓ(v⁻)], ℓ the error of x0 divided by its own mean absolute value (CODE: the official one,
by docs/methods/nft-awm.md#nft).  One snapshot serves as sampler and as reference of the contrast.  The anchor's
guidance and its adaptation are options for comparisons at equal anchor, off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.crd import WEIGHT_FLOOR
from gencontrol.algorithms.forward.base import ForwardConfig, ForwardTuning, Micro, Views
from gencontrol.config import NonNegative, Positive, options
from gencontrol.models.denoiser import Pred


@options
class NftConfig(ForwardConfig):
    """Options of `Nft`; defaults are those of the official GenEval run (CODE), where they differ from `ForwardConfig`.

    The official OCR run has beta = 0.1 and decay = "75-0-0.0075-0.999".

    Args:
        beta: > 0, how far the two implicit policies are from the snapshot (1, CODE).
        adaptive: divide each error by its mean absolute value (True, CODE).
        decay: schedule of the snapshot in optimizer steps, "start-first-slope-last" (CODE).
        kl_coef, kl_guidance, kl_adapt: constant weight 1e-4 to the plain base (CODE).
        time_sampling, train_times: 9 of the sampler's 10 times, in an order drawn anew (CODE: floor(0.99·n) of n).
    """

    beta: Positive = 1.0
    adaptive: bool = True
    decay: str = "0-0-0.001-0.5"
    kl_coef: NonNegative = 1e-4
    kl_guidance: NonNegative = 1.0
    kl_adapt: Literal["raw_reward", "advantage", "off"] = "off"
    time_sampling: Literal["stratified", "grid", "permutation", "uniform", "logit-normal"] = "permutation"

    def snapshots(self) -> Mapping[str, str]:
        """Sampler and reference in one."""
        return {"old": self.decay}


class Nft(ForwardTuning):
    """DiffusionNFT; see the module docstring and `NftConfig`."""

    Config = NftConfig
    config: NftConfig
    name = "nft"
    title = "DiffusionNFT (Zheng et al. 2025)"
    paper = "arXiv:2509.16117"
    summary = "An implicit better and an implicit worse model are contrasted on noised samples."
    sampler_role = "old"
    frozen_roles = ("old",)

    def _error(self, pred: Pred, micro: Micro) -> Float[Tensor, " r"]:
        """Error of x0 averaged over the data axes, divided by its mean absolute value where adaptive."""
        gap = (pred.x0.double() - micro.latents.double()).flatten(1)
        error = gap.square().mean(1)
        return error / gap.detach().abs().mean(1).clamp_min(WEIGHT_FLOOR) if self.config.adaptive else error

    def objective(self, micro: Micro, views: Views) -> tuple[Float[Tensor, " r"], dict[str, Tensor]]:
        """Loss of every row."""
        cfg, theta, old = self.config, views.theta, views.frozen["old"]
        positive = self._error(theta.replace(old.raw + cfg.beta * (theta.raw - old.raw)), micro)
        negative = self._error(theta.replace(old.raw - cfg.beta * (theta.raw - old.raw)), micro)
        losses = (cfg.adv_clip / cfg.beta) * (micro.goal * positive + (1.0 - micro.goal) * negative)
        return losses, {"loss/positive": positive.detach().sum(), "loss/negative": negative.detach().sum()}
