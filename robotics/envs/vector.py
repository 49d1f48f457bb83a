"""A vector layer over environments of robots; single ones are made by `make_env`.

The layer never resets by itself (Gymnasium's autoreset mode DISABLED): a row that has ended waits until `reset` names
it, so an episode never depends on when another one ended.  A row that crashes, hangs or returns a wrong shape is a
fault of its own episode; its environment is made anew and the other rows go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.envs.make import env_name, importable
from gencontrol.robotics.envs.rows import InlineRow, ProcessRow
from gencontrol.robotics.envs.types import Array, EnvSource, EnvSpec, Timeouts, Transition

Isolation = Literal["process", "inline"]


@dataclass(frozen=True)
class Batch:
    """What some rows returned, in the order of `rows`; a row in `faults` holds zeros.

    Args:
        observation: key → [k ...] float32 or uint8.
        reward: float64 [k].
        terminated, truncated: bool [k]; a row with either, or with a fault, has ended.
        success: bool [k], False where not reported.
        reported: bool [k], whether the environment said anything about success.
        faults: row number → reason.
    """

    rows: tuple[int, ...]
    observation: dict[str, Array]
    reward: Array
    terminated: Array
    truncated: Array
    success: Array
    reported: Array
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def ended(self) -> Array:
        """Rows that need a reset, bool [k]."""
        return self.terminated | self.truncated | np.array([row in self.faults for row in self.rows], bool)


class Envs:
    """Rows of one environment, each with a reset of its own; use `make_envs`, and close it (or use `with`)."""

    def __init__(self, rows: Sequence[Any], spec: EnvSpec) -> None:
        self.spec = spec
        self._rows = list(rows)
        self._steps: dict[int, int] = {}  # row → steps of its running episode

    @property
    def num_envs(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __enter__(self) -> Envs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Batch:
        """Begin episodes in these rows; the other rows are left as they are."""
        if len(rows) != len(seeds):
            raise UsageError(f"{len(seeds)} seeds for {len(rows)} rows; give one each.")
        for row, seed in zip(rows, seeds):
            self._rows[row].send_reset(int(seed))
            self._steps[row] = 0
        return self._gather(rows)

    def step(self, rows: Sequence[int], actions: Array) -> Batch:
        """Execute one action in each of these rows.

        Args:
            actions: [k A]; must be finite and inside the bounds: whoever clips, counts.

        Raises:
            UsageError: wrong shape, or a row that has ended and was not reset.
        """
        wanted = (len(rows), self.spec.action_dim)
        if np.shape(actions) != wanted:
            raise UsageError(f"actions have shape {np.shape(actions)}; {self.spec.env_id} takes {wanted}.")
        idle = [row for row in rows if row not in self._steps]
        if idle:
            raise UsageError(f"row {idle[0]} has ended or was never begun; reset it first.")
        for row, action in zip(rows, np.asarray(actions, np.float32)):
            self._rows[row].send_step(action)
            self._steps[row] += 1
        return self._gather(rows)

    def render(self, rows: Sequence[int]) -> list[Array | str]:
        """Return a frame of each row, uint8 [h w 3], or the reason why there is none; never ends an episode."""
        for row in rows:
            self._rows[row].send_render()
        return [self._rows[row].receive_frame() for row in rows]

    def close(self) -> None:
        """End all rows."""
        for row in self._rows:
            row.close()

    def _gather(self, rows: Sequence[int]) -> Batch:
        observation = {
            key: np.zeros((len(rows), *shape), np.uint8 if key in self.spec.images else np.float32)
            for key, shape in self.spec.observations.items()
        }
        flags = np.zeros((4, len(rows)), bool)  # terminated, truncated, success, reported
        batch = Batch(tuple(int(row) for row in rows), observation, np.zeros(len(rows)), *flags)
        for index, row in enumerate(rows):
            answer = self._rows[row].receive()
            fault = answer if isinstance(answer, str) else fault_of(answer, self.spec)
            if fault is not None:
                steps = self._steps.pop(row)
                batch.faults[row] = f"{fault} (at {f'step {steps}' if steps else 'the reset'})"
                self._rows[row].restart()
                continue
            for key, value in answer.observation.items():
                if key in batch.observation:
                    batch.observation[key][index] = value
            batch.reward[index] = answer.reward
            batch.terminated[index] = answer.terminated
            late = self._steps[row] >= self.spec.time_limit
            batch.truncated[index] = (answer.truncated or late) and not answer.terminated
            batch.success[index], batch.reported[index] = bool(answer.success), answer.success is not None
            if batch.terminated[index] or batch.truncated[index]:
                del self._steps[row]
        return batch


def fault_of(answer: Transition, spec: EnvSpec) -> str | None:
    """Return what is wrong with a transition, or None."""
    for key, shape in spec.observations.items():
        value = answer.observation.get(key)
        if value is None:
            return f"wrong shape: the observation has no '{key}'"
        if value.shape != tuple(shape):
            return f"wrong shape: observation '{key}' is {value.shape}, it was {tuple(shape)}"
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"not finite: observation '{key}'"
    return None if math.isfinite(answer.reward) else f"not finite: the reward is {answer.reward}"


def make_envs(
    env: EnvSource,
    num_envs: int = 1,
    *,
    kwargs: Mapping[str, Any] | None = None,
    time_limit: int | None = None,
    success: str = "auto",
    isolation: Isolation = "process",
    timeouts: Timeouts | None = None,
    render: bool = False,
) -> Envs:
    """Make rows of one environment.

    Args:
        env: see `make_env`.
        isolation: "process" gives each row a process, so that a crash or a hang costs one episode; "inline" runs all
            rows here: faster to start, catches exceptions only.
        timeouts: of isolated rows.
        kwargs, time_limit, success, render: see `make_env`.

    Raises:
        EnvironmentMissing: its package is not installed; the message has the install line.
        UsageError: no such environment, or it cannot be made; the message says why.
    """
    if num_envs < 1:
        raise UsageError(f"num_envs {num_envs}: give at least 1.")
    if isolation not in ("process", "inline"):
        raise UsageError(f"isolation '{isolation}': give process or inline.")
    if isolation == "process":
        if not importable(env):
            raise UsageError(
                f"environment '{env_name(env)}' cannot be imported by its name, so no other process can make it; "
                "define the function in a module, or pass isolation='inline'."
            )
        env = env_name(env)
    request = {
        "env": env,
        "kwargs": dict(kwargs or {}),
        "time_limit": time_limit,
        "success": success,
        "render": render,
    }
    rows: list[Any] = []
    try:
        for _ in range(num_envs):
            rows.append(InlineRow(request) if isolation == "inline" else ProcessRow(request, timeouts or Timeouts()))
        specs = [row.start() for row in rows]
    except BaseException:
        for row in rows:
            row.close()
        raise
    return Envs(rows, specs[0])
