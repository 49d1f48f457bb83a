"""What every item reward must keep: subclass `RewardContract` and give `make` and `samples`.

class TestMine(RewardContract):
    def make(self):
        return Mine()

    def samples(self):
        return torch.rand(4, 3, 32, 32), RewardContext(prompts=["a cat"] * 4)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gencontrol.rewards.base import Reward
from gencontrol.types import RewardContext


class RewardContract(ABC):
    """Base of the tests of an item reward."""

    @abstractmethod
    def make(self) -> Reward:
        """Return a new reward."""

    @abstractmethod
    def samples(self) -> tuple[Tensor, RewardContext]:
        """Return at least two samples [b ...] with their prompts; equal at each call."""

    def test_one_value_and_one_mark_per_sample(self) -> None:
        """Values and `valid` have the length of the batch, and valid values are finite."""
        samples, context = self.samples()
        out = self.make()(samples, context)
        assert out.values.shape == out.valid.shape == (len(samples),) and out.valid.dtype == torch.bool
        assert bool(out.values[out.valid].isfinite().all())

    def test_repeatable_and_touches_nothing(self) -> None:
        """Two calls give the same; samples and the global generator stay as they were."""
        samples, context = self.samples()
        reward, before, drawn = self.make(), samples.clone(), torch.random.get_rng_state()
        first, second = reward(samples, context), reward(samples, context)
        assert torch.equal(first.values.nan_to_num(), second.values.nan_to_num())
        assert torch.equal(samples, before) and torch.equal(torch.random.get_rng_state(), drawn)

    def test_gradient_where_it_is_promised(self) -> None:
        """`differentiable` and a gradient with respect to the samples go together."""
        samples, context = self.samples()
        reward = self.make()
        if reward.differentiable:
            leaf = samples.clone().requires_grad_()
            (slope,) = torch.autograd.grad(reward(leaf, context).values.nan_to_num().sum(), leaf)
            assert bool(slope.isfinite().all()) and bool(slope.any())
