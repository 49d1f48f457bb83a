"""Contracts that an outside author's own classes can run under pytest: subclass one and give `make`."""

import pytest

pytest.register_assert_rewrite(*(f"gencontrol.testing.{name}" for name in ("algorithm", "policy", "reward")))

from gencontrol.testing.algorithm import AlgorithmContract  # noqa: E402  # the rewrite must be registered before
from gencontrol.testing.policy import PolicyContract  # noqa: E402  # same
from gencontrol.testing.reward import RewardContract  # noqa: E402  # same

__all__ = ["AlgorithmContract", "PolicyContract", "RewardContract"]
