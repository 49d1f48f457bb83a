"""What composition is compared with at the same number of network calls: other ways to make one policy of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.chunked import ChunkedPolicy
from gencontrol.robotics.policies.denoising import History

Rule = Literal["mean", "mean, shared noise", "switch"]
RULES: tuple[Rule, ...] = ("mean", "mean, shared noise", "switch")


class Ensemble(ChunkedPolicy):
    """Chunks of all parents, each drawn by its own sampler, made into one.

    Args:
        policy: gives the parents and what they see; its weights are not used.
        weights: one per parent, ≥ 0, sum 1.
        rule: "mean" averages the actions of independent draws, "mean, shared noise" those of one noise
            (docs/methods/gpc.md#p5), and "switch" takes one parent per chunk, with these probabilities.
    """

    def __init__(
        self,
        policy: ComposedPolicy,
        weights: Sequence[float],
        rule: Rule,
    ) -> None:
        super().__init__()
        self.policy, self.weights, self.rule = policy, tuple(weights), rule
        self.spec = policy.spec

    def sample_chunk(self, observation: History, noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return chunks in the environment's units."""
        chunks = []
        for index, parent in enumerate(self.policy.parents):
            own = noise if self.rule == "mean, shared noise" else Keyed(row_keys(index, "ensemble", noise.keys))
            chunks.append(parent.sample_chunk(self.policy.part(index, observation), own))
        weights = torch.tensor(self.weights)
        if self.rule == "switch":
            drawn = Keyed(row_keys(0, "ensemble/switch", noise.keys)).uniform((len(noise), 1))
            chosen = (drawn > weights.double().cumsum(0)).sum(1).clamp(max=len(chunks) - 1)
            return torch.stack(chunks, 1)[torch.arange(len(chosen)), chosen]
        return torch.einsum("p,pbha->bha", weights.to(chunks[0]), torch.stack(chunks))
