"""robosuite's tasks as `RobotEnv`, with the keys and names of robomimic's data sets.

robosuite has the old interface of four values, its `done` means only that the horizon was reached, and success is
asked for by `_check_success` (docs/robot-interfaces.md#robosuite, FOUND).  The observation "object-state" is called
"object".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.robotics.envs.gymnasium import as_array, versions
from gencontrol.robotics.envs.types import Array, EnvSpec, Transition

#: names of robomimic's tasks that differ from robosuite's
TASKS = {"Can": "PickPlaceCan", "Square": "NutAssemblySquare", "Transport": "TwoArmTransport"}
#: steps of robomimic's evaluations on proficient-human data
HORIZONS = {"Lift": 400, "PickPlaceCan": 400, "NutAssemblySquare": 400, "ToolHang": 700, "TwoArmTransport": 700}
_NEEDS = 'robosuite environments need robosuite; pip install "robosuite>=1.5,<1.6" "mujoco<3.6"'
_STATE = re.compile(r"(object|robot\d+_(eef_pos|eef_quat|gripper_qpos|gripper_qvel|joint_pos|joint_vel|eef_vel_\w+))")
_CAMERA = "agentview"


class RobosuiteEnv:
    """One task of robosuite.

    Args:
        env_id: "robosuite/Lift", or robomimic's name: "robosuite/Can".
        kwargs: of robosuite.make, e.g. robots="Panda" (two of them for two arms), controller_configs; images only with
            use_camera_obs=True.
        time_limit: steps; None: robomimic's horizon.
        render: make an offscreen renderer.

    Raises:
        EnvironmentMissing: robosuite is not installed.
        UsageError: no such task, or no horizon is known for it.
    """

    def __init__(self, env_id: str, *, kwargs: Mapping[str, Any], time_limit: int | None, render: bool) -> None:
        try:
            import robosuite
        except ImportError as error:
            raise EnvironmentMissing(_NEEDS) from error
        name = env_id.partition("/")[2]
        name = TASKS.get(name, name)
        if name not in robosuite.ALL_ENVIRONMENTS:
            raise UsageError(f"robosuite has no task '{name}'.{nearest(name, robosuite.ALL_ENVIRONMENTS)}")
        limit = time_limit or HORIZONS.get(name)
        if limit is None:
            raise UsageError(f"no time limit is known for '{env_id}'; give --time-limit STEPS.")
        robots = ["Panda", "Panda"] if name.startswith("TwoArm") else "Panda"
        given = {"robots": robots, "use_camera_obs": False, "control_freq": 20, "reward_shaping": False, **kwargs}
        images = bool(given["use_camera_obs"])
        self.env = robosuite.make(
            name,
            **{
                "has_renderer": False,
                "has_offscreen_renderer": render or images,
                "ignore_done": True,
                "horizon": limit,
                **given,
            },
        )
        low, high = self.env.action_spec
        first = self._flat(self.env.reset())
        self.spec = EnvSpec(
            env_id=env_id,
            observations={key: tuple(value.shape) for key, value in first.items()},
            images=tuple(key for key, value in first.items() if value.dtype == np.uint8),
            action_low=tuple(float(x) for x in low),
            action_high=tuple(float(x) for x in high),
            fps=float(given["control_freq"]),
            time_limit=limit,
            limit_from="asked for" if time_limit else "robomimic's",
            success="_check_success()",
            kwargs={key: value for key, value in given.items() if isinstance(value, (str, int, float, bool))},
            versions=versions(),
        )

    def reset(self, seed: int) -> dict[str, Array]:
        """Begin an episode; see RobotEnv.

        Placements are drawn from `env.rng` and by the initialiser and its samplers, which keep generators of their own
        (robosuite 1.5), or from NumPy's global generator (1.4); all are set here, and the global one gets its state
        back.
        """
        before = np.random.get_state()
        np.random.seed(seed % 2**32)
        try:
            self.env.rng = np.random.default_rng(seed)
            placing = getattr(self.env, "placement_initializer", None)
            for drawer in (placing, *getattr(placing, "samplers", {}).values()):
                if drawer is not None:
                    drawer.rng = self.env.rng
            return self._flat(self.env.reset())
        finally:
            np.random.set_state(before)

    def step(self, action: Array) -> Transition:
        """Execute an action; see RobotEnv.  The task never ends by itself."""
        observation, reward, _, _ = self.env.step(action)
        return Transition(self._flat(observation), float(reward), False, False, bool(self.env._check_success()))

    def render(self) -> Array:
        """Return a frame of the front camera; see RobotEnv."""
        frame = self.env.sim.render(camera_name=_CAMERA, height=256, width=256)
        return np.ascontiguousarray(frame[::-1]).astype(np.uint8)  # OpenGL counts rows from the bottom

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    @staticmethod
    def _flat(observation: Mapping[str, Any]) -> dict[str, Array]:
        """Keep robomimic's keys, images upright."""
        found = {}
        for key, value in observation.items():
            name = "object" if key == "object-state" else key
            if name.endswith("_image"):
                found[name] = np.ascontiguousarray(np.asarray(value)[::-1]).astype(np.uint8)
            elif _STATE.fullmatch(name):
                found[name] = as_array(value)
        return found
