"""LIBERO's tasks as `RobotEnv`: "libero/SUITE/TASK" with the benchmark's own initial states.

Protocol (docs/robot-interfaces.md#libero, FOUND): reset, set the initial state, ten steps of an idle action.  Initial
state k of a task belongs to the seeds that are k modulo the number of states.  Images are turned upright (both axes).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.robotics.envs.gymnasium import as_array, versions
from gencontrol.robotics.envs.types import Array, EnvSpec, Transition

#: steps of LeRobot's evaluations
LIMITS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SETTLE_STEPS = 10
IDLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
_NEEDS = "LIBERO environments need libero; pip install hf-libero (in an environment of its own)"
_IMAGES = ("agentview_image", "robot0_eye_in_hand_image")
_STATES = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos")


class LiberoEnv:
    """One task of LIBERO.

    Args:
        env_id: e.g. "libero/libero_spatial/3".
        kwargs: of OffScreenRenderEnv, e.g. camera_heights and camera_widths (256).
        time_limit: steps; None: LeRobot's for the suite.

    Raises:
        EnvironmentMissing: libero is not installed or not configured.
        UsageError: no such suite or task, or its initial states cannot be read.
    """

    def __init__(self, env_id: str, *, kwargs: Mapping[str, Any], time_limit: int | None) -> None:
        suite_name, index = split(env_id)
        benchmark, make, folder = _libero()
        suite = benchmark.get_benchmark_dict()[suite_name]()
        if not 0 <= index < suite.n_tasks:
            raise UsageError(f"'{env_id}': {suite_name} has tasks 0 to {suite.n_tasks - 1}.")
        task = suite.get_task(index)
        self._states = _initial_states(suite, index, env_id)
        given = {"camera_heights": 256, "camera_widths": 256, **kwargs}
        self.env = make(bddl_file_name=str(folder / task.problem_folder / task.bddl_file), **given)
        self._image: Array | None = None
        first = self.reset(0)
        self.spec = EnvSpec(
            env_id=env_id,
            observations={key: tuple(value.shape) for key, value in first.items()},
            images=tuple(key for key, value in first.items() if value.dtype == np.uint8),
            action_low=(-1.0,) * len(IDLE),
            action_high=(1.0,) * len(IDLE),
            fps=20.0,
            time_limit=time_limit or LIMITS[suite_name],
            limit_from="asked for" if time_limit else "LeRobot's",
            success="check_success()",
            task=str(task.language),
            kwargs=given,
            versions=versions(),
        )

    def reset(self, seed: int) -> dict[str, Array]:
        """Begin an episode; see RobotEnv."""
        self.env.seed(seed)
        self.env.reset()
        observation = self.env.set_init_state(self._states[seed % len(self._states)])
        for _ in range(SETTLE_STEPS):
            observation = self.env.step(list(IDLE))[0]
        return self._flat(observation)

    def step(self, action: Array) -> Transition:
        """Execute an action; see RobotEnv.  Success ends the episode."""
        observation, reward, _, _ = self.env.step(action.tolist())
        success = bool(self.env.check_success())
        return Transition(self._flat(observation), float(reward), success, False, success)

    def render(self) -> Array:
        """Return the front camera's image; see RobotEnv."""
        if self._image is None:
            raise UsageError("nothing was seen yet; reset first.")
        return self._image

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    def _flat(self, observation: Mapping[str, Any]) -> dict[str, Array]:
        """Images upright, states as float32, and LeRobot's state of 8 numbers under "state"."""
        found = {key: as_array(observation[key]) for key in _STATES if key in observation}
        for key in _IMAGES:
            if key in observation:
                found[key] = np.ascontiguousarray(np.asarray(observation[key])[::-1, ::-1]).astype(np.uint8)
        parts = [found["robot0_eef_pos"], axis_angle(found["robot0_eef_quat"]), found["robot0_gripper_qpos"]]
        found["state"] = np.concatenate(parts)
        self._image = found.get(_IMAGES[0])
        return found


def split(env_id: str) -> tuple[str, int]:
    """Return suite and task of "libero/SUITE/TASK".

    Raises:
        UsageError: another form, or an unknown suite.
    """
    parts = env_id.split("/")
    if len(parts) != 3 or not parts[2].isdigit():
        raise UsageError(f"'{env_id}': LIBERO ids are libero/SUITE/TASK, e.g. libero/libero_spatial/0.")
    if parts[1] not in LIMITS:
        raise UsageError(f"LIBERO has no suite '{parts[1]}'.{nearest(parts[1], LIMITS)} Suites: {', '.join(LIMITS)}.")
    return parts[1], int(parts[2])


def axis_angle(quaternion: Array) -> Array:
    """Return the rotation vector of a quaternion x y z w, float32 [3]; the angle is in [0, 2π) as in robosuite."""
    x = quaternion.astype(np.float64)
    w = float(np.clip(x[3], -1.0, 1.0))
    length = float(np.sqrt(1.0 - w * w))
    if length < 1e-9:
        return np.zeros(3, np.float32)
    return (x[:3] * (2.0 * np.arccos(w) / length)).astype(np.float32)


def _libero() -> tuple[Any, Any, Path]:
    """Return LIBERO's benchmark module, its environment class and the folder of its tasks."""
    configured = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
    if not configured.exists():  # without it the import asks a question on the terminal and waits for ever
        raise EnvironmentMissing(
            f"LIBERO is not configured: write '{configured}' with the keys benchmark_root, bddl_files, init_states, "
            "datasets and assets (`python -c 'import libero.libero'` in a terminal asks for them)."
        )
    try:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as error:
        raise EnvironmentMissing(_NEEDS) from error
    return benchmark, OffScreenRenderEnv, Path(get_libero_path("bddl_files"))


def _initial_states(suite: Any, index: int, env_id: str) -> Array:
    try:
        states: Array = np.asarray(suite.get_task_init_states(index))
    except Exception as error:  # torch's unpickler has an error class of its own in every version
        raise UsageError(
            f"'{env_id}': LIBERO cannot read its initial states ({' '.join(str(error).split())[:160]}); with torch 2.6 "
            "or newer, and if you trust its files, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
        ) from error
    return states
