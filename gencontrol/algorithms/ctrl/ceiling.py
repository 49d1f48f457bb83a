"""What a perfect control would reach, known before any training: base samples resampled with p(y|x0)^γ.

Tilting does not mend the base, and a poor classifier bounds every control.  So log Z, the effective number of samples
and the share that the classifiers themselves would recognise are printed first, and a classifier that says nothing is
refused (docs/methods/ctrl.md#ceiling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.image.classifier import classifiers_of

#: a temperature this near (as a factor) to an end of its search has no minimum inside; share of the way from chance to
#: certainty below which held-out accuracy says nothing (ours)
_NEAR, _ABOVE_CHANCE = 1.02, 0.1


def check_classifiers(reward: Any) -> None:
    """Check that a reward's classifiers know anything.

    Raises:
        UsageError: held-out accuracy near chance, or a temperature at an end of its search.
    """
    from gencontrol.models.readers.image_classifier import TEMPERATURES

    for name, model in classifiers_of(reward):
        config, low, high = model.config, *TEMPERATURES
        if not low * _NEAR < config.temperature < high / _NEAR:
            raise UsageError(
                f"the classifier of '{name}' has temperature {config.temperature:.3g}, an end of its search: its "
                "held-out predictions say nothing. Label more images, or check the labels; trust_classifier = true "
                "trains anyway."
            )
        chance = 1.0 / len(config.classes)
        if config.held_out is not None and config.held_out < chance + _ABOVE_CHANCE * (1 - chance):
            raise UsageError(
                f"the classifier of '{name}' is right on {config.held_out:.0%} of images it did not see, and chance is "
                f"{chance:.0%}. Label more images, or check the labels; trust_classifier = true trains anyway."
            )


def effective(weights: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """Effective number of samples of every column of weights."""
    return weights.sum(0).square() / weights.square().sum(0).clamp(min=1e-300)


def target_weights(values: Float[Tensor, "n m"], gamma: Float[Tensor, " m"], prompts: int) -> Float[Tensor, "n m"]:
    """Return shares p(y|x)^γ of samples whose prompts take turns: every column sums to 1, every prompt has the same."""
    scaled = values.double() * gamma
    shares = torch.empty_like(scaled)
    for start in range(prompts):
        shares[start::prompts] = torch.softmax(scaled[start::prompts], 0) / prompts
    return shares


def annealed(values: Float[Tensor, "n m"], gamma: float, least: float, prompts: int) -> Float[Tensor, " m"]:
    """Return for every label the largest γ' ≤ γ that leaves `least` effective samples (of at most all of them)."""
    high = torch.full((values.shape[1],), float(gamma), dtype=torch.float64)
    least = min(least, 0.5 * len(values))
    low, found = torch.zeros_like(high), high.clone()
    enough = effective(target_weights(values, high, prompts)) >= least
    for _ in range(20):
        middle = (low + high) / 2
        fine = effective(target_weights(values, middle, prompts)) >= least
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return torch.where(enough, found, low)


@dataclass(frozen=True)
class Ceiling:
    """Of every label row: log Z, effective number of base samples, and expected p(y|x) and share of samples whose
    likeliest label it is, both under the target.
    """

    names: Sequence[str]
    log_z: Float[Tensor, " m"]
    ess: Float[Tensor, " m"]
    log_p: Float[Tensor, " m"]
    accuracy: Float[Tensor, " m"]
    samples: int

    @classmethod
    def of(
        cls, names: Sequence[str], values: Float[Tensor, "n m"], log_z: Float[Tensor, " m"], gamma: float, prompts: int
    ) -> Ceiling:
        """Measure it from log p(y|x) of base samples."""
        shares = target_weights(values, torch.full((values.shape[1],), float(gamma), dtype=torch.float64), prompts)
        right = values.argmax(1)[:, None] == torch.arange(values.shape[1])
        return cls(names, log_z, effective(shares), (shares * values).sum(0), (shares * right).sum(0), len(values))

    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        return {
            "ctrl/ceiling/log_p": float(self.log_p.mean()),
            "ctrl/ceiling/accuracy": float(self.accuracy.mean()),
            "ctrl/ceiling/ess_min": float(self.ess.min()),
        }

    def text(self) -> str:
        """One line for each label, at most 16, and the mean."""
        lines = [f"ceiling of the control, from {self.samples} base samples (a perfect control reaches this):"]
        lines += [
            f"  {name}: log Z {z:.2f}, {ess:.0f} effective samples, log p {log_p:.2f}, right {right:.2f}"
            for name, z, ess, log_p, right in list(
                zip(self.names, self.log_z, self.ess, self.log_p, self.accuracy, strict=True)
            )[:16]
        ]
        mean = f"  mean of {len(self.names)}: log Z {self.log_z.mean():.2f}, log p {self.log_p.mean():.2f}"
        return "\n".join([*lines, f"{mean}, right {self.accuracy.mean():.2f} by the classifiers themselves"])
