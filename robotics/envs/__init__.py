"""Environments: one protocol for a single one, a vector layer over many, a family per package."""

from typing import TYPE_CHECKING

from gencontrol.registry import lazily

if TYPE_CHECKING:
    from gencontrol.robotics.envs.make import make_env
    from gencontrol.robotics.envs.types import EnvSpec, RobotEnv, Timeouts, Transition
    from gencontrol.robotics.envs.vector import Batch, Envs, make_envs

__all__ = [
    "Batch",
    "EnvSpec",
    "Envs",
    "RobotEnv",
    "Timeouts",
    "Transition",
    "make_env",
    "make_envs",
]

__getattr__ = lazily(
    __name__,
    {
        "Batch": "vector",
        "EnvSpec": "types",
        "Envs": "vector",
        "RobotEnv": "types",
        "Timeouts": "types",
        "Transition": "types",
        "make_env": "make",
        "make_envs": "vector",
    },
)
