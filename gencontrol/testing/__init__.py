"""Contracts that an outside author's own classes can run under pytest: subclass one and give `make`."""

import pytest

pytest.register_assert_rewrite("gencontrol.testing.algorithm", "gencontrol.testing.reward")

from gencontrol.testing.algorithm import AlgorithmContract  # noqa: E402  # the rewrite must be registered before
from gencontrol.testing.reward import RewardContract  # noqa: E402  # same

__all__ = ["AlgorithmContract", "RewardContract"]
