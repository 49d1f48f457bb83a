"""Recording of episodes: any policy in any environment, the successful ones kept, every attempt accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.envs import Batch, Envs, EnvSpec
from gencontrol.robotics.episodes import Array, Episode, Episodes


class Actor(Protocol):
    """What recording and evaluation need of a policy."""

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None: ...
    def select_action(self, observation: Mapping[str, Any], rows: Sequence[int] | None = None) -> Array: ...


@dataclass
class _Open:
    """The recording of one row."""

    seed: int
    observations: list[dict[str, Array]]
    actions: list[Array] = field(default_factory=list)
    steps: list[tuple[float, bool, bool, bool]] = field(default_factory=list)


def record(policy: Actor, envs: Envs, seeds: Sequence[int]) -> Iterator[Episode | str]:
    """Yield the episode of each seed, or the reason why it has none, as they end (not in the order of `seeds`).

    An episode depends on its seed alone; rows that end take the next seed at once.
    """
    waiting = list(reversed(seeds))
    running: dict[int, _Open] = {}
    current: dict[int, dict[str, Array]] = {}
    free = list(range(envs.num_envs))
    while waiting or running:
        begun = {row: waiting.pop() for row in free[: len(waiting)]}
        free = [row for row in free if row not in begun]
        if begun:
            batch = envs.reset(list(begun), list(begun.values()))
            policy.reset(list(begun), list(begun.values()))
            for index, row in enumerate(batch.rows):
                if row in batch.faults:
                    free.append(row)
                    yield batch.faults[row]
                    continue
                current[row] = _row_of(batch, index)
                running[row] = _Open(begun[row], [current[row]])
        rows = sorted(running)
        if not rows:
            continue
        actions = policy.select_action({k: np.stack([current[r][k] for r in rows]) for k in current[rows[0]]}, rows)
        actions = np.clip(actions, envs.spec.action_low, envs.spec.action_high).astype(np.float32)
        yield from _advance(envs, envs.step(rows, actions), actions, running, current, free)


def _advance(
    envs: Envs,
    batch: Batch,
    actions: Array,
    running: dict[int, _Open],
    current: dict[int, dict[str, Array]],
    free: list[int],
) -> Iterator[Episode | str]:
    """Write one step of every row down; yield what ended."""
    ended = batch.ended
    for index, row in enumerate(batch.rows):
        if row in batch.faults:
            running.pop(row)
            free.append(row)
            yield batch.faults[row]
            continue
        current[row] = _row_of(batch, index)
        opened = running[row]
        opened.observations.append(current[row])
        opened.actions.append(actions[index])
        flags = bool(batch.terminated[index]), bool(batch.truncated[index]), bool(batch.success[index])
        opened.steps.append((float(batch.reward[index]), *flags))
        if ended[index]:
            free.append(row)
            yield _closed(running.pop(row), envs.spec)


def _row_of(batch: Batch, index: int) -> dict[str, Array]:
    return {key: value[index].copy() for key, value in batch.observation.items()}


def _closed(opened: _Open, spec: EnvSpec) -> Episode:
    rewards, terminated, truncated, success = (np.array(column) for column in zip(*opened.steps))
    return Episode(
        observations={k: np.stack([row[k] for row in opened.observations]) for k in opened.observations[0]},
        actions=np.stack(opened.actions),
        rewards=rewards.astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        success=success,
        task=spec.task,
        seed=opened.seed,
        fps=spec.fps,
    )


@dataclass(frozen=True)
class Collection:
    """What was recorded.

    Args:
        episodes: those kept, in the order of their seeds.
        attempted: seeds tried.
        succeeded: episodes with success, by the convention of the environment.
        rejected: reason → number of attempts that were not kept.
    """

    episodes: Episodes
    attempted: int
    succeeded: int
    rejected: Mapping[str, int]

    def summary(self) -> dict[str, Any]:
        """Return the numbers, for the JSON file beside the data."""
        return {
            "attempted": self.attempted,
            "succeeded": self.succeeded,
            "kept": len(self.episodes),
            "frames": self.episodes.frames,
            "rejected": dict(self.rejected),
            "seeds": [episode.seed for episode in self.episodes],
        }


def collect(
    policy: Actor,
    envs: Envs,
    seeds: Sequence[int],
    *,
    keep: int | None = None,
    only_successes: bool = True,
    say: Callable[[int, int, int], None] | None = None,
) -> Collection:
    """Record episodes of a policy.

    Args:
        seeds: tried in order.
        keep: stop when this many are kept (None: try all seeds).  Which are kept does not depend on `envs.num_envs`.
        only_successes: leave out episodes without success.
        say: called with (kept, attempted, succeeded) after every episode.

    Raises:
        UsageError: nothing was kept.
    """
    wanted = len(seeds) if keep is None else keep
    kept: list[Episode] = []
    rejected: Counter[str] = Counter()
    attempted = succeeded = 0
    while attempted < len(seeds) and len(kept) < wanted:
        missing = wanted - len(kept)
        for found in record(policy, envs, seeds[attempted : attempted + missing]):
            attempted += 1
            good = isinstance(found, Episode) and won(found, envs.spec)
            succeeded += good
            if isinstance(found, str):
                rejected[found.split(" (at ")[0]] += 1
            elif good or not only_successes:
                kept.append(found)
            else:
                rejected["no success"] += 1
            if say is not None:
                say(len(kept), attempted, succeeded)
    if not kept:
        raise UsageError(
            f"none of {attempted} episodes in {envs.spec.env_id} was kept ({dict(rejected)}); check the policy, or "
            "keep failures too."
        )
    kept.sort(key=lambda episode: seeds.index(episode.seed) if episode.seed is not None else 0)
    env = {"env_id": envs.spec.env_id, "kwargs": dict(envs.spec.kwargs), "versions": dict(envs.spec.versions)}
    return Collection(Episodes(tuple(kept), env), attempted, succeeded, dict(rejected))


def won(episode: Episode, spec: EnvSpec) -> bool:
    """Whether the episode counts as a success by the convention of its environment."""
    return bool(episode.success[-1]) if spec.success_at == "end" else episode.succeeded
