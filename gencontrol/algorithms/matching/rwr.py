"""Reward-weighted regression: denoising regression on the policy's own samples, weighted by exp(reward/temperature).

The simplest peer of DRAGON (Peters & Schaal 2007; for diffusion Lee et al. 2023, arXiv 2302.12192).  A set reward
enters as the leave-one-out influence R(S) − R(S∖i) of each sample in the round's whole set (`InfluenceAsItem` says
the same for a batch).  Rollout and denoising error are DRAGON's own.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gencontrol.algorithms.matching.weighted import WeightedDenoising
from gencontrol.algorithms.online.base import OnPolicyConfig
from gencontrol.config import Positive, options


@options
class RwrConfig(OnPolicyConfig):
    """Options of `RewardWeightedRegression`; all values are ours.

    Args:
        temperature: of the softmax weights, in standard deviations of the round's rewards, > 0.
    """

    temperature: Positive = 1.0


def softmax_weights(
    values: Float[Tensor, " n"], valid: Bool[Tensor, " n"], temperature: float
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


class RewardWeightedRegression(WeightedDenoising):
    """Reward-weighted regression; see the module docstring."""

    Config = RwrConfig
    name = "rwr"
    title = "reward-weighted regression (Peters & Schaal 2007; Lee et al. 2023)"
    paper = "arXiv:2302.12192"
    summary = "Denoising regression on the model's own samples, weighted by exp(reward/temperature)."

    def weights(
        self, values: Float[Tensor, " n"], valid: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Softmax over the whole round."""
        weights, effective = softmax_weights(values, valid, self.config.temperature)
        return weights, {"policy/effective_share": effective}
