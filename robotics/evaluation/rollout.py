"""Episodes of a policy in a vector environment, one per seed: the loop that recording and evaluation share.

An episode depends on its seed alone: rows that end take the next seed at once by a masked reset, noise of actions is
named by the seed, and networks are asked in batches of a fixed size (`ChunkedPolicy.rows_at_once`) or row by row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.files import feed
from gencontrol.robotics.datasets.episodes import Array, Episode
from gencontrol.robotics.envs.types import EnvSpec
from gencontrol.robotics.envs.vector import Batch, Envs
from gencontrol.robotics.policies.chunked import ChunkedPolicy


class Actor(Protocol):
    """What a rollout needs of a policy."""

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin an episode in each of these rows, its noise named by the seed."""

    def select_action(self, observation: Mapping[str, Any], rows: Sequence[int] | None = None) -> Any:
        """Return the action of each row, [k A]."""


@dataclass(frozen=True)
class Rollout:
    """What came of one seed.

    Args:
        episode: what happened until the end, or until the fault; None where not even one step was taken.
        fault: why the episode is invalid, or None.
        start: digest of the first observation: equal for two policies exactly if they began alike.
        clipped: numbers in actions that lay outside the bounds.
        reported: whether the environment ever said anything about success.
        latency_s: how long the policy took for each action.
        wall_s: from the reset to the end, other rows included.
        frames: rendered pictures, where they were asked for.
        render_fault: why there are no further ones.
    """

    seed: int
    episode: Episode | None
    fault: str | None
    start: str
    clipped: int
    reported: bool
    latency_s: tuple[float, ...]
    wall_s: float
    frames: tuple[Array, ...] = ()
    render_fault: str | None = None


@dataclass
class _Open:
    """The recording of one row."""

    seed: int
    observations: list[dict[str, Array]]
    begin: float
    actions: list[Array] = field(default_factory=list)
    steps: list[tuple[float, bool, bool, bool]] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    frames: list[Array] = field(default_factory=list)
    render_fault: str | None = None
    clipped: int = 0
    reported: bool = False

    def close(self, spec: EnvSpec, fault: str | None = None) -> Rollout:
        """Return what was recorded."""
        episode = None
        if self.steps:
            rewards, terminated, truncated, success = (np.array(column) for column in zip(*self.steps))
            rows = self.observations[: len(self.steps) + 1]
            episode = Episode(
                observations={key: np.stack([row[key] for row in rows]) for key in rows[0]},
                actions=np.stack(self.actions[: len(self.steps)]),
                rewards=rewards.astype(np.float32),
                terminated=terminated,
                truncated=truncated,
                success=success,
                task=spec.task,
                seed=self.seed,
                fps=spec.fps,
            )
        return Rollout(
            seed=self.seed,
            episode=episode,
            fault=fault,
            start=digest(self.observations[0]) if self.observations else "",
            clipped=self.clipped,
            reported=self.reported,
            latency_s=tuple(self.latency_s),
            wall_s=time.perf_counter() - self.begin,
            frames=tuple(self.frames),
            render_fault=self.render_fault,
        )


def digest(arrays: Mapping[str, Array]) -> str:
    """Return 16 hexadecimal digits that name these arrays."""
    return str(feed(hashlib.blake2b(digest_size=8), arrays).hexdigest())


