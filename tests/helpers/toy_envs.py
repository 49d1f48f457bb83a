"""Tiny environments for the tests, made by "tests.helpers.toy_envs:NAME"; none needs a simulator."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict


class Point(gymnasium.Env[Any, Any]):
    """A point on a line that an action pushes; success is the flag at |x| < 0.1, reward is −|x|.

    Args:
        limit: steps until truncation; None leaves it to whoever runs it.
        trouble: what happens at step 3 of episodes whose seed is in `bad`.
        ends: success ends the episode.
        drift: added every step, so that success may be lost again.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        limit: int | None = 12,
        trouble: str = "",
        bad: tuple[int, ...] = (1,),
        ends: bool = True,
        drift: float = 0.0,
        size: int = 2,
        render_mode: str | None = None,
        broken_camera: bool = False,
    ) -> None:
        self.limit, self.trouble, self.bad, self.ends, self.drift = limit, trouble, tuple(bad), ends, drift
        self.render_mode, self.broken_camera = render_mode, broken_camera
        self.observation_space = Dict({"place": Box(-9, 9, (2,), np.float64), "time": Box(0, 1, (1,), np.float32)})
        self.action_space = Box(-1.0, 1.0, (size,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed_of_episode, self.count, self.over = seed, 0, False
        self.place = self.np_random.uniform(-1.5, 1.5, 2)
        if self.trouble == "reset" and seed in self.bad:
            raise RuntimeError("no such place")
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert not self.over, "stepped after the end"
        self.count += 1
        if self.count == 3 and self.seed_of_episode in self.bad:
            self._fail()
        self.place = self.place + 0.5 * np.asarray(action, np.float64)[:2] + self.drift
        good = bool(abs(self.place[0]) < 0.1)
        self.over = (good and self.ends) or (self.limit is not None and self.count >= self.limit)
        info = {} if self.trouble == "silent" else {"is_success": good}
        reward = float("nan") if self._bad_now("nan reward") else -abs(float(self.place[0]))
        late = self.limit is not None and self.count >= self.limit
        return self._see(), reward, good and self.ends, late, info

    def render(self) -> Any:
        if self.broken_camera:
            raise OSError("no display")
        picture = np.zeros((21, 33, 3), np.uint8)
        picture[:, int(np.clip(16 + 10 * self.place[0], 0, 32))] = 255
        return picture

    def _bad_now(self, trouble: str) -> bool:
        return self.trouble == trouble and self.count == 3 and self.seed_of_episode in self.bad

    def _fail(self) -> None:
        if self.trouble == "raise":
            raise ValueError("the arm fell off")
        if self.trouble == "die":
            print("segmentation is coming", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 11)
        if self.trouble == "hang":
            time.sleep(60)

    def _see(self) -> Any:
        place = self.place[:1] if self._bad_now("shape") else self.place.copy()
        if self._bad_now("nan"):
            place[0] = np.nan
        return {"place": place, "time": np.array([self.count / 100], np.float32)}


def point(**kwargs: Any) -> Any:
    """A Point."""
    return Point(**kwargs)


def silent() -> Any:
    """A Point that never says whether it succeeded."""
    return Point(trouble="silent")


def endless() -> Any:
    """A Point without a time limit."""
    return Point(limit=None)


class Restless(Point):
    """A Point whose places come from a generator that no seed reaches.

    Args:
        late: the place after a step does instead of the first one.
    """

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.own, self.late = np.random.default_rng(0), late

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if not self.late:
            self.place = self.own.uniform(-1.5, 1.5, 2)
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.late:
            self.place = self.place + 0.01 * self.own.normal(size=2)
        return super().step(action)


class Discrete(Point):
    """A Point with actions that no policy here gives."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gymnasium.spaces.Discrete(3)  # type: ignore[assignment]


class Homing:
    """Pushes towards 0 with noise named by (seed, step); vectorised and without state between episodes."""

    def __init__(self, gain: float = 1.0, noise: float = 0.3, nan_at: int = -1, size: int = 2) -> None:
        self.gain, self.noise, self.nan_at, self.size = gain, noise, nan_at, size
        self.rows: dict[int, list[int]] = {}

    def reset(self, rows: Any = None, seeds: Any = None) -> None:
        for row, seed in zip(rows, seeds):
            self.rows[row] = [seed, 0]

    def select_action(self, observation: Any, rows: Any = None) -> Any:
        found = []
        for place, row in zip(observation["place"], rows):
            seed, step = self.rows[row]
            self.rows[row][1] += 1
            push = -self.gain * place[0] + self.noise * np.random.default_rng([seed, step]).normal()
            value = np.nan if step == self.nan_at and seed == 2 else push
            found.append([value] + [0.0] * (self.size - 1))
        return np.array(found, np.float32)


def homing() -> Any:
    """A policy by name."""
    return Homing()


def weak() -> Any:
    """A worse policy by name."""
    return Homing(gain=0.2, noise=0.5)
