"""The contracts for outside authors accept what is right and find what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.rewards import load_reward
from gencontrol.testing import PolicyContract, RewardContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.chunk_toys import Network


class TestCentroid(RewardContract):
    """A differentiable reward of ours."""

    def make(self) -> Any:
        return load_reward("spectral-centroid")

    def samples(self) -> tuple[Tensor, RewardContext]:
        sound = torch.rand(3, 16000, generator=torch.Generator().manual_seed(0)) - 0.5
        return sound, RewardContext(prompts=("a", "b", "c"), sampling_rate=16000)


class TestNetwork(PolicyContract):
    """A chunked policy whose network rounds differently at other batch sizes."""

    def make(self) -> Any:
        return Network()

    def observations(self) -> Sequence[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        return [{"place": rng.normal(size=(2, 2)).astype(np.float32)} for _ in range(5)]


class _Forgetful(Network):
    """Its seeds are ignored after the first episode."""

    def reset(self, rows: Any = None, seeds: Any = None) -> None:
        if not self._rows:
            super().reset(rows, seeds)


class _Noisy(Network):
    def sample_chunk(self, observation: Any, noise: Any) -> Tensor:
        return super().sample_chunk(observation, noise) + torch.randn(())


class _WholeBatch:
    """A reward that looks at its neighbours' number and draws from the global generator."""

    name, differentiable = "bad", True

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        return RewardOut(torch.rand(len(samples)), torch.ones(len(samples), dtype=torch.bool))


@pytest.mark.parametrize(
    ("kind", "test"), [(_Forgetful, "test_reset_forgets"), (_Noisy, "test_a_seed_decides_everything")]
)
def test_a_wrong_policy_is_found(kind: type, test: str) -> None:
    contract = TestNetwork()
    contract.make = kind  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        getattr(contract, test)()


@pytest.mark.parametrize("test", ["test_repeatable_and_touches_nothing", "test_gradient_where_it_is_promised"])
def test_a_wrong_reward_is_found(test: str) -> None:
    contract = TestCentroid()
    contract.make = _WholeBatch  # type: ignore[method-assign]
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(contract, test)()
