"""What every policy that `gencontrol evaluate` runs must keep: subclass `PolicyContract`; give `make`, `observations`.

from gencontrol.testing import PolicyContract

class TestMine(PolicyContract):
    def make(self):
        return MyPolicy()

    def observations(self):
        return [{"state": np.zeros((3, 4), np.float32)} for _ in range(5)]     # 5 steps of 3 rows
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class PolicyContract(ABC):
    """Base of the tests of a policy: `reset(rows, seeds)` begins episodes, `select_action(observation, rows)` acts."""

    #: largest difference of an action that depends on how many rows ask together; 0 where `rows_at_once` is set
    tolerance: float = 1e-5

    @abstractmethod
    def make(self) -> Any:
        """Return a policy with the same weights at every call."""

    @abstractmethod
    def observations(self) -> Sequence[Mapping[str, np.ndarray]]:
        """Return at least four steps of at least two rows: key → [rows ...]; equal at each call."""

    def act(self, rows: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Return the actions [steps rows A] of new episodes in these rows."""
        policy = self.make()
        policy.reset(rows=list(rows), seeds=list(seeds))
        steps = [{key: value[list(rows)] for key, value in step.items()} for step in self.observations()]
        return np.stack([np.asarray(policy.select_action(step, rows=list(rows))) for step in steps])

    def test_one_finite_action_per_row(self) -> None:
        """Actions are float32 [rows A] and finite, and the global random generator is not used."""
        before = torch.random.get_rng_state()
        actions = self.act((0, 1), (10, 11))
        assert actions.ndim == 3 and actions.shape[1] == 2 and actions.dtype == np.float32
        assert np.isfinite(actions).all()
        assert torch.equal(before, torch.random.get_rng_state())

    def test_a_seed_decides_everything(self) -> None:
        """The same seeds give the same actions, bit by bit."""
        np.testing.assert_array_equal(self.act((0, 1), (10, 11)), self.act((0, 1), (10, 11)))

    def test_rows_do_not_know_each_other(self) -> None:
        """A row acts alone as it does beside another one, so that parallelism changes no result."""
        together, alone = self.act((0, 1), (10, 11)), self.act((1,), (11,))
        np.testing.assert_allclose(together[:, 1], alone[:, 0], rtol=0, atol=self.tolerance)

    def test_reset_forgets(self) -> None:
        """An episode does not depend on the one before it in the same row."""
        policy, steps = self.make(), self.observations()
        found = []
        for _ in range(2):
            policy.reset(rows=[0, 1], seeds=[10, 11])
            rows = [{key: value[[0, 1]] for key, value in step.items()} for step in steps]
            found.append(np.stack([np.asarray(policy.select_action(step, rows=[0, 1])) for step in rows]))
        np.testing.assert_array_equal(found[0], found[1])
