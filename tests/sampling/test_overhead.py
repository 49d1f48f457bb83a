"""The loop beside its network: a lenient bound here, the claim itself is `gencontrol bench overhead`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gencontrol.bench.overhead import ResidualNetwork, overhead, trainer_overhead


def test_the_loop_costs_little() -> None:
    # the claim is 1.05; tests run with shape checking switched on and on shared machines, so the best of three counts
    for _ in range(3):
        result = overhead(ResidualNetwork(64, depth=4), shape=(8, 32, 64), runs=7)
        if result.ratio < 1.5:
            break
    assert result.ratio < 1.5
    assert result.bare_ms > 0.5


def test_the_trainer_costs_little() -> None:
    """The claim is 1.3; machines of continuous integration are noisy, so 1.6 in the best of three counts here."""
    ratios = []
    for _ in range(3):
        ratios.append(trainer_overhead(runs=3).ratio)
        if ratios[-1] <= 1.6:
            break
    assert ratios[-1] <= 1.6, ratios


def test_loops_that_disagree_are_not_compared() -> None:
    class Drifting(nn.Module):
        calls = 0

        def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
            self.calls += 1
            return torch.full_like(xt, float(self.calls))

    with pytest.raises(ValueError, match="disagree"):
        overhead(Drifting(), shape=(1, 2, 2), steps=2, runs=1)
