"""A small chunked policy with a network, for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec


class Network(ChunkedPolicy):
    """Random hidden layers around a push towards 0; sizes at which batches of 1 and 3 round differently."""

    def __init__(self, action_dim: int = 2, keys: Mapping[str, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.spec = PolicySpec(keys or {"place": (2,)}, action_dim, horizon=6, n_obs=2, n_action=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4 + 6 * action_dim, 306), nn.SiLU(), nn.Linear(306, 6 * action_dim))
        self.batches: list[int] = []

    def sample_chunk(self, observation: Mapping[str, np.ndarray], noise: Keyed) -> Tensor:
        place = torch.as_tensor(observation["place"])
        self.batches.append(len(place))
        drawn = noise.normal((len(place), 6 * self.spec.action_dim))
        chunk = self.layers(torch.cat([place.flatten(1), drawn], dim=1))
        chunk = chunk.reshape(len(place), 6, self.spec.action_dim) * 0.3
        chunk[..., 0] -= 0.5 * place[:, -1, :1]
        return chunk
