"""Small episodes whose every number is a formula, for the tests of formats and the recipes of tests/fixtures."""

from __future__ import annotations

import numpy as np

from gencontrol.robotics.datasets.episodes import Episode, Episodes

TASKS = ("pick the cube", "déposer 立方体", "")
LENGTHS = (7, 1, 12)
#: lengths of the episodes in tests/fixtures/lerobot_v3
RECORDED = (7, 3, 12)


def flat_image(number: int, step: int, size: int = 32) -> np.ndarray:
    """A picture of one colour, which lossy coding keeps and which names (episode, step)."""
    return np.full((size, size, 3), (20 + 15 * step, 60 + 60 * number, 128), dtype=np.uint8)


def sample_episode(number: int, count: int, *, final: bool = True, noise: bool = True) -> Episode:
    """One episode; `final` adds an observation after the last action, `noise` a second camera full of detail."""
    rng = np.random.default_rng(number)
    rows = count + int(final)
    seen = {
        "state": rng.normal(size=(rows, 4)).astype(np.float32),
        "gripper": rng.normal(size=(rows, 1)).astype(np.float32),
        "front": np.stack([flat_image(number, step) for step in range(rows)]),
    }
    if noise:
        seen["wrist/rgb"] = rng.integers(0, 256, (rows, 8, 6, 3), dtype=np.uint8)
    last = np.arange(count) == count - 1
    return Episode(
        seen,
        rng.uniform(-1, 1, (count, 3)).astype(np.float32),
        rng.normal(size=count).astype(np.float32),
        terminated=last & (number % 2 == 0),
        truncated=last & (number % 2 == 1),
        success=last & (number != 1),
        task=TASKS[number % 3],
        seed=100 + number,
        fps=10.0,
        states=rng.normal(size=(rows, 5)),
        meta={"note": f"n° {number}", "numbers": [number, 0.5]},
    )


def sample_episodes(*, final: bool = True, noise: bool = True) -> Episodes:
    """Three episodes, one of a single step, one without a task."""
    items = [sample_episode(number, count, final=final, noise=noise) for number, count in enumerate(LENGTHS)]
    return Episodes(tuple(items), {"env_id": "Sample-v0", "kwargs": {"size": 3}})
