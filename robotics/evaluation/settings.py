"""How the episodes of an evaluation are run: the options of `evaluate`, in Python and on the command line."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

from gencontrol.config import Count, Natural, Positive, options

if TYPE_CHECKING:
    from gencontrol.robotics.envs.types import EnvSource
    from gencontrol.robotics.envs.vector import Envs


@options
class Settings:
    """How policies are evaluated; results do not depend on `num_envs`.

    Args:
        num_envs: environments side by side; changes no result.
        env_kwargs: arguments of the environments.
        time_limit: steps of an episode (default: the environment's own, or 1000 where it names none).
        success: how success is read: auto (the environment's own flag), info:KEY, terminated or reward>=NUMBER.
        success_at: which steps count (default: as usual for the environment; Fetch: end, others: any).
        isolation: process survives crashes and hangs of the simulator, inline catches exceptions only.
        make_timeout, reset_timeout, step_timeout: seconds after which it hangs, in a process.
        rows_at_once: rows in one network call; 1 is exact for any num_envs, more pads to this size and is faster, but
            the last bits of an action then depend on its place in the batch, and 0 takes all rows that ask.
        allow_unseeded: compare policies also where an environment's episodes are no function of their seed, which is
            checked before the first one; the pairs are then no pairs.
        videos: most videos per policy and environment, failures and successes in proportion; needs an output folder.
    """

    num_envs: Count = 1
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    time_limit: Count | None = None
    success: str = "auto"
    success_at: Literal["any", "end"] | None = None
    isolation: Literal["process", "inline"] = "process"
    make_timeout: Positive = 300.0
    reset_timeout: Positive = 120.0
    step_timeout: Positive = 60.0
    rows_at_once: Natural = 1
    allow_unseeded: bool = False
    videos: Natural = 0

    def envs(self, env: EnvSource, num_envs: int, *, render: bool = False) -> Envs:
        """Make the rows of one environment."""
        from gencontrol.robotics.envs.make import importable
        from gencontrol.robotics.envs.types import Timeouts
        from gencontrol.robotics.envs.vector import make_envs

        # a broken renderer may end its process
        isolation = "process" if render and importable(env) else self.isolation
        return make_envs(
            env,
            num_envs,
            kwargs=self.env_kwargs,
            time_limit=self.time_limit,
            success=self.success,
            isolation=isolation,
            timeouts=Timeouts(self.make_timeout, self.reset_timeout, self.step_timeout),
            render=render,
        )
