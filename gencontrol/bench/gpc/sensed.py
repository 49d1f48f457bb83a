"""Fetch pick-and-place seen through two imperfect cameras: the world of `gencontrol bench gpc`
(docs/methods/gpc.md#part-b).

Each sensor reports the state of the arm exactly and the object's place with an error that stays the same for a whole
episode, N(0, σ²) in x and y and N(0, (0.3σ)²) in z.  The errors of different sensors are independent, which is what
makes the composition of two policies better than either.  An error is a pure function of (episode seed, sensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gencontrol.rng import stream
from gencontrol.robotics.envs.make import family_of, require

Rows = NDArray[np.float32]

#: numbers in a sensor's observation
SENSED = 17
#: metres of error of docs/methods/gpc.md#part-b
SIGMA = 0.012


def sensed(observation: Mapping[str, Any], error: Rows) -> Rows:
    """Return what a sensor with this error [3] reports: float32 [17].

    Gripper place (3), object place (3), object relative to the gripper (3), finger widths (2), gripper speed (3),
    goal (3).
    """
    state = np.asarray(observation["observation"], dtype=np.float32)
    thing = state[3:6] + error
    goal = np.asarray(observation["desired_goal"], dtype=np.float32)
    return np.concatenate([state[:3], thing, thing - state[:3], state[9:11], state[20:23], goal]).astype(np.float32)


def sensor_error(seed: int, sensor: str, sigma: float) -> Rows:
    """Return the error [3], in metres, of this sensor in the episode with this seed."""
    scale = sigma * torch.tensor([1.0, 1.0, 0.3])
    error: Rows = (scale * torch.randn(3, generator=stream(seed, "sensor", sensor))).numpy()
    return error


def make_two_cameras(sigma_a: float = SIGMA, sigma_b: float = SIGMA, render_mode: str | None = None) -> Any:
    """Return FetchPickAndPlace-v4 with the further observations "camera_a" and "camera_b" [17].

    Args:
        sigma_a, sigma_b: metres.
        render_mode: Gymnasium's.

    Raises:
        EnvironmentMissing: gymnasium-robotics is not installed.
    """
    require(family_of("FetchPickAndPlace-v4"))
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    sigmas = {"camera_a": sigma_a, "camera_b": sigma_b}

    class TwoCameras(gymnasium.ObservationWrapper[Any, Any, Any]):
        """Adds the two cameras to the observation."""

        def __init__(self, env: Any) -> None:
            super().__init__(env)
            camera = gymnasium.spaces.Box(-np.inf, np.inf, (SENSED,), np.float32)
            self.observation_space = gymnasium.spaces.Dict(
                {**env.observation_space.spaces, **dict.fromkeys(sigmas, camera)}
            )
            self._errors = {name: np.zeros(3, np.float32) for name in sigmas}

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            """Begin an episode with errors of its own; an unseeded one takes its seed from the environment."""
            observation, info = self.env.reset(seed=seed, options=options)
            number = int(self.np_random.integers(2**62)) if seed is None else seed
            self._errors = {name: sensor_error(number, name, sigma) for name, sigma in sigmas.items()}
            return self.observation(observation), info

        def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
            """Add what each camera reports."""
            return {**observation, **{name: sensed(observation, error) for name, error in self._errors.items()}}

    return TwoCameras(gymnasium.make("FetchPickAndPlace-v4", render_mode=render_mode))
