"""What the supervised pretrainings share: averaged weights, which are what gets evaluated and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gencontrol.algorithms.base import StepContext
from gencontrol.models.roles import Roles, ema_decay


class AveragedPretraining:
    """Base of the pretrainings: the role "ema" follows the policy, and the number of updates is the only state."""

    def __init__(self, roles: Roles, ema: float) -> None:
        """Start with no update taken.

        Args:
            roles: with "policy" and "ema".
            ema: largest decay of the average, in [0, 1).
        """
        self.roles = roles
        self._ema, self._updates = ema, 0

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the average."""
        self.roles.lerp("ema", ema_decay(self._ema, self._updates))
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Number of updates taken (for the warm-up of the average)."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._updates = int(state["updates"])
