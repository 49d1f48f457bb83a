"""Histories, queues and noise of the rows of a vector environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec


class _Echo(ChunkedPolicy):
    """Action h of a chunk is (h, oldest observation, newest observation, a noise of the chunk)."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = PolicySpec({"x": (1,)}, 4, horizon=6, n_obs=2, n_action=3)
        self.asked: list[int] = []

    def sample_chunk(self, observation: dict[str, np.ndarray], noise: Keyed) -> Tensor:  # type: ignore[override]
        self.asked.append(len(noise))
        x = torch.from_numpy(observation["x"])
        steps = torch.arange(6.0)[None, :, None].expand(len(x), 6, 1)
        ends = x[:, [0, -1], 0][:, None].expand(len(x), 6, 2)
        return torch.cat([steps, ends, noise.normal((len(x), 1, 1)).expand(len(x), 6, 1)], 2)


def _see(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)[:, None]}


def test_history_is_padded_and_execution_begins_at_now() -> None:
    """Offset n_obs − 1 = 1: actions 1, 2, 3 of a chunk, then a new one that has seen the last two observations."""
    policy = _Echo()
    policy.reset(seeds=[0])
    acted = [policy.select_action(_see(value))[0] for value in (5.0, 6.0, 7.0, 8.0)]
    assert [row[0] for row in acted] == [1, 2, 3, 1]
    assert acted[0][1:3].tolist() == [5, 5] and acted[3][1:3].tolist() == [7, 8]
    assert acted[0][3] != acted[3][3]


def test_rows_and_single_observations() -> None:
    """Noise is named by the episode's seed and the decision, whatever the row; finished rows alone are forgotten."""
    policy, other = _Echo(), _Echo()
    policy.reset([3, 9], [70, 71])
    both = policy.select_action(_see(1.0, 2.0), [3, 9])
    other.reset(seeds=[71])
    assert np.array_equal(other.select_action({"x": np.array([2.0], np.float32)}), both[1])
    policy.reset([9], [70])
    again = policy.select_action(_see(4.0, 4.0), [3, 9])
    assert again[0][0] == 2 and again[1][0] == 1  # row 3 goes on in its queue
    assert again[1][3] == both[0][3]  # seed 70 again
    policy.rows_at_once = 4
    policy.reset(seeds=[1, 2])
    policy.select_action(_see(0.0, 0.0))
    assert policy.asked[-1] == 4


def test_observations_that_no_policy_can_use() -> None:
    policy = _Echo()
    for observation, text in (
        ({"y": np.zeros((1, 1))}, "no 'x'"),
        ({"x": np.zeros((1, 2))}, "shape"),
        (_see(float("nan")), "not finite"),
    ):
        with pytest.raises(UsageError, match=text):
            policy.select_action(observation)
    with pytest.raises(UsageError, match="2 observations for 1 rows"):
        policy.select_action(_see(0.0, 0.0), [0])
    for sizes in ({"n_action": 6}, {"n_obs": 0}, {"horizon": 2, "n_obs": 2, "n_action": 2}):
        with pytest.raises(UsageError, match="at most horizon"):
            PolicySpec({"x": (1,)}, 1, **{"horizon": 6, "n_obs": 2, "n_action": 3, **sizes})
