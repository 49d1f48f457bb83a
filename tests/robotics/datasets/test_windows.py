"""Windows against a reference written with loops, and against the counts of Diffusion Policy and LeRobot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from gencontrol.robotics.datasets.windows import Windows


def episodes(*lengths: int) -> Episodes:
    """Episodes whose numbers name (episode, step); one more observation than actions in every second."""
    items = []
    for number, count in enumerate(lengths):
        seen = np.arange(count + number % 2, dtype=np.float32) + 1000 * number
        flags = np.zeros(count, bool)
        acted = (np.arange(count, dtype=np.float32) + 1000 * number)[:, None] * np.array([1, -1], np.float32)
        images = np.repeat((seen % 256).astype(np.uint8), 12).reshape(-1, 2, 2, 3)
        items.append(Episode({"state": seen[:, None], "image": images}, acted, flags.astype(np.float32), *[flags] * 3))
    return Episodes(tuple(items))


@pytest.mark.parametrize("n_obs, horizon, n_action", [(2, 8, 4), (1, 1, 1), (3, 5, None), (2, 16, 8), (1, 4, 4)])
def test_windows_equal_the_loops(n_obs: int, horizon: int, n_action: int | None) -> None:
    data = episodes(9, 1, 30, 2)
    windows = Windows.of(data, n_obs=n_obs, horizon=horizon, n_action=n_action)
    batch = windows.batch(torch.arange(len(windows)))
    place = 0
    for number, episode in enumerate(data):
        count = len(episode)
        # diffusion_policy/common/sampler.py create_indices: starts −pad_before … T − horizon + pad_after
        final = count - 1 - (n_obs - 1) if n_action is None else count - horizon + n_action - 1
        starts = list(range(-(n_obs - 1), final + 1)) or [-(n_obs - 1)]
        for start in starts:
            rows = [min(max(start + i, 0), count - 1) for i in range(horizon)]
            assert batch.actions[place, :, 0].tolist() == [row + 1000 * number for row in rows]
            assert batch.pad[place].tolist() == [not 0 <= start + i < count for i in range(horizon)]
            history = [min(max(start + i, 0), count - 1) for i in range(n_obs)]
            assert batch.observations["state"][place, :, 0].tolist() == [row + 1000 * number for row in history]
            assert batch.obs_pad[place].tolist() == [start + i < 0 for i in range(n_obs)]
            assert batch.observations["image"].dtype is torch.uint8
            assert batch.observations["image"][place, -1, 0, 0, 0] == (history[-1] + 1000 * number) % 256
            place += 1
    assert place == len(windows)


def test_count_is_that_of_lerobot() -> None:
    """drop_n_last_frames = horizon − n_action_steps − n_obs_steps + 1 frames of each episode are left out."""
    lengths = (40, 25)
    windows = Windows.of(episodes(*lengths), n_obs=2, horizon=16, n_action=8)
    assert len(windows) == sum(count - (16 - 8 - 2 + 1) for count in lengths)


def test_keys_and_refusals() -> None:
    data = episodes(5)
    assert list(Windows.of(data, n_obs=1, horizon=2, keys=["state"]).observations) == ["state"]
    with pytest.raises(UsageError, match="no observation 'stat'; it has state, image"):
        Windows.of(data, n_obs=1, horizon=2, keys=["stat"])
    with pytest.raises(UsageError, match="n_action 4"):
        Windows.of(data, n_obs=2, horizon=4, n_action=4)