class Rollouts:
    """Runs one policy over seeds; iterate `run`.

    Args:
        together: ask the policy for all rows in one call.  Default: only a `ChunkedPolicy`, which sees to it that an
            action does not depend on the other rows.
        render_every: record a frame at the start and after every so many steps; 0 records none.
    """

    def __init__(self, policy: Actor, envs: Envs, *, together: bool | None = None, render_every: int = 0) -> None:
        self.policy, self.envs = policy, envs
        self._together = isinstance(policy, ChunkedPolicy) if together is None else together
        self._every = render_every
        self._open: dict[int, _Open] = {}
        self._low = np.array(envs.spec.action_low, np.float32)
        self._high = np.array(envs.spec.action_high, np.float32)

    def run(self, seeds: Sequence[int], poll: Callable[[], None] | None = None) -> Iterator[Rollout]:
        """Yield the rollout of each seed as it ends (not in the order of `seeds`).

        Args:
            poll: called between steps; may raise to stop.

        Raises:
            UsageError: the policy's actions have another size than the environment's.
        """
        waiting = list(reversed(seeds))
        free = list(range(self.envs.num_envs))
        while waiting or self._open:
            if poll is not None:
                poll()
            begun = {row: waiting.pop() for row in free[: len(waiting)]}
            done = list(self._begin(begun)) if begun else []
            if self._open:
                done += self._advance()
            free = [row for row in range(self.envs.num_envs) if row not in self._open]
            yield from done

    def _begin(self, begun: Mapping[int, int]) -> Iterator[Rollout]:
        """Reset rows; yield those that could not be."""
        now = time.perf_counter()
        batch = self.envs.reset(list(begun), list(begun.values()))
        self.policy.reset(list(begun), list(begun.values()))
        for index, row in enumerate(batch.rows):
            if row in batch.faults:
                yield _Open(begun[row], [], now).close(self.envs.spec, batch.faults[row])
            else:
                self._open[row] = _Open(begun[row], [_row_of(batch, index)], now)
        self._shoot([row for row in begun if row in self._open])

    def _advance(self) -> Iterator[Rollout]:
        """Take one step in every row; yield what ended."""
        rows = sorted(self._open)
        actions, seconds = self._ask(rows)
        good = []
        for row, action, spent in zip(rows, actions, seconds):
            opened = self._open[row]
            opened.latency_s.append(spent)
            if not np.isfinite(action).all():
                fault = f"policy: its action is not finite (at step {len(opened.actions) + 1})"
                yield self._open.pop(row).close(self.envs.spec, fault)
                continue
            inside = np.clip(action, self._low, self._high)
            opened.clipped += int((inside != action).sum())
            opened.actions.append(inside)
            good.append(row)
        if good:
            yield from self._step(good)

    def _step(self, rows: Sequence[int]) -> Iterator[Rollout]:
        batch = self.envs.step(rows, np.stack([self._open[row].actions[-1] for row in rows]))
        ended = batch.ended
        for index, row in enumerate(rows):
            opened = self._open[row]
            if row in batch.faults:
                yield self._open.pop(row).close(self.envs.spec, batch.faults[row])
                continue
            opened.observations.append(_row_of(batch, index))
            flags = bool(batch.terminated[index]), bool(batch.truncated[index]), bool(batch.success[index])
            opened.steps.append((float(batch.reward[index]), *flags))
            opened.reported |= bool(batch.reported[index])
        self._shoot([row for row in rows if row in self._open])
        for index, row in enumerate(rows):
            if ended[index] and row in self._open:
                yield self._open.pop(row).close(self.envs.spec)

    def _ask(self, rows: Sequence[int]) -> tuple[Array, list[float]]:
        """Return actions float32 [k A] and the seconds that each row waited for its action."""
        newest = [self._open[row].observations[-1] for row in rows]
        groups = [list(range(len(rows)))] if self._together else [[index] for index in range(len(rows))]
        found, seconds = [], []
        for group in groups:
            begin = time.perf_counter()
            observation = {key: np.stack([newest[i][key] for i in group]) for key in newest[0]}
            actions = np.asarray(self.policy.select_action(observation, [rows[i] for i in group]), np.float32)
            seconds += [time.perf_counter() - begin] * len(group)
            wanted = (len(group), self.envs.spec.action_dim)
            if actions.shape != wanted:
                raise UsageError(
                    f"the policy returned actions of shape {actions.shape}; {self.envs.spec.env_id} takes {wanted}."
                )
            found.append(actions)
        return np.concatenate(found), seconds

    def _shoot(self, rows: Sequence[int]) -> None:
        """Render rows until one of their frames fails."""
        if not self._every:
            return
        wanted = [
            row
            for row in rows
            if self._open[row].render_fault is None and len(self._open[row].steps) % self._every == 0
        ]
        for row, frame in zip(wanted, self.envs.render(wanted)):
            if isinstance(frame, str):
                self._open[row].render_fault = frame
            else:
                self._open[row].frames.append(frame)


def _row_of(batch: Batch, index: int) -> dict[str, Array]:
    return {key: value[index].copy() for key, value in batch.observation.items()}
