"""GPC's composed loop against its official code: two analytic parents, DDPM, clipped composed prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencontrol.models.denoiser import Denoiser
from gencontrol.process.gaussian import GaussianProcess, GridProcess
from gencontrol.rng import Keyed
from gencontrol.robotics.composition.policy import ComposedPolicy
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import diffusion_grid, squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy
from gencontrol.sampling.steps import Ddim, GaussianStep
from gencontrol.types import Prediction
from tests.helpers.golden import cases, tensors


class Parent(nn.Module):
    """The exact denoiser of data N(mean, std²), in the coordinates that it is asked for."""

    def __init__(self, mean: Tensor, std: float, process: GaussianProcess, epsilon: bool) -> None:
        super().__init__()
        self.mean, self.variance, self.process, self.epsilon = mean, std**2, process, epsilon

    def forward(self, x: Tensor, t: Any, cond: Any) -> Tensor:
        at = self.process.at(t, x)
        x0 = self.mean + at.a * self.variance / (at.a**2 * self.variance + at.s**2) * (x - at.a * self.mean)
        return (x - at.a * x0) / at.s if self.epsilon else x0


@pytest.mark.parametrize("case", cases("gpc_trajectory"))
def test_composed_loop(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-5 in 10 steps and 3e-5 in 100 (float32)."""
    config, data = cases("gpc_trajectory")[case], tensors("gpc_trajectory", case)
    steps, epsilon = config["steps"], config["prediction"] == "epsilon"
    grid = lambda count: diffusion_grid(100, count, trailing=False)  # noqa: E731
    process = GridProcess(squaredcos(100), grid=grid)
    kind = Prediction.EPS if epsilon else Prediction.X0
    sampler = ChunkSampler(steps, Ddim(1.0), clip=1.0)
    spec = PolicySpec({"state": (1,)}, action_dim=2, horizon=4, n_obs=1, n_action=4)
    nets = [Parent(data[f"m_{i}"], std, process, epsilon) for i, std in ((1, 0.3), (2, 0.15))]
    parents = [ForeignPolicy(spec, Denoiser(net, process, kind), sampler=sampler) for net in nets]
    policy = ComposedPolicy(parents, [config["w_1"], config["w_2"]], sampler=sampler)
    noise = iter(data["noise"])
    monkeypatch.setattr(GridProcess, "prior", lambda *arguments, **keywords: data["x_T"])
    monkeypatch.setattr(GaussianStep, "draw", lambda self, x, generator: next(noise))
    keys = Keyed(torch.arange(3))
    found = policy.sample_chunk({"state": torch.zeros(3, 1, 1)}, keys)
    expected = data["trajectory"][-1] if "trajectory" in data else data["final"]
    assert math.isfinite(float(found.sum()))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 if steps == 10 else 3e-5)
