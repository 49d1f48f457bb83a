"""What every policy here shares: histories, action queues and noise streams of the rows of a vector environment.

A policy sees the last `n_obs` observations, samples a chunk of `horizon` actions that begins with the oldest of them,
and executes `n_action` of it from the newest on (offset n_obs − 1: the convention of Diffusion Policy, robomimic and
LeRobot).  Noise of decision k in an episode is a pure function of (episode seed, k), so neither the number of parallel
environments nor their order changes an action's noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import Keyed, row_keys

#: observations of several rows: key → array with the row axis first
Observation = Mapping[str, Any]


@dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and writes.

    Args:
        observations: key → shape of one observation, images [h w 3] uint8.
        action_dim: numbers in an action.
        horizon: actions in a chunk, counted from the oldest observation in the history.
        n_obs: observations in the history.
        n_action: actions executed before the next chunk, at most horizon − n_obs + 1.
        control: what an action means, e.g. "delta end effector, 20 Hz"; "" where nobody said.  Policies that say
            different things are not composed.
        task_conditioned: whether the policy is told which task to do.

    Raises:
        UsageError: sizes do not fit.
    """

    observations: Mapping[str, tuple[int, ...]]
    action_dim: int
    horizon: int = 16
    n_obs: int = 2
    n_action: int = 8
    control: str = ""
    task_conditioned: bool = False

    def __post_init__(self) -> None:
        """Refuse a chunk that ends before its actions are executed."""
        least = min(self.action_dim, self.horizon, self.n_obs, self.n_action)
        if least < 1 or self.n_action > self.horizon - self.n_obs + 1:
            raise UsageError(
                f"horizon {self.horizon}, n_obs {self.n_obs}, n_action {self.n_action}: each must be at least 1 and "
                f"n_action at most horizon − n_obs + 1."
            )


@dataclass
class _Row:
    """One episode in progress."""

    seed: int
    decisions: int = 0
    history: list[dict[str, np.ndarray]] = field(default_factory=list)
    queue: deque[np.ndarray] = field(default_factory=deque)


class ChunkedPolicy(ABC):
    """A policy that acts in chunks; subclasses give `spec` and `sample_chunk`.

    Libraries of linear algebra round differently for different batch sizes.  With `rows_at_once` set, `sample_chunk`
    only ever sees batches of exactly this size (split, and padded with a repeated row), so that an action does not
    depend on how many other rows ask with it; None hands over all rows that ask.
    """

    spec: PolicySpec
    rows_at_once: int | None = None

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    @abstractmethod
    def sample_chunk(self, observation: Mapping[str, np.ndarray], noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return chunks in the environment's units.

        Args:
            observation: key → [b n_obs ...].
            noise: one stream per row; further draws are `Keyed(noise.keys, counter)` with counters from 1.
        """

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes: forget histories and queues.

        Args:
            rows: rows of the vector environment; None forgets all of them.
            seeds: one per row (or, without `rows`, of rows 0, 1, …), naming the streams of noise; None: the row number.
        """
        if rows is None:
            self._rows.clear()
            rows = range(len(seeds)) if seeds is not None else ()
        for index, row in enumerate(rows):
            self._rows[int(row)] = _Row(int(seeds[index]) if seeds is not None else int(row))

    def select_action(self, observation: Observation, rows: Sequence[int] | None = None) -> np.ndarray:
        """Return the next action of each row, float32 [b A]; [A] for one observation without the row axis.

        Args:
            observation: key → [b ...] or one observation; further keys are ignored.
            rows: the rows that these observations belong to (default 0 … b − 1).

        Raises:
            UsageError: a key is missing, has another shape or a value that is not finite; the message names it.
        """
        batch, single = self._batch(observation)
        count, n_obs = len(next(iter(batch.values()))), self.spec.n_obs
        numbers = list(range(count)) if rows is None else [int(row) for row in rows]
        if len(numbers) != count:
            raise UsageError(f"{count} observations for {len(numbers)} rows; give one each.")
        states = [self._rows.setdefault(number, _Row(number)) for number in numbers]
        for index, state in enumerate(states):
            seen = {key: value[index] for key, value in batch.items()}
            # an episode's history begins as its first observation repeated, as in Diffusion Policy
            state.history = [*(state.history or [seen] * (n_obs - 1)), seen][-n_obs:]
        asking = [state for state in states if not state.queue]
        size = self.rows_at_once or len(asking)
        for begin in range(0, len(asking), size or 1):
            group = asking[begin : begin + size]
            full = [*group, *[group[-1]] * (size - len(group))]  # the batch has exactly this size: see the class
            history = {key: np.stack([np.stack([step[key] for step in row.history]) for row in full]) for key in batch}
            seeds = torch.tensor([row.seed for row in full], dtype=torch.int64)
            noise = Keyed(row_keys(0, "policy", seeds, torch.tensor([row.decisions for row in full])))
            with torch.inference_mode():
                chunks = self.sample_chunk(history, noise)[: len(group)].float().cpu().numpy()
            for row, chunk in zip(group, chunks, strict=True):
                row.queue.extend(chunk[n_obs - 1 : n_obs - 1 + self.spec.n_action])
                row.decisions += 1
        actions = np.stack([state.queue.popleft() for state in states])
        return actions[0] if single else actions

    def _batch(self, observation: Observation) -> tuple[dict[str, np.ndarray], bool]:
        """Return the declared keys as arrays with the row axis, and whether it was added."""
        found, single = {}, False
        for key, shape in self.spec.observations.items():
            if key not in observation:
                raise UsageError(
                    f"the observation has no '{key}'; this policy reads {', '.join(self.spec.observations)}."
                )
            value = np.asarray(observation[key])
            if value.shape == tuple(shape):
                value, single = value[None], True
            elif value.shape[1:] != tuple(shape):
                raise UsageError(f"observation '{key}' has shape {value.shape}; this policy reads {tuple(shape)}.")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UsageError(
                    f"observation '{key}' has a value that is not finite; a sensor or the simulator failed."
                )
            found[key] = value
        return found, single
