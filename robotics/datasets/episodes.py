"""One episode in memory, whatever file it came from: the type that readers, writers, experts and training share.

The fields follow Gymnasium: `observations[t]` was seen before `actions[t]`; reward, terminated, truncated and success
of row t are what `env.step(actions[t])` returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gencontrol.errors import UsageError

Array = NDArray[Any]


@dataclass(frozen=True)
class Episode:
    """What happened from a reset to an end.

    Args:
        observations: key → [T or T+1, ...]; row T, where present, is the final observation.  Images are uint8
            [h w 3], everything else float32.
        actions: float32 [T A], T ≥ 1.
        rewards: float32 [T].
        terminated, truncated: bool [T].
        success: bool [T], the environment's flag after each action.
        task: a sentence, or "".
        seed: of the environment's reset.
        fps: control steps per second.
        states: simulator states [T or T+1, D], where recorded.
        meta: anything JSON can hold.

    Raises:
        UsageError: lengths differ, T = 0, or numbers are not finite; the message names the array.
    """

    observations: Mapping[str, Array]
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    success: Array
    task: str = ""
    seed: int | None = None
    fps: float = 20.0
    states: Array | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no training could use."""
        count = len(self.actions)
        if self.actions.ndim != 2 or count == 0:
            raise UsageError(f"actions have shape {self.actions.shape}; an episode needs [T A] with T of at least 1.")
        for name in ("rewards", "terminated", "truncated", "success"):
            if getattr(self, name).shape != (count,):
                raise UsageError(f"{name} has shape {getattr(self, name).shape} beside {count} actions.")
        rows = {**{f"observation '{key}'": value for key, value in self.observations.items()}}
        if self.states is not None:
            rows["states"] = self.states
        for name, value in rows.items():
            if len(value) not in (count, count + 1):
                raise UsageError(f"{name} has {len(value)} rows beside {count} actions; give {count} or {count + 1}.")
        for name, value in {"actions": self.actions, "rewards": self.rewards, **rows}.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                bad = int(np.argwhere(~np.isfinite(value))[0][0])
                raise UsageError(
                    f"{name} has a value that is not finite in row {bad}; repair or leave out the episode."
                )

    def __len__(self) -> int:
        """Return T, the number of actions."""
        return len(self.actions)

    @property
    def succeeded(self) -> bool:
        """Whether the flag was set at any step."""
        return bool(self.success.any())

    @property
    def total_reward(self) -> float:
        """Sum of the rewards, without discount."""
        return float(self.rewards.astype(np.float64).sum())


@dataclass(frozen=True)
class Episodes(Sequence[Episode]):
    """Episodes of one environment: the same observation keys and shapes and one action size.

    Args:
        items: the episodes.
        env: what made them, e.g. {"env_id": …, "kwargs": …}; written into the file formats that have a place for it.

    Raises:
        UsageError: no episode, or keys or shapes differ; the message names the episode.
    """

    items: tuple[Episode, ...]
    env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse mixtures."""
        if not self.items:
            raise UsageError("there is no episode; a data set needs at least one.")
        first = shapes_of(self.items[0])
        for index, episode in enumerate(self.items):
            if shapes_of(episode) != first:
                raise UsageError(f"episode {index} has arrays {shapes_of(episode)}, episode 0 has {first}.")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """Return one episode, or Episodes for a slice."""
        return Episodes(self.items[index], self.env) if isinstance(index, slice) else self.items[index]

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.items)

    @property
    def frames(self) -> int:
        """Number of actions of all episodes."""
        return sum(map(len, self.items))


def shapes_of(episode: Episode) -> dict[str, tuple[int, ...]]:
    """Return the shape of one row of each observation and of the action, under "action"."""
    rows = {key: tuple(value.shape[1:]) for key, value in sorted(episode.observations.items())}
    return {**rows, "action": tuple(episode.actions.shape[1:])}
