"""Environments by id: which package each family needs, what it is made with, and how user code enters."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.registry import resolve_dotted
from gencontrol.robotics.envs.gymnasium import GymnasiumEnv, SuccessRule
from gencontrol.robotics.envs.types import EnvSource, RobotEnv


@dataclass(frozen=True)
class Family:
    """Environments of one package.

    Args:
        name: for people.
        pattern: of the ids.
        module: to import before the id is known.
        install: the line that brings it.
        kwargs: given unless the user gives others.
        success_at: see EnvSpec.
        probe: an id that `gencontrol doctor` tries.
        draws: whether making one needs a renderer even where no frames are asked for.
    """

    name: str
    pattern: str
    module: str
    install: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    success_at: Literal["any", "end"] = "any"
    probe: str = ""
    draws: bool = True


_EXTRA = 'pip install "gencontrol[robotics]"'
#: in order; the last one takes every other id that Gymnasium knows
FAMILIES = (
    Family(
        "PointMaze",
        r"(PointMaze|AntMaze)_",
        "gymnasium_robotics",
        _EXTRA,
        {"continuing_task": False},
        probe="PointMaze_UMaze-v3",
        draws=False,
    ),
    Family(
        "Fetch", r"(Fetch|Hand(Reach|Manip))", "gymnasium_robotics", _EXTRA, {}, "end", "FetchReach-v4", draws=False
    ),
    Family("PushT", r"gym_pusht/", "gym_pusht", 'pip install gym-pusht "pymunk<7"', probe="gym_pusht/PushT-v0"),
    Family(
        "robosuite",
        r"robosuite/",
        "robosuite",
        'pip install "robosuite>=1.5,<1.6" "mujoco<3.6"',
        probe="robosuite/Lift",
    ),
    Family(
        "LIBERO",
        r"libero/",
        "libero",
        "pip install hf-libero (in an environment of its own)",
        probe="libero/libero_spatial/0",
    ),
    Family("Gymnasium", r"", "gymnasium", _EXTRA, probe="Pendulum-v1"),
)


def family_of(env_id: str) -> Family:
    """Return the family of an id."""
    return next(family for family in FAMILIES if re.match(family.pattern, env_id))


def env_name(env: EnvSource) -> str:
    """Return the id of an environment; that of a function is package.module:make_fn."""
    if isinstance(env, str):
        return env
    return f"{env.__module__}:{getattr(env, '__qualname__', type(env).__qualname__)}"


def importable(env: EnvSource) -> bool:
    """Whether another process can make this environment by its name: no lambda, no function of a script."""
    module, _, name = env_name(env).partition(":")
    return isinstance(env, str) or (module != "__main__" and getattr(sys.modules[module], name, None) is env)


def make_env(
    env: EnvSource,
    *,
    kwargs: Mapping[str, Any] | None = None,
    time_limit: int | None = None,
    success: str = "auto",
    render: bool = False,
) -> RobotEnv:
    """Make one environment in this process.

    Args:
        env: an id of Gymnasium ("FetchPush-v4"), "robosuite/Lift", "libero/libero_spatial/3", or a function of `kwargs`
            that returns a Gymnasium environment, itself or by its name package.module:make_fn.
        time_limit: steps of an episode; None: the environment's own, or 1000 where it names none.
        success: "auto" (the environment's own flag), "info:KEY", "terminated", or "reward>=0.9".

    Raises:
        EnvironmentMissing: its package is not installed; the message has the install line.
        UsageError: no such environment, or spaces that no policy here can use.
    """
    given = dict(kwargs or {})
    rule = SuccessRule.parse(success)
    if render:
        _draw_without_screen()
    env_id = env_name(env)
    if ":" in env_id:
        made = _user_env(env, given, render)
        return GymnasiumEnv(made, env_id, kwargs=given, rule=rule, time_limit=time_limit)
    family = family_of(env_id)
    if family.name in ("robosuite", "LIBERO"):
        _draw_without_screen()
        if success != "auto":
            raise UsageError(f"{family.name} tasks know their success; leave out success '{success}'.")
    require(family)
    given = {**family.kwargs, **given}
    if family.name == "robosuite":
        from gencontrol.robotics.envs.robosuite import RobosuiteEnv

        return RobosuiteEnv(env_id, kwargs=given, time_limit=time_limit, render=render)
    if family.name == "LIBERO":
        from gencontrol.robotics.envs.libero import LiberoEnv

        return LiberoEnv(env_id, kwargs=given, time_limit=time_limit)
    import gymnasium

    mode = "rgb_array" if render else None
    try:
        # the checker of Gymnasium prints warnings about conventions and costs time; `Envs` checks what matters here
        made = gymnasium.make(env_id, render_mode=mode, max_episode_steps=time_limit, disable_env_checker=True, **given)
    except gymnasium.error.Error as error:
        known = [name for name in gymnasium.registry if family_of(name) is family]
        reason = str(error).partition(" Did you mean")[0].rstrip(".")  # ours has the version
        raise UsageError(f"environment '{env_id}': {reason}.{nearest(env_id, known)}") from error
    except TypeError as error:
        raise UsageError(f"environment '{env_id}' cannot be made with {dict(given)}: {error}.") from error
    return GymnasiumEnv(made, env_id, kwargs=given, rule=rule, time_limit=time_limit, success_at=family.success_at)


def require(family: Family) -> None:
    """Import the package of a family.

    Raises:
        EnvironmentMissing: with the install line.
    """
    try:  # packages print and warn at import about versions that nobody asked for
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(family.module)
    except ImportError as error:
        raise EnvironmentMissing(f"{family.name} environments need {error.name or error}; {family.install}") from error
    except AttributeError as error:  # how MuJoCo's import ends where MUJOCO_GL names what is not here
        chosen = os.environ.get("MUJOCO_GL")
        raise EnvironmentMissing(f"{family.module} cannot be imported with MUJOCO_GL={chosen}; unset it.") from error


def _draw_without_screen() -> None:
    """Have MuJoCo render by EGL unless there is a screen or the user chose; read when it is first imported."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def _user_env(env: EnvSource, kwargs: Mapping[str, Any], render: bool) -> Any:
    """Call the user's function; for videos it is asked for frames if it can be."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does
    make = resolve_dotted(env, "environment") if isinstance(env, str) else env
    wishes = {"render_mode": "rgb_array"} if render and "render_mode" in inspect.signature(make).parameters else {}
    try:
        return make(**{**wishes, **kwargs})
    except TypeError as error:
        raise UsageError(f"environment '{env_name(env)}' cannot be made with {dict(kwargs)}: {error}.") from error
