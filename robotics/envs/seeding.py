"""Whether an episode is a function of its seed: the ground of paired comparison, checked before the first episode."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gencontrol.robotics.envs.make import family_of
from gencontrol.robotics.envs.types import Array
from gencontrol.robotics.envs.vector import Batch, Envs

STEPS = 5


def difference(envs: Envs, seed: int) -> str | None:
    """Begin the first row twice with one seed and take the same five actions; return what differed, or None.

    A fault of the simulator is no difference: it shows as an invalid episode.
    """
    low, high = np.array(envs.spec.action_low), np.array(envs.spec.action_high)
    bounds = np.clip(low, -1.0, 1.0), np.clip(high, -1.0, 1.0)
    actions = np.random.default_rng(0).uniform(*bounds, (STEPS, 1, envs.spec.action_dim)).astype(np.float32)
    first, second = (_watched(envs, seed, actions) for _ in range(2))
    for step, (one, two) in enumerate(zip(first, second)):
        if key := next((key for key in one if not np.array_equal(one[key], two[key], equal_nan=True)), None):
            return f"'{key}' {f'after step {step}' if step else 'at the reset'}"
    return None if len(first) == len(second) else "the length of an episode"


def unseeded(envs: Envs, seed: int) -> str | None:
    """Return one line that says that episodes differ under one seed and what to do, or None where they do not."""
    found = difference(envs, seed)
    if found is None:
        return None
    name = f"{envs.spec.env_id} ({family_of(envs.spec.env_id).name})"
    return (
        f"episodes of {name} are no function of their seed: two with seed {seed} differ in {found}. Let its "
        "reset(seed) seed every generator that it draws from"
    )


def _watched(envs: Envs, seed: int, actions: Array) -> list[Mapping[str, Array]]:
    """What one episode shows, up to its end, to a fault, or through the actions."""
    batch = envs.reset([0], [seed])
    seen: list[Mapping[str, Array]] = [_shown(batch)]
    for action in actions:
        if batch.ended[0]:
            break
        batch = envs.step([0], action)
        seen.append(_shown(batch))
    return seen if not batch.faults else []


def _shown(batch: Batch) -> dict[str, Array]:
    flags = {"reward": batch.reward, "terminated": batch.terminated, "success": batch.success}
    return {**batch.observation, **flags}
