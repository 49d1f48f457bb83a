"""Policies that know nothing: the control of an evaluation, and the quickest test of an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.rng import stream_seed
from gencontrol.robotics.envs.types import Array, EnvSpec


class Baseline:
    """Uniform random actions ("random") or zeros ("zero"); action k of an episode depends on (seed, k) alone.

    Raises:
        UsageError: uniform actions need bounds.
    """

    def __init__(self, kind: Literal["random", "zero"], spec: EnvSpec) -> None:
        self._low, self._high = np.array(spec.action_low), np.array(spec.action_high)
        if kind == "random" and not np.isfinite([self._low, self._high]).all():
            raise UsageError(f"actions of {spec.env_id} have no bounds, so none is uniform; use the policy 'zero'.")
        if kind == "zero":
            self._low = self._high = np.clip(np.zeros_like(self._low), self._low, self._high)
        self._random: dict[int, np.random.Generator] = {}

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin episodes; see ChunkedPolicy."""
        rows = range(len(seeds or ())) if rows is None else rows
        for index, row in enumerate(rows):
            seed = seeds[index] if seeds is not None else row
            self._random[row] = np.random.default_rng(stream_seed(int(seed), "random policy"))

    def select_action(self, observation: Mapping[str, Any], rows: Sequence[int] | None = None) -> Array:
        """Return float32 [b A]."""
        rows = range(len(next(iter(observation.values())))) if rows is None else rows
        return np.stack([self._random[row].uniform(self._low, self._high) for row in rows]).astype(np.float32)
