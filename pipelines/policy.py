"""Robot policies behind one small interface: load by name, reset, select actions.

`PolicyPipeline` is one policy, `ComposedPolicyPipeline` several that sample one chunk together (GPC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from gencontrol.errors import UsageError
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.chunked import ChunkedPolicy, Observation, PolicySpec
from gencontrol.robotics.policies.diffusion import GenerativePolicy
from gencontrol.robotics.policies.loading import load_policy


class PolicyPipeline:
    """One policy with its histories and action queues."""

    def __init__(self, policy: Any) -> None:
        """Take a policy: anything with reset(rows, seeds) and select_action(observation, rows).

        Raises:
            UsageError: it has not both.
        """
        for method in ("reset", "select_action"):
            if not callable(getattr(policy, method, None)):
                raise UsageError(
                    f"a {type(policy).__name__} has no {method}(); a policy needs reset and select_action."
                )
        self.policy = policy

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Load what `robotics.policies.load_policy` loads: folders, checkpoints, package.module:make_policy.

        Raises:
            UsageError: there is no policy.
        """
        return cls(load_policy(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads.

        Raises:
            UsageError: the policy is not one of ours.
        """
        if not isinstance(self.policy, GenerativePolicy):
            raise UsageError(f"a {type(self.policy).__name__} has no folder format here; keep what it was loaded from.")
        self.policy.save_pretrained(folder)

    @property
    def spec(self) -> PolicySpec:
        """What the policy reads and writes.

        Raises:
            UsageError: user code that does not say.
        """
        if not isinstance(self.policy, ChunkedPolicy):
            raise UsageError(
                f"a {type(self.policy).__name__} does not say what it reads; look at its own documentation."
            )
        return self.policy.spec

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns the pipeline.

        Raises:
            UsageError: the policy is not one of ours.
        """
        if not isinstance(self.policy, GenerativePolicy):
            raise UsageError(f"a {type(self.policy).__name__} cannot be moved here; load it on its device.")
        self.policy.to(device)
        return self

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes, all or those of some rows of a vector environment; see `ChunkedPolicy.reset`."""
        self.policy.reset(rows, seeds)

    def select_action(self, observation: Observation, rows: Sequence[int] | None = None) -> np.ndarray:
        """Return the next action of each row, [b A], or [A] for one observation without the row axis."""
        action: np.ndarray = self.policy.select_action(observation, rows)
        return action

    __call__ = select_action


class ComposedPolicyPipeline(PolicyPipeline):
    """Several policies that sample one chunk together; see `gencontrol.robotics.compose.ComposedPolicy`."""

    policy: ComposedPolicy

    def __init__(
        self,
        policies: Mapping[str, Any] | Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        operator: str = "convex",
    ) -> None:
        """Compose policies.

        Args:
            policies: loaded ones, or what `load_policy` loads; a mapping names them.
            weights: one each, ≥ 0 with sum 1; None takes equal ones.
            operator: "convex", "and" or "or" (the last two are experimental).

        Raises:
            UsageError: they cannot be composed; the message says what differs.
        """
        named = isinstance(policies, Mapping)
        values = [_loaded(policy) for policy in (policies.values() if isinstance(policies, Mapping) else policies)]
        parents: Any = dict(zip(policies, values, strict=True)) if named else values
        shares = [1.0 / len(values)] * len(values) if weights is None and values else weights
        super().__init__(ComposedPolicy(parents, shares, operator=operator))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Refuse: a composition is made of several policies."""
        raise UsageError(f"a composition is made of several policies: ComposedPolicyPipeline(['{path}', …], weights).")


def _loaded(policy: Any) -> Any:
    return load_policy(policy) if isinstance(policy, (str, Path)) else policy
