"""Recording of episodes: any policy in any environment, the successful ones kept, every attempt accounted for."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from gencontrol.robotics.envs.seeding import unseeded
from gencontrol.robotics.envs.types import EnvSpec
from gencontrol.robotics.envs.vector import Envs
from gencontrol.robotics.evaluation.rollout import Actor, Rollouts


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
    poll: Callable[[], None] | None = None,
) -> Collection:
    """Record episodes of a policy.

    Args:
        seeds: tried in order.
        keep: stop when this many are kept (None: try all seeds).  Which are kept does not depend on `envs.num_envs`.
        only_successes: leave out episodes without success.
        say: called with (kept, attempted, succeeded) after every episode.
        poll: called between steps; may raise to stop.

    Raises:
        UsageError: nothing was kept.
    """
    wanted = len(seeds) if keep is None else keep
    kept: list[Episode] = []
    rejected: Counter[str] = Counter()
    attempted = succeeded = 0
    if (fault := unseeded(envs, seeds[0])) is not None:
        warnings.warn(f"{fault}; the recorded seeds do not bring these episodes back.", UserWarning, stacklevel=2)
    rollouts = Rollouts(policy, envs)
    while attempted < len(seeds) and len(kept) < wanted:
        missing = wanted - len(kept)
        for rollout in rollouts.run(seeds[attempted : attempted + missing], poll):
            attempted += 1
            found = rollout.episode if rollout.fault is None else None
            good = found is not None and won(found, envs.spec)
            succeeded += good
            if found is None:
                rejected[str(rollout.fault).split(" (at ")[0]] += 1
            elif good or not only_successes:
                kept.append(found)
            else:
                rejected["no success"] += 1
            if say is not None:
                say(len(kept), attempted, succeeded)
    if not kept:
        raise UsageError(
            f"none of {attempted} episodes in {envs.spec.env_id} was kept ({dict(rejected)}); check the policy, or "
            "keep failures too (--keep-failures, only_successes=False)."
        )
    kept.sort(key=lambda episode: seeds.index(episode.seed) if episode.seed is not None else 0)
    env = {"env_id": envs.spec.env_id, "kwargs": dict(envs.spec.kwargs), "versions": dict(envs.spec.versions)}
    return Collection(Episodes(tuple(kept), env), attempted, succeeded, dict(rejected))


def won(episode: Episode, spec: EnvSpec) -> bool:
    """Whether the episode counts as a success by the convention of its environment."""
    return bool(episode.success[-1]) if spec.success_at == "end" else episode.succeeded
