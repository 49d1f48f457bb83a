"""Denoising errors and the contrasts built on them: Diffusion-DPO, Diffusion-KTO and positive-only regression.

ℓ_θ(x; t, ε) is the squared error of the network's own prediction, averaged over the data axes.  With
Δ(x) = ℓ_θ(x) − ℓ_ref(x) and g(x) = −Δ(x) (an implicit reward):

- DPO (Wallace et al. 2023, arXiv 2311.12908): −log σ(−(β/2)·[Δ(x+) − Δ(x−)]), the same t and ε for both members;
- KTO (Li et al. 2024, arXiv 2404.04465): 1 − σ(s·β·(g − Q)), s = ±1, Q = max(0, mean of g over the global batch);
- positive-only: ℓ_θ(x+).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Errors:
    """Denoising errors [p] of aligned pairs under the policy and, without gradient, under the reference."""

    positive: Float[Tensor, " p"]
    negative: Float[Tensor, " p"]
    ref_positive: Float[Tensor, " p"]
    ref_negative: Float[Tensor, " p"]

    def gains(self) -> Float[Tensor, " q"]:
        """Return g = ℓ_ref − ℓ_θ of all items, the positives first."""
        return torch.cat([self.ref_positive - self.positive, self.ref_negative - self.negative])


def dpo(errors: Errors, beta: float, baseline: float) -> Float[Tensor, " p"]:
    """Diffusion-DPO loss of each pair; log 2 at θ = ref.  `baseline` plays no part: it cancels in the pair."""
    gap = (errors.positive - errors.ref_positive) - (errors.negative - errors.ref_negative)
    return functional.softplus(0.5 * beta * gap)


def kto(errors: Errors, beta: float, baseline: float) -> Float[Tensor, " q"]:
    """Diffusion-KTO loss of each item with the sigmoid utility; 0.5 at θ = ref.  `baseline` is Q, a constant."""
    gains = errors.gains() - baseline
    sign = torch.ones_like(gains)
    sign[len(errors.positive) :] = -1.0
    return torch.sigmoid(-sign * beta * gains)


def positive_only(errors: Errors, beta: float, baseline: float) -> Float[Tensor, " p"]:
    """Denoising error of D+ alone: regression on the winners, the plainest peer of the contrasts."""
    return errors.positive


#: Losses by name; each takes (errors, beta, baseline) and returns one value per item.
LOSSES: dict[str, Callable[[Errors, float, float], Tensor]] = {"kto": kto, "dpo": dpo, "positive": positive_only}


def kto_baseline(mean_gain: float) -> float:
    """Q = max(0, mean of g over the optimizer batch of all ranks): a constant, so no gradient flows through it."""
    return max(0.0, mean_gain)
