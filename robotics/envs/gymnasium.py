"""Gymnasium environments as `RobotEnv`: flattened observations, explicit success, and the time limit by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.envs.types import Array, EnvSpec, Transition

#: names under which environments report success (docs/robot-interfaces.md#gymnasium, FOUND)
SUCCESS_KEYS = ("is_success", "success")
#: steps of an episode where neither the user nor the environment's registration says
DEFAULT_LIMIT = 1000
_PACKAGES = ("gymnasium", "gymnasium-robotics", "gym-pusht", "mujoco", "pymunk", "robosuite", "hf-libero", "numpy")


@dataclass(frozen=True)
class SuccessRule:
    """How success is read from a step.

    Args:
        kind: "flag" (info's value under the first of `keys` that is there), "terminated" or "reward".
        keys: names in info.
        threshold: least reward that is a success.
    """

    kind: Literal["flag", "terminated", "reward"] = "flag"
    keys: tuple[str, ...] = SUCCESS_KEYS
    threshold: float = math.nan

    @staticmethod
    def parse(text: str) -> SuccessRule:
        """Read "auto", "info:KEY", "terminated" or "reward>=NUMBER".

        Raises:
            UsageError: anything else.
        """
        if text == "auto":
            return SuccessRule()
        if text == "terminated":
            return SuccessRule("terminated", ())
        if found := re.fullmatch(r"info:(.+)", text):
            return SuccessRule("flag", (found.group(1),))
        if found := re.fullmatch(r"reward>=([-+0-9.eE]+)", text):
            try:
                return SuccessRule("reward", (), float(found.group(1)))
            except ValueError:
                pass
        raise UsageError(f"success '{text}': give auto, info:KEY, terminated or reward>=NUMBER.")

    def __str__(self) -> str:
        """The definition for the report."""
        if self.kind == "flag":
            return " or ".join(f"info['{key}']" for key in self.keys)
        return "terminated" if self.kind == "terminated" else f"reward >= {self.threshold:g}"

    def read(self, reward: float, terminated: bool, info: Mapping[str, Any]) -> bool | None:
        """Return success of a step, None where the environment did not say."""
        if self.kind == "terminated":
            return terminated
        if self.kind == "reward":
            return reward >= self.threshold
        for key in self.keys:
            if key in info:
                return bool(np.all(np.asarray(info[key]) > 0))
        return None


class GymnasiumEnv:
    """A Gymnasium environment (or one with its methods) as a `RobotEnv`.

    Raises:
        UsageError: spaces that are no numbers, or a time limit below 1; the message says what to give.
    """

    def __init__(
        self,
        env: Any,
        env_id: str,
        *,
        kwargs: Mapping[str, Any],
        rule: SuccessRule,
        time_limit: int | None = None,
        success_at: Literal["any", "end"] = "any",
    ) -> None:
        self.env = env
        self._rule = rule
        known = env.spec.max_episode_steps if env.spec is not None else None
        limit = min((n for n in (time_limit, known) if n is not None), default=DEFAULT_LIMIT)
        if limit < 1:
            raise UsageError(f"environment '{env_id}': a time limit of {limit} steps; give at least 1.")
        boxes, actions = dict(_leaves(env.observation_space)), env.action_space
        for key, leaf in boxes.items():
            if leaf.shape is None or leaf.dtype is None or leaf.dtype.kind not in "fiub":
                raise UsageError(
                    f"environment '{env_id}': observation '{key}' is a {leaf}; arrays of numbers are read."
                )
        from gymnasium.spaces import Box

        if not isinstance(actions, Box) or len(actions.shape) != 1:
            raise UsageError(
                f"environment '{env_id}' takes actions of {actions}; policies here give vectors of numbers."
            )
        self.spec = EnvSpec(
            env_id=env_id,
            observations={key: tuple(int(n) for n in leaf.shape) for key, leaf in boxes.items()},
            images=tuple(key for key, leaf in boxes.items() if leaf.dtype == np.uint8),
            action_low=tuple(float(x) for x in actions.low),
            action_high=tuple(float(x) for x in actions.high),
            fps=float(env.metadata.get("render_fps") or 20.0),
            time_limit=int(limit),
            limit_from="asked for" if limit == time_limit else "the environment's" if limit == known else "our default",
            success=str(rule),
            success_at=success_at,
            task=str(getattr(env.unwrapped, "task_description", "")),
            kwargs=dict(kwargs),
            versions=versions(),
        )

    def reset(self, seed: int) -> dict[str, Array]:
        """Begin an episode; see RobotEnv."""
        observation, _ = self.env.reset(seed=seed)
        return flatten(observation)

    def step(self, action: Array) -> Transition:
        """Execute an action; see RobotEnv."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = float(reward)
        success = self._rule.read(reward, bool(terminated), info)
        return Transition(flatten(observation), reward, bool(terminated), bool(truncated), success)

    def render(self) -> Array:
        """Return a frame; see RobotEnv.  The episode goes on as if nothing had been drawn."""
        with _undisturbed(self.env.unwrapped):
            frame = np.asarray(self.env.render())
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise UsageError(f"{self.spec.env_id} rendered {frame.shape}; videos need [h w 3].")
        return frame.astype(np.uint8, copy=False)

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()


@contextmanager
def _undisturbed(inner: Any) -> Iterator[None]:
    """Put the simulator's state back: Fetch recomputes it to place its markers, which moves the last bits."""
    if not any(kind.__name__ == "MujocoRobotEnv" for kind in type(inner).__mro__):
        yield
        return
    import mujoco

    before = mujoco.MjData(inner.model)
    mujoco.mj_copyData(before, inner.model, inner.data)
    try:
        yield
    finally:
        mujoco.mj_copyData(inner.data, inner.model, before)


def versions() -> dict[str, str]:
    """Return the versions of the simulators' packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flatten(observation: Any, prefix: str = "") -> dict[str, Array]:
    """Return key → array float32 or uint8; nested dictionaries get keys "a/b", a bare array the key "observation"."""
    if not isinstance(observation, Mapping):
        return {prefix or "observation": as_array(observation)}
    found: dict[str, Array] = {}
    for key, value in observation.items():
        found.update(flatten(value, f"{prefix}/{key}" if prefix else str(key)))
    return found


def as_array(value: Any) -> Array:
    """Return uint8 as it is and every other number as float32."""
    array = np.asarray(value)
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _leaves(space: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from gymnasium.spaces import Dict

    if isinstance(space, Dict):
        for key, inner in space.spaces.items():
            yield from _leaves(inner, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix or "observation", space
