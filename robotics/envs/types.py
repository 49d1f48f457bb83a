"""What an environment of a robot is: its description, its steps, and the protocol of a single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

from gencontrol.errors import UsageError

Array = NDArray[Any]
#: what makes an environment: an id, package.module:make_fn, or such a function itself
EnvSource = str | Callable[..., Any]


@dataclass(frozen=True)
class EnvSpec:
    """What an environment reads, writes and means by success.

    Args:
        observations: key → shape of one observation; images [h w 3].
        images: keys that hold uint8; all others hold float32.
        action_low, action_high: bounds of each number of an action, infinite where there are none.
        fps: control steps per second.
        time_limit: steps after which an episode is truncated.
        limit_from: who set it.
        success: how success is read, e.g. "info['is_success']".
        success_at: whether the convention of this environment counts success at "any" step or at the "end".
        task: a sentence, or "".
        kwargs: what it was made with beside the id.
        versions: package → version.
    """

    env_id: str
    observations: Mapping[str, tuple[int, ...]]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    time_limit: int
    limit_from: str = "the environment's"
    images: tuple[str, ...] = ()
    fps: float = 20.0
    success: str = "info"
    success_at: Literal["any", "end"] = "any"
    task: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""
        return len(self.action_low)


class Transition(NamedTuple):
    """What one step returned; `success` is None where the environment did not say."""

    observation: dict[str, Array]
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None


class RobotEnv(Protocol):
    """One environment; `make_env` returns it."""

    spec: EnvSpec

    def reset(self, seed: int) -> dict[str, Array]:
        """Begin an episode that depends on the seed alone; return its first observation."""

    def step(self, action: Array) -> Transition:
        """Execute one action, float32 [A]."""

    def render(self) -> Array:
        """Return a frame, uint8 [h w 3]; only where it was made with render=True."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a row in a process of its own counts as hanging."""

    make_s: float = 300.0
    reset_s: float = 120.0
    step_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what would kill every episode."""
        if not min(self.make_s, self.reset_s, self.step_s) > 0:
            raise UsageError("timeouts must be above 0 seconds.")
